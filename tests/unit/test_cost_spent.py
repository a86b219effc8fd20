"""What teachers' actors say of their time, and that the engine goes on while a unit is handed over."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_ray.capture.stages import FAILED_STARTS, ReadUnit, TaughtUnit, Teacher, from_row, to_row
from distill_ray.cost import ActorTime, Beat, Stopwatch, TimeSum
from distill_ray.cost.spent import Doing
from distill_ray.errors import DistillError, UserError
from distill_ray.schema import Sequence, TargetRows
from tests.unit.targets_fakes import captured, identity, unit

OF = identity(temperatures=(1.0,))


class Clock:
    """Seconds that pass only when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_every_second_of_an_actor_is_given_to_one_doing():
    clock = Clock()
    watch = Stopwatch(clock, "h100")
    clock.now += 3.0
    doings: list[tuple[Doing, float]] = [
        ("loading", 20.0),
        ("idle", 1.0),
        ("busy", 50.0),
        ("idle", 0.5),
        ("busy", 40.0),
    ]
    for doing, seconds in doings:
        watch.enter(doing)
        clock.now += seconds
    watch.did(2, 300)
    found = watch.read()
    assert (found.staging_s, found.loading_s, found.busy_s, found.idle_s) == (3.0, 20.0, 90.0, 1.5)
    assert (found.node_type, found.done, found.tokens) == ("h100", 2, 300)
    clock.now += 7.0
    assert watch.read().busy_s == 97.0, "what is done now counts at once"
    assert Stopwatch(clock).read().actor != found.actor


def test_the_sum_takes_each_actor_once_at_its_latest():
    total = TimeSum()
    assert total.to_json() == {"actors": 0, "start_s": 0, "staging_s": 0, "busy_s": 0, "idle_s": 0}
    for spent in (
        ActorTime("a", 1.0, 10.0, 5.0, 1.0),
        ActorTime("a", 1.0, 10.0, 15.0, 2.0),
        ActorTime("b", 2.0, 20.0, 7.0, 0.5),
        ActorTime("a", 1.0, 10.0, 9.0, 1.5),  # written after a later unit of the same actor
    ):
        total.add(spent)
    assert total.to_json() == {"actors": 2, "start_s": 33.0, "staging_s": 3.0, "busy_s": 22.0, "idle_s": 2.5}
    assert total.seconds == 57.5


class Meeting:
    """Pickled only once the engine has the next unit."""

    reached = threading.Event()

    def __reduce__(self) -> Any:
        assert self.reached.wait(120), "the engine waits for a unit to be pickled"
        return str, ()


class Engine:
    """Notes which thread uses it, and says what can only be pickled while it has its second unit."""

    vocab_size = OF.vocab_size

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds, self.calls, self.threads, self.inside = seconds, 0, set[int](), 0
        self.version = "made up"
        self.notes: Any = ()

    def score(self, sequences: list[np.ndarray]) -> list[TargetRows | str]:
        self.inside += 1
        assert self.inside == 1, "two units at a time"
        self.calls += 1
        self.threads.add(threading.get_ident())
        if self.calls == 2 and self.notes:
            self.notes = ()
            Meeting.reached.set()
        time.sleep(self._seconds)
        self.inside -= 1
        return list[TargetRows | str](captured(OF)[1])

    def close(self) -> None: ...


def _unit() -> Any:
    sequences: list[Sequence] = captured(OF)[0]
    return to_row(ReadUnit(unit(), sequences, []))


def test_the_engine_has_the_next_unit_while_one_is_pickled(tmp_path: Path):
    engine = Engine()
    engine.notes = (Meeting(),)
    teacher = Teacher(lambda: engine, str(tmp_path))
    with ThreadPoolExecutor(2) as calls:
        first, second = calls.submit(teacher, _unit()), calls.submit(teacher, _unit())
        assert isinstance(from_row(first.result(120)), TaughtUnit)
        second.result(120)
    assert engine.calls == 2
    assert len(engine.threads) == 1, "an engine keeps to one thread"


def test_what_an_actor_spent_travels_with_each_unit(tmp_path: Path):
    def slow() -> Engine:
        time.sleep(0.2)
        return Engine(0.3)

    started = time.monotonic()
    teacher = Teacher(slow, str(tmp_path))
    time.sleep(0.25)
    one, two = (from_row(teacher(_unit())).spent for _ in range(2))
    took = time.monotonic() - started
    assert one.actor == two.actor
    assert one.loading_s == two.loading_s >= 0.2
    assert one.idle_s >= 0.25
    assert one.busy_s >= 0.3
    assert two.busy_s - one.busy_s >= 0.3
    # No second is counted twice: with the floors above, none can be in the wrong place.
    assert two.staging_s + two.loading_s + two.busy_s + two.idle_s <= took


def test_an_engine_that_cannot_open_is_told_to_the_first_call(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        Teacher(Engine, str(tmp_path / "gone"))(_unit())


def test_a_teacher_whose_process_died_in_three_starts_does_not_begin_a_fourth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Beat, "starting", lambda _: FAILED_STARTS)
    teacher = Teacher(lambda: pytest.fail("began to start"), str(tmp_path))
    with pytest.raises(DistillError, match="could not be started, 3 times in a row"):
        teacher(_unit())
