"""`latest` moves forward only, and never loses a race."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distill_ray.errors import IntegrityError
from distill_ray.registry import publish_latest, read_latest, version_order
from distill_ray.storage import Storage, open_storage


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_uri"))


def test_latest_moves_forward_and_never_back(storage: Storage) -> None:
    assert read_latest(storage, "m") is None
    assert publish_latest(storage, "m", "2026-W9", {"kl": 0.2}).version == "2026-W9"
    newest = publish_latest(storage, "m", "2026-W10", {"kl": 0.1})
    assert read_latest(storage, "m") == newest
    assert publish_latest(storage, "m", "2026-W9", {"kl": 0.3}) == newest
    assert read_latest(storage, "m") == newest
    again = publish_latest(storage, "m", "2026-W10", {"kl": 0.05})
    assert again.entry == {"kl": 0.05}
    assert read_latest(storage, "m") == again
    assert read_latest(storage, "another") is None


def test_of_versions_published_at_once_the_newest_stays(tmp_path: Path) -> None:
    storage, barrier = open_storage(str(tmp_path)), threading.Barrier(8)

    def attempt(week: int) -> str:
        barrier.wait()
        return publish_latest(storage, "m", f"2026-W{week}", {}).version

    with ThreadPoolExecutor(8) as pool:
        in_force = list(pool.map(attempt, range(5, 13)))
    latest = read_latest(storage, "m")
    assert latest is not None
    assert latest.version == "2026-W12"
    assert in_force[-1] == "2026-W12"


def test_order_of_versions() -> None:
    versions = ["1", "2.9", "2.10", "2026-W09", "2026-W10", "2026-W10-hotfix", "v2", "v10"]
    shuffled = versions[4:] + versions[:4]
    assert sorted(shuffled, key=version_order) == versions


def test_damaged_record(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.put("models/m/latest.json", b"[]")
    with pytest.raises(IntegrityError, match=r"2 bytes.*no registry record"):
        read_latest(storage, "m")
