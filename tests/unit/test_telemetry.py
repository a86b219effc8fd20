"""Progress: JSON lines off a terminal."""

from __future__ import annotations

import io
import json
import re

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


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(clock: Clock, total: int | None = 10) -> tuple[Progress, io.StringIO]:
    stream = io.StringIO()
    return Progress("capture", total, "units", interval_s=0, stream=stream, clock=clock), stream


def test_time_left_follows_from_weights_where_they_are_given():
    clock = Clock()
    bar, stream = shown(clock)
    bar.skip(7, reused=7)
    bar.weigh(1000)
    clock.now = 100.0  # start
    bar.advance(1, weight=100)
    clock.now = 110.0
    bar.advance(1, weight=100, rows_per_s=5.0)
    events = lines(stream)
    assert [e["done"] for e in events] == [7, 8, 9]
    # Before a second piece there is the start alone to go by; then 100 bytes take 10 s, whatever the start took.
    assert [e["eta_s"] for e in events] == [None, 900.0, 80.0]
    assert events[-1]["rows_per_s"] == 5.0
    clock.now = 130.0
    bar.note("later")
    assert lines(stream)[-1]["eta_s"] == 60.0
    clock.now = 500.0
    bar.note("far too late")
    assert lines(stream)[-1]["eta_s"] == 0.0


def test_what_was_done_before_says_nothing_of_speed():
    clock = Clock()
    bar, stream = shown(clock, 100)
    bar.skip(90)
    for clock.now in (30.0, 32.0, 34.0):
        bar.advance()
    assert lines(stream)[-1]["eta_s"] == 14.0  # 7 left, 2 s each
    bar.skip(-2)  # a restarted group goes back
    assert (lines(stream)[-1]["done"], lines(stream)[-1]["eta_s"]) == (91, 18.0)


def test_no_total_means_no_time_left():
    clock = Clock()
    bar, stream = shown(clock, None)
    for clock.now in (1.0, 2.0):
        bar.advance()
    assert lines(stream)[-1]["eta_s"] is None


def test_a_terminal_shows_the_same_time_left():
    clock = Clock()
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    with Progress("capture", 4, "units", stream=stream, clock=clock) as bar:
        bar.weigh(8000.0)
        for clock.now in (10.0, 20.0):
            bar.advance(1, weight=10.0, rows_left=77)
    text = stream.getvalue()
    assert "2/4" in text
    assert "2:13:00" in text  # 7,980 bytes at one a second
    assert "rows_left 77" in text


def test_a_narrow_terminal_still_shows_all_figures_and_the_time_left():
    clock = Clock()
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    with Progress("train", 20_000, "steps", stream=stream, clock=clock) as bar:
        bar.skip(12_340)
        for clock.now in (10.0, 20.0):
            bar.advance(1, loss=1.23456, kl_t1=0.98765, lr=2e-5, tokens_per_s=123456.7, mfu=0.41)
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", stream.getvalue()).rpartition("train ")[2]
    for shown in ("12342/20000", "21:16:20", "loss 1.235", "tokens_per_s", "123,457", "mfu", "0.41"):
        assert shown in last, last
