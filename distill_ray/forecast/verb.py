"""The forecast of one run."""

from __future__ import annotations

import math
from pathlib import Path

from distill_ray import capture, corpus, targets, teacher
from distill_ray.codec import CODEC_VERSION
from distill_ray.config import Recipe
from distill_ray.cost import Basis, Forecast, stage_forecast, stored_forecast
from distill_ray.forecast.amounts import corpus_amounts
from distill_ray.forecast.rates import rates
from distill_ray.schema import Amounts
from distill_ray.storage import open_storage, stage_folder
from distill_ray.student.size import weight_count
from distill_ray.targets import CaptureIdentity


def predict(recipe: Recipe, identity: CaptureIdentity | None = None) -> Forecast:
    """What the run will take, from cached indices, a sample of the sources that are new, and rates.

    Args:
        recipe: that `check` found right.
        identity: of its capture. None: made here where that is cheap, with `teacher.revision` or weights on this
            machine; else what is captured already is not known.

    Raises:
        UserError: a source is damaged.
    """
    storage = open_storage(recipe.storage.root)
    if identity is None and (recipe.teacher.revision or not recipe.teacher.model.startswith("s3://")):
        identity = capture.capture_identity(recipe)
    folder = stage_folder(recipe.teacher.model, weights=False)
    tokenizer = corpus.load_tokenizer(folder, recipe.teacher.trust_remote_code)
    found = corpus_amounts(recipe, storage, tokenizer, identity)
    notes = list(found.notes)
    rate = rates(recipe, storage, identity, notes)
    train, new = _trained(recipe, found.epoch), found.new
    units = max(1, -(-found.new_bytes // recipe.corpus.unit_bytes))
    _, teachers, _ = capture.teachers_for(recipe, units, found.new_bytes)
    stages = (
        stage_forecast(recipe, "capture", new.tokens, new.supervised, rate["capture"], teachers),
        stage_forecast(
            recipe, "train", train.train_tokens, train.train_supervised, rate["train"], recipe.train.workers.max
        ),
    )
    stored = stored_forecast(recipe, new, _row_bytes(recipe, folder), train.train_tokens, weight_count(recipe))
    if recipe.capture.draws:
        notes.append("every drawn token counts as a distinct one")
    sample, generates = found.sample, recipe.capture.generate is not None
    basis = Basis(
        found.sources, found.bytes, sample.sources, sample.bytes, found.captured_tokens, generates, tuple(notes)
    )
    return Forecast(stages, round(new.rows), stored, basis)


def _trained(recipe: Recipe, epoch: Amounts) -> Amounts:
    """What training goes through; full packs, where it ends with `max_steps`."""
    section = recipe.train
    found = epoch.times(section.epochs)
    most = (section.max_steps or math.inf) * section.global_batch_tokens
    return found.times(most / found.train_tokens) if found.train_tokens > most else found


def _row_bytes(recipe: Recipe, teacher_folder: Path) -> float:
    section = recipe.capture
    # Weights and tokenizer change no row's size.
    layout = CaptureIdentity(
        teacher={},
        tokenizer="",
        vocab_size=teacher.vocabulary_size(teacher_folder),
        top_k=section.top_k,
        temperatures=section.temperatures,
        codec=CODEC_VERSION,
        draws=section.draws,
    )
    return targets.stored_row_bytes(layout, with_entropy=not recipe.teacher.public_path)
