"""The GPU kernel in triton's interpreter, on a CPU: against the same reduction by torch."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("values", "ids", "greater", "rest_max", "rest_sum", "rest_entropy")


def compare() -> None:
    """In a process of its own, where triton was told to interpret before it was imported."""
    from distill_ray.teacher import kernel_triton
    from distill_ray.teacher.reduction import reduce_by_torch

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(7, 1300, generator=generator) * 4
    z[1] = z[1].round()  # ties
    z[2, 7] += 60  # the kept mass rounds to 1
    z[3, 100:1250] = -torch.inf
    z[4] = 1.0  # more equal logits than there is room for
    z[5, 500] = torch.nan
    for dtype, top_k, temperatures in ((torch.float32, 8, (0.5, 2.0)), (torch.bfloat16, 20, ())):
        tile = z.to(dtype)[:, :1299]  # rows are not adjacent
        actual = tile[:, 5].float()
        got = kernel_triton.reduce_rows(tile.clone(), actual, top_k, temperatures, room=128)
        exact = reduce_by_torch(tile.clone(), 0, actual, top_k, temperatures)
        want = (exact.values_RK, exact.ids_RK, exact.greater_R, exact.rest_max_R, exact.rest_sum_RS)
        good = torch.arange(7) != 5
        for name, mine, theirs in zip(NAMES, got, (*want, exact.rest_entropy_R), strict=True):
            torch.testing.assert_close(mine[good], theirs[good], rtol=1e-5, atol=1e-5, msg=f"{dtype} {name}")
        assert got[4][5].isnan().all()


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernel_is_the_reduction_by_torch() -> None:
    code = "from tests.unit.test_kernel_triton import compare; compare()"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_module_loads_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; from distill_ray.teacher import kernel_triton as k; print(k.tl)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "None"
