"""Metrics: what is declared is what capture and training emit, and nothing else can be."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from distill_ray.capture.emitting import CaptureMeters
from distill_ray.capture.figures import Figures
from distill_ray.config import parse_recipe
from distill_ray.cost import ActorTime
from distill_ray.metrics import LABELS, METRICS, Meters, Metric, Record
from distill_ray.schema import UnitSummary
from distill_ray.train.board import News
from distill_ray.train.driver import _Relay
from distill_ray.train.emitting import TrainMeters
from distill_ray.units import Units
from tests.unit.targets_fakes import unit
from tests.unit.test_cost_spent import Clock
from tests.unit.test_telemetry import shown

LINE = {
    "step": 0,
    "time": 1.8e9,
    "loss": 2.0,
    "kl_t": 1.5,
    "kl_t1": 1.25,
    "ce": 3.0,
    "kept_mass": 0.9,
    "top1_agreement": 0.5,
    "lr": 1e-4,
    "grad_norm": 0.75,
    "tokens": 90,
    "input_tokens": 100,
    "tokens_per_s": 50.0,
    "mfu": 0.4,
    "workers": 2,
    "host_peak_bytes": 2**30,
    "cuda_peak_bytes": 2**31,
    "seconds": 2.0,
    "data_s": 0.25,
    "save_s": 1.0,
}


@dataclass
class Recorder:
    """Stands in for Ray: what was recorded, by exported name; of a gauge, its changes and how often it was set."""

    times: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    gauges: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    counters: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    labels: set[tuple[str, ...]] = field(default_factory=set)

    def __call__(self, metric: Metric) -> Record:
        def record(value: float, labels: dict[str, str]) -> None:
            assert tuple(labels) == LABELS
            self.labels.add(tuple(labels.values()))
            if metric.kind == "gauge":
                self.times[metric.name] += 1
                self.gauges[metric.name] += [value] if self.gauges[metric.name][-1:] != [value] else []
            else:
                assert value > 0, "Ray refuses others"
                self.counters[metric.name] += value

        return record


def recipe(**sections: dict[str, Any]) -> Any:
    stated: dict[str, dict[str, Any]] = {
        "storage": {"root": "/root"},
        "corpus": {"sources": ["a.jsonl"]},
        "teacher": {"model": "/teacher"},
        "capture": {"max_gpu_hours": 50.0},
        "student": {"teacher_layers": [0]},
        "cost": {"teacher_gpu_hour": 2.0, "student_gpu_hour": 36.0},
        "train": {"checkpoint_every": 10},
    }
    return parse_recipe({"name": "tiny", "version": "w1", **stated, **sections})


def capture_one_unit(recorder: Recorder, clock: Clock) -> None:
    """Everything that a capture emits, its budget too."""
    units = Units.of([unit("a"), unit("b")])
    figures = Figures(recipe(), units, clock)
    meters = CaptureMeters(Meters("tiny", "w1", "capture", recorder), recipe(), figures, 5, 3, lambda: 2, clock)
    meters.tick()
    for i, busy in enumerate((10.0, 25.0)):
        clock.now += 10
        figures.spent.add(ActorTime("a", 4.0, 6.0, busy, 2.0))
        lengths = np.array([11, 21, 5], np.int32)
        keys = np.array([7, 7, 8], np.uint64)  # two windows of one document
        summary = UnitSummary(units[i].hash, lengths, lengths, keys, 1, "sha", 1.0, 3 * i, 1.0)
        figures.add(summary)
        meters.unit(summary)
        meters.hold(busy)
    meters.close()


def train_two_steps(recorder: Recorder, clock: Clock) -> None:
    """Everything that training emits."""
    meters = TrainMeters(Meters("tiny", "w1", "train", recorder), recipe(), 40, clock)
    meters.start(0)
    meters.step(LINE)
    clock.now += 60
    meters.tick()
    meters.saved(1)
    clock.now += 5
    meters.tick()
    bad = {name: value for name, value in LINE.items() if name not in ("loss", "grad_norm")}
    meters.step(bad | {"step": 1, "skipped": 1})
    meters.bad_end()
    meters.close()


def test_a_capture_emits_what_it_is_doing():
    recorder, clock = Recorder(), Clock()
    capture_one_unit(recorder, clock)
    assert recorder.labels == {("tiny", "w1", "capture")}
    assert recorder.counters == {
        "distill_capture_rows": 68,
        "distill_capture_documents": 4,
        "distill_capture_dead_letters": 3,
        "distill_teacher_start_seconds": 10,
        "distill_teacher_busy_seconds": 25,
        "distill_teacher_idle_seconds": 2,
    }
    assert recorder.gauges["distill_capture_units_done"] == [3, 4, 5]
    assert recorder.gauges["distill_capture_rows_per_second"][-2:] == [3.4, 0.0]
    assert recorder.gauges["distill_teacher_actors"] == [2, 0]
    assert recorder.gauges["distill_cost_dollars"] == [20.0, 50.0]
    assert recorder.gauges["distill_budget_dollars"] == [100.0]


def test_teachers_are_counted_seldom_and_every_gauge_is_set_again_before_an_agent_forgets_it():
    clock, asked, recorder = Clock(), [], Recorder()
    meters = CaptureMeters(
        Meters("tiny", "w1", "capture", recorder),
        recipe(),
        Figures(recipe(), Units.of([unit("a")]), clock),
        1,
        0,
        lambda: asked.append(clock.now) or 1,
        clock,
    )
    begun = clock.now
    for _ in range(100):
        meters.tick()
        clock.now += 0.2
    assert [round(at - begun) for at in asked] == [0, 5, 10, 15]
    assert recorder.times["distill_capture_units"] == 1 + 4


def test_training_emits_its_steps_and_its_checkpoints():
    recorder, clock = Recorder(), Clock()
    train_two_steps(recorder, clock)
    assert recorder.labels == {("tiny", "w1", "train")}
    assert recorder.counters == {
        "distill_train_tokens": 200,
        "distill_train_data_wait_seconds": 0.5,
        "distill_checkpoint_blocked_seconds": 2.0,
        "distill_train_bad_steps": 2,
    }
    assert recorder.gauges["distill_train_steps_done"] == [0, 1, 2]
    assert recorder.gauges["distill_train_loss"] == [2.0]
    assert recorder.gauges["distill_train_mfu"] == [0.4]
    assert recorder.gauges["distill_checkpoint_interval_seconds"] == [30.0]
    assert recorder.gauges["distill_checkpoint_age_seconds"] == [60.0, 5.0, 0.0]
    assert recorder.gauges["distill_checkpoint_step"] == [1]
    assert recorder.gauges["distill_cost_dollars"] == [0.06, 0.12]  # 3 s of two GPUs at a cent a second


def test_what_is_declared_is_what_is_emitted():
    recorder, clock = Recorder(), Clock()
    capture_one_unit(recorder, clock)
    train_two_steps(recorder, clock)
    assert recorder.gauges.keys() | recorder.counters.keys() == METRICS.keys()
    assert {m.exported for m in METRICS.values() if m.kind == "counter"} == {
        f"ray_{name}_total" for name in recorder.counters
    }


@pytest.mark.parametrize("call", ["set", "add", "reach"])
@pytest.mark.parametrize("name", ["train_los", "distill_train_loss", "train_loss", "train_tokens"])
def test_what_is_not_declared_cannot_be_emitted(call: str, name: str):
    meters = Meters("tiny", "w1", "train", Recorder())
    kind = "gauge" if call == "set" else "counter"
    declared = METRICS.get(f"distill_{name}")
    if declared is not None and declared.kind == kind:
        getattr(meters, call)(name, 1.0)
    else:
        with pytest.raises(KeyError, match=rf"no {kind} distill_{name} is declared in distill_ray/metrics\.py"):
            getattr(meters, call)(name, 1.0)


def test_without_a_price_there_is_no_cost_and_without_a_bound_no_budget():
    recorder, clock = Recorder(), Clock()
    cpus = recipe(teacher={"model": "/teacher", "use_gpu": False}, train={"use_gpu": False})
    for free in (recipe(cost={}), cpus):
        figures = Figures(free, Units.of([unit("a")]), clock)
        CaptureMeters(Meters("tiny", "w1", "capture", recorder), free, figures, 1, 0, lambda: 0, clock).hold(1.0)
        TrainMeters(Meters("tiny", "w1", "train", recorder), free, 1, clock).step(LINE)
    assert not {"distill_cost_dollars", "distill_budget_dollars"} & recorder.gauges.keys()


def test_a_bar_of_training_shows_loss_speed_and_the_time_left():
    clock = Clock()
    clock.now = 0.0
    bar, stream = shown(clock, 10)  # type: ignore[arg-type]
    relay = _Relay(bar, TrainMeters(Meters("tiny", "w1", "train", Recorder()), recipe(), 10, clock))
    relay.take(News(steps=[{"start": 6}]))
    for step in (6, 7):
        clock.now += 30.0
        relay.take(News(steps=[LINE | {"step": step, "tokens_per_s": 12345.6}], saved=[step + 1]))
    last = json.loads(stream.getvalue().splitlines()[-1])
    assert (last["done"], last["total"], last["eta_s"]) == (8, 10, 60.0)
    assert (last["loss"], last["tokens_per_s"], last["mfu"]) == (2.0, 12345.6, 0.4)


def test_a_restart_makes_no_checkpoint_younger():
    recorder, clock = Recorder(), Clock()
    meters = TrainMeters(Meters("tiny", "w1", "train", recorder), recipe(), 40, clock)
    meters.start(0)
    for _ in range(20):
        clock.now += 100
        meters.start(0)
        meters.tick()
    assert recorder.gauges["distill_checkpoint_age_seconds"] == [100.0 * i for i in range(1, 21)]
