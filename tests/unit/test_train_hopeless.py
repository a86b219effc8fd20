"""Which errors of a worker end the run at once."""

from __future__ import annotations

import pytest
import torch

from distill_ray.config.student import TrainSection
from distill_ray.errors import DistillError, UserError
from distill_ray.train.board import Board
from distill_ray.train.hopeless import hopeless

SECTION = TrainSection(micro_batch_packs=4)


def _caught(error: Exception) -> Exception:
    try:
        raise error
    except type(error) as caught:
        return caught


@pytest.mark.parametrize("error", [ValueError("bad shape\nmore"), KeyError("x"), NotImplementedError(), TypeError("t")])
def test_a_fault_of_the_code_is_named_with_its_place(error: Exception) -> None:
    found = hopeless(_caught(error), SECTION, 7, lambda step: pytest.fail("not asked"))
    assert type(found) is DistillError
    assert f"training met {type(error).__name__} at step 7, which another try would meet again: " in str(found)
    assert "test_train_hopeless.py:" in str(found)
    assert "more" not in str(found)


@pytest.mark.parametrize("error", [RuntimeError("Connection closed by peer"), OSError("gone")])
def test_what_a_lost_peer_or_device_causes_is_tried_again(error: Exception) -> None:
    assert hopeless(_caught(error), SECTION, 7, lambda step: pytest.fail("not asked")) is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried …\nmore"), MemoryError()])
def test_memory_that_ends_at_one_step_in_two_groups_ends_the_run_with_what_would_help(error: Exception) -> None:
    board = Board()

    def met(step: int | None) -> DistillError | None:
        return hopeless(_caught(error), SECTION, step, board.out_of_memory)

    board.start(0)
    assert met(None) is None
    assert met(3) is None
    assert met(3) is None, "another worker of the same group"
    board.start(2)
    assert met(4) is None, "another step"
    found = met(3)
    assert isinstance(found, UserError)
    for part in ("out of memory at step 3 a second time", "micro_batch_packs=4", "gradient_checkpointing (now False)"):
        assert part in str(found)
