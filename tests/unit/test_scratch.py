"""Memory kept for a tile's logits: given to the one tensor it is for, and to nothing else."""

from __future__ import annotations

import pytest
import torch

from distill_ray.teacher.scratch import Scratch

ROWS, WIDTH = 6, 40


@pytest.fixture
def memory() -> Scratch:
    return Scratch(ROWS, WIDTH, torch.float32)


def logits(rows: int = ROWS, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(rows, width, dtype=dtype)


def test_use_after_use_gets_the_same_memory(memory: Scratch) -> None:
    with memory:
        first = logits().fill_(1)
    with memory:
        second = logits(ROWS - 2)
    assert second.data_ptr() == first.data_ptr()
    assert second.shape == (ROWS - 2, WIDTH)
    assert second.is_contiguous()
    assert bool((second == 1).all())


def test_only_the_first_tensor_of_a_use_lies_there(memory: Scratch) -> None:
    with memory:
        first, second = logits().fill_(1), logits().fill_(2)
    assert bool((first == 1).all())
    assert bool((second == 2).all())


@pytest.mark.parametrize(
    "other", [{"rows": ROWS + 1}, {"width": WIDTH + 1}, {"width": WIDTH - 1}, {"dtype": torch.bfloat16}]
)
def test_another_shape_or_type_is_new(memory: Scratch, other: dict[str, int | torch.dtype]) -> None:
    with memory:
        fresh = logits(**other)  # type: ignore[arg-type]
        kept = logits()
    assert fresh.shape == (other.get("rows", ROWS), other.get("width", WIDTH))
    with memory:
        assert logits().data_ptr() == kept.data_ptr() != fresh.data_ptr()


def test_outside_of_a_use_all_is_new(memory: Scratch) -> None:
    with memory:
        kept = logits()
    assert logits().data_ptr() != kept.data_ptr()


def test_a_linear_layer_that_makes_its_output_so_gives_the_same_numbers(memory: Scratch) -> None:
    hidden, weight = torch.randn(ROWS, 8), torch.randn(WIDTH, 8)

    def head() -> torch.Tensor:
        return torch.mm(hidden, weight.T, out=logits())

    with memory:
        inside = head()
        kept = inside.data_ptr()
    assert torch.equal(inside, head())
    assert kept == memory._memory_RW.data_ptr()
