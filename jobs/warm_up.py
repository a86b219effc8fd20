"""Part of the installation: builds the project's own machine code, so that no first run waits for it, and compiles the
bytecode of what the project imports; pip, told not to, compiled none.
"""

from __future__ import annotations

import os
import time


def main() -> None:
    """Build what is built at first use; a second call finds it cached."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    started = time.monotonic()
    import deepspeed
    import peft
    import ray.data
    import ray.train.torch
    import transformers
    import vllm

    import distill_ray.codec.kernels
    import distill_ray.targets.kernels  # noqa: F401

    names = ", ".join(f"{m.__name__} {m.__version__}" for m in (deepspeed, peft, ray, transformers, vllm))
    print(f"warmed up in {time.monotonic() - started:.0f} s: {names}")


if __name__ == "__main__":
    main()
