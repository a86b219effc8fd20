"""The learning rate: a function of the step alone, so a resume goes on with the very next rate."""

import itertools
import math

import pytest

from distill_ray.config.student import TrainSection
from distill_ray.student.schedule import learning_rate


def test_learning_rate_rises_then_falls_to_its_last_share():
    section = TrainSection(learning_rate=1.0, warmup_fraction=0.1, final_lr_fraction=0.1)
    rates = [learning_rate(s, 100, section) for s in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert learning_rate(0, 1, section.model_copy(update={"warmup_fraction": 0.0})) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("cosine", {10: 1.0, 32: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 22 / 89)), 99: 0.1}),
        ("linear", {10: 1.0, 32: 0.1 + 0.9 * 67 / 89, 99: 0.1}),
        ("constant", {10: 1.0, 32: 1.0, 99: 1.0}),
        ("wsd", {10: 1.0, 69: 1.0, 70: 0.1 + 0.9 * 29 / 30, 84: 0.1 + 0.9 * 15 / 30, 99: 0.1}),
    ],
)
def test_every_schedule_rises_to_the_peak_and_ends_where_it_is_stated(schedule, at):
    falls = {"decay_fraction": 0.3} if schedule == "wsd" else {}
    section = TrainSection(learning_rate=2.0, warmup_fraction=0.1, final_lr_fraction=0.1, schedule=schedule, **falls)
    assert [learning_rate(s, 100, section) for s in (0, 4)] == pytest.approx([0.2, 1.0])
    assert {s: learning_rate(s, 100, section) / 2 for s in at} == pytest.approx(at)
    assert learning_rate(0, 1, section) == pytest.approx(2.0)


def test_a_decay_of_no_steps_leaves_the_rate_at_its_peak():
    section = TrainSection(learning_rate=2.0, warmup_fraction=0.1, schedule="wsd", decay_fraction=0.0)
    assert learning_rate(99, 100, section) == 2.0
