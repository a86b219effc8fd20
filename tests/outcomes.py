"""Pytest plugin for `tests.suites`: a JSON line for each test collected and each of its phases ended.

A process that dies leaves the lines it has written, so that no test it never reached is taken for passed.
"""

from __future__ import annotations

import json
import os
from typing import Any, TextIO

import pytest

OUTCOMES = "DISTILL_RAY_TEST_OUTCOMES"
"""Environment variable with the file's path."""


class Outcomes:
    """Hooks of the process that knows every outcome: the only one, or the controller of pytest-xdist's workers."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def _write(self, node: str, **line: Any) -> None:
        print(json.dumps({"node": node, **line}), file=self._file, flush=True)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:  # none in a controller
            self._write(item.nodeid, phase="collected")

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        for each in ids:  # every worker collects all
            self._write(each, phase="collected")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._write(report.nodeid, phase=report.when, outcome=report.outcome)


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get(OUTCOMES)
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(open(path, "w", encoding="utf-8")))  # noqa: SIM115 - ends with pytest
