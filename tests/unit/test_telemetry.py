"""Progress: JSON lines off a terminal."""

from __future__ import annotations

import io
import json

import pytest

from distill_ray.telemetry import Progress


def lines(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_carry_counts_and_fields():
    stream = io.StringIO()
    with Progress("capture", 3, "units", interval_s=0, stream=stream) as progress:
        progress.advance(2, rows=10)
        progress.note("one unit was captured again")
        progress.advance(1, rows=12)
    events = lines(stream)
    assert [e["event"] for e in events] == ["start", "progress", "note", "progress", "end"]
    assert (events[1]["done"], events[1]["total"], events[1]["rows"]) == (2, 3, 10)
    assert events[1]["eta_s"] >= 0
    assert events[2]["note"] == "one unit was captured again"
    assert events[-1]["done"] == 3


def test_an_error_ends_the_stage_as_stopped():
    stream = io.StringIO()
    with pytest.raises(ValueError, match="boom"), Progress("train", None, "steps", stream=stream):
        raise ValueError("boom")
    assert lines(stream)[-1]["event"] == "stopped"


def test_intervals_bound_the_number_of_lines():
    stream = io.StringIO()
    with Progress("train", 1000, "steps", interval_s=60, stream=stream) as progress:
        for _ in range(1000):
            progress.advance()
    assert len(lines(stream)) == 2
