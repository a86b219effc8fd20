"""Restoring at another number of workers: a damaged conversion costs no step that the checkpoint itself still holds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill_ray import checkpoints
from distill_ray.config.student import TrainSection
from distill_ray.lease import Lease, LeaseToken
from distill_ray.storage import Storage, open_storage
from distill_ray.storage.local import LocalStorage
from distill_ray.student import universal
from distill_ray.train import restoring
from distill_ray.train.result import HISTORY_FILE, to_lines
from tests.ranks import spawn

RUN = "runs/tiny/v1"


class FakeEngine:
    """One worker; remembers what it loaded."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        self.loaded: list[tuple[bytes, bool]] = []

    def place(self, folder: Path) -> Path:
        return folder / "state"

    def load(self, folder: Path, *, universal: bool) -> None:
        self.loaded.append(((folder / "state" / "weights.pt").read_bytes(), universal))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "root"))


@pytest.fixture
def token(storage: Storage, tmp_path: Path) -> Iterator[LeaseToken]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    with Lease.acquire(storage, RUN) as lease:
        yield lease.token
    torch.distributed.destroy_process_group()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the user is told; the converter copies, and counts as a sentence."""
    texts: list[str] = []
    monkeypatch.setattr(restoring, "_say", lambda job, text: texts.append(text))

    def copy(saved: Path, out: Path, zero_stage: int, processes: int) -> None:
        texts.append("converted")
        shutil.copytree(saved, out)

    monkeypatch.setattr(universal, "convert", copy)
    return texts


def _save(storage: Storage, token: LeaseToken, tmp_path: Path, step: int) -> checkpoints.Manifest:
    paths = [tmp_path / "weights.pt", tmp_path / HISTORY_FILE]
    paths[0].write_bytes(b"weights of step %d" % step)
    paths[1].write_bytes(to_lines([{"step": i} for i in range(step)]))
    files = checkpoints.upload(storage, token, step, paths)
    return checkpoints.publish(storage, token, step, files, loss=1.0, world_size=2, zero_stage=2, plan="p")


def _flip(storage: Storage, key: str) -> None:
    data = bytearray(storage.get(key))
    data[0] ^= 1
    storage.put(key, bytes(data))


def _restore(storage: Storage, token: LeaseToken) -> tuple[FakeEngine, int]:
    job: Any = SimpleNamespace(storage=storage, token=token, recipe=SimpleNamespace(train=TrainSection(zero_stage=2)))
    engine: Any = FakeEngine()
    step, history = restoring.restore_newest(job, engine, "p")
    assert len(history) == step
    return engine, step


def test_a_damaged_conversion_is_made_anew_from_its_sound_checkpoint(
    storage: Storage, token: LeaseToken, said: list[str], tmp_path: Path
) -> None:
    for step in (3, 6):
        manifest = _save(storage, token, tmp_path, step)
    assert _restore(storage, token)[1] == 6
    converted = checkpoints.universal_of(storage, RUN, manifest)
    assert converted is not None
    _flip(storage, converted.key_of("weights.pt"))
    said.clear()
    engine, step = _restore(storage, token)
    assert (step, engine.loaded) == (6, [(b"weights of step 6", True)])
    assert "the conversion of step 6 is damaged and made anew" in said[0]
    assert said[1] == "converted"
    said.clear()
    assert _restore(storage, token)[1] == 6
    assert said == []


def test_a_damaged_checkpoint_falls_back_though_it_was_to_be_converted(
    storage: Storage, token: LeaseToken, said: list[str], tmp_path: Path
) -> None:
    for step in (3, 6):
        manifest = _save(storage, token, tmp_path, step)
    _restore(storage, token)
    converted = checkpoints.universal_of(storage, RUN, manifest)
    assert converted is not None
    for key in (converted.key_of("weights.pt"), manifest.key_of("weights.pt")):
        _flip(storage, key)
    assert _restore(storage, token)[1] == 3
    assert any("checkpoint of step 6 is broken and not used" in text for text in said)


class CountingStorage(LocalStorage):
    """Counts this process's downloads."""

    downloads = 0

    def download(self, key: str, path: Path) -> None:
        self.downloads += 1
        super().download(key, path)


def _restore_beside_others(rank: int, tmp: str, token: LeaseToken) -> None:
    os.environ["NODE_RANK"] = "01"[rank // 2]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp}/store-3", rank=rank, world_size=3)
    restoring._say = lambda job, text: None
    universal.convert = lambda saved, out, zero_stage, processes: shutil.copytree(saved, out)
    storage, engine = CountingStorage(f"{tmp}/root"), FakeEngine(rank, 3)
    job: Any = SimpleNamespace(storage=storage, token=token, recipe=SimpleNamespace(train=TrainSection(zero_stage=2)))
    restoring.restore_newest(job, engine, "p")  # type: ignore[arg-type]
    assert engine.loaded == [(b"weights of step 3", True)]
    Path(tmp, f"downloads-{rank}").write_text(str(storage.downloads))


def test_a_conversion_is_fetched_once_a_node(storage: Storage, token: LeaseToken, tmp_path: Path) -> None:
    files = len(_save(storage, token, tmp_path, 3).files)
    spawn(_restore_beside_others, (str(tmp_path), token), 3)
    counts = [int((tmp_path / f"downloads-{rank}").read_text()) for rank in range(3)]
    assert counts == [2 * files, 0, files], "rank 0 also fetches what it converts"
