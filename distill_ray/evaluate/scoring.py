"""Held-out figures of teacher, student before and student after training, in one Ray task.

The teacher is never run again: its figures come from the stored targets, by the same functions as the student's.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_ray import report as reports
from distill_ray.config import Recipe
from distill_ray.config.student import StudentSection
from distill_ray.cost import Beat, Stopwatch, node_type
from distill_ray.errors import DistillError, StoppedError
from distill_ray.ingest import BatchPlan
from distill_ray.session import died, is_death, note_full
from distill_ray.storage import Storage, stage_folder
from distill_ray.student.published import stage_student
from distill_ray.telemetry import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from distill_ray.ingest.batch import PackedBatch
    from distill_ray.losses import RowMetrics
    from distill_ray.student.module import DistillModule
    from distill_ray.targets import CaptureIdentity

_POLL_S = 0.5


@dataclass(frozen=True)
class ScoringJob:
    """What the scoring task needs, picklable."""

    recipe: Recipe
    storage: Storage
    identity: CaptureIdentity
    plan: BatchPlan
    student: dict[str, Any]
    """The published entry of the trained student."""
    meter: Any = None
    """Actor to which the task posts its seconds."""


def score_remotely(job: ScoringJob, shown: Progress, stop: threading.Event) -> reports.Evaluation:
    """Score teacher, student before and student after in one Ray task.

    Raises:
        StoppedError: `stop` was set.
        DistillError: an error of ours in the task, as it was raised there; its process died too often.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    # A streaming task tells its progress while it runs and needs no actor to do so.
    needed = {"CPU": 1, "GPU": 1} if job.recipe.train.use_gpu else {"CPU": 1}
    selector = job.recipe.cluster.selector("student")
    note_full("evaluation", needed, shown.note, stop, selector)
    options: dict[str, Any] = {"num_cpus": needed["CPU"], "num_gpus": needed.get("GPU", 0)}
    options |= {"label_selector": selector} if selector else {}
    options |= job.recipe.cluster.environments.student.options()
    task = ray.remote(_score).options(num_returns="streaming", **options)
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
        except RayError as error:
            if not is_death(error):
                raise
            raise died("the process that scores the students died", error) from error
        if isinstance(item, reports.Evaluation):
            return item
        shown.advance(1, tokens_per_s=item)


def _score(job: ScoringJob) -> Iterator[float | reports.Evaluation]:
    """Yields tokens/s after every batch, then the sums."""
    watch = Stopwatch(node_type=node_type())
    beat = Beat(watch, job.meter)
    try:
        evaluation = yield from _scored(job, watch)
    finally:
        beat.close()
    yield evaluation  # not before its seconds have arrived: the driver asks for no more and ends the meter


def _scored(job: ScoringJob, watch: Stopwatch) -> Generator[float, None, reports.Evaluation]:
    import torch

    from distill_ray.ingest.loader import PackLoader

    recipe = job.recipe
    if not recipe.train.use_gpu:
        # Ray gives a task as many threads as it declares CPUs; this task runs alone.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = stage_student(job.storage, job.student)
    trained = recipe.model_copy(update={"student": StudentSection(model=str(folder))})
    bins = recipe.evaluate.ece_bins
    teacher, before, after = (reports.MetricSums(bins) for _ in range(3))
    kept_mass = reports.KeptMassHistogram()
    sizes = np.zeros(job.identity.vocab_size, np.int64)
    sketch = reports.HeldOutSketch(job.identity.tokenizer, job.identity.fingerprint, sizes)
    tokens, seconds = 0, 0.0
    for origin, sums in ((recipe, before), (trained, after)):
        watch.enter("loading")
        module = _load(origin, folder, job.identity)
        watch.enter("idle")
        with PackLoader(
            job.storage,
            job.identity,
            job.plan,
            student_ids=module.head.spec.vocab_size,
            micro_batch_packs=recipe.evaluate.batch_packs,
        ) as batches:
            for batch in batches:
                begun = time.perf_counter()
                watch.enter("busy")
                sums.add(_on_cpu(student_rows(module, batch)))
                seconds += time.perf_counter() - begun
                tokens += batch.tokens
                if sums is before:
                    teacher.add(_on_cpu(teacher_rows(batch, job.identity.vocab_size)))
                    kept_mass.add(batch.targets.log_tail_N.numpy())
                    tokens_held = batch.input_ids[batch.document_ids >= 0].numpy()
                    sketch.add(tokens_held, batch.targets.logprobs_NK.numpy(), batch.targets.log_tail_N.numpy())
                watch.enter("idle")
                watch.did(1, batch.tokens)
                yield round(tokens / seconds, 1)
        del module
    return reports.Evaluation(teacher, before, after, kept_mass, tokens / seconds, sketch)


def _load(origin: Recipe, trained: Path, identity: CaptureIdentity) -> DistillModule:
    """A student ready to score; `before` is built by the very function that training started from."""
    from distill_ray.student.build import build_initial
    from distill_ray.student.module import DistillModule, loss_spec, shared_vocabulary
    from distill_ray.student.varlen import FLASH

    # Only a student cut from the teacher needs its weights here; the tokenizer lies beside the trained student too.
    cut = origin.student.teacher_layers is not None
    model, config = build_initial(origin, stage_folder(origin.teacher.model) if cut else trained)
    vocab_size = shared_vocabulary(model, identity.vocab_size, identity.top_k)
    gpu = origin.train.use_gpu
    module = DistillModule(model, loss_spec(config, vocab_size, origin.loss), kernel=FLASH if gpu else None)
    return module.to("cuda" if gpu else "cpu").eval()


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
