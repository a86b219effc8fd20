"""What is refused before the teacher is paid for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill_ray.config import Recipe, parse_recipe
from distill_ray.errors import UserError
from distill_ray.model_config import ModelShape, model_shape
from distill_ray.preflight import _student, _teacher_shape


def _folder(path: Path, rows: int) -> Path:
    path.mkdir()
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 32}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows, **shape}))
    return path


def _recipe(student: Path, loss: dict[str, Any], capture: dict[str, Any]) -> Recipe:
    return parse_recipe(
        {
            "name": "tiny",
            "storage": {"root": "/root"},
            "corpus": {"sources": ["/data/*.jsonl"]},
            "teacher": {"model": "/teacher"},
            "capture": capture,
            "loss": loss,
            "student": {"config": str(student)},
        }
    )


@pytest.mark.parametrize(("objective", "drawn_from"), [("sampled", "all"), ("head_tail", "tail")])
def test_draws_beyond_the_students_rows_are_refused_before_they_end_a_training(
    objective: str, drawn_from: str, tmp_path: Path
) -> None:
    tokenizer: Any = range(150)
    teacher = model_shape(_folder(tmp_path / "teacher", 200), False)
    assert isinstance(teacher, ModelShape)
    narrow, equal = _folder(tmp_path / "narrow", 160), _folder(tmp_path / "equal", 200)
    drawn = {"loss": {"objective": objective}, "capture": {"draws": 5, "draws_from": drawn_from}}
    with pytest.raises(UserError, match=r"all 200 rows of the teacher, and the student .*narrow has 160"):
        _student(_recipe(narrow, **drawn), teacher, tokenizer)
    assert "vocabulary 200" in _student(_recipe(equal, **drawn), teacher, tokenizer).fact
    assert "vocabulary 160" in _student(_recipe(narrow, loss={}, capture={}), teacher, tokenizer).fact


def test_a_vocabulary_beyond_the_codecs_ids_is_refused_before_any_row_is_captured(tmp_path: Path) -> None:
    recipe = _recipe(_folder(tmp_path / "student", 200), loss={}, capture={})
    recipe = recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"window_tokens": 1024})})
    _teacher_shape(recipe, model_shape(_folder(tmp_path / "largest", 1 << 20), False))
    with pytest.raises(UserError, match=r"1,048,577 rows, and codec v1 stores ids below 1,048,576"):
        _teacher_shape(recipe, model_shape(_folder(tmp_path / "larger", (1 << 20) + 1), False))
