"""The trained student in storage: a Hugging Face folder, its manifest, then the lease record that names it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_ray.errors import IntegrityError
from distill_ray.lease import publish, read_published, read_whole_folder, store_folder
from distill_ray.storage import Storage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from distill_ray.train.worker import Job


def publish_student(
    job: Job, model: PreTrainedModel, state: dict[str, Tensor], teacher_folder: Path, steps: int
) -> None:
    """Write the folder under `<run>/student/e<epoch>/` and publish it as "student". Called by rank 0.

    Args:
        job: storage, token and recipe.
        model: gives architecture and configuration.
        state: all weights by Hugging Face name, adapters not yet merged.
        teacher_folder: gives the tokenizer.
        steps: optimizer steps trained.

    Raises:
        LeaseLostError: another driver took the run over; nothing was published.
    """
    from distill_ray.student import merge_lora, write_folder

    lora = job.recipe.student.lora
    # With the epoch in the key, a driver that lost its lease cannot touch its successor's files.
    prefix = f"{job.token.run_prefix}/student/e{job.token.epoch:04d}"
    with tempfile.TemporaryDirectory(prefix="distill-ray-student-") as folder:
        write_folder(model, merge_lora(state, lora) if lora else state, teacher_folder, Path(folder))
        entry = store_folder(job.storage, job.token, prefix, Path(folder), {"step": steps})
    publish(job.storage, job.token, "student", {**entry, "step": steps})


def published_student(storage: Storage, run_prefix: str) -> dict[str, Any] | None:
    """The lease record's entry of a trained student whose files are all there at their sizes, else None."""
    entry = read_published(storage, run_prefix).get("student")
    if entry is None:
        return None
    try:
        read_whole_folder(storage, entry)
    except IntegrityError:
        return None
    return entry
