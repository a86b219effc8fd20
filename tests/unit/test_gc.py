"""What gc removes and what it never may, whenever it is killed; and a source that was withdrawn."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill_ray import cli, corpus, gc, pipeline, standing, targets
from distill_ray.config import Recipe
from distill_ray.errors import IntegrityError, UserError
from distill_ray.forgotten import KEY, read_forgotten
from distill_ray.lease import Lease, publish, read_published
from distill_ray.registry import publish_latest
from distill_ray.status import status
from distill_ray.storage import Storage, open_storage
from distill_ray.units import Units, texts
from tests.unit import run_fakes
from tests.unit.run_fakes import OF
from tests.unit.targets_fakes import identity

DAY = 86400.0
OTHER = identity(temperatures=(1.0,), teacher="other")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return run_fakes.recipe_in(tmp_path)


@pytest.fixture
def storage(recipe: Recipe) -> Storage:
    return open_storage(recipe.storage.root)


def _age(storage: Storage, days: float, prefix: str = "") -> None:
    then = time.time() - days * DAY
    for info in storage.list(prefix):
        os.utime(Path(storage.uri, info.key), (then, then))


def _keys(storage: Storage, prefix: str = "") -> set[str]:
    return {info.key for info in storage.list(prefix)}


def _collect(storage: Storage, days: float = 30) -> gc.Garbage:
    return gc.collect(storage, older_than=time.time() - days * DAY)


def _finish(storage: Storage, recipe: Recipe, units: Units, tmp_path: Path) -> None:
    """A run with a checkpoint, a student and an export that its record names, and one of each that it does not."""
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        run_fakes.begin(storage, lease.token)
        run_fakes.publish_targets(storage, lease.token, units)
        run_fakes.train(storage, lease.token, 3, (2,), tmp_path)
        student = {"key": f"{recipe.run_prefix}/student/e0001/manifest.json", "sha256": "s", "step": 3}
        publish(storage, lease.token, "student", student)
        export = {"key": f"{recipe.model_prefix}/abc/manifest.json", "sha256": "e"}
        publish(storage, lease.token, "export", export)
        publish_latest(storage, "tiny", recipe.version, export)
    for key in (
        f"{recipe.run_prefix}/student/e0001",
        f"{recipe.run_prefix}/student/e0002",
        f"{recipe.run_prefix}/checkpoints/step-00000001/e0001",
        f"{recipe.model_prefix}/abc",
        f"{recipe.model_prefix}/abcd",
        "runs/tiny/gone/student/e0001",
    ):
        storage.put(f"{key}/model.safetensors", b"weights")
        storage.put(f"{key}/manifest.json", b"{}")
    storage.put(f"{recipe.run_prefix}/dead-letters.jsonl", b"")


@pytest.fixture
def litter(recipe: Recipe, storage: Storage, tmp_path: Path) -> tuple[Units, Units]:
    """Units that the run names, and old ones that nobody does; and everything `_finish` leaves."""
    units = run_fakes.planned(recipe, storage)
    run_fakes.capture(storage, units)
    run_fakes.capture(storage, list(units)[:2], OTHER)
    used, loose = units.where(slice(2, None)), units.where(slice(0, 2))
    _finish(storage, recipe, used, tmp_path)
    _age(storage, 40)
    return used, loose


def test_what_nobody_refers_to_goes_and_all_else_stays(storage: Storage, recipe: Recipe, litter: tuple[Units, Units]):
    _, loose = litter
    before = _keys(storage)
    garbage = _collect(storage)
    counts = {kind: n for kind, (n, _) in garbage.counts().items()}
    assert counts == {
        "target objects": 4,
        "checkpoints": 1,
        "students": 1,
        "exports": 1,
        "runs without a record": 1,
        "half-written objects": 0,
    }
    assert garbage.counts()["exports"] == (1, len(b"weights") + 2)
    assert _keys(storage) == before, "looking removes nothing"
    gc.remove(storage, garbage)
    gone = {key for key in before - _keys(storage) if "/index/" not in key}
    assert gone == {
        *(targets.unit_key(of, unit) for of in (OF, OTHER) for unit in texts(loose.hashes)),
        *(
            f"{folder}/{name}"
            for folder in (
                f"{recipe.run_prefix}/student/e0002",
                f"{recipe.run_prefix}/checkpoints/step-00000001/e0001",
                f"{recipe.model_prefix}/abcd",
                "runs/tiny/gone/student/e0001",
            )
            for name in ("model.safetensors", "manifest.json")
        ),
    }
    assert not any(n for n, _ in _collect(storage, 0).counts().values()), "nothing is left"


def test_the_index_names_what_is_there_and_nothing_else(storage: Storage, litter: tuple[Units, Units]):
    used, _ = litter
    gc.remove(storage, _collect(storage))
    for of, left in ((OF, used.hashes), (OTHER, used.hashes[:0])):
        table, broken = targets.load_table(storage, of, columns=())
        assert table["unit"].to_pylist() == texts(left)
        assert not broken
        said: list[str] = []
        assert texts(targets.done_hashes(storage, of, report=said.append)) == texts(left)
        assert said == []


def test_what_is_young_stays(storage: Storage, litter: tuple[Units, Units]):
    _, loose = litter
    key = targets.unit_key(OF, loose[0].hash)
    os.utime(Path(storage.uri, key))
    young = Path(storage.uri, "models/tiny/v1/abcd/model.safetensors")
    os.utime(young)
    gc.remove(storage, _collect(storage))
    assert key in _keys(storage)
    assert young.with_name("manifest.json").exists(), "a folder goes as one"
    assert not any(n for n, _ in _collect(storage, 50).counts().values())


class _KilledError(BaseException):
    pass


class _Dying:
    """A store whose user is killed at its n-th write."""

    def __init__(self, storage: Storage, writes: int) -> None:
        self._storage, self._left = storage, writes

    def __getattr__(self, name: str) -> Any:
        act: Callable[..., Any] = getattr(self._storage, name)
        if name not in ("put", "put_if", "delete"):
            return act

        def counted(*args: Any) -> Any:
            if self._left == 0:
                raise _KilledError
            self._left -= 1
            return act(*args)

        return counted


def _each_kill(storage: Storage, act: Callable[[Storage], None], check: Callable[[Storage], None]) -> set[str]:
    """Run `act` killed at every one of its writes, each time on a copy, then whole; returns the last copy's keys."""
    root = Path(storage.uri)
    finals = []
    for writes in range(1000):
        copy = root.with_name(f"copy{writes}")
        shutil.copytree(root, copy)  # keeps the objects' age
        copied = open_storage(str(copy))
        try:
            act(_Dying(copied, writes))  # type: ignore[arg-type]
        except _KilledError:
            check(copied)
            act(copied)
            finals.append(_keys(copied))
            shutil.rmtree(copy)
            continue
        assert writes > 5
        assert all(_without_index(keys) == _without_index(_keys(copied)) for keys in finals)
        check(copied)
        return _keys(copied)
    raise AssertionError("it never ends")


def _without_index(keys: set[str]) -> set[str]:
    return {key for key in keys if "/index/" not in key}


def _index_is_true(storage: Storage) -> None:
    for of in (OF, OTHER):
        named = set(targets.load_index(storage, of))
        there = {unit for unit, _ in targets.each_object(storage, of)}
        assert named <= there, "the index names what is gone"


def test_killed_at_any_write_the_index_stays_true_and_the_same_command_ends_it(
    storage: Storage, recipe: Recipe, litter: tuple[Units, Units]
):
    used, _ = litter

    def check(copied: Storage) -> None:
        _index_is_true(copied)
        assert set(texts(used.hashes)) <= set(texts(targets.done_hashes(copied, OF)))
        published = read_published(copied, recipe.run_prefix)
        assert copied.head(published["export"]["key"]) is not None

    _each_kill(storage, lambda s: gc.remove(s, _collect(s)), check)


def test_of_a_folder_the_manifest_goes_first(storage: Storage, litter: tuple[Units, Units]):
    order: list[str] = []

    class Watched(_Dying):
        def __getattr__(self, name: str) -> Any:
            act = super().__getattr__(name)
            return (lambda key: (order.append(key), act(key))) if name == "delete" else act

    gc.remove(Watched(storage, -1), _collect(storage))  # type: ignore[arg-type]
    folders = [key.rsplit("/", 1) for key in order if key.startswith(("runs/", "models/"))]
    first = dict(reversed(folders))
    assert set(first.values()) == {"manifest.json"}


@pytest.mark.parametrize("said", [True, False])
def test_a_run_that_somebody_works_on_keeps_its_capture_and_folders(
    storage: Storage, recipe: Recipe, litter: tuple[Units, Units], said: bool
):
    with Lease.acquire(storage, "runs/tiny/v2") as lease:
        if said:
            run_fakes.begin(storage, lease.token)
        for key in ("runs/tiny/v2/student/e0001/x", "models/tiny/v2/new/x"):
            storage.put(key, b"")
        _age(storage, 40)
        garbage = _collect(storage)
        assert set(garbage.units) == ({OTHER.fingerprint} if said else set())
        assert not any("/v2/" in f"{prefix}/" for prefix in garbage.folders)
        assert said or "a driver has just begun" in garbage.render()
    assert set(_collect(storage).units) == {OF.fingerprint, OTHER.fingerprint}


def test_what_a_killed_write_left_goes_once_it_is_a_day_old(storage: Storage, litter: tuple[Units, Units]):
    folder = Path(storage.uri, "targets", OF.fingerprint)
    old, young = folder / ".tmp-old", folder / ".tmp-young"
    for path in (old, young):
        path.write_bytes(b"half")
    then = time.time() - 2 * DAY
    os.utime(old, (then, then))
    assert _collect(storage).counts()["half-written objects"] == (0, 0)
    garbage = _collect(storage, 0)
    assert garbage.counts()["half-written objects"] == (1, 4)
    gc.remove(storage, garbage)
    assert (old.exists(), young.exists()) == (False, True)


def test_an_upload_that_never_ended_is_found_and_discarded_on_s3(s3_uri: str):
    from distill_ray.storage.s3 import S3Storage

    storage = S3Storage(f"{s3_uri}/root")
    storage.put("whole", b"whole")
    client, name = storage._client, storage._name("runs/a/b/half")
    upload = client.create_multipart_upload(Bucket=storage._bucket, Key=name)["UploadId"]
    client.upload_part(Bucket=storage._bucket, Key=name, UploadId=upload, PartNumber=1, Body=b"half")
    (info,) = storage.half_written()
    assert (info.key, info.size) == ("runs/a/b/half", 4)
    assert abs(info.modified - time.time()) < 600
    for _ in range(2):
        storage.discard(info)
    assert list(storage.half_written()) == []
    assert _keys(storage) == {"whole"}


def test_a_driver_that_began_since_the_look_keeps_what_it_may_use(storage: Storage, litter: tuple[Units, Units]):
    garbage = _collect(storage)
    with Lease.acquire(storage, "runs/tiny/v2"):
        gc.remove(storage, garbage)
    assert set(_collect(storage).units) == set(garbage.units)


def test_a_lost_manifest_keeps_its_whole_capture(storage: Storage, recipe: Recipe, litter: tuple[Units, Units]):
    storage.delete(read_published(storage, recipe.run_prefix)["targets"]["key"])
    garbage = _collect(storage)
    assert set(garbage.units) == {OTHER.fingerprint}
    assert f"targets/{OF.fingerprint} stays whole" in garbage.render()


def test_a_damaged_record_stops_everything_and_a_damaged_latest_keeps_its_models(
    storage: Storage, recipe: Recipe, litter: tuple[Units, Units]
):
    storage.put("models/tiny/latest.json", b"[]")
    assert not any(prefix.startswith("models/") for prefix in _collect(storage).folders)
    storage.put(f"{recipe.run_prefix}/lease.json", b"[]")
    with pytest.raises(IntegrityError, match="no lease record"):
        _collect(storage)


def test_the_latest_export_stays_even_without_its_runs_record(storage: Storage, recipe: Recipe, litter: Any):
    storage.delete(f"{recipe.run_prefix}/lease.json")
    gc.remove(storage, _collect(storage))
    assert f"{recipe.model_prefix}/abc/model.safetensors" in _keys(storage)


# Withdrawing a source.


@pytest.fixture
def trained(recipe: Recipe, storage: Storage, tmp_path: Path) -> Recipe:
    """A run over both sources, trained and exported; the second source also lies elsewhere, in another teacher's
    capture that no manifest names."""
    units = run_fakes.planned(recipe, storage)
    run_fakes.capture(storage, units)
    _finish(storage, recipe, units, tmp_path)
    copy = shutil.copy(_source(tmp_path, "b"), tmp_path / "copy.jsonl")
    elsewhere = recipe.corpus.model_copy(update={"sources": (str(copy),)})
    run_fakes.capture(storage, run_fakes.planned(recipe.model_copy(update={"corpus": elsewhere}), storage), OTHER)
    return recipe


def _source(tmp_path: Path, name: str) -> Path:
    return tmp_path / "data" / f"{name}.jsonl"


def _of(units: Units, name: str) -> set[str]:
    return {unit.hash for unit in units if unit.source.uri.endswith(f"/{name}.jsonl")}


def _objects(storage: Storage, of: targets.CaptureIdentity) -> set[str]:
    return {unit for unit, _ in targets.each_object(storage, of)}


@pytest.mark.parametrize("name", ["data/b.jsonl", "copy.jsonl", "data/b*", "**/copy.*"])
def test_a_withdrawn_sources_rows_go_from_every_capture(trained: Recipe, storage: Storage, tmp_path: Path, name: str):
    units = run_fakes.planned(trained, storage)
    found = gc.find(storage, str(tmp_path / name))
    text = found.render()
    other = tmp_path / ("data/b.jsonl" if "copy" in name else "copy.jsonl")
    assert f"ALSO AT   {other}: the same content" in text
    (run,) = found.runs
    assert (run.prefix, run.units, run.student, run.latest) == ("runs/tiny/v1", len(_of(units, "b")), True, True)
    assert "STUDENT TRAINED, published at" in text
    gc.forget(storage, found)
    assert _objects(storage, OF) == _of(units, "a")
    assert _objects(storage, OTHER) == set()
    _index_is_true(storage)


def test_a_withdrawn_source_is_found_by_its_manifest_alone(trained: Recipe, storage: Storage, tmp_path: Path):
    units = run_fakes.planned(trained, storage)
    for key in _keys(storage, "cache/"):
        storage.delete(key)
    _source(tmp_path, "b").unlink()
    found = gc.find(storage, str(_source(tmp_path, "b")))
    assert {capture: set(texts(hashes)) for capture, hashes in found.units.items()} == {
        OF.fingerprint: _of(units, "b"),
        OTHER.fingerprint: _of(units, "b"),
    }


def test_a_source_nobody_read_is_refused(trained: Recipe, storage: Storage, tmp_path: Path):
    with pytest.raises(UserError, match=r"nothing under .* was read from"):
        gc.find(storage, str(tmp_path / "data" / "z.jsonl"))


def test_afterwards_its_content_is_refused_wherever_it_lies_and_the_run_says_so(
    trained: Recipe, storage: Storage, tmp_path: Path
):
    count = len(_of(run_fakes.planned(trained, storage), "b"))
    gc.forget(storage, gc.find(storage, str(_source(tmp_path, "b"))))
    with pytest.raises(UserError, match=r"b\.jsonl holds content that was withdrawn on \d{4}-.*leave it out"):
        run_fakes.planned(trained, storage)
    shutil.move(_source(tmp_path, "b"), _source(tmp_path, "renamed"))
    with pytest.raises(UserError, match=r"renamed\.jsonl holds content that was withdrawn"):
        run_fakes.planned(trained, storage)
    said = standing.withdrawn(storage, trained.run_prefix)
    assert said is not None
    assert f"{count} of the run's units are of withdrawn sources" in said
    found = status(trained)
    assert found.due["capture"].startswith("refused: ")
    assert f"forgotten: {count} of the run's units" in found.render()
    assert standing.withdrawn(storage, "runs/tiny/v2") is None
    again = gc.find(storage, str(_source(tmp_path, "b")))
    assert again.units == {}
    assert [run.prefix for run in again.runs] == ["runs/tiny/v1"], "who was trained on it is still told"


def test_a_run_that_lacks_withdrawn_rows_is_not_captured_anew(trained: Recipe, storage: Storage, tmp_path: Path):
    units = run_fakes.planned(trained, storage)
    gc.forget(storage, gc.find(storage, str(_source(tmp_path, "b"))))
    _source(tmp_path, "b").unlink()
    gone = len(_of(units, "b"))
    with Lease.acquire(storage, trained.run_prefix) as lease, pytest.raises(UserError) as caught:
        pipeline._stage("capture", trained, storage, lease.token, threading.Event(), "train")
    assert f"{gone} of {len(units)} target objects missing" in str(caught.value)
    assert f"{gone} of the run's units are of withdrawn sources" in str(caught.value)
    assert "give a new --version" in str(caught.value)


def test_killed_at_any_write_nothing_is_captured_again_and_the_same_command_ends_it(
    trained: Recipe, storage: Storage, tmp_path: Path
):
    pattern = str(_source(tmp_path, "b"))

    def check(copied: Storage) -> None:
        _index_is_true(copied)
        whole = _objects(copied, OF) >= _objects(storage, OF) and _objects(copied, OTHER) >= _objects(storage, OTHER)
        assert whole or read_forgotten(copied).runs == {"runs/tiny/v1": count}, "removed, and not recorded"

    count = gc.find(storage, pattern).runs[0].units
    final = _each_kill(storage, lambda s: gc.forget(s, gc.find(s, pattern)), check)
    assert KEY in final


def test_a_driver_at_work_on_such_rows_is_waited_for(trained: Recipe, storage: Storage, tmp_path: Path):
    found = gc.find(storage, str(_source(tmp_path, "b")))
    before = _objects(storage, OF)
    with Lease.acquire(storage, "runs/tiny/v2"), pytest.raises(UserError, match="runs/tiny/v2 by host"):
        gc.forget(storage, found)
    assert _objects(storage, OF) == before
    gc.forget(storage, found)
    assert _objects(storage, OF) < before


def test_an_object_that_does_not_tell_its_source_stays_and_is_named(trained: Recipe, storage: Storage, tmp_path: Path):
    unit = sorted(_objects(storage, OTHER))[0]
    key = targets.unit_key(OTHER, unit)
    storage.put(key, storage.get(key)[:-5])
    found = gc.find(storage, str(_source(tmp_path, "b")))
    assert found.unreadable == (key,)
    assert f"(one: {key})" in found.render()
    gc.forget(storage, found)
    assert _objects(storage, OTHER) == {unit}


def test_a_damaged_record_of_withdrawn_sources_is_never_taken_for_empty(trained: Recipe, storage: Storage):
    storage.put(KEY, b"[]")
    with pytest.raises(IntegrityError, match="no record of withdrawn sources"):
        corpus.plan_units(trained.corpus, OF.tokenizer, storage)


# The command.


def _cli(recipe: Recipe, *arguments: str) -> int:
    import json

    path = Path(recipe.storage.root).parent / "recipe.toml"
    tables = {name: value for name, value in recipe.model_dump(mode="json").items() if isinstance(value, dict)}
    wanted = {name: tables[name] for name in ("storage", "teacher", "corpus", "student")}
    lines = ['name = "tiny"', 'version = "v1"']
    for name, fields in wanted.items():
        lines.append(f"[{name}]")
        lines += [f"{k} = {json.dumps(v)}" for k, v in fields.items() if v is not None and not isinstance(v, dict)]
    path.write_text("\n".join(lines))
    return cli.main(["gc", str(path), *arguments])


def test_the_command_looks_first_and_removes_on_demand(
    recipe: Recipe, storage: Storage, litter: tuple[Units, Units], capsys: pytest.CaptureFixture[str]
):
    before = _keys(storage)
    assert _cli(recipe) == _cli(recipe, "--dry-run") == 0
    assert "dry run: nothing was removed" in capsys.readouterr().out
    assert _keys(storage) == before
    assert _cli(recipe, "--delete", "--days", "50") == 0
    assert _keys(storage) == before
    assert _cli(recipe, "--delete", "--days", "nan") == 2
    assert _cli(recipe, "--delete") == 0
    assert len(_without_index(_keys(storage))) == len(_without_index(before)) - 12


def test_the_command_says_by_its_exit_code_whether_a_student_was_trained_on_a_source(
    trained: Recipe, storage: Storage, tmp_path: Path
):
    source = str(_source(tmp_path, "b"))
    assert _cli(trained, "--forget", source) == 4
    assert KEY not in _keys(storage)
    assert _cli(trained, "--forget", source, "--delete") == 4
    assert _objects(storage, OTHER) == set()
    unused = run_fakes.source(tmp_path / "unused.jsonl", "unused")
    alone = trained.model_copy(update={"corpus": trained.corpus.model_copy(update={"sources": (str(unused),)})})
    run_fakes.capture(storage, run_fakes.planned(alone, storage))
    assert _cli(trained, "--forget", str(unused)) == 0
    assert _cli(trained, "--forget", str(tmp_path / "none.jsonl")) == 2
