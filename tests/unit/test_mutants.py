"""Plants every trap in a copy of the repository and asserts that its test sees it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, Mutant

REPO = Path(__file__).parents[2]
TESTS_FAILED = 1
"""Pytest's exit code for "tests ran and some failed"; a plant that breaks an import gives another one."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutants") / "repo"
    folder.mkdir()
    for name in ("distill_ray", "tests", "jobs", "pyproject.toml"):
        source = REPO / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    (folder / ".test-assets").symlink_to(REPO / ".test-assets")
    return folder


def pytest_in(folder: Path, node: str) -> subprocess.CompletedProcess[str]:
    # PYTHONPATH, so that worker processes import the copy and not the installed package.
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", node]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def passes_unplanted(copy: Path) -> Callable[[str], None]:
    """Asserts, once a node, that it passes in the copy as it is: a plant that a broken test sees proves nothing."""

    @cache
    def run(node: str) -> None:
        done = pytest_in(copy, node)
        assert done.returncode == 0, f"{node} does not pass without a plant\n{done.stdout[-3000:]}{done.stderr}"

    return run


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_plant_has_its_place(mutant: Mutant):
    assert Path(REPO, mutant.file).read_text("utf-8").count(mutant.old) == 1, f"of {mutant.file}"


# A node's plants go to one process, which runs the node unplanted once.
@pytest.mark.mutants
@pytest.mark.parametrize("mutant", [pytest.param(m, id=m.name, marks=pytest.mark.xdist_group(m.test)) for m in MUTANTS])
def test_the_planted_trap_is_seen(mutant: Mutant, copy: Path, passes_unplanted: Callable[[str], None]):
    passes_unplanted(mutant.test)
    path = copy / mutant.file
    original = path.read_text()
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        done = pytest_in(copy, mutant.test)
    finally:
        path.write_text(original)
    assert done.returncode == TESTS_FAILED, (
        f"{mutant.trap}: not seen by {mutant.test}\n{done.stdout[-3000:]}{done.stderr}"
    )


@pytest.mark.mutants
def test_the_copy_is_what_the_plants_are_tested_on(copy: Path):
    probe = "import distill_ray, sys; print(distill_ray.__file__)"
    env = {**os.environ, "PYTHONPATH": str(copy)}
    out = subprocess.run([sys.executable, "-c", probe], cwd=copy, env=env, capture_output=True, text=True, check=True)
    assert out.stdout.startswith(str(copy))
