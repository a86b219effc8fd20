"""Part of the installation: builds DeepSpeed's shared-memory operator and the project's own machine code, so that no
first run waits for a compiler, and compiles the bytecode of what the project imports; pip, told not to, compiled none.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

BUILD = "from distill_ray.student.operators import load_cpu_operators; load_cpu_operators()"


def main() -> None:
    """Build what is built at first use; a second call finds it cached."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    started = time.monotonic()
    build = subprocess.Popen([sys.executable, "-c", BUILD])
    import peft
    import ray.data
    import ray.train.torch
    import transformers
    import vllm

    import distill_ray.codec.kernels
    import distill_ray.targets.kernels  # noqa: F401

    if build.wait() != 0:
        raise SystemExit("DeepSpeed's operator for CPUs could not be built; a C++ compiler (g++) is needed")
    names = ", ".join(f"{m.__name__} {m.__version__}" for m in (peft, ray, transformers, vllm))
    print(f"warmed up in {time.monotonic() - started:.0f} s: {names}")


if __name__ == "__main__":
    main()
