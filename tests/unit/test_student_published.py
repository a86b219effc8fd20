"""The published student on this machine: damage of the local copy is mended, damage in the store is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill_ray.errors import IntegrityError
from distill_ray.lease import document_entry, file_sha256
from distill_ray.storage import Storage, open_storage
from distill_ray.student.published import stage_student


@pytest.fixture
def stored(s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Storage, dict[str, Any]]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    storage, path = open_storage(s3_uri), tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * 100)
    storage.upload(path, "student/model.safetensors")
    file = {"name": path.name, "size": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = json.dumps({"files": [file]}).encode()
    storage.put("student/manifest.json", manifest)
    return storage, document_entry("student/manifest.json", manifest)


@pytest.mark.parametrize("damage", ["removed", "cut short", "bit flipped"])
def test_a_damaged_copy_on_this_machine_is_fetched_again(stored: tuple[Storage, dict[str, Any]], damage: str) -> None:
    path = stage_student(*stored) / "model.safetensors"
    whole = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] + b"\0" if damage == "bit flipped" else whole[:-1])
    assert (stage_student(*stored) / "model.safetensors").read_bytes() == whole


def test_a_damaged_object_is_named(stored: tuple[Storage, dict[str, Any]]) -> None:
    storage, entry = stored
    data = bytearray(storage.get("student/model.safetensors"))
    data[5] ^= 1
    storage.put("student/model.safetensors", bytes(data))
    with pytest.raises(IntegrityError, match=r"student/model.safetensors has SHA-256 .* run `distill-ray train` again"):
        stage_student(storage, entry)
