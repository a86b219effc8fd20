"""A checkpoint on its way: training goes on meanwhile, it counts only when all is stored, and no error is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill_ray import checkpoints
from distill_ray.checkpoints import StoredFile
from distill_ray.config.student import TrainSection
from distill_ray.errors import LeaseLostError
from distill_ray.lease import Lease, LeaseToken
from distill_ray.storage import StorageError
from distill_ray.storage.local import LocalStorage
from distill_ray.train.keeping import Keeper
from distill_ray.train.saving import Saver

RUN = "runs/tiny/v1"


class SlowStorage(LocalStorage):
    """Uploads wait until they may go on, or fail."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.may_go = threading.Event()
        self.error: Exception | None = None

    def upload(self, path: Path, key: str) -> None:
        assert self.may_go.wait(120)
        if self.error is not None:
            raise self.error
        super().upload(path, key)


@pytest.fixture
def storage(tmp_path: Path) -> SlowStorage:
    return SlowStorage(tmp_path / "root")


@pytest.fixture
def token(storage: SlowStorage, tmp_path: Path) -> Iterator[LeaseToken]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    with Lease.acquire(storage, RUN) as lease:
        yield lease.token
    torch.distributed.destroy_process_group()


def _begin(
    saver: Saver, storage: SlowStorage, token: LeaseToken, step: int, before: Callable[[], object] = lambda: None
) -> Path:
    """The folder that the files are written to, once `before` returned."""
    folders = []

    def stage(folder: Path) -> Callable[[], list[Path]]:
        folders.append(folder)

        def write() -> list[Path]:
            before()
            (folder / "state.pt").write_bytes(step.to_bytes(8, "little"))
            return [folder / "state.pt"]

        return write

    def publish(files: list[StoredFile]) -> None:
        checkpoints.publish(storage, token, step, files, loss=1.0, world_size=1, zero_stage=2, plan="p")

    saver.begin(step, stage, publish)
    return folders[0]


def test_steps_go_on_while_a_checkpoint_is_stored_and_it_counts_once_it_is_whole(
    storage: SlowStorage, token: LeaseToken
) -> None:
    saver = Saver(storage, token)
    _begin(saver, storage, token, 3)
    assert saver.in_flight
    assert not saver.arrived
    assert checkpoints.latest_whole(storage, RUN) is None
    storage.may_go.set()
    saver.drain()
    assert not saver.in_flight
    found = checkpoints.latest_whole(storage, RUN)
    assert found is not None
    assert storage.get(found.key_of("state.pt")) == (3).to_bytes(8, "little")
    assert saver.take() > 0
    assert saver.take() == 0
    _begin(saver, storage, token, 6)
    saver.drain()
    found = checkpoints.latest_whole(storage, RUN)
    assert found is not None
    assert found.step == 6


def test_training_waits_for_no_disk_and_nothing_stays_on_it(storage: SlowStorage, token: LeaseToken) -> None:
    saver, may_write = Saver(storage, token), threading.Event()
    storage.may_go.set()
    folder = _begin(saver, storage, token, 3, lambda: may_write.wait(120))
    assert saver.take() < 20
    assert not saver.arrived
    may_write.set()
    while not saver.arrived:
        threading.Event().wait(0.05)
    assert not folder.exists()
    saver.land()


def test_a_disk_that_is_full_has_arrived_and_raises_where_it_lands(storage: SlowStorage, token: LeaseToken) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    saver = Saver(storage, token)
    folder = _begin(saver, storage, token, 3, full)
    with pytest.raises(StorageError, match="disk full"):
        saver.land()
    assert not folder.exists()
    assert checkpoints.latest_whole(storage, RUN) is None


def test_an_upload_that_fails_has_arrived_and_raises_where_it_lands(storage: SlowStorage, token: LeaseToken) -> None:
    saver, storage.error = Saver(storage, token), StorageError("the store is down")
    _begin(saver, storage, token, 3)
    storage.may_go.set()
    for _ in range(100):
        if saver.arrived:
            break
        threading.Event().wait(0.05)
    assert saver.arrived
    with pytest.raises(StorageError, match="down"):
        saver.land()
    assert checkpoints.latest_whole(storage, RUN) is None


def _check_for_seconds(saver: Saver) -> None:
    for _ in range(100):
        saver.check()
        threading.Event().wait(0.05)


def test_a_lost_lease_is_known_at_the_next_step_and_nothing_is_published(
    storage: SlowStorage, token: LeaseToken
) -> None:
    storage.may_go.set()
    saver = Saver(storage, token)
    record = storage.get(f"{RUN}/lease.json").replace(b'"epoch": 1', b'"epoch": 2')
    storage.put(f"{RUN}/lease.json", record)
    _begin(saver, storage, token, 3)
    saver.land()
    with pytest.raises(LeaseLostError):
        _check_for_seconds(saver)
    assert checkpoints.latest_whole(storage, RUN) is None


def test_a_store_that_fails_after_a_checkpoint_counts_is_told_and_costs_nothing(
    storage: SlowStorage, token: LeaseToken
) -> None:
    storage.may_go.set()
    said = list[str]()

    def published(step: int) -> None:
        raise StorageError("no answer")

    train = TrainSection(use_gpu=False)
    job: Any = SimpleNamespace(recipe=SimpleNamespace(train=train), storage=storage, token=token)
    engine: Any = SimpleNamespace(world=1)
    Keeper(job, Saver(storage, token), engine, "plan", said.append, published)._publish(3, 0.5, [])
    assert said == ["the checkpoint of step 3 is stored, but not what follows it: no answer"]
    found = checkpoints.latest_whole(storage, RUN)
    assert found is not None
    assert found.step == 3
