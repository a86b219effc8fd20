"""Part of the installation: builds DeepSpeed's shared-memory operator and the project's own machine code, so that no
first run waits for a compiler, and compiles the packages' bytecode that first imports would."""

from __future__ import annotations

import os
import time


def main() -> None:
    """Build what is built at first use; a second call finds it cached."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    started = time.monotonic()
    from distill_ray.student.operators import load_cpu_operators

    load_cpu_operators()
    import peft
    import transformers
    import vllm

    import distill_ray.codec.kernels
    import distill_ray.targets.kernels  # noqa: F401

    names = ", ".join(f"{m.__name__} {m.__version__}" for m in (peft, transformers, vllm))
    print(f"warmed up in {time.monotonic() - started:.0f} s: {names}")


if __name__ == "__main__":
    main()
