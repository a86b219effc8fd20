"""What is staged for a checkpoint is a copy: later steps do not reach it, and it holds no more than the state did."""

from __future__ import annotations

import io
from collections import OrderedDict

import torch

from distill_ray.student.staging import host_copy


def test_nothing_is_shared_with_the_state_and_the_copy_is_equal():
    flat = torch.arange(12.0)
    state = {
        "views": [flat[:4], (flat[4:], 3)],
        "scaler": OrderedDict(inner={"t": torch.ones(2, dtype=torch.bfloat16)}),
    }
    found = host_copy(state)
    flat.add_(100)
    state["scaler"]["inner"]["t"].zero_()
    assert torch.equal(found["views"][0], torch.arange(4.0))
    assert torch.equal(found["views"][1][0], torch.arange(4.0, 12.0))
    assert found["views"][1][1] == 3
    assert type(found["scaler"]) is OrderedDict
    assert torch.equal(found["scaler"]["inner"]["t"], torch.ones(2, dtype=torch.bfloat16))


def test_a_tied_weight_is_copied_once_and_a_view_without_the_storage_around_it():
    weight = torch.ones(1 << 16)
    state = {"a": weight.detach(), "b": weight.detach(), "part": torch.ones(1 << 20)[:8]}
    found, file = host_copy(state), io.BytesIO()
    assert found["a"] is found["b"]
    torch.save(found, file)
    assert file.tell() < 4 * (1 << 16) + 8192


def test_objects_and_what_a_modules_state_carries_are_copied():
    class Scaler:
        def __init__(self) -> None:
            self.scale = [1.0]

    scaler, module = Scaler(), torch.nn.Linear(2, 2)
    found = host_copy({"scaler": scaler, "module": module.state_dict(), "shape": module.weight.shape})
    scaler.scale[0] = 2.0
    assert found["scaler"].scale == [1.0]
    assert found["module"]._metadata == module.state_dict()._metadata
    assert found["shape"] == torch.Size([2, 2])
