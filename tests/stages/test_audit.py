"""The audit through the command line, on a real capture: sound targets pass, one wrong number in one row does not."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from distill_ray import corpus, targets
from distill_ray.audit.tolerance import tolerance_of
from distill_ray.audit.unit import Found
from distill_ray.audit.witnessed import WitnessAuditor
from distill_ray.codec import encode
from distill_ray.config import load_recipe
from distill_ray.lease import Lease, publish
from distill_ray.schema import SourceSlice, TargetRows, Unit
from distill_ray.status import status
from distill_ray.storage import open_storage
from distill_ray.targets.writer import _to_bytes as sealed
from tests.assets import TINY_VOCAB, tiny_llama_folder
from tests.stages.jobs import Job

pytestmark = pytest.mark.usefixtures("cluster_address")

Plant = Callable[[TargetRows, int], TargetRows]
"""Decoded rows and a row's number → the rows with that one wrong."""


def one_row_shift(rows: TargetRows, t: int) -> TargetRows:
    """Row t holds what belongs to row t + 1."""
    return row_replaced(rows, t, rows.ids_NK[t + 1], rows.logprobs_NK[t + 1], rows.log_tail_N[t + 1])


def one_swapped_id(rows: TargetRows, t: int) -> TargetRows:
    """Rank 5 of row t is an id that the row does not keep."""
    ids = rows.ids_NK[t].copy()
    ids[4] = np.setdiff1d(np.arange(TINY_VOCAB), rows.ids_NK[t])[100]
    return row_replaced(rows, t, ids, rows.logprobs_NK[t], rows.log_tail_N[t])


def a_third_of_a_nat(rows: TargetRows, t: int) -> TargetRows:
    """Rank 3 of row t is 0.3 nats too likely; the row stays in rank order."""
    logprobs = rows.logprobs_NK[t].copy()
    logprobs[2] += 0.3
    order = np.argsort(-logprobs, kind="stable")
    return row_replaced(rows, t, rows.ids_NK[t][order], logprobs[order], rows.log_tail_N[t])


def row_replaced(rows: TargetRows, t: int, ids: np.ndarray, logprobs: np.ndarray, log_tail: float) -> TargetRows:
    values = [a.copy() for a in (rows.ids_NK, rows.logprobs_NK, rows.log_tail_N)]
    for array, value in zip(values, (ids, logprobs, log_tail), strict=True):
        array[t] = value
    return replace(rows, ids_NK=values[0], logprobs_NK=values[1], log_tail_N=values[2])


@dataclass(frozen=True)
class Planted:
    unit: str
    sequence: int
    position: int
    path: Path
    """The unit's object."""


def plant(job: Job, change: Plant, version: str = "v1") -> Planted:
    """Change one row of one object, seal it anew and let the run's manifest name it: every checksum holds."""
    storage = open_storage(job.root)
    manifest = targets.read_run_manifest(storage, job.published(version)["targets"])
    victim = max(manifest.units, key=lambda u: len(u.lengths))
    i, t = len(victim.lengths) - 1, int(victim.lengths[-1]) // 2
    stored = targets.read_unit(storage, manifest.identity, victim.unit)
    sequences = [stored.sequence(j) for j in range(len(stored))]
    rows = change(stored.rows(i), t)
    packed = sequences[i].packed_NB.copy()
    packed[t] = encode(rows.ids_NK[t : t + 1], rows.logprobs_NK[t : t + 1], rows.log_tail_N[t : t + 1], TINY_VOCAB)
    sequences[i] = replace(sequences[i], packed_NB=packed)
    info = stored.info
    entropy = sequences[0].entropy_N is not None
    data = sealed(info.identity, info.unit, sequences, list(info.dead), info.kept_mass_sum, entropy)
    key = targets.unit_key(manifest.identity, victim.unit)
    storage.put(key, data)
    summaries = {u.unit: u.summary for u in manifest.units}
    summaries[victim.unit] = targets.read_unit(storage, manifest.identity, victim.unit).summary()
    planned = [_planned(u) for u in manifest.units]
    with Lease.acquire(storage, f"runs/tiny/{version}") as lease:
        entry = targets.write_run_manifest(storage, lease.token, manifest.identity, planned, summaries)
        publish(storage, lease.token, "targets", job.published(version)["targets"] | entry)
    return Planted(victim.unit, i, t, Path(job.root, key))


def _planned(unit: targets.ManifestUnit) -> Unit:
    return Unit(unit.unit, SourceSlice(unit.source, "", "lines", 0, 0), 0, unit.multiplicity)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher has scored every sequence twice."""
    folder = tmp_path_factory.mktemp("captured")
    Job(folder, str(folder / "root"), audit=1000).call(command="capture")
    return folder


@pytest.fixture
def job(captured: Path, tmp_path: Path) -> Job:
    shutil.copytree(captured / "root", tmp_path / "root")
    shutil.copytree(captured / "data", tmp_path / "data")
    return Job(tmp_path, str(tmp_path / "root"), audit=6)


def shown(job: Job) -> str:
    return status(load_recipe(job.recipe)).render()


def test_sound_targets_pass_and_are_not_audited_twice(job: Job):
    assert "audit     to do" in shown(job)
    first = job.call(command="audit")
    assert "sound" in first.stderr
    entry = job.published()["audit"]
    assert entry["passed"]
    assert (entry["path"], entry["dtype"], entry["sequences"], entry["units"]) == (
        "transformers, dense, in the capture",
        "float32",
        6,
        6,
    )
    assert entry["worst_nats"] < 1e-4
    assert re.search(
        r"audit     done: 6 sequences, [\d,]+ rows by transformers, dense, in the capture \(float32\)", shown(job)
    )
    again = job.call(command="audit")
    assert "scored again" not in again.stderr
    assert job.published()["audit"] == entry


def audit_whole(job: Job, unit: str) -> Found | None:
    """What the audit does with one unit and all its sequences."""
    recipe, storage = load_recipe(job.recipe), open_storage(job.root)
    manifest = targets.read_run_manifest(storage, job.published()["targets"])
    auditor = WitnessAuditor(recipe, storage, manifest, tolerance_of("float32", None), threading.Event())
    stored = next(u for u in manifest.units if u.unit == unit)
    (source,) = [u for u in corpus.plan_units(recipe.corpus, manifest.identity.tokenizer, storage) if u.hash == unit]
    found = auditor.check(source, stored.object_sha256)
    return found or auditor.score(unit, tuple(range(len(stored.lengths)))).difference


@pytest.mark.parametrize("change", [one_row_shift, one_swapped_id, a_third_of_a_nat], ids=lambda c: c.__name__)
def test_one_wrong_row_of_a_sealed_object_is_found_at_its_position(change: Plant, job: Job):
    planted = plant(job, change)
    found = audit_whole(job, planted.unit)
    assert found is not None
    assert (found[0], found[1].position) == (planted.sequence, planted.position)


def test_training_does_not_start_on_wrong_targets_and_the_remedy_works(job: Job):
    planted = plant(job, a_third_of_a_nat)
    # Of a named unit every sequence is audited, by a teacher that is loaded for it.
    job = Job(job.folder, job.root, edits={"sequences = 0": f'units = ["{planted.unit}"]'})
    failed = job.call(command="train", code=1)
    assert "Traceback" not in failed.stderr
    assert f"unit {planted.unit} (of {job.data}" in failed.stderr
    assert f"sequence {planted.sequence}, position {planted.position}:" in failed.stderr
    assert f"delete {planted.path}" in failed.stderr
    assert f"position {planted.position}" in shown(job)
    assert not any(name.startswith(("student", "checkpoint")) for name in job.published())
    planted.path.unlink()
    job.call(command="capture")
    assert job.published()["targets"]["captured"] == 1
    assert "audit     to do" in shown(job)
    assert audit_whole(job, planted.unit) is None


@pytest.mark.slow
def test_what_vllms_workers_captured_is_what_its_public_path_gives(tmp_path: Path):
    wide = tiny_llama_folder(vocab=TINY_VOCAB, hidden=128, heads=4)  # vLLM's CPU attention takes no head of 16
    job = Job(tmp_path, str(tmp_path / "root"), engine="vllm", teacher=wide, audit=6)
    passed = job.call(command="audit")
    print(passed.stderr)
    entry = job.published()["audit"]
    assert (entry["passed"], entry["path"]) == (True, "vLLM's public path, in the capture")
    planted = plant(job, one_swapped_id)
    failed = job.call("--unit", planted.unit, command="audit", code=1)
    assert f"sequence {planted.sequence}, position {planted.position}:" in failed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("drawn", ["draws = 20", 'draws = 8\ndraws_from = "tail"\ndraws_temperature = 2.0'])
def test_drawn_tokens_of_vllms_workers_pass_its_public_path(drawn: str, tmp_path: Path):
    wide = tiny_llama_folder(vocab=TINY_VOCAB, hidden=128, heads=4)
    edits = {"[audit]": f"temperatures = [2.0]\n{drawn}\n[audit]"}
    job = Job(tmp_path, str(tmp_path / "root"), engine="vllm", teacher=wide, audit=6, edits=edits)
    passed = job.call(command="audit")
    print(passed.stderr)
    assert "drawn tokens are held to their log-probabilities" in passed.stderr
    entry = job.published()["audit"]
    assert (entry["passed"], entry["path"], entry["sequences"]) == (True, "vLLM's public path, in the capture", 6)
