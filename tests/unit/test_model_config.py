"""What a model folder's config says, whatever names its family uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill_ray.errors import UserError
from distill_ray.model_config import ModelShape, model_shape, read_config, stated_dtype
from tests.assets import tiny_teacher_folder


def _folder(tmp_path: Path, config: Any) -> Path:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return tmp_path


def test_shape_of_a_llama() -> None:
    assert model_shape(tiny_teacher_folder()) == ModelShape(layers=2, heads=4, kv_heads=4, vocab_size=512, context=2048)


def test_shape_of_a_model_with_names_of_its_own(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_head": 3, "n_layer": 5, "n_positions": 77, "vocab_size": 99, "n_embd": 12}
    assert model_shape(_folder(tmp_path, config)) == ModelShape(
        layers=5, heads=3, kv_heads=3, vocab_size=99, context=77
    )


def test_shape_of_the_text_model_in_a_composite_one(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "num_attention_heads": 6, "num_hidden_layers": 7, "vocab_size": 98}
    shape = model_shape(_folder(tmp_path, {"model_type": "gemma3", "text_config": text}))
    assert (shape.layers, shape.heads, shape.vocab_size) == (7, 6, 98)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a JSON list, not an object"),
        ("[" * 100_000, "not valid JSON"),
        ({"vocab_size": 9}, "transformers cannot use"),
        ({"model_type": "of-our-own", "vocab_size": 9}, "of-our-own"),
        ({"model_type": "clip_vision_model"}, "vocab_size = None"),
        ({"model_type": "llama", "num_attention_heads": "four"}, "config.json"),
    ],
)
def test_what_is_no_causal_language_model(config: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        model_shape(_folder(tmp_path, config))
    assert expected in str(caught.value)


def test_no_config(tmp_path: Path) -> None:
    for read in (read_config, stated_dtype, model_shape):
        with pytest.raises(UserError, match=r"has no config\.json"):
            read(tmp_path)
