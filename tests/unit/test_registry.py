"""`latest` moves forward only, and never loses a race."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distill_ray.errors import IntegrityError, LeaseLostError
from distill_ray.registry import Latest, publish_latest, read_latest, retract_latest, version_order
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


def _others(*versions: str) -> Callable[[], list[Latest]]:
    return lambda: [Latest("m", version, 1.0, {"of": version}) for version in versions]


def test_taking_a_version_back_leads_to_the_newest_of_the_others(storage: Storage) -> None:
    publish_latest(storage, "m", "2026-W46", {"of": "2026-W46"})
    publish_latest(storage, "m", "2026-W47", {"of": "2026-W47"})
    others = _others("2026-W45", "2026-W9", "2026-W46", "2026-W47")
    assert retract_latest(storage, "m", "2026-W46", others=others) == read_latest(storage, "m"), "another stays"
    for version, then in (("2026-W47", "2026-W46"), ("2026-W46", "2026-W47")):
        now = retract_latest(storage, "m", version, others=others)
        assert now is not None
        assert (now.version, now.entry) == (then, {"of": then})
        assert read_latest(storage, "m") == now
    assert retract_latest(storage, "m", "2026-W47") is None
    assert read_latest(storage, "m") is None
    assert json.loads(storage.get("models/m/latest.json"))["version"] is None


@pytest.mark.parametrize("record", [None, b"[]", b'{"version": null}'])
def test_without_a_sound_record_an_old_version_does_not_become_the_latest(tmp_path: Path, record: bytes | None) -> None:
    storage = open_storage(str(tmp_path))
    if record is not None:
        storage.put("models/m/latest.json", record)
    assert publish_latest(storage, "m", "2026-W40", {}, others=_others("2026-W47")).version == "2026-W47"
    latest = read_latest(storage, "m")
    assert latest is not None
    assert latest.version == "2026-W47"


def test_who_may_not_publish_any_more_writes_nothing(storage: Storage) -> None:
    def guard() -> None:
        raise LeaseLostError("taken over")

    newest = publish_latest(storage, "m", "2026-W46", {})
    with pytest.raises(LeaseLostError):
        publish_latest(storage, "m", "2026-W47", {}, guard=guard)
    with pytest.raises(LeaseLostError):
        retract_latest(storage, "m", "2026-W46", guard=guard)
    assert read_latest(storage, "m") == newest


def test_a_damaged_record_is_refused_and_replaced_by_the_next_version(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.put("models/m/latest.json", b"[]")
    with pytest.raises(IntegrityError, match=r"2 bytes.*no registry record.*run"):
        read_latest(storage, "m")
    assert publish_latest(storage, "m", "2026-W40", {}) == read_latest(storage, "m")
