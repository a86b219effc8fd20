"""What the progress of a capture shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from distill_ray.capture.figures import Figures
from distill_ray.config import parse_recipe
from distill_ray.cost import ActorTime
from distill_ray.schema import UnitSummary
from distill_ray.units import Units
from tests.unit.targets_fakes import unit
from tests.unit.test_cost_spent import Clock

UNITS = [replace(unit(name), bytes=size) for name, size in (("a", 1000), ("b", 3000), ("c", 6000))]


def _recipe(teacher: dict[str, Any], cost: dict[str, Any]) -> Any:
    return parse_recipe(
        {
            "name": "tiny",
            "storage": {"root": "/root"},
            "corpus": {"sources": ["a.jsonl"]},
            "teacher": {"model": "/teacher"} | teacher,
            "student": {"teacher_layers": [0]},
            "cost": cost,
        }
    )


def _summary(of: int, tokens: int) -> UnitSummary:
    lengths = np.array([tokens + 1], np.int32)
    return UnitSummary(UNITS[of].hash, lengths, lengths, np.zeros(1, np.uint64), 1, "sha", 1.0, 0, 1.0)


def test_rows_left_follow_from_the_bytes_that_are_left():
    clock = Clock()
    figures = Figures(_recipe({}, {}), Units.of(UNITS), clock)
    assert figures.bytes_left == 10_000
    assert figures.shown() == {"teacher_hours": 0.0, "teacher_start_s": 0}
    clock.now += 60  # the engine starts
    assert figures.add(_summary(0, 300)) == 1000
    assert figures.shown()["rows_left"] == 2700
    clock.now += 10
    figures.spent.add(ActorTime("a", 10.0, 26.0, 30.0, 6.0))
    assert figures.add(_summary(1, 700)) == 3000
    assert (figures.bytes_left, figures.tokens) == (6000, 1002)
    assert figures.shown() == {
        "rows_per_s": 70.0,  # the wait for the first unit is no part of it
        "rows_left": 1500,
        "teacher_hours": 0.02,
        "teacher_start_s": 36.0,
        "teacher_idle_share": pytest.approx(1 / 6, abs=1e-4),
    }


@pytest.mark.parametrize(
    ("teacher", "cost", "dollars"),
    [
        ({"tensor_parallel": 2, "pipeline_parallel": 2}, {"teacher_gpu_hour": 2.5}, 10.0),
        ({"tensor_parallel": 2, "use_gpu": False}, {"teacher_gpu_hour": 2.5}, 0.0),
        ({"tensor_parallel": 2}, {"student_gpu_hour": 2.5}, None),
    ],
)
def test_dollars_are_those_of_all_gpus_of_all_teachers(teacher: dict, cost: dict, dollars: float | None):
    figures = Figures(_recipe(teacher, cost), Units.of(UNITS), Clock())
    figures.spent.add(ActorTime("a", 600.0, 600.0, 500.0, 100.0))
    figures.spent.add(ActorTime("b", 300.0, 900.0, 300.0, 300.0))
    assert figures.shown().get("teacher_dollars") == dollars
