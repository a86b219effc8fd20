"""Casting and sharding a model folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distill_ray.errors import IntegrityError, UserError
from distill_ray.student.weights import convert_folder
from tests.assets import tiny_teacher_folder
from tests.stages.trained_run import prompt_logits


def _weights(folder: Path, **tensors: torch.Tensor) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"dtype": "float32", "eos_token_id": 2, "text_config": {"dtype": "float32"}}')
    return folder


def test_large_weights_are_split_into_shards_that_load_as_one(tmp_path: Path) -> None:
    source = tiny_teacher_folder()
    convert_folder(source, tmp_path / "out", "float32", shard_bytes=100_000)
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert torch.equal(prompt_logits(tmp_path / "out", torch.float32), prompt_logits(source, torch.float32))


def test_weights_that_do_not_fit_the_type_or_are_not_finite_are_refused(tmp_path: Path) -> None:
    large = _weights(tmp_path / "large", a=torch.tensor([1e30]), ids=torch.tensor([7]))
    with pytest.raises(UserError, match=r"weight a reaches 1e\+30, more than export.dtype=float16"):
        convert_folder(large, tmp_path / "out1", "float16")
    convert_folder(large, tmp_path / "out2", "bfloat16")
    config = json.loads((tmp_path / "out2" / "config.json").read_text())
    assert (config["dtype"], config["text_config"]["dtype"]) == ("bfloat16", "bfloat16")
    assert json.loads((tmp_path / "out2" / "generation_config.json").read_text())["eos_token_id"] == 2
    with pytest.raises(IntegrityError, match="weight a of the trained student is not finite"):
        convert_folder(_weights(tmp_path / "nan", a=torch.tensor([float("nan")])), tmp_path / "out3", "bfloat16")
