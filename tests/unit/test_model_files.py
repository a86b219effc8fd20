"""Which files of a model folder are loaded, hashed and brought to a machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distill_ray.storage import model_files, open_storage, stage_folder, weight_files
from distill_ray.teacher import weights_identity
from tests.assets import tiny_teacher_folder

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
KEPT = {
    *SHARDS,
    *("model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"),
    *("chat_template.jinja", "additional_chat_templates/rag.jinja", "modeling_own.py", "README.md"),
}
BESIDE = {
    *("consolidated.safetensors", "consolidated.safetensors.index.json", "consolidated.00.pth", "tekken.json"),
    *("original/consolidated.00.pth", "original/params.json", "original/tokenizer.model", "pytorch_model.bin"),
    *("onnx/model.onnx", "onnx/model.onnx_data", "metal/model.bin", "model.gguf", "flax_model.msgpack"),
    *("checkpoint-7/model.safetensors", "checkpoint-7/optimizer.pt", "training_args.bin", "optimizer.bin"),
}


def test_a_model_is_its_safetensors_and_text_and_nothing_that_is_shipped_beside_them() -> None:
    assert model_files(KEPT | BESIDE) == KEPT
    assert weight_files(KEPT | BESIDE) == SHARDS


def test_without_safetensors_pytorchs_own_files_are_the_weights() -> None:
    names = {"pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "training_args.bin", "x.pt"}
    assert weight_files(names) == sorted(n for n in names if n.startswith("pytorch_model"))


def test_an_adapters_safetensors_do_not_hide_the_models_own_files() -> None:
    assert weight_files({"pytorch_model.bin", "adapter_model.safetensors"}) == ["pytorch_model.bin"]
    assert weight_files({"model.safetensors", "adapter_model.safetensors"}) == ["model.safetensors"]
    assert weight_files({"weights-1.safetensors"}) == ["weights-1.safetensors"]


def test_mistrals_tokenizer_is_read_where_there_is_no_other() -> None:
    assert model_files({"tekken.json"}) == {"tekken.json"}


@pytest.fixture(params=["local", "s3"])
def shipped(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """The URI of a folder with the model alone, and of one with all that publishers put beside it."""
    root = str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_uri")
    for name, more in (("plain", ()), ("shipped", BESIDE)):
        storage = open_storage(f"{root}/{name}")
        for path in tiny_teacher_folder().iterdir():
            storage.upload(path, path.name)
        for key in more:
            storage.put(key, b"of no use here")
    return f"{root}/plain", f"{root}/shipped"


def test_what_lies_beside_is_neither_staged_nor_hashed(
    shipped: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain, whole = shipped
    assert weights_identity(whole, None) == weights_identity(plain, None)
    assert weights_identity(whole, "v1") == weights_identity(plain, "v1")
    wanted = {path.name for path in tiny_teacher_folder().iterdir()}
    assert {path.name for path in stage_folder(whole).iterdir() if path.is_file()} == wanted
    assert {p.name for p in stage_folder(whole, weights=False).iterdir()} >= wanted - {"model.safetensors"}


def test_links_follow_a_folder_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    shutil.copytree(tiny_teacher_folder(), folder)
    assert stage_folder(str(folder)) == folder
    (folder / "tekken.json").write_text("{}")
    first = stage_folder(str(folder))
    assert stage_folder(str(folder)) == first != folder
    (folder / "config.json").write_text("{}")
    assert (first / "config.json").read_text() == "{}"
    (folder / "new.py").write_text("x = 1")
    assert (stage_folder(str(folder)) / "new.py").read_text() == "x = 1"
