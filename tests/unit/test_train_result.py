"""What training leaves in storage, and who may write it; no Ray, no DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill_ray.checkpoints import Manifest
from distill_ray.errors import LeaseLostError, UserError
from distill_ray.lease import Lease, publish, store_folder
from distill_ray.report import read_history
from distill_ray.storage import Storage, open_storage
from distill_ray.train.restoring import check_plan
from distill_ray.train.result import HISTORY_FILE, published_student, store_history

RUN = "runs/tiny/v1"


def _steps(count: int) -> list[dict[str, float]]:
    return [{"step": step, "loss": 1.0} for step in range(count)]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "root"))


def test_an_old_drivers_rank_0_cannot_overwrite_its_successors_history(storage: Storage) -> None:
    with Lease.acquire(storage, RUN) as lease:
        old = lease.token
    with Lease.acquire(storage, RUN) as lease:
        entry = store_history(storage, lease.token, _steps(40))
        with pytest.raises(LeaseLostError):
            store_history(storage, old, _steps(21))
    assert entry["steps"] == 40
    assert len(read_history(storage.get(f"{RUN}/{HISTORY_FILE}"))) == 40


@pytest.mark.parametrize("damage", ["none", "weights", "history gone", "history altered"])
def test_a_student_is_done_only_with_its_files_and_its_history(storage: Storage, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    with Lease.acquire(storage, RUN) as lease:
        entry: dict[str, Any] = store_folder(storage, lease.token, f"{RUN}/student/e0001", folder, {})
        entry["history"] = store_history(storage, lease.token, _steps(3))
        publish(storage, lease.token, "student", entry)
        if damage == "weights":
            storage.delete(f"{RUN}/student/e0001/model.safetensors")
        elif damage == "history gone":
            storage.delete(f"{RUN}/{HISTORY_FILE}")
        elif damage == "history altered":
            store_history(storage, lease.token, _steps(4))
    assert published_student(storage, RUN) == (entry if damage == "none" else None)


def test_a_checkpoint_of_another_plan_is_refused_with_both_digests() -> None:
    manifest = Manifest(4, 1, 1.0, 2, 2, "a" * 64, (), "prefix")
    check_plan(manifest, "a" * 64)
    with pytest.raises(UserError, match=r"step 4 .* plan aaaaaaaaaaaa….* plan bbbbbbbbbbbb…"):
        check_plan(manifest, "b" * 64)
