"""The scoring task without Ray: what it counts for the next version's drift."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from distill_ray.cost import ActorTime, Stopwatch
from distill_ray.evaluate import require_held_out, scoring
from distill_ray.evaluate.scoring import ScoringJob, _score
from distill_ray.lease import Lease
from distill_ray.report import Evaluation
from distill_ray.schema import Sequence
from distill_ray.storage import open_storage
from distill_ray.targets import read_run_manifest
from tests.assets import TINY_VOCAB, tiny_teacher_folder
from tests.stages.trained_run import (
    HELD_OUT,
    K,
    Run,
    random_sequences,
    row_logits,
    store_capture,
    store_student,
    tiny_recipe,
)
from tests.unit.targets_fakes import exact_rows


def _job(root: Path, sequences: list[Sequence]) -> ScoringJob:
    recipe = tiny_recipe(root)
    storage = open_storage(recipe.storage.root)
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        store_capture(storage, recipe, lease.token, sequences)
        store_student(storage, recipe, lease.token, tiny_teacher_folder())
        published = Run(recipe, storage, lease.token, sequences).published
    manifest = read_run_manifest(storage, published["targets"])
    return ScoringJob(recipe, storage, manifest.identity, require_held_out(manifest, recipe), published["student"])


def test_the_sketch_is_of_every_held_out_sequence_once(tmp_path: Path):
    sequences = random_sequences()
    job = _job(tmp_path / "root", sequences)
    *_, evaluation = _score(job)
    assert isinstance(evaluation, Evaluation)
    assert evaluation.sketch is not None
    held = [s for s in sequences if s.doc_key in HELD_OUT]
    wanted = np.bincount(np.concatenate([s.tokens for s in held]), minlength=TINY_VOCAB)
    assert (evaluation.sketch.counts == wanted).all()
    assert evaluation.sketch.rows == sum(int(s.loss_mask.sum()) for s in held)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher_folder(), dtype="float32")
    entropy = 0.0
    for s in held:
        rows = exact_rows(row_logits(teacher, s), s.tokens[1:], K)
        log_NB = np.concatenate([rows.logprobs_NK, rows.log_tail_N[:, None]], axis=1)[s.loss_mask[1:]]
        entropy -= float((np.exp(log_NB) * log_NB).sum())
    assert evaluation.sketch.entropy == pytest.approx(entropy, rel=2e-3)


def test_what_scoring_took_has_arrived_before_its_figures_are_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # The driver kills the meter once it has the figures; a short evaluation's busy seconds came too late for it.
    told = list[ActorTime]()

    def beat(watch: Stopwatch, meter: object) -> SimpleNamespace:
        return SimpleNamespace(close=lambda: told.append(watch.read()))

    monkeypatch.setattr(scoring, "Beat", beat)
    batches = 0
    for item in _score(_job(tmp_path / "root", random_sequences())):
        assert bool(told) == isinstance(item, Evaluation)
        batches += isinstance(item, float)
    assert told[0].busy_s > 0
    assert told[0].done == batches
