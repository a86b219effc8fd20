"""Capture of one run: find out what is missing, capture it, and publish which units the run uses."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from distill_ray import corpus, targets, teacher
from distill_ray.capture.budget import Budget
from distill_ray.capture.emitting import CaptureMeters, live_teachers
from distill_ray.capture.figures import Figures
from distill_ray.capture.refused import Watch, refusals, require_few
from distill_ray.capture.stages import EngineFactory
from distill_ray.codec import CODEC_VERSION
from distill_ray.config import Recipe, identity_of
from distill_ray.cost import metered
from distill_ray.errors import IntegrityError, UserError
from distill_ray.lease import LeaseToken, publish, put_owned, read_published
from distill_ray.metrics import Meters
from distill_ray.schema import DeadLetter, UnitSummary
from distill_ray.storage import Storage, stage_folder
from distill_ray.targets import CaptureIdentity, RunManifest
from distill_ray.telemetry import Progress
from distill_ray.units import Units, hashes_of, in_sorted, places_in, texts

if TYPE_CHECKING:
    from distill_ray.capture.pool import Work

_INDEX_BATCH = 1000
_REASONS = 20
"""Kinds of refusal that a report shows."""
_INDEX_EVERY_S = 60.0
"""Captured units, and seconds, between two additions to the index: what a killed driver has to read again."""


def capture_identity(recipe: Recipe) -> CaptureIdentity:
    """What the recipe's targets are, from the teacher's folder alone; no model is loaded.

    Raises:
        UserError: the folder is missing, or lacks config, weights, tokenizer or (for `auto`) a stated dtype; or an end
            token where prompts are to be answered.
    """
    folder = stage_folder(recipe.teacher.model, weights=False)
    tokenizer = corpus.load_tokenizer(folder, recipe.teacher.trust_remote_code)
    section = teacher.resolve_dtype(recipe.teacher, folder)
    writing = teacher.writing_of(recipe.capture, folder, recipe.teacher.trust_remote_code)
    return CaptureIdentity(
        teacher=identity_of(section) | {"weights": teacher.weights_identity(section.model, section.revision)},
        tokenizer=corpus.tokenizer_identity(tokenizer),
        vocab_size=teacher.vocabulary_size(folder),
        top_k=recipe.capture.top_k,
        temperatures=recipe.capture.temperatures,
        codec=CODEC_VERSION,
        draws=recipe.capture.draws,
        draws_from=recipe.capture.draws_from,
        draws_temperature=recipe.capture.draws_temperature,
        generate=None if writing is None else writing.to_json(),
        token_ids=teacher.token_ids(folder, recipe.teacher.trust_remote_code),
    )


def run(
    recipe: Recipe,
    storage: Storage,
    token: LeaseToken,
    stop: threading.Event,
    progress: Callable[[str, int | None, str], Progress] = Progress,
    *,
    engine_factory: EngineFactory | None = None,
) -> RunManifest:
    """Capture whatever of the corpus is not captured yet, and publish the run's manifest. Ray must be initialised.

    The published entry "targets" also counts the units `captured` by this call (and their `captured_tokens`) and
    those `reused`; `teacher_of_command` is what this call's teachers spent, until each one's last unit; what all
    commands spent is in the run's usage (`distill_ray.cost`).

    A version's units are settled when its manifest is first published: what came into the corpus since is another
    version's, or a student half trained would go on with other data.

    Args:
        recipe: what to capture.
        storage: the recipe's root.
        token: the run's lease.
        stop: set it to stop; finished units are kept and indexed.
        progress: makes the progress display.
        engine_factory: opens the teacher in each actor; the recipe's engine by default.

    Raises:
        UserError: nothing in the corpus could be captured, or the teacher cannot be used.
        BudgetSpentError: `capture.max_gpu_hours` is spent; what is finished is kept and indexed.
        StoppedError: `stop` was set.
        LeaseLostError: another driver owns the run by now; its manifest stands.
    """
    identity = capture_identity(recipe)
    tokenizer = corpus.load_tokenizer(
        stage_folder(recipe.teacher.model, weights=False), recipe.teacher.trust_remote_code
    )
    planned = corpus.plan_units(
        recipe.corpus,
        identity.tokenizer,
        storage,
        top_k=identity.top_k,
        draws=identity.draws,
        prompts=identity.generate is not None,
    )
    units = _of_this_version(recipe, storage, identity, planned)
    factory = engine_factory or partial(
        teacher.open_engine, recipe.teacher, recipe.capture, recipe.corpus.window_tokens
    )
    with progress("capture", len(units), "units") as bar:
        pending = pending_units(storage, identity, units, bar.note)
        counts: dict[str, Any] = {"captured": len(pending), "reused": len(units) - len(pending)}
        figures = Figures(recipe, pending)
        bar.skip(counts["reused"], reused=counts["reused"])
        bar.weigh(figures.bytes_left)
        if pending:
            from distill_ray.capture import pool

            with metered(recipe, storage, token, "capture") as meter:
                work = pool.Work(recipe, storage, identity, tokenizer, pending, factory, meter)
                _capture(work, token, stop, bar, figures, units)
        counts |= {"captured_tokens": figures.tokens, "teacher_of_command": figures.spent.to_json()}
        # Read back rather than kept: captures take days, and summaries 16 bytes a sequence.
        summaries, _ = targets.load_table(storage, identity, only=units.hashes)
        letters = _write_dead_letters(storage, token, identity, units, summaries)
        _require_sequences(recipe, units, summaries)
        refused = refusals(recipe, summaries, letters)
        if refused.refused:
            bar.note(str(refused))
    require_few(recipe, refused)
    entry = targets.write_run_manifest(storage, token, identity, units, summaries)
    told = {"documents": refused.documents, "refused": dict(refused.reasons[:_REASONS])}
    publish(storage, token, "targets", entry | counts | told)
    return targets.read_run_manifest(storage, entry)


def _capture(
    work: Work, token: LeaseToken, stop: threading.Event, bar: Progress, figures: Figures, units: Units
) -> None:
    from distill_ray.capture import pool

    recipe = work.recipe
    budget = Budget(recipe, work.storage, token.epoch)
    budget.check()
    labels = (recipe.name, recipe.version, "capture")
    meters = CaptureMeters(Meters(*labels), recipe, figures, len(units), len(units) - len(work.pending), live_teachers)

    def hold(seconds: Mapping[str, float]) -> None:
        budget.hold(seconds)
        meters.hold(budget.hours)

    watch = Watch(recipe, work.storage, work.identity, units)
    stream = pool.summaries(work, stop, bar.note, figures.spent.add, hold, meters.tick)
    with closing(meters), closing(stream), closing(_indexed(work.storage, work.identity, stream)) as finished:
        for summary in finished:
            size = figures.add(summary)
            watch.add(summary, size)
            meters.unit(summary)
            kept_mass = summary.kept_mass_sum / max(summary.rows, 1)
            bar.advance(1, weight=size, kept_mass=kept_mass, **figures.shown(), **budget.shown())


def pending_units(storage: Storage, identity: CaptureIdentity, units: Units, report: Callable[[str], None]) -> Units:
    """Those of the units that are not captured yet.

    Args:
        storage: the recipe's root.
        identity: the capture.
        units: the run's.
        report: told of every broken or vanished target object.
    """
    done = targets.done_hashes(storage, identity, report=report)
    return units.where(~in_sorted(done, units.hashes))


def damage(storage: Storage, entry: Mapping[str, Any]) -> str | None:
    """Which target objects of a published manifest are missing or have another size; None if none.

    Args:
        storage: the run's store.
        entry: "targets" of the run's record, whose document must be sound.
    """
    units = targets.read_run_manifest(storage, entry).units
    hashes, sizes = targets.object_sizes(storage, entry["fingerprint"])
    place, whole = places_in(hashes, units.hashes)
    whole[whole] = sizes[place[whole]] == units.table["object_bytes"].to_numpy()[whole]
    if whole.all():
        return None
    bad = units.hashes[~whole]
    return f"{len(bad)} of {len(units)} target objects missing or cut short (first: {texts(bad[:1])[0]})"


def _of_this_version(recipe: Recipe, storage: Storage, identity: CaptureIdentity, planned: Units) -> Units:
    entry = read_published(storage, recipe.run_prefix).get("targets")
    if entry is None:
        return planned
    if entry["fingerprint"] != identity.fingerprint:
        return planned
    try:
        manifest = targets.read_run_manifest(storage, entry)
    except IntegrityError as error:
        found = targets.units_of_lost_manifest(storage, entry, planned)
        if found is None:
            raise UserError(
                f"{storage.uri}/{entry['key']} is missing or damaged, and which {entry['units']} units version "
                f"{recipe.version} has cannot be told any more: the corpus has {len(planned)} now; restore that "
                "object, or let corpus.sources name the very sources of then, or give a new --version"
            ) from error
        return found
    wanted = manifest.units.hashes
    gone = np.flatnonzero(~in_sorted(planned.hashes, wanted))
    if len(gone):
        raise UserError(
            f"{len(gone)} of the {len(wanted)} units of version {recipe.version} are no longer in the corpus (one: of "
            f"{manifest.units[gone[0]].source}); restore those sources, or give a new --version"
        )
    return planned.where(in_sorted(wanted, planned.hashes)).counted(manifest.units.table["multiplicity"].to_numpy())


def _indexed(
    storage: Storage, identity: CaptureIdentity, stream: Iterator[UnitSummary]
) -> Generator[UnitSummary, None, None]:
    """Pass summaries on and add them to the index in batches; what is at hand is added on a stop or an error too."""
    batch: list[UnitSummary] = []
    last = time.monotonic()
    try:
        for summary in stream:
            batch.append(summary)
            if len(batch) >= _INDEX_BATCH or time.monotonic() - last >= _INDEX_EVERY_S:
                targets.append_index(storage, identity, batch)
                batch, last = [], time.monotonic()
            yield summary
    finally:
        targets.append_index(storage, identity, batch)


def _require_sequences(recipe: Recipe, units: Units, summaries: pa.Table) -> None:
    if not any(len(chunk.flatten()) for chunk in summaries["lengths"].chunks):
        raise UserError(
            f"none of the corpus's {summaries['dead'].to_numpy().sum()} documents in {len(units)} units could be "
            f"captured; the reasons lie in the units' dead letters (corpus.sources={list(recipe.corpus.sources)}): "
            "mend the documents or corpus.format"
        )


def _write_dead_letters(
    storage: Storage, token: LeaseToken, identity: CaptureIdentity, units: Units, summaries: pa.Table
) -> list[DeadLetter]:
    """Write the run's dead letters anew from the units' own lists, so that no rerun lists one twice.

    They lie in a folder of their own, beside `runs/`: a bucket's rule that removes old ones knows prefixes alone.
    """
    having = hashes_of(summaries["unit"])[summaries["dead"].to_numpy() > 0]
    letters: list[DeadLetter] = []
    for unit in units.where(in_sorted(having, units.hashes)):
        # A unit captured by another run may have been read from another path.
        found = targets.open_unit(storage, identity, unit.hash).dead
        letters += [replace(letter, source=unit.source.uri) for letter in found]
    text = "".join(json.dumps(asdict(letter), ensure_ascii=False) + "\n" for letter in letters)
    key = f"dead-letters/{token.run_prefix.removeprefix('runs/')}.jsonl"
    put_owned(storage, token, key, text.encode())
    return letters
