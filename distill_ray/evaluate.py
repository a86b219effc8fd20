"""How good the student is: held-out figures of teacher, student before and student after training, and the report.

The teacher is never run again: its figures come from the stored targets, by the same functions as the student's.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_ray import report as reports
from distill_ray.config import Recipe, fingerprint, identity_of
from distill_ray.config.sections import StudentSection
from distill_ray.errors import DistillError, IntegrityError, StoppedError
from distill_ray.ingest import BatchPlan, PackLoader, build_plan
from distill_ray.lease import LeaseToken, read_document, read_published
from distill_ray.storage import Storage, stage_folder
from distill_ray.student.published import stage_student
from distill_ray.telemetry import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from distill_ray.ingest import PackedBatch
    from distill_ray.losses import RowMetrics
    from distill_ray.student import DistillModule
    from distill_ray.targets import CaptureIdentity, RunManifest

_POLL_S = 0.5


def require_held_out(manifest: RunManifest, recipe: Recipe) -> BatchPlan:
    """The plan of the held-out sequences, without opening a target object; call it before money goes into training.

    Raises:
        UserError: no held-out sequence has a supervised token, or `evaluate.require` names an unknown metric.
    """
    reports.check_require(recipe.evaluate.require)
    return build_plan(
        manifest,
        holdout=recipe.corpus.holdout,
        split="held_out",
        pack_tokens=recipe.train.pack_tokens,
        packs_per_batch=recipe.evaluate.batch_packs,
        max_sequences=recipe.evaluate.max_sequences,
    )


def run(
    recipe: Recipe,
    storage: Storage,
    manifest: RunManifest,
    token: LeaseToken,
    progress: Callable[[str, int | None, str], Progress] = Progress,
    *,
    timings: Mapping[str, float] | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Score the held-out targets in one Ray task, then write and publish report.json and report.html.

    Args:
        recipe: the run.
        storage: the run's root.
        manifest: the targets that the run uses.
        token: of the run's lease; the report is published against it.
        progress: makes the progress display.
        timings: wall seconds by stage, for the report.
        stop: set it to stop; nothing is written then.

    Returns:
        The report, as written to report.json.

    Raises:
        UserError: nothing is held out, or a metric is not finite.
        IntegrityError: the student or its training history is not what was published.
        StoppedError: `stop` was set.
    """
    started = time.monotonic()
    plan = require_held_out(manifest, recipe)
    published = read_published(storage, recipe.run_prefix)
    if "student" not in published:
        raise DistillError(f"run {recipe.run_prefix} has no trained student yet; run `distill-ray train` first")
    history = _history(storage, published["student"])
    job = _Job(recipe, storage, manifest.identity, plan, published["student"])
    with progress("evaluate", 2 * plan.steps, "batches") as shown:
        evaluation = _score_remotely(job, shown, stop or threading.Event())
    seconds = {**(timings or {}), "evaluate": round(time.monotonic() - started, 3)}
    report = reports.build_report(
        evaluation,
        identity=_identity(recipe, manifest, str(published["student"]["sha256"])),
        timings=reports.Timings(seconds, _rates(manifest, history, evaluation.tokens_per_s)),
        tokens=_tokens(published["targets"], manifest, history, evaluation.teacher.rows),
        targets=_target_figures(manifest),
        history=history,
        require=recipe.evaluate.require,
    )
    _publish(recipe, storage, token, report, history)
    return report


def outdated(recipe: Recipe, published: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why the published report is not of this recipe and student; None where it is."""
    entry = published["report"]
    if entry["student"] != published["student"]["sha256"]:
        return "it is of another training of the student"
    if entry["settings"] != json.loads(json.dumps(identity_of(recipe.evaluate))):
        return "other settings of [evaluate]"
    if entry["require"] != recipe.evaluate.require:
        return "other bounds of evaluate.require"
    return None


def only_bounds_changed(recipe: Recipe, storage: Storage, published: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the report's figures stand and only have to be judged anew."""
    entry = published.get("report")
    if entry is None:
        return False
    try:
        reports.read_report(storage, recipe.run_prefix)
    except IntegrityError:
        return False
    same = {**published, "report": {**entry, "require": recipe.evaluate.require}}
    return outdated(recipe, same) is None


def rejudge(recipe: Recipe, storage: Storage, token: LeaseToken) -> None:
    """Hold the published figures against the recipe's bounds as they are now; nothing is scored again."""
    report = reports.read_report(storage, recipe.run_prefix)
    report["gate"] = reports.judge({model: report[model] for model in reports.MODELS}, recipe.evaluate.require)
    student = read_published(storage, recipe.run_prefix)["student"]
    _publish(recipe, storage, token, report, _history(storage, student))


def _publish(
    recipe: Recipe, storage: Storage, token: LeaseToken, report: dict[str, Any], history: list[dict[str, float]]
) -> None:
    section = recipe.evaluate
    reports.write_report(storage, token, report, history, settings=identity_of(section), require=dict(section.require))


@dataclass(frozen=True)
class _Job:
    """What the scoring task needs, picklable."""

    recipe: Recipe
    storage: Storage
    identity: CaptureIdentity
    plan: BatchPlan
    student: dict[str, Any]
    """The published entry of the trained student."""


def _score_remotely(job: _Job, shown: Progress, stop: threading.Event) -> reports.Evaluation:
    import ray
    from ray.exceptions import RayTaskError

    # A streaming task tells its progress while it runs and needs no actor to do so.
    use_gpu = job.recipe.train.use_gpu
    task = ray.remote(_score).options(num_returns="streaming", num_cpus=1, num_gpus=1 if use_gpu else 0)
    stream: Any = task.remote(job)
    while True:
        ready, _ = ray.wait([stream], timeout=_POLL_S, fetch_local=False)
        if stop.is_set():
            ray.cancel(stream)
            raise StoppedError("evaluation was stopped; nothing of it is kept, the trained student is")
        if not ready:
            continue
        try:
            item: Any = ray.get(next(stream))
        except RayTaskError as error:
            # Ray's wrapper carries the worker's traceback as its message; a user wants the message alone.
            if isinstance(error.cause, DistillError):
                raise error.cause from error
            raise
        if isinstance(item, reports.Evaluation):
            return item
        shown.advance(1, tokens_per_s=item)


def _score(job: _Job) -> Iterator[float | reports.Evaluation]:
    """Yields tokens/s after every batch, then the sums."""
    import torch

    recipe = job.recipe
    if not recipe.train.use_gpu:
        # Ray gives a task as many threads as it declares CPUs; this task runs alone.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = stage_student(job.storage, job.student)
    trained = recipe.model_copy(update={"student": StudentSection(model=str(folder))})
    bins = recipe.evaluate.ece_bins
    teacher, before, after = (reports.MetricSums(bins) for _ in range(3))
    kept_mass = reports.KeptMassHistogram()
    tokens, seconds = 0, 0.0
    for origin, sums in ((recipe, before), (trained, after)):
        module = _load(origin, folder, job.identity)
        with PackLoader(
            job.storage,
            job.identity,
            job.plan,
            student_ids=module.head.spec.vocab_size,
            micro_batch_packs=recipe.evaluate.batch_packs,
        ) as batches:
            for batch in batches:
                begun = time.perf_counter()
                sums.add(_on_cpu(student_rows(module, batch)))
                seconds += time.perf_counter() - begun
                tokens += batch.tokens
                if sums is before:
                    teacher.add(_on_cpu(teacher_rows(batch, job.identity.vocab_size)))
                    kept_mass.add(batch.targets.log_tail_N.numpy())
                yield round(tokens / seconds, 1)
        del module
    yield reports.Evaluation(teacher, before, after, kept_mass, tokens / seconds)


def _load(origin: Recipe, trained: Path, identity: CaptureIdentity) -> DistillModule:
    """A student ready to score; `before` is built by the very function that training started from."""
    from distill_ray.student import DistillModule, build_initial, loss_spec, shared_vocabulary

    # Only a student cut from the teacher needs its weights here; the tokenizer lies beside the trained student too.
    cut = origin.student.teacher_layers is not None
    model, config = build_initial(origin, stage_folder(origin.teacher.model) if cut else trained)
    vocab_size = shared_vocabulary(model, identity.vocab_size, identity.top_k)
    module = DistillModule(model, loss_spec(config, vocab_size, origin.loss))
    return module.to("cuda" if origin.train.use_gpu else "cpu").eval()


def student_rows(module: DistillModule, batch: PackedBatch) -> RowMetrics:
    """Figures of a student on the supervised rows of a batch; logits exist for one chunk of rows at a time."""
    import torch

    from distill_ray.losses import head_metrics

    head = module.head
    with torch.no_grad():
        batch = batch.to(head.weight.device)
        return head_metrics(
            module.hidden_rows(batch),
            head.weight,
            head.bias,
            batch.targets,
            vocab_size=head.spec.vocab_size,
            logit_scale=head.spec.logit_scale,
            softcap=head.spec.softcap,
        )


def teacher_rows(batch: PackedBatch, vocab_size: int) -> RowMetrics:
    """Figures of the teacher: its own stored rows stand in for the student's, through the same comparison."""
    from distill_ray.losses import ModelRows, compare_rows

    stored = batch.targets
    own = ModelRows(
        log_q_NK=stored.logprobs_NK,
        log_tail_N=stored.log_tail_N,
        top1_N=stored.ids_NK[:, 0],
        top1_logprob_N=stored.logprobs_NK[:, 0],
        # Stored apart from the kept ids: the actual token may rank below them.
        actual_logprob_N=batch.actual_logprob_N,
    )
    return compare_rows(own, stored, vocab_size=vocab_size)


def _on_cpu(rows: RowMetrics) -> reports.ScoredRows:
    def of(x: Tensor) -> np.ndarray:
        return x.cpu().numpy()

    return reports.ScoredRows(
        actual_logprob_N=of(rows.logprob_N),
        kl_t1_N=of(rows.kl_N),
        acceptance_N=of(rows.acceptance_N),
        agree_N=of(rows.top1_agree_N),
        confidence_N=of(rows.confidence_N),
        correct_N=of(rows.correct_N),
    )


def _history(storage: Storage, student: Mapping[str, Any]) -> list[dict[str, float]]:
    """The very history that the published student was trained with."""
    entry = student["history"]
    history = reports.read_history(read_document(storage, entry, "run `distill-ray train` again"))
    if len(history) != entry["steps"]:
        raise IntegrityError(
            f"{storage.uri}/{entry['key']} holds {len(history)} steps, published were {entry['steps']}; run "
            "`distill-ray train` again"
        )
    return history


def _identity(recipe: Recipe, manifest: RunManifest, student_sha256: str) -> reports.RunIdentity:
    units = sorted([u.unit, u.multiplicity] for u in manifest.units)
    return reports.RunIdentity(
        name=recipe.name,
        version=recipe.version,
        capture=manifest.identity.fingerprint,
        units=len(units),
        corpus=fingerprint({"units": units}),
        teacher=fingerprint(dict(manifest.identity.teacher)),
        tokenizer=manifest.identity.tokenizer,
        student=student_sha256,
        recipe=fingerprint(identity_of(recipe)),
    )


def _tokens(
    entry: Mapping[str, Any], manifest: RunManifest, history: list[dict[str, float]], held_out: int
) -> reports.TokenCounts:
    total = sum(int(u.lengths.sum()) for u in manifest.units)
    captured = int(entry["captured_tokens"])
    return reports.TokenCounts(
        captured=captured,
        reused=total - captured,
        supervised_train=int(sum(step["tokens"] for step in history)),
        held_out=held_out,
    )


def _rates(manifest: RunManifest, history: list[dict[str, float]], evaluation_tokens_per_s: float) -> dict[str, float]:
    rates = {"evaluate": evaluation_tokens_per_s}
    if manifest.teacher_seconds > 0:
        rates["teacher"] = sum(int(u.lengths.sum()) for u in manifest.units) / manifest.teacher_seconds
    train_s = sum(step["seconds"] for step in history)
    if train_s > 0:
        rates["train"] = sum(step["tokens"] for step in history) / train_s
    return rates


def _target_figures(manifest: RunManifest) -> reports.TargetFigures:
    return reports.TargetFigures(
        rows=manifest.rows,
        bytes_per_row=sum(u.object_bytes for u in manifest.units) / manifest.rows,
        mean_kept_mass=manifest.mean_kept_mass,
        dead_letters=manifest.dead,
    )
