"""`latest` moves forward only, and never loses a race."""

from __future__ import annotations

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distill_ray.errors import IntegrityError
from distill_ray.registry import publish_latest, read_latest, retract_latest, version_order
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
    assert again.previous == newest.previous
    assert publish_latest(storage, "m", "2026-W10", {"kl": 0.05}) == again, "nothing to write"
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
    versions = ["demo", "v2", "v10", "1", "2.9", "2.10", "2026-W09", "2026-W10", "2026-W10-hotfix"]
    shuffled = versions[4:] + versions[:4]
    assert sorted(shuffled, key=version_order) == versions


def test_a_trial_under_a_name_neither_keeps_nor_takes_the_place_of_a_week(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    publish_latest(storage, "m", "demo", {})
    assert publish_latest(storage, "m", "2026-W47", {}).version == "2026-W47"
    assert publish_latest(storage, "m", "trial", {}).version == "2026-W47"


def _stored(storage: Storage, key: str) -> dict[str, str]:
    storage.put(key, key.encode())
    return {"key": key, "sha256": hashlib.sha256(key.encode()).hexdigest()}


def test_taking_a_version_back_leads_to_the_one_before_while_that_stands(storage: Storage) -> None:
    first, second = _stored(storage, "a/manifest.json"), _stored(storage, "b/manifest.json")
    publish_latest(storage, "m", "2026-W46", first)
    publish_latest(storage, "m", "2026-W47", second)
    assert retract_latest(storage, "m", "2026-W46") == read_latest(storage, "m"), "another version is not touched"
    now = retract_latest(storage, "m", "2026-W47")
    assert now is not None
    assert (now.version, now.entry) == ("2026-W46", first)
    assert read_latest(storage, "m") == now
    publish_latest(storage, "m", "2026-W47", second)
    storage.put("a/manifest.json", b"altered")
    assert retract_latest(storage, "m", "2026-W47") is None
    assert read_latest(storage, "m") is None
    assert json.loads(storage.get("models/m/latest.json"))["version"] is None
    assert publish_latest(storage, "m", "2026-W40", first).version == "2026-W40"


def test_a_damaged_record_is_refused_and_replaced_by_the_next_version(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.put("models/m/latest.json", b"[]")
    with pytest.raises(IntegrityError, match=r"2 bytes.*no registry record.*run"):
        read_latest(storage, "m")
    assert publish_latest(storage, "m", "2026-W40", {}) == read_latest(storage, "m")
