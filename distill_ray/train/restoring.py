"""Finding the newest checkpoint that every rank could restore."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_ray import checkpoints
from distill_ray.config import Recipe
from distill_ray.errors import DistillError, IntegrityError, UserError
from distill_ray.storage import Storage
from distill_ray.train.result import HISTORY_FILE

if TYPE_CHECKING:
    from distill_ray.student.engine import StudentEngine
    from distill_ray.train.job import Job


def restore_newest(job: Job, engine: StudentEngine, plan: str) -> tuple[int, list[dict[str, float]]]:
    """Load the newest whole checkpoint into `engine`, the same on every rank.

    Rank 0 chooses. If any rank finds one of its files missing or altered, all of them go back one checkpoint, before
    anything was unpickled.

    Args:
        job: the run.
        engine: freshly started.
        plan: digest of the run's batches.

    Returns:
        Optimizer steps done, and the metrics lines of those steps; (0, []) without a checkpoint.

    Raises:
        UserError: the checkpoint is of another plan or ZeRO stage.
        DistillError: it is of another world size, and cannot be converted.
    """
    import torch.distributed as dist

    from distill_ray.student.engine import check_resumable

    broken: set[int] = set()
    while True:
        choice: list[checkpoints.Manifest | None] = [None]
        if engine.rank == 0:
            choice[0] = checkpoints.latest_whole(
                job.storage, job.token.run_prefix, say=lambda text: _say(job, text), exclude=broken
            )
        dist.broadcast_object_list(choice, src=0)
        manifest = choice[0]
        if manifest is None:
            return 0, []
        check_plan(manifest, plan)
        check_resumable(manifest.zero_stage, job.recipe.train, manifest.step)
        resized = manifest.world_size != engine.world
        if resized:
            manifest = _converted(job, engine, manifest, broken)
            if manifest is None:
                continue
        with tempfile.TemporaryDirectory(prefix="distill-ray-restore-") as folder:
            problems = [p for p in _everyones_problem(job, engine, manifest, Path(folder)) if p]
            if not problems:
                engine.load(Path(folder), universal=resized)
                lines = (engine.place(Path(folder)) / HISTORY_FILE).read_text().splitlines()
                return manifest.step, [json.loads(line) for line in lines]
        broken.add(manifest.step)
        if engine.rank == 0:
            _say(
                job, f"checkpoint of step {manifest.step} is broken and not used: {problems[0]}; trying the one before"
            )


def _converted(
    job: Job, engine: StudentEngine, manifest: checkpoints.Manifest, broken: set[int]
) -> checkpoints.Manifest | None:
    """The checkpoint for this number of workers; None, and its step `broken`, where a file of it is. A collective."""
    import torch.distributed as dist

    from distill_ray.train.resizing import for_any_size

    box: list[Any] = [None, None]
    if engine.rank == 0:
        try:
            box[0] = for_any_size(job, manifest, lambda text: _say(job, text))
        except IntegrityError as error:
            broken.add(manifest.step)
            _say(job, f"checkpoint of step {manifest.step} is broken and not used: {error}; trying the one before")
        except DistillError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def check_newest(recipe: Recipe, storage: Storage, plan: str) -> None:
    """Refuse, before any worker is started, what `restore_newest` would refuse.

    Raises:
        UserError: the newest whole checkpoint is of another plan or ZeRO stage.
    """
    from distill_ray.student.engine import check_resumable

    manifest = checkpoints.latest_whole(storage, recipe.run_prefix)
    if manifest is not None:
        check_plan(manifest, plan)
        check_resumable(manifest.zero_stage, recipe.train, manifest.step)


def check_plan(manifest: checkpoints.Manifest, plan: str) -> None:
    """Refuse a checkpoint whose batches were others: going on would train on some twice and leave some out.

    Raises:
        UserError: with both digests and the remedy.
    """
    if manifest.plan != plan:
        raise UserError(
            f"the checkpoint of step {manifest.step} was trained on the batches of plan {manifest.plan[:12]}…, but the "
            f"targets and recipe now give plan {plan[:12]}…: the units, their sequences or the teacher are others, "
            "or another version of the software orders them otherwise; restore them, or start a new --version"
        )


def _everyones_problem(
    job: Job, engine: StudentEngine, manifest: checkpoints.Manifest, folder: Path
) -> list[str | None]:
    import torch.distributed as dist

    mine: str | None = None
    try:
        names = [f.name for f in manifest.files]
        if manifest.world_size == engine.world:
            names = engine.needed(names, engine.rank)
        checkpoints.restore(job.storage, manifest, names, engine.place(folder))
    except IntegrityError as error:
        mine = str(error)
    problems: list[str | None] = [None] * engine.world
    dist.all_gather_object(problems, mine)
    return problems


def _say(job: Job, text: str) -> None:
    import ray

    ray.get(job.board.note.remote(text))
