"""A process killed while it builds DeepSpeed's operator must not block the next one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LOAD = "from distill_ray.student.operators import load_cpu_operators; load_cpu_operators(); print('loaded')"


def test_a_guard_left_by_a_killed_build_blocks_nobody():
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    run = [sys.executable, "-c", LOAD + "; import os; print(os.environ['TORCH_EXTENSIONS_DIR'])"]
    first = subprocess.run(run, env=env, capture_output=True, text=True, check=True, timeout=300)
    folder = Path(first.stdout.split()[-1])
    guard = folder / "deepspeed_shm_comm" / "lock"
    guard.touch()
    again = subprocess.run(run, env=env, capture_output=True, text=True, check=True, timeout=300)
    assert "loaded" in again.stdout
    assert not guard.exists()
