"""The Ray Data pipeline over pending units: read and tokenise → teacher actors → encode and write.

Memory is bounded whatever the corpus size: Ray Data holds back readers while the teacher is busy.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayActorError, RayTaskError
from ray.util.annotations import RayDeprecationWarning

from distill_ray import corpus, targets
from distill_ray.capture.pool import TASK_CPUS, Work
from distill_ray.capture.scaling import teachers_for
from distill_ray.capture.stages import FAILED_STARTS, Teacher, from_row, not_started, read, to_row, write
from distill_ray.config import Recipe
from distill_ray.cost import ActorTime
from distill_ray.errors import DistillError
from distill_ray.schema import UnitSummary
from distill_ray.session import died, is_death
from distill_ray.storage import Storage
from distill_ray.targets import CaptureIdentity
from distill_ray.teacher import actor_resources
from distill_ray.units import Units, unit_of

_TASKS_PER_TEACHER = 2
"""Readers, and writers, for each teacher: each is a process with its own tokenizer."""
_CALLS_PER_TEACHER = 2
"""Units that an actor has at a time: the engine has one, the other is unpickled before it or pickled after it."""
_UNIT_RETRIES = 4
"""How often a unit may lose its teacher's process before the run fails: one that kills every engine must not loop."""
_MOST_BLOCKS = 10_000


@dataclass(frozen=True)
class Captured:
    """A unit whose object is written."""

    summary: UnitSummary
    notes: tuple[str, ...]
    """What the user should know of the engine that taught it."""
    spent: ActorTime | None
    """All that its teacher's actor had spent by then."""


def iter_captured(work: Work) -> Iterator[Captured]:
    """Capture what is pending; each unit once its object is written, in order of completion.

    Raises DistillError: an error of ours in any stage, as it was raised there; a teacher's process died too often.
    """
    try:
        rows = _pipeline(work)
        tables: Iterator[Any] = iter(rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
        for table in tables:
            for i in range(table.num_rows):
                yield from_row(table.slice(i, 1))
    except Exception as error:
        raise _own_error(error) from error


def pool_size(recipe: Recipe, pending: Units) -> tuple[int, int, int]:
    """`teachers_for` what is pending, which is at least one unit."""
    return teachers_for(recipe, len(pending), int(pending.rows["bytes"].sum()))


def _pipeline(work: Work) -> ray.data.Dataset:
    recipe, pending = work.recipe, work.pending
    least, first, most = pool_size(recipe, pending)
    tasks = min(_TASKS_PER_TEACHER * most, len(pending))
    # Such a task needs no GPU node; on a student node it would keep that from going away.
    small: dict[str, Any] = {"num_cpus": TASK_CPUS, "label_selector": recipe.cluster.besides("student") or None}
    # The tokenizer travels as an object: a machine that only tokenises need not stage the teacher's weights.
    tokenizer_ref = ray.put(work.tokenizer)
    witnesses = targets.to_witness(pending, recipe.audit.sampled)
    as_is: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
    with _unit_sized_blocks():
        # Not from_arrow(): each block is looked at in a task of its own there, which asks for a CPU, and for thousands
        # of those an autoscaler brings every node that it may.
        units = ray.data.from_blocks(list(blocks(pending)))
        return (
            units.map_batches(
                partial(
                    _read_row,
                    section=recipe.corpus,
                    generate=recipe.capture.generate,
                    most_tokens=corpus.most_unit_tokens(work.identity.top_k, work.identity.draws),
                    tokenizer_ref=[tokenizer_ref],
                    witnesses=witnesses,
                ),
                **small,
                compute=ray.data.TaskPoolStrategy(tasks),
                **as_is,
            )
            .map_batches(
                Teacher,
                fn_constructor_args=(work.engine_factory, recipe.teacher.model, work.meter),
                compute=ray.data.ActorPoolStrategy(
                    min_size=least,
                    initial_size=first,
                    max_size=most,
                    max_tasks_in_flight_per_actor=_CALLS_PER_TEACHER,
                    max_concurrent_calls_per_actor=_CALLS_PER_TEACHER,
                    enable_true_multi_threading=True,
                ),
                max_task_retries=_UNIT_RETRIES,
                **actor_resources(recipe.teacher, recipe.cluster.selector("teacher")),
                **recipe.cluster.environments.teacher.options(),
                **as_is,
            )
            .map_batches(
                partial(_write_row, storage=work.storage, identity=work.identity),
                **small,
                compute=ray.data.TaskPoolStrategy(tasks),
                **as_is,
            )
        )


def blocks(pending: Units) -> Iterator[pa.Table]:
    """The pipeline's input: tables of one row a unit, at most 10,000 of them, made one after the other."""
    step = -(-len(pending) // _MOST_BLOCKS)
    for start in range(0, len(pending), step):
        yield pending[start : start + step].table()


@contextmanager
def _unit_sized_blocks() -> Iterator[None]:
    """Every row becomes a block of its own, so that a finished unit never waits for a block to fill.

    Also: an error of ours keeps its type, and Ray Data prints nothing of its own.
    """
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1
    context.raise_original_map_exception = True
    context.max_consecutive_actor_init_deaths = FAILED_STARTS - 1
    # The pool grows by units given to an actor over its calls; Ray Data's threshold is for one call: at its own 1.75
    # this pool would never grow. It shrinks only once no unit waits: each teacher then goes as it is done. What starves
    # all of them for a moment, a store that does not answer, must not cost a start of each.
    scaling = context.autoscaling_config
    scaling.actor_pool_util_upscaling_threshold /= _CALLS_PER_TEACHER
    scaling.actor_pool_util_downscaling_threshold = -1.0
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        # Ray 2.60 announces that arguments of the actor will lose their place here, and has none yet for retries.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        yield


@lru_cache(maxsize=1)
def _tokenizer(ref: ray.ObjectRef) -> Any:
    return ray.get(ref)


def _read_row(
    table: pa.Table,
    section: Any,
    generate: Any,
    most_tokens: int,
    tokenizer_ref: list[ray.ObjectRef],
    witnesses: Mapping[str, int],
) -> pa.Table:
    unit = unit_of(table)
    asked = witnesses.get(unit.hash, 0)
    return to_row(read(unit, section, _tokenizer(tokenizer_ref[0]), most_tokens, generate, asked))


def _write_row(table: pa.Table, storage: Storage, identity: CaptureIdentity) -> pa.Table:
    taught = from_row(table)
    return to_row(Captured(write(storage, identity, taught), taught.notes, taught.spent))


def _own_error(error: BaseException) -> BaseException:
    """Our own error inside Ray's wrapping, what to do about a dead process, or the error itself."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, RayTaskError):
            # Ray's wrapper may be of both classes; what was raised in the worker is inside.
            inner = inner.cause  # type: ignore[attr-defined]
        if isinstance(inner, DistillError):
            # Ray Data adds advice on settings of its own, which would not help here.
            inner.args = (str(inner).partition("\nFailed to apply UDF transform")[0],)
            return inner
        if isinstance(inner, RayActorError) and inner.actor_init_failed:
            return not_started(str(inner))
        if inner and is_death(inner):
            # A task's retries are Ray's own affair; only a teacher's are ours to count.
            retries = f"{_UNIT_RETRIES} retries" if isinstance(inner, RayActorError) else "retries"
            return died(f"a capture process died, and {retries} of its unit did not help", inner)
        inner = inner and (inner.__cause__ or inner.__context__)
    return error
