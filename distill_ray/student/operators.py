"""DeepSpeed's operator for CPUs, which is compiled at first use, loaded so that no killed process blocks the next."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from distill_ray.storage import user_cache
from distill_ray.storage.atomic import locked

_BUILD_S = 1800.0


def load_cpu_operators() -> None:
    """Build, once for each machine and environment, and load the shared-memory operator of DeepSpeed's communication.

    Torch guards a build, and each look whether one is needed, by a file that a killed process leaves behind; whoever
    meets it then waits for ever. Here a process first takes a lock that the kernel drops with its holder, in a folder
    that nothing else builds in: a guard met under it is a dead process's.

    Raises:
        StorageError: another process has been building for half an hour.
    """
    import deepspeed
    import torch
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    # Environments must not share a build: with other include paths, torch would compile it anew at each change.
    versions = f"{sys.prefix} {torch.__version__} {deepspeed.__version__}"
    folder = user_cache("operators") / hashlib.sha256(versions.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", _BUILD_S):
        for guard in folder.glob("*/lock"):
            guard.unlink()
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        # Torch calls the first ninja on the PATH, and one of another version compiles anew what the last one built:
        # some commands are given with the environment activated, others without.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        # Kept by DeepSpeed's builder: what asks for the operator later in this process does not look at the folder.
        ShareMemCommBuilder().load(verbose=False)
