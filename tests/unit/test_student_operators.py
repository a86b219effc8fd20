"""DeepSpeed's operator is built once, whoever was killed at it before and whatever else lies on the PATH."""

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


def test_the_environments_own_ninja_builds_whatever_the_path_says(tmp_path: Path):
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", LOAD], env=env, capture_output=True, text=True, timeout=300)
    assert "loaded" in done.stdout, done.stderr
