"""What is stored beside training, and what a store that is away costs: nothing."""

from __future__ import annotations

import threading
import time

import pytest

from distill_ray.errors import LeaseLostError
from distill_ray.storage import StorageError
from distill_ray.train.bad_loss import Line
from distill_ray.train.board import Board
from distill_ray.train.history import HistoryUpload
from tests.unit.test_cost_spent import Clock


class Store:
    """Keeps the numbers of lines that were stored; waits, or fails, where told to."""

    def __init__(self) -> None:
        self.stored: list[int] = []
        self.may_go = threading.Event()
        self.error: Exception | None = None

    def __call__(self, history: list[Line]) -> None:
        assert self.may_go.wait(120)
        if self.error is not None:
            raise self.error
        self.stored.append(len(history))


def _ticked(upload: HistoryUpload, store: Store, history: list[Line]) -> None:
    """`tick`, and what it has begun is over."""
    upload.tick(history)
    store.may_go.set()
    assert upload._running is not None
    while not upload._running.done():
        time.sleep(0.01)
    store.may_go.clear()


def test_steps_do_not_wait_for_the_history_and_one_store_goes_on_at_a_time() -> None:
    store, clock = Store(), Clock()
    upload = HistoryUpload(store, print, clock)
    lines: list[Line] = [{"step": 0.0}]
    upload.tick(lines)
    assert upload._running is None, "not due yet"
    clock.now += 31
    upload.tick(lines)
    lines.append({"step": 1.0})
    clock.now += 31
    upload.tick(lines)  # the first one is still under way
    store.may_go.set()
    upload.wait()
    assert store.stored == [1]
    clock.now += 10_000  # the first one took half a minute: the next is due after ten
    upload.tick(lines)
    upload.wait()
    assert store.stored == [1, 2]


def test_a_store_that_is_away_is_told_and_made_up_for_and_a_lost_lease_is_raised() -> None:
    store, clock, said = Store(), Clock(), list[str]()
    upload = HistoryUpload(store, said.append, clock)
    store.error = StorageError("no answer")
    clock.now += 31
    _ticked(upload, store, [{"step": 0.0}])
    upload.tick([{"step": 0.0}])
    assert said == ["metrics.jsonl could not be stored now and will be later: no answer"]
    store.error = LeaseLostError("another driver")
    clock.now += 31
    _ticked(upload, store, [{"step": 0.0}])
    with pytest.raises(LeaseLostError):
        upload.tick([{"step": 0.0}])


def test_a_group_that_works_again_has_mended_the_error_before_it_unless_that_was_final() -> None:
    board = Board()
    board.fail(StorageError("no answer"), final=False)
    board.start(400)
    assert board.error() == (None, False)
    board.fail(lost := LeaseLostError("another driver"), final=True)
    board.start(400)
    assert board.error() == (lost, True)
