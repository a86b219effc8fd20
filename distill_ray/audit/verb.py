"""Audit of one run: choose a sample, compare it, and publish the outcome, whichever it is."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_ray import corpus
from distill_ray.audit.outcome import IN_CAPTURE, Outcome, document_of, limits, path_of, sentence
from distill_ray.audit.sample import UnitSample, choose, whole
from distill_ray.audit.tolerance import MEAN_ROWS, Tolerance, tolerance_of
from distill_ray.audit.unit import Found
from distill_ray.audit.witnessed import WitnessAuditor
from distill_ray.config import Recipe
from distill_ray.cost import metered
from distill_ray.errors import IntegrityError, UserError
from distill_ray.lease import LeaseToken, document_entry, publish, put_owned, read_published
from distill_ray.model_config import stated_quantization
from distill_ray.schema import Unit
from distill_ray.storage import Storage, stage_folder
from distill_ray.targets import RunManifest, unit_key
from distill_ray.telemetry import Progress
from distill_ray.units import HASH, places_in

if TYPE_CHECKING:
    from distill_ray.audit.remote import RemoteAuditor

_BATCH_TOKENS = 32_768
"""Tokens scored between two looks at the progress."""


def outdated(recipe: Recipe, published: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why the published audit does not let this recipe train; None where it does."""
    entry = published["audit"]
    if not entry["passed"]:
        return "it failed"
    if entry["targets"] != published["targets"]["sha256"]:
        return "it is of other targets"
    return None if entry["settings"] == _settings(recipe) else "other settings of [audit]"


def require_sample(recipe: Recipe) -> None:
    """Raises UserError where the recipe leaves nothing to audit."""
    if not recipe.audit.is_on:
        raise UserError("audit.sequences=0 leaves nothing to audit; set it, or give --sequences or --unit")


def run(
    recipe: Recipe,
    storage: Storage,
    manifest: RunManifest,
    token: LeaseToken,
    stop: threading.Event,
    progress: Callable[[str, int | None, str], Progress] = Progress,
) -> dict[str, Any]:
    """Compare a sample of the run's targets with its corpus and its teacher; publish the outcome as "audit".

    Of a sampled unit every sequence is compared with the corpus, and the sampled ones are scored again in full: they
    were when they were captured, or one actor loads the teacher for it. Ray must be initialised.

    Args:
        recipe: the run; [audit] says how much is compared, and by which engine.
        storage: the run's root.
        manifest: the targets that the run uses.
        token: of the run's lease.
        stop: set it to stop; nothing is published then.
        progress: makes the progress display.

    Returns:
        The document, as written to audit.json.

    Raises:
        IntegrityError: something differs: names unit, sequence and position, and what to do. It is published too.
        UserError: the sources of the sampled units cannot be read again, or the engine cannot load the teacher.
        StoppedError: `stop` was set.
    """
    from distill_ray.audit.remote import remote_auditor

    require_sample(recipe)
    published = read_published(storage, recipe.run_prefix)
    entry, last = published["targets"], published.get("audit")
    if last is None or last["passed"]:
        # Whatever comes of this one, an older outcome must not let training begin; one that failed does not.
        publish(storage, token, "audit", None)
    engine = recipe.teacher.engine if recipe.audit.engine == "auto" else recipe.audit.engine
    tolerance = _tolerance(recipe, manifest)
    witnesses, samples, notes = _choose(recipe, storage, manifest, entry["sha256"], tolerance, stop, last)
    with progress("audit", sum(len(s.sequences) for s in samples), "sequences") as bar:
        path = path_of(engine, loaded=witnesses is None)
        bar.note(f"{len(samples)} of {len(manifest.units)} units, scored again by {path}")
        for text in (*notes, *limits(manifest, engine, tolerance, loaded=witnesses is None)):
            bar.note(text)
        units = _sources(recipe, storage, manifest, samples)
        with ExitStack() as stack:
            auditor = witnesses
            if auditor is None:
                meter = stack.enter_context(metered(recipe, storage, token, "audit"))
                remote = remote_auditor(recipe, storage, manifest.identity, engine, tolerance, stop, bar.note, meter)
                auditor = stack.enter_context(remote)
            outcome = _compare(storage, manifest, samples, units, auditor, tolerance, bar)
        bar.note(sentence(outcome))
    document = document_of(manifest, outcome, engine, tolerance, loaded=witnesses is None)
    _publish(recipe, storage, token, entry["sha256"], document)
    if outcome.failure is not None:
        raise IntegrityError(outcome.failure)
    return document


def _choose(
    recipe: Recipe,
    storage: Storage,
    manifest: RunManifest,
    seed: str,
    tolerance: Tolerance,
    stop: threading.Event,
    last: Mapping[str, Any] | None,
) -> tuple[WitnessAuditor | None, list[UnitSample], list[str]]:
    """What is compared; with what, where the capture's teachers have scored enough of it twice; and what to say."""
    if recipe.audit.units:
        return None, whole(manifest, recipe.audit.units), []
    samples = partial(choose, manifest, seed, recipe.audit.sequences)
    if not recipe.audit.sampled:
        return None, samples(), []
    if last is not None and not last["passed"] and last["targets"] == seed and not last["path"].endswith(IN_CAPTURE):
        # A teacher that was loaded for it said no: those that captured are no judges of that.
        return None, samples(), ["the last audit loaded the teacher and failed, so this one loads it, too"]
    witnesses = WitnessAuditor(recipe, storage, manifest, tolerance, stop)
    found = witnesses.choose(seed)
    have, wanted = sum(len(s.sequences) for s in found), min(recipe.audit.sequences, manifest.sequences)
    if have >= wanted:
        return witnesses, found, witnesses.notes
    why = f"teachers scored {have} of the {wanted} sequences twice when they captured, so the teacher is loaded"
    return None, samples(), [*witnesses.notes, why]


def _tolerance(recipe: Recipe, manifest: RunManifest) -> Tolerance:
    """That of the teacher's arithmetic; recipes state a quantisation only where the checkpoint does not."""
    arithmetic = manifest.identity.teacher
    folder = stage_folder(recipe.teacher.model, weights=False)
    return tolerance_of(arithmetic["dtype"], arithmetic["quantization"] or stated_quantization(folder))


def _compare(
    storage: Storage,
    manifest: RunManifest,
    samples: list[UnitSample],
    units: Mapping[str, Unit],
    auditor: WitnessAuditor | RemoteAuditor,
    tolerance: Tolerance,
    bar: Progress,
) -> Outcome:
    outcome = Outcome()
    for sample in samples:
        unit, where = sample.unit.unit, f"{storage.uri}/{unit_key(manifest.identity, sample.unit.unit)}"
        different = auditor.check(units[unit], sample.unit.object_sha256)
        outcome.read += len(sample.unit.lengths)
        for batch in _batches(sample) if different is None else ():
            found = auditor.score(unit, batch)
            outcome.add(unit, batch, found)
            bar.advance(len(batch), worst_nats=outcome.worst, moved_mass=outcome.mean_moved_mass)
            different = found.difference
            if different is not None:
                break
        if different is not None:
            outcome.failure = _failure(units[unit], different, where)
            return outcome
    if outcome.rows >= MEAN_ROWS and not outcome.mean_moved_mass <= tolerance.mean_mass:
        outcome.failure = (
            f"audit: over {outcome.rows} rows the mean probability mass that lies elsewhere is "
            f"{outcome.mean_moved_mass:.4f}, allowed {tolerance.mean_mass}: no single row stands out, all are off; "
            f"{_remedy(f'the capture {storage.uri}/targets/{manifest.fingerprint}')}"
        )
    return outcome


def _sources(recipe: Recipe, storage: Storage, manifest: RunManifest, samples: list[UnitSample]) -> dict[str, Unit]:
    """Where the sampled units' sources lie now."""
    prompts = manifest.identity.generate is not None
    planned = corpus.plan_units(recipe.corpus, manifest.identity.tokenizer, storage, prompts=prompts)
    place, found = places_in(planned.hashes, np.array([s.unit.unit for s in samples], HASH))
    gone = [s.unit for s, there in zip(samples, found, strict=True) if not there]
    if gone:
        raise UserError(
            f"{len(gone)} of the {len(samples)} units to audit are no longer in the corpus (one: of {gone[0].source}); "
            "restore those sources, or set audit.sequences = 0 to train unaudited"
        )
    return {s.unit.unit: planned[at] for s, at in zip(samples, place.tolist(), strict=True)}


def _batches(sample: UnitSample) -> Iterator[tuple[int, ...]]:
    batch: list[int] = []
    for i in sample.sequences:
        batch.append(i)
        if int(sample.unit.lengths[batch].sum()) >= _BATCH_TOKENS:
            yield tuple(batch)
            batch = []
    if batch:
        yield tuple(batch)


def _failure(unit: Unit, found: Found, where: str) -> str:
    sequence, different = found
    return (
        f"audit: unit {unit.hash} (of {unit.source.uri}), sequence {sequence}, position "
        f"{different.position}: {different.what}; {_remedy(where)}"
    )


def _remedy(what: str) -> str:
    return (
        f"delete {what} and run the command again: what is missing is captured anew. If it fails again, the teacher "
        "does not repeat itself: ask the other engine (`distill-ray audit --engine`) before training on its targets"
    )


def _settings(recipe: Recipe) -> dict[str, Any]:
    return recipe.audit.model_dump(mode="json")


def _publish(
    recipe: Recipe, storage: Storage, token: LeaseToken, targets_sha256: str, document: dict[str, Any]
) -> None:
    data = (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()
    key = f"{token.run_prefix}/audit.json"
    put_owned(storage, token, key, data)
    shown = {
        name: document[name]
        for name in ("passed", "failure", "path", "dtype", "tolerance", "units", "sequences", "rows", "worst_nats")
    }
    links = {"targets": targets_sha256, "settings": _settings(recipe)}
    publish(storage, token, "audit", document_entry(key, data) | links | shown)
