"""The Triton kernels under triton's own interpreter: their arithmetic, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill_ray.losses import triton_pass

REPO = Path(__file__).parents[2]


@pytest.mark.skipif(not triton_pass.AVAILABLE, reason="triton is not installed")
def test_kernels_equal_the_dense_formula_under_the_interpreter():
    # A process of its own: the interpreter is chosen when triton is imported, and other tests may have done so.
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.triton_check"], cwd=REPO, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 18
    for case, off in found.items():
        assert off <= (1e-5 if case.startswith("float32") else 1e-2), case


def test_importing_the_losses_imports_no_triton():
    code = "import sys, distill_ray.losses.triton_pass; print([m for m in sys.modules if m.split('.')[0] == 'triton'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "[]"
