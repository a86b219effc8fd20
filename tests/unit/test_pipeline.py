"""What makes two recipes the same run, and what a driver loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from distill_ray.config import load_recipe
from distill_ray.pipeline import run_identity
from tests.assets import tiny_teacher_folder
from tests.stages.jobs import Job


def test_auto_and_the_dtype_it_means_are_one_run_and_another_dtype_is_not(tmp_path: Path):
    meant = json.loads((tiny_teacher_folder() / "config.json").read_text())["dtype"]
    other = "float32" if meant != "float32" else "bfloat16"
    auto, same, differs = (
        run_identity(load_recipe(Job(tmp_path, str(tmp_path / "root"), dtype=dtype).recipe))
        for dtype in ("auto", meant, other)
    )
    assert auto == same
    assert auto != differs


def test_the_driver_loads_no_framework_before_it_needs_one():
    heavy = ("torch", "transformers", "ray", "vllm", "deepspeed", "boto3", "pandas", "numba")
    code = f"import sys, distill_ray.pipeline; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout == "[]\n"


def test_how_much_is_audited_is_no_part_of_a_run(tmp_path: Path):
    few = Job(tmp_path, str(tmp_path / "root"))
    plain = run_identity(load_recipe(few.recipe))
    many = Job(tmp_path, str(tmp_path / "root"), audit=1000)
    assert run_identity(load_recipe(many.recipe)) == plain
    assert "audit" not in plain
