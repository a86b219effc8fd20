"""Witnesses: what they keep, of which units, and that the audit believes none that saw other tokens."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill_ray import gc, targets
from distill_ray.audit import verb, witnessed
from distill_ray.audit.tolerance import tolerance_of
from distill_ray.audit.witnessed import WitnessAuditor
from distill_ray.capture.stages import ReadUnit, TaughtUnit, teach, write
from distill_ray.config.sections import AuditSection, TeacherSection
from distill_ray.errors import IntegrityError, StoppedError
from distill_ray.gc.garbage import remove_units
from distill_ray.lease import Lease, publish, read_published
from distill_ray.schema import TargetRows
from distill_ray.storage import Storage, open_storage
from distill_ray.targets import ManifestUnit, RunManifest, Witness
from distill_ray.units import Units
from tests.unit.targets_fakes import captured, identity, unit

OF = identity(temperatures=(2.0,))
WIDE = replace(OF, top_k=2 * OF.top_k)
SEQUENCES, ROWS = captured(OF)
AGAIN = captured(WIDE)[1]
UNIT = unit()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path))


class Engine:
    """Both answers to `SEQUENCES`."""

    version, notes = "made up", ()

    def score(self, sequences: list[np.ndarray]) -> list[TargetRows | str]:
        return list(ROWS)

    def score_again(self, sequences: list[np.ndarray]) -> list[TargetRows | str] | None:
        place = {s.tokens.tobytes(): i for i, s in enumerate(SEQUENCES)}
        return [AGAIN[place[tokens.tobytes()]] for tokens in sequences]


def _taught(witnesses: int) -> TaughtUnit:
    return teach(Engine(), ReadUnit(UNIT, SEQUENCES, [], witnesses=witnesses))  # type: ignore[arg-type]


def _columns(rows: TargetRows | str) -> dict[str, Any]:
    assert isinstance(rows, TargetRows)
    return vars(rows) | {f"T={t}": tail for t, tail in rows.log_tail_at.items()} | {"log_tail_at": 0}


def test_what_a_witness_keeps_comes_back(storage: Storage) -> None:
    first = replace(AGAIN[0], entropy_N=None, log_tail_at={0.1: AGAIN[0].log_tail_N})
    said = {3: Witness(SEQUENCES[0].tokens, first), 11: Witness(SEQUENCES[2].tokens, "a reason: ∞ at 3")}
    targets.write_witness(storage, OF, UNIT.hash, said)
    found = targets.read_witness(storage, OF, UNIT.hash)
    assert found.keys() == said.keys()
    assert found[11].rows == said[11].rows
    for place in said:
        np.testing.assert_array_equal(found[place].tokens, said[place].tokens)
    np.testing.assert_equal(_columns(found[3].rows), _columns(first))
    assert targets.witnessed(storage, OF) == [UNIT.hash]


def test_the_newest_witness_comes_first(storage: Storage, tmp_path: Path) -> None:
    names = [unit(str(i)).hash for i in range(4)]
    for age, name in enumerate(names):
        targets.write_witness(storage, OF, name, {0: Witness(SEQUENCES[0].tokens, AGAIN[0])})
        os.utime(tmp_path / targets.witness_key(OF, name), (1e9 - age, 1e9 - age))
    assert targets.witnessed(storage, OF) == names


def test_a_damaged_witness_is_named(storage: Storage) -> None:
    targets.write_witness(storage, OF, UNIT.hash, {0: Witness(SEQUENCES[0].tokens, AGAIN[0])})
    key = targets.witness_key(OF, UNIT.hash)
    data = storage.get(key)
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    for broken in (data[:-40], b"", flipped, b"PK\x05\x06" + bytes(18)):  # the last one is an empty archive
        storage.put(key, broken)
        with pytest.raises(IntegrityError, match=f"witness .*{UNIT.hash}.npz is damaged"):
            targets.read_witness(storage, OF, UNIT.hash)
    for at in range(len(data)):  # whatever a flipped bit makes of the archive's own fields
        storage.put(key, data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        with suppress(IntegrityError):
            targets.read_witness(storage, OF, UNIT.hash)


def test_twice_as_many_sequences_as_the_audit_wants_get_a_witness() -> None:
    units = Units.of(unit(str(i)) for i in range(200))
    asked = targets.to_witness(units, 3)
    assert (len(asked), set(asked.values())) == (6, {1})
    # Units are captured in the order of their hashes: the last teacher that joins may be asked, too.
    assert max(asked) > units[150].hash
    assert min(asked) < units[50].hash
    units = units[:10]
    assert set(targets.to_witness(units, 12).values()) == {3}
    assert targets.to_witness(units, 0) == {} == targets.to_witness(units[:0], 8)
    assert (AuditSection().sampled, AuditSection(engine="vllm").sampled) == (8, 0)
    chosen = targets.places(UNIT.hash, 100, 4)
    assert chosen == sorted(set(chosen))
    assert chosen != targets.places(unit("b").hash, 100, 4)
    assert targets.places(UNIT.hash, 2, 4) == [0, 1]


def test_the_witness_follows_its_own_object_alone(storage: Storage) -> None:
    write(storage, OF, _taught(0))
    assert list(targets.witnessed(storage, OF)) == []
    write(storage, OF, _taught(2))
    assert list(targets.witnessed(storage, OF)) == [], "the object that is there is another capture's"
    storage.delete(targets.unit_key(OF, UNIT.hash))
    write(storage, OF, _taught(2))
    assert list(targets.read_witness(storage, OF, UNIT.hash)) == targets.places(UNIT.hash, len(SEQUENCES), 2)


def test_a_witness_goes_with_its_unit_and_one_alone_when_sources_are_withdrawn(storage: Storage) -> None:
    other, third = unit("other"), unit("third")
    for name in (UNIT.hash, other.hash, third.hash):
        targets.write_witness(storage, OF, name, {0: Witness(SEQUENCES[0].tokens, AGAIN[0])})
    storage.put(targets.unit_key(OF, UNIT.hash), b"")
    storage.put(targets.unit_key(OF, other.hash), b"")
    remove_units(storage, OF.fingerprint, np.array([other.hash.encode()]))
    assert set(targets.witnessed(storage, OF)) == {UNIT.hash, third.hash}
    assert [u for u, _ in targets.each_object(storage, OF)] == [UNIT.hash]
    gc.forget(storage, gc.Found({}, (), {}, (), ()))
    assert targets.witnessed(storage, OF) == [UNIT.hash]


def test_what_goes_wrong_with_a_second_answer_costs_no_row() -> None:
    class Failing(Engine):
        def score_again(self, sequences: list[np.ndarray]) -> list[TargetRows | str] | None:
            raise IntegrityError("another layout")

    taught = teach(Failing(), ReadUnit(UNIT, SEQUENCES, [], witnesses=2))  # type: ignore[arg-type]
    assert (len(taught.rows), taught.witness) == (len(SEQUENCES), {})
    assert taught.notes == ("no second answer for the audit: another layout",)


@pytest.fixture
def auditor(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> WitnessAuditor:
    """Of one unit that was written with witnesses of all its sequences."""
    return _auditor(storage, monkeypatch, OF)


def _auditor(storage: Storage, monkeypatch: pytest.MonkeyPatch, of: targets.CaptureIdentity) -> WitnessAuditor:
    taught = _taught(9)
    if of.generate is not None:
        taught = replace(taught, sequences=[replace(s, finish="stop") for s in taught.sequences])
    summary = write(storage, of, taught)
    monkeypatch.setattr(witnessed.corpus, "load_tokenizer", lambda *_: None)
    monkeypatch.setattr(witnessed, "stage_folder", lambda *_, **__: None)
    recipe: Any = type("Recipe", (), {"audit": AuditSection(sequences=4)})
    recipe.teacher = type("Teacher", (), {"model": "", "trust_remote_code": False})
    manifest = RunManifest(of, (ManifestUnit(summary, 1, "a.jsonl"),))
    return WitnessAuditor(recipe, storage, manifest, tolerance_of("float32", None), threading.Event())


def test_stored_rows_are_held_to_the_witness(auditor: WitnessAuditor, storage: Storage) -> None:
    (sample,) = auditor.choose("seed")
    assert len(sample.sequences) == 4
    found = auditor.score(UNIT.hash, sample.sequences)
    assert found.difference is None
    assert found.rows == sum(len(SEQUENCES[i].tokens) - 1 for i in sample.sequences) > 0
    place = max(sample.sequences, key=lambda i: len(SEQUENCES[i].tokens))
    wrong = dict(targets.read_witness(storage, OF, UNIT.hash))
    rows = wrong[place].rows
    assert isinstance(rows, TargetRows)
    rows.logprobs_NK[1, 0] -= 0.3
    targets.write_witness(storage, OF, UNIT.hash, wrong)
    auditor._witness.cache_clear()
    found = auditor.score(UNIT.hash, sample.sequences)
    assert found.difference is not None
    assert (found.difference[0], found.difference[1].position) == (place, 1)
    auditor._stop.set()
    with pytest.raises(StoppedError):
        auditor.score(UNIT.hash, sample.sequences)


@pytest.mark.parametrize("generate", [None, {}], ids=["corpus", "completions"])
def test_of_other_completions_a_witness_says_nothing_and_of_a_corpus_all_is_judged(
    generate: Any, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = replace(OF, generate=generate)
    auditor = _auditor(storage, monkeypatch, of)
    said = dict(targets.read_witness(storage, of, UNIT.hash))
    said[2] = replace(said[2], tokens=said[2].tokens + 1)
    said[99] = said[0]
    targets.write_witness(storage, of, UNIT.hash, said)
    auditor._recipe.audit = AuditSection(sequences=5)  # type: ignore[misc]
    (sample,) = auditor.choose("seed")
    assert sample.sequences == ((0, 1, 2, 3, 4) if generate is None else (0, 1, 3, 4))


def test_a_damaged_witness_is_said_and_another_taken(auditor: WitnessAuditor, storage: Storage) -> None:
    storage.put(targets.witness_key(OF, UNIT.hash), b"damaged")
    assert auditor.choose("seed") == []
    assert auditor.notes[0] == "chosen among 1 of 1 units, those with a second answer"
    assert "is damaged" in auditor.notes[1]
    storage.delete(targets.witness_key(OF, UNIT.hash))
    assert auditor.choose("seed") == []


def test_the_teacher_is_loaded_where_it_was_not_asked_twice(auditor: WitnessAuditor, storage: Storage) -> None:
    def chosen(last: Any = None, **stated: Any) -> tuple[bool, tuple[int, ...]]:
        recipe: Any = auditor._recipe
        recipe.audit = AuditSection(**stated)
        of = auditor._manifest, "seed", auditor._tolerance, threading.Event()
        by, (sample,), notes = verb._choose(recipe, storage, *of, last)
        said[:] = notes
        return by is not None, sample.sequences

    said: list[str] = []

    assert chosen(sequences=2)[0]
    assert chosen(sequences=1000) == (True, tuple(range(len(SEQUENCES))))
    assert not chosen(sequences=2, engine="transformers")[0]
    assert chosen(units=(UNIT.hash,)) == (False, tuple(range(len(SEQUENCES))))
    failed = {"passed": False, "targets": "seed", "path": "vLLM's public path"}
    assert not chosen(failed, sequences=2)[0]
    assert said == ["the last audit loaded the teacher and failed, so this one loads it, too"]
    for change in ({"passed": True}, {"targets": "mended"}, {"path": "vLLM's public path, in the capture"}):
        assert chosen(failed | change, sequences=2)[0]
    witness = targets.read_witness(storage, OF, UNIT.hash)
    targets.write_witness(storage, OF, UNIT.hash, {0: witness[0]})
    assert chosen(sequences=1)[0]
    by_witness, places = chosen(sequences=2)
    assert (by_witness, len(places)) == (False, 2)
    assert said[-1] == "teachers scored 1 of the 2 sequences twice when they captured, so the teacher is loaded"


@pytest.mark.parametrize("passed", [True, False])
def test_a_failed_outcome_stands_when_the_next_audit_is_killed_and_a_passed_one_does_not(
    passed: bool, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class _KilledError(Exception):
        pass

    def killed(*_: Any) -> None:
        raise _KilledError

    monkeypatch.setattr(verb, "_tolerance", killed)
    recipe: Any = SimpleNamespace(run_prefix="runs/tiny/v1", audit=AuditSection(), teacher=TeacherSection(model="/m"))
    last = {"key": "runs/tiny/v1/audit.json", "passed": passed}
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        publish(storage, lease.token, "targets", {"key": "runs/tiny/v1/targets.parquet", "sha256": "a"})
        publish(storage, lease.token, "audit", last)
        with pytest.raises(_KilledError):
            verb.run(recipe, storage, RunManifest(OF, ()), lease.token, threading.Event())
    assert read_published(storage, recipe.run_prefix).get("audit") == (None if passed else last)
