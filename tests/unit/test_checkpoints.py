"""Checkpoints without Ray or DeepSpeed: what counts as whole, fallback, verification, pruning."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_ray import checkpoints
from distill_ray.checkpoints.moving import at_once
from distill_ray.errors import IntegrityError, LeaseLostError
from distill_ray.lease import Lease, LeaseToken, read_published
from distill_ray.storage import Storage, StorageError, open_storage
from distill_ray.storage.local import LocalStorage

RUN = "runs/tiny/v1"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "root"))


@pytest.fixture
def token(storage: Storage) -> Iterator[LeaseToken]:
    with Lease.acquire(storage, RUN) as lease:
        yield lease.token


def save(storage: Storage, token: LeaseToken, tmp_path: Path, step: int, loss: float = 1.0) -> checkpoints.Manifest:
    stored = []
    for rank in range(2):
        folder = tmp_path / f"rank{rank}"
        folder.mkdir(exist_ok=True)
        path = folder / f"zero_pp_rank_{rank}_optim_states.pt"
        path.write_bytes(bytes([rank]) * 100 + str(step).encode())
        stored += checkpoints.upload(storage, token, step, [path])
    return checkpoints.publish(storage, token, step, stored, loss=loss, world_size=2, zero_stage=2, plan="p")


def names(manifest: checkpoints.Manifest) -> list[str]:
    return [f.name for f in manifest.files]


def test_newest_published_checkpoint_is_restored_byte_for_byte(
    storage: Storage, token: LeaseToken, tmp_path: Path
) -> None:
    assert checkpoints.latest_whole(storage, RUN) is None
    save(storage, token, tmp_path, 2)
    saved = save(storage, token, tmp_path, 4)
    found = checkpoints.latest_whole(storage, RUN)
    assert found == saved
    folder = checkpoints.restore(storage, saved, names(saved), tmp_path / "restored")
    assert (folder / names(saved)[1]).read_bytes() == bytes([1]) * 100 + b"4"


def test_a_manifest_that_the_lease_does_not_name_does_not_count(
    storage: Storage, token: LeaseToken, tmp_path: Path
) -> None:
    first = save(storage, token, tmp_path, 2)
    storage.put(
        f"{RUN}/checkpoints/step-00000004/e0001/manifest.json", first.to_json().replace(b'"step": 2', b'"step": 4')
    )
    assert checkpoints.latest_whole(storage, RUN) == first


@pytest.mark.parametrize("damage", ["missing", "short", "manifest missing", "manifest altered"])
def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(
    storage: Storage, token: LeaseToken, tmp_path: Path, damage: str
) -> None:
    first, second = (save(storage, token, tmp_path, step) for step in (2, 4))
    key = second.key_of("manifest.json" if "manifest" in damage else names(second)[0])
    if "missing" in damage:
        storage.delete(key)
    else:
        storage.put(key, storage.get(key)[:-1])
    said: list[str] = []
    assert checkpoints.latest_whole(storage, RUN, say=said.append) == first
    assert len(said) == 1
    assert "step 4 is broken" in said[0]


def test_a_flipped_bit_is_found_before_anything_can_read_the_file(
    storage: Storage, token: LeaseToken, tmp_path: Path
) -> None:
    first, second = (save(storage, token, tmp_path, step) for step in (2, 4))
    key = second.key_of(names(second)[1])
    data = bytearray(storage.get(key))
    data[7] ^= 1
    storage.put(key, bytes(data))
    assert checkpoints.latest_whole(storage, RUN) == second, "sizes alone cannot tell"
    with pytest.raises(IntegrityError, match="SHA-256"):
        checkpoints.restore(storage, second, names(second), tmp_path / "restored")
    assert not (tmp_path / "restored" / names(second)[1]).exists()
    assert checkpoints.latest_whole(storage, RUN, exclude={4}) == first


def test_two_ranks_may_not_write_one_name(storage: Storage, token: LeaseToken, tmp_path: Path) -> None:
    manifest = save(storage, token, tmp_path, 2)
    twice = [*manifest.files, manifest.files[0]]
    with pytest.raises(IntegrityError, match="several ranks wrote"):
        checkpoints.publish(storage, token, 4, twice, loss=1.0, world_size=2, zero_stage=2, plan="p")


def test_pruning_keeps_the_newest_and_the_best_and_deletes_the_rest(
    storage: Storage, token: LeaseToken, tmp_path: Path
) -> None:
    losses = {2: 3.0, 4: 0.5, 6: float("nan"), 8: 2.0, 10: 1.0}
    for step, loss in losses.items():
        save(storage, token, tmp_path, step, loss)
    assert checkpoints.prune(storage, token, keep=2) == [2, 6]
    kept = {e["step"] for n, e in read_published(storage, RUN).items() if n.startswith("checkpoint/")}
    assert kept == {4, 8, 10}
    folders = {i.key.split("/")[4] for i in storage.list(f"{RUN}/checkpoints/")}
    assert folders == {f"step-{s:08d}" for s in kept}


def test_released_checkpoints_are_in_no_record_and_their_objects_still_lie_there(
    storage: Storage, token: LeaseToken, tmp_path: Path
) -> None:
    manifest = save(storage, token, tmp_path, 2)
    save(storage, token, tmp_path, 4)
    checkpoints.store_universal(storage, token, manifest, tmp_path / "rank0")
    before = {info.key for info in storage.list(f"{RUN}/checkpoints/")}
    checkpoints.release(storage, token)
    assert not [name for name in read_published(storage, RUN) if name.startswith(("checkpoint/", "universal/"))]
    assert {info.key for info in storage.list(f"{RUN}/checkpoints/")} == before
    assert checkpoints.latest_whole(storage, RUN) is None
    checkpoints.release(storage, token)


def test_every_so_many_th_checkpoint_stays_beside_the_newest_and_the_best(
    storage: Storage, token: LeaseToken, tmp_path: Path
) -> None:
    for step, loss in {2: 0.1, 4: 9.0, 5: 9.0, 6: 9.0, 8: 9.0, 10: 9.0}.items():
        save(storage, token, tmp_path, step, loss)
        checkpoints.prune(storage, token, keep=1, multiples_of=4)
    kept = {e["step"] for n, e in read_published(storage, RUN).items() if n.startswith("checkpoint/")}
    assert kept == {2, 4, 8, 10}
    assert checkpoints.prune(storage, token, keep=1) == [4, 8]


def test_orphans_of_earlier_epochs_are_swept_and_work_in_flight_is_not(storage: Storage, tmp_path: Path) -> None:
    with Lease.acquire(storage, RUN) as lease:
        kept = save(storage, lease.token, tmp_path, 2)
        storage.put(f"{RUN}/checkpoints/step-00000004/e0001/half", b"x")
    with Lease.acquire(storage, RUN) as lease:
        assert lease.token.epoch == 2
        storage.put(f"{RUN}/checkpoints/step-00000004/e0002/half", b"x")
        for strange in ("README.txt", "step-00000004/README.txt"):  # a person's
            storage.put(f"{RUN}/checkpoints/{strange}", b"x")
        checkpoints.prune(storage, lease.token, keep=2)
    assert storage.head(f"{RUN}/checkpoints/step-00000004/e0001/half") is None
    assert storage.head(f"{RUN}/checkpoints/step-00000004/e0002/half") is not None
    assert checkpoints.latest_whole(storage, RUN) == kept


def test_a_driver_that_lost_its_lease_publishes_and_prunes_nothing(storage: Storage, tmp_path: Path) -> None:
    with Lease.acquire(storage, RUN) as lease:
        old = lease.token
        save(storage, old, tmp_path, 2)
    with Lease.acquire(storage, RUN):
        before = read_published(storage, RUN)
        with pytest.raises(LeaseLostError):
            save(storage, old, tmp_path, 4)
        for step in (6, 8):
            with pytest.raises(LeaseLostError):
                save(storage, old, tmp_path, step)
        assert read_published(storage, RUN) == before


def test_a_conversion_is_kept_with_its_checkpoint_reused_while_whole_and_dropped_with_it(
    storage: Storage, token: LeaseToken, tmp_path: Path
) -> None:
    manifest = save(storage, token, tmp_path, 2)
    folder = tmp_path / "converted"
    (folder / "zero" / "weight").mkdir(parents=True)
    (folder / "zero" / "weight" / "fp32.pt").write_bytes(b"w" * 100)
    (folder / "model.pt").write_bytes(b"m")
    assert checkpoints.universal_of(storage, RUN, manifest) is None
    stored = checkpoints.store_universal(storage, token, manifest, folder)
    assert checkpoints.universal_of(storage, RUN, manifest) == stored
    checkpoints.restore(storage, stored, names(stored), tmp_path / "back")
    assert (tmp_path / "back" / "zero" / "weight" / "fp32.pt").read_bytes() == b"w" * 100
    assert checkpoints.latest_whole(storage, RUN) == manifest, "a conversion is no checkpoint"
    assert checkpoints.prune(storage, token, keep=1) == []
    assert checkpoints.universal_of(storage, RUN, manifest) == stored
    again = save(storage, token, tmp_path, 2, loss=0.9)
    assert again.prefix == manifest.prefix
    assert checkpoints.universal_of(storage, RUN, again) is None, "the same step, saved again in its place"
    stored = checkpoints.store_universal(storage, token, again, folder)
    storage.delete(stored.key_of("model.pt"))
    assert checkpoints.universal_of(storage, RUN, again) is None
    save(storage, token, tmp_path, 4, loss=0.5)
    assert checkpoints.prune(storage, token, keep=1) == [2]
    assert not [key for key in read_published(storage, RUN) if key.startswith("universal/")]
    assert not [info.key for info in storage.list(f"{RUN}/checkpoints/step-00000002/")]


class CountingStorage(LocalStorage):
    """Downloads meet: each waits for another one to be under way."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.together = threading.Barrier(2, timeout=120)

    def download(self, key: str, path: Path) -> None:
        self.together.wait()
        super().download(key, path)


def test_files_are_restored_several_at_once(storage: Storage, token: LeaseToken, tmp_path: Path) -> None:
    saved = save(storage, token, tmp_path, 2)
    folder = checkpoints.restore(CountingStorage(tmp_path / "root"), saved, names(saved), tmp_path / "restored")
    assert sorted(p.name for p in folder.iterdir()) == sorted(names(saved))


def test_after_the_first_failure_nothing_more_is_begun() -> None:
    """Also where the one before it is still on its way."""
    begun: list[int] = []

    def act(item: int) -> None:
        begun.append(item)
        if item == 1:
            raise StorageError("refused")
        time.sleep(0.5)

    with pytest.raises(StorageError, match="refused"):
        at_once(act, range(100))
    assert len(begun) < 20
