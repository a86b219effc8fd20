"""Compilation survives a cache that cannot be used, and workers that start at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.assets import REPO

MODULE = """
from numba import types
from distill_ray.jit import compiled

@compiled((types.int64,))
def twice(x):
    return 2 * x

print(twice(21), twice.stats.cache_hits[twice.signatures[0]] if twice.stats.cache_hits else 0)
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "doubling.py"
    path.write_text(MODULE)
    return path


def start(*command: str, cache: Path) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(REPO), "NUMBA_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.strip(), err


def test_the_second_process_loads_what_the_first_compiled(module: Path, tmp_path: Path):
    assert finish(start(str(module), cache=tmp_path / "cache")) == ("42 0", "")
    assert finish(start(str(module), cache=tmp_path / "cache")) == ("42 1", "")


def test_of_processes_started_at_once_one_compiles(module: Path, tmp_path: Path):
    said = [finish(p) for p in [start(str(module), cache=tmp_path / "cache") for _ in range(4)]]
    assert sorted(said) == [("42 0", ""), *[("42 1", "")] * 3]


def test_a_damaged_cache_costs_time_only(module: Path, tmp_path: Path):
    finish(start(str(module), cache=tmp_path / "cache"))
    [index] = (tmp_path / "cache").rglob("*.nbi")
    index.write_bytes(b"")
    out, err = finish(start(str(module), cache=tmp_path / "cache"))
    assert out == "42 0"
    assert "no compiler cache for twice" in err


def test_without_any_place_for_a_cache_it_compiles_in_memory(tmp_path: Path):
    out, err = finish(start("-c", MODULE, cache=tmp_path / "cache"))
    assert out == "42 0"
    assert "set NUMBA_CACHE_DIR" in err
