"""Suites of tests, each in processes of its own, going on after a red one: `python -m tests.suites core kill …`.

`core` is `make test`; `make test-all` runs every suite and ends with a table. With `--second-run` a failed test runs
once more in a process of its own: one that passes then is named as unsteady, one that fails again is red.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.outcomes import OUTCOMES

TWO = ["--numprocesses", "2"]
BY_FILE = [*TWO, "--dist", "loadfile", "--no-loadscope-reorder"]
"""Tests of one file share what they start; `tests/stages/conftest.py` begins with the dearest."""
SUITES: dict[str, dict[str, list[str]]] = {
    # What Ray leaves in processes that connected to clusters cannot reach the others' tests.
    "core": {"unit": [*TWO, "tests/unit", "tests/gpu", "tests/cluster"], "stages": [*BY_FILE, "tests/stages"]},
    "random": {"random": [*TWO, "--hypothesis-profile=random", "-m", "hypothesis", "tests/unit"]},
    "long": {"long": ["-m", "long"]},
    "kill": {"kill": ["-m", "kill and not slow"]},
    "mutants": {"mutants": [*TWO, "--dist", "loadgroup", "-m", "mutants"]},
    "quickstart": {"quickstart": ["-m", "quickstart"]},
    "slow": {"slow": ["-m", "slow"]},
    "cluster": {"cluster": ["-m", "cluster"]},
    "chaos": {"chaos": ["-m", "chaos and not soak", "tests/cluster/chaos"]},
    "soak": {"soak": ["-s", "-m", "soak", "tests/cluster/chaos"]},
}
"""Name → its processes: name → arguments of pytest."""
ALL = ("core", "random", "long", "kill", "mutants", "quickstart", "slow")
MOST_SECOND_RUNS = 10
"""More failures than this are no unsteadiness: the run is red at once."""


@dataclass
class Run:
    """One process of pytest and what came of its tests."""

    name: str
    code: int
    """How the process ended: above 1 the run itself went wrong, below 0 a signal ended it."""
    seconds: float
    tests: dict[str, str]
    """Test → passed, skipped, failed, unsteady; "unended" where the process died in or before it."""

    def nodes(self, outcome: str) -> list[str]:
        return [node for node, found in self.tests.items() if found == outcome]

    @property
    def red(self) -> list[str]:
        """Tests that failed; the run's own mistake is in `code`."""
        return self.nodes("failed") + self.nodes("unended")


def outcomes(lines: Iterable[str]) -> dict[str, str]:
    """Test → passed, failed, skipped or unended, from the lines that `tests.outcomes` writes."""
    found: dict[str, str] = {}
    for line in map(json.loads, lines):
        node, outcome = line["node"], line.get("outcome")
        if line["phase"] == "collected":
            found.setdefault(node, "unended")
        elif found.get(node) == "failed":
            continue
        elif outcome != "passed":
            found[node] = outcome
        elif line["phase"] == "teardown" and found.get(node) != "skipped":
            found[node] = "passed"
    return found


def pytest_run(name: str, arguments: list[str]) -> Run:
    """One process of pytest, its output passed on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "outcomes.jsonl")
        command = [sys.executable, "-m", "pytest", "-p", "tests.outcomes", *arguments]
        began = time.monotonic()
        code = subprocess.run(command, env={**os.environ, OUTCOMES: str(path)}, check=False).returncode
        found = outcomes(path.read_text("utf-8").splitlines()) if path.exists() else {}
        return Run(name, code, time.monotonic() - began, found)


def run_again(run: Run, arguments: list[str]) -> None:
    """Each failed test of a run once more, by itself; those that a dead process left behind, together."""
    failed, unended = run.nodes("failed"), run.nodes("unended")
    if len(failed) > MOST_SECOND_RUNS:
        return
    marks = arguments[arguments.index("-m") :][:2] if "-m" in arguments else []
    for nodes in filter(None, [*([node] for node in failed), unended]):
        print(f"\nsecond run, in a process of its own: {', '.join(nodes)}", flush=True)
        again = pytest_run(run.name, [*marks, *nodes])
        run.seconds += again.seconds
        run.tests |= again.tests
        if again.tests.get(nodes[0]) == "passed":  # of those left behind the first is the one in which it died
            run.tests[nodes[0]] = "unsteady"


def commit() -> str:
    """The commit that is tested; `+` where the tree has other changes."""
    git = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "no commit"


def table(runs: list[Run]) -> str:
    """A line a run, then each test that is red or unsteady."""
    at = commit()
    lines = [f"{'suite':<12}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}  commit"]
    for run in runs:
        passed = len(run.nodes("passed") + run.nodes("unsteady"))
        lines.append(
            f"{run.name:<12}{passed:>8}{len(run.red):>8}{len(run.nodes('skipped')):>9}{run.seconds:>9.0f}  {at}"
            + (f"  pytest ended with {run.code}" if run.code not in (0, 1) else "")
        )
    lines += [f"red: {node}" for run in runs for node in run.red]
    lines += [f"unsteady: {node}" for run in runs for node in run.nodes("unsteady")]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the suites named, print the table, and return 1 if any is red."""
    parser = argparse.ArgumentParser(prog="python -m tests.suites", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: {' '.join(ALL)}")
    parser.add_argument("--second-run", action="store_true", help="run a failed test once more, by itself")
    given = parser.parse_args(argv)
    if unknown := set(given.suites) - set(SUITES):
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    runs = []
    for suite in given.suites or ALL:
        for name, arguments in SUITES[suite].items():
            runs.append(pytest_run(name, arguments))
            if given.second_run:
                run_again(runs[-1], arguments)
    print("\n" + table(runs), flush=True)
    return int(any(run.red or run.code > 1 for run in runs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
