"""Finding the newest checkpoint that every rank could restore."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_ray import checkpoints
from distill_ray.config import Recipe
from distill_ray.errors import DistillError, IntegrityError, UserError
from distill_ray.storage import Storage
from distill_ray.train.meeting import patiently
from distill_ray.train.result import HISTORY_FILE
from distill_ray.train.scratch import Scratch

if TYPE_CHECKING:
    from distill_ray.student.engine import StudentEngine
    from distill_ray.train.job import Job


def restore_newest(job: Job, engine: StudentEngine, plan: str) -> tuple[int, list[dict[str, float]]]:
    """Load the newest whole checkpoint into `engine`, the same on every rank.

    Rank 0 chooses. If any rank finds one of its files missing or altered, all of them go back one checkpoint, before
    anything was unpickled; a damaged conversion is first made anew.

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

    broken, made_anew = set[int](), set[int]()
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
        with Scratch("restore") as own:
            # Of a conversion every rank reads every file: one copy a node, or eight of them fill its disk.
            folder = _of_this_node(own) if resized else Path(own)
            names = [f.name for f in manifest.files]
            if folder != Path(own):
                names = []
            elif not resized:
                names = engine.needed(names, engine.rank)
            problems = [p for p in _everyones_problem(job, manifest, names, engine.place(folder)) if p]
            if not problems:
                engine.load(folder, universal=resized)
                lines = (engine.place(folder) / HISTORY_FILE).read_text().splitlines()
                dist.barrier()  # another rank may still read what lies here
                return manifest.step, [json.loads(line) for line in lines]
        if resized and manifest.step not in made_anew:
            # Sizes alone said that it is whole. What it was made from may be sound: no step is given up yet.
            made_anew.add(manifest.step)
            if engine.rank == 0:
                checkpoints.forget_universal(job.storage, job.token, manifest.step)
                _say(job, f"the conversion of step {manifest.step} is damaged and made anew: {problems[0]}")
            continue
        broken.add(manifest.step)
        if engine.rank == 0:
            _say(
                job, f"checkpoint of step {manifest.step} is broken and not used: {problems[0]}; trying the one before"
            )


def _converted(
    job: Job, engine: StudentEngine, manifest: checkpoints.Manifest, broken: set[int]
) -> checkpoints.Manifest | None:
    """The checkpoint for this number of workers; None, and its step `broken`, where a file of it is. A collective."""
    from distill_ray.train.resizing import for_any_size

    def convert() -> checkpoints.Manifest | DistillError | None:
        if engine.rank != 0:
            return None
        try:
            return for_any_size(job, manifest, lambda text: _say(job, text))
        except IntegrityError as error:
            broken.add(manifest.step)
            _say(job, f"checkpoint of step {manifest.step} is broken and not used: {error}; trying the one before")
            return None
        except DistillError as error:
            return error

    found = patiently(convert)[0]
    if isinstance(found, DistillError):
        raise found
    return found


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


def _of_this_node(own: str) -> Path:
    """The folder of the first rank on this machine. A collective."""
    import torch.distributed as dist

    here = os.environ.get("NODE_RANK", "0")
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (here, own))
    return Path(next(folder for node, folder in everyone if node == here))


def _everyones_problem(job: Job, manifest: checkpoints.Manifest, names: list[str], folder: Path) -> list[str | None]:
    def restore() -> str | None:
        try:
            checkpoints.restore(job.storage, manifest, names, folder)
        except IntegrityError as error:
            return str(error)
        return None

    return patiently(restore)


def _say(job: Job, text: str) -> None:
    import ray

    ray.get(job.board.note.remote(text))
