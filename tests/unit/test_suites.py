"""The suites' runner: red stays red, unsteady is named, a dead process hides nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import suites
from tests.suites import Run, outcomes, pytest_run, run_again, table

REPO = Path(__file__).parents[2]
STEADY = "def test_steady():\n    pass\n\n"
UNSTEADY = """
import pathlib

def test_unsteady():
    marker = pathlib.Path(__file__).with_suffix(".marker")
    there = marker.exists()
    marker.touch()
    assert there, "fails the first time"

"""
BROKEN = "def test_broken():\n    raise AssertionError\n\n"
SKIPPED = "import pytest\n\ndef test_skipped():\n    pytest.skip('not here')\n\n"
DIES_ONCE = UNSTEADY.replace("unsteady", "dies").replace("assert there", "there or __import__('os').abort()  #")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pytest finds the planted tests, and no other configuration than its own."""
    (tmp_path / "pytest.ini").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    return tmp_path


def _suite(*pieces: str, arguments: tuple[str, ...] = ()) -> tuple[Run, list[str]]:
    Path("test_planted.py").write_text("".join(pieces))
    given = ["-q", *arguments, "test_planted.py"]
    return pytest_run("planted", given), given


def _named(run: Run, outcome: str) -> list[str]:
    return [node.rpartition("::")[2] for node in run.nodes(outcome)]


@pytest.mark.parametrize("arguments", [(), ("--numprocesses", "1")], ids=["one process", "workers"])
def test_a_test_that_passes_by_itself_is_unsteady_and_a_broken_one_stays_red(arguments: tuple[str, ...]) -> None:
    run, given = _suite(STEADY, UNSTEADY, BROKEN, SKIPPED, arguments=arguments)
    assert (_named(run, "failed"), run.code) == (["test_unsteady", "test_broken"], 1)
    run_again(run, given)
    assert [_named(run, o) for o in ("passed", "unsteady", "failed", "skipped")] == [
        ["test_steady"], ["test_unsteady"], ["test_broken"], ["test_skipped"]
    ]  # fmt: skip
    lines = table([run]).splitlines()
    assert lines[1].split()[:4] == ["planted", "2", "1", "1"]
    assert [line.split(":")[0] for line in lines[2:]] == ["red", "unsteady"]
    assert lines[3].endswith("::test_unsteady")


def test_what_a_dead_process_left_is_run_and_the_test_it_died_in_is_named() -> None:
    run, given = _suite(STEADY, DIES_ONCE, SKIPPED, "def test_last():\n    pass\n")
    assert run.code < 0
    assert run.red == run.nodes("unended")
    assert _named(run, "unended") == ["test_dies", "test_skipped", "test_last"]
    run_again(run, given)
    assert run.red == []
    assert [_named(run, o) for o in ("passed", "unsteady", "skipped")] == [
        ["test_steady", "test_last"], ["test_dies"], ["test_skipped"]
    ]  # fmt: skip


def test_many_failures_are_no_unsteadiness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "MOST_SECOND_RUNS", 1)
    run, given = _suite(UNSTEADY, BROKEN)
    run_again(run, given)
    assert _named(run, "failed") == ["test_unsteady", "test_broken"]


def test_a_failed_fixture_is_a_failed_test() -> None:
    ends = [("setup", "passed"), ("call", "passed"), ("teardown", "failed")]
    lines = ['{"node": "a", "phase": "collected"}', '{"node": "b", "phase": "collected"}']
    lines += [f'{{"node": "a", "phase": "{phase}", "outcome": "{outcome}"}}' for phase, outcome in ends]
    assert outcomes(lines) == {"a": "failed", "b": "unended"}


@pytest.mark.parametrize(("piece", "code"), [(UNSTEADY, 0), (BROKEN, 1), ("raise RuntimeError\n", 1)])
def test_the_command_ends_with_what_was_found(folder: Path, piece: str, code: int) -> None:
    (folder / "test_planted.py").write_text(piece)
    script = (
        "import sys\nfrom tests import suites\nsuites.SUITES['core'] = {'planted': ['test_planted.py']}\n"
        "sys.exit(suites.main(['core', '--second-run']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("\nunsteady: test_planted.py::test_unsteady" in done.stdout) == (piece == UNSTEADY)
