"""A checkpoint of another number of workers: converted once by rank 0, then loaded by all."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from distill_ray import checkpoints
from distill_ray.train.result import HISTORY_FILE
from distill_ray.train.scratch import Scratch

if TYPE_CHECKING:
    from distill_ray.train.job import Job


def for_any_size(job: Job, manifest: checkpoints.Manifest, say: Callable[[str], None]) -> checkpoints.Manifest:
    """The conversion of a checkpoint to DeepSpeed's universal format: the stored one, or a new one. By rank 0.

    Args:
        job: the run.
        manifest: of the checkpoint.
        say: takes one sentence with the seconds and the size.

    Raises:
        IntegrityError: a file of the checkpoint is missing or altered.
        DistillError: the conversion failed.
    """
    from distill_ray.student.universal import convert

    found = checkpoints.universal_of(job.storage, job.token.run_prefix, manifest)
    if found is not None:
        return found
    started = time.monotonic()
    with Scratch("convert") as work:
        saved, converted = Path(work) / "saved", Path(work) / "converted"
        checkpoints.restore(job.storage, manifest, [f.name for f in manifest.files], saved)
        convert(saved, converted, manifest.zero_stage, max(1, len(os.sched_getaffinity(0)) // 2))
        shutil.copyfile(saved / HISTORY_FILE, converted / HISTORY_FILE)
        seconds = time.monotonic() - started
        stored = checkpoints.store_universal(job.storage, job.token, manifest, converted, seconds=seconds)
    taken = time.monotonic() - started
    size, before = (sum(f.size for f in m.files) / 2**30 for m in (stored, manifest))
    disk = size + before
    say(
        f"checkpoint of step {manifest.step} was saved by {manifest.world_size} workers; converted for any number in "
        f"{taken:.0f} s, {size:.3g} GiB, with {disk:.3g} GiB of local disk: {taken / before:.3g} s and "
        f"{disk / before:.3g} GiB of disk for each GiB of the checkpoint"
    )
    return stored
