"""The trained student in storage: a Hugging Face folder, its manifest, then the lease record that names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_ray.errors import IntegrityError
from distill_ray.lease import (
    LeaseToken,
    document_entry,
    publish,
    put_owned,
    read_document,
    read_published,
    read_whole_folder,
    store_folder,
)
from distill_ray.storage import Storage
from distill_ray.train.scratch import Scratch, writing_under

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from distill_ray.train.job import Job


HISTORY_FILE = "metrics.jsonl"


def to_lines(history: list[dict[str, float]]) -> bytes:
    """One JSON line a step."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in history)


def store_history(storage: Storage, token: LeaseToken, history: list[dict[str, float]]) -> dict[str, Any]:
    """Write `<run>/metrics.jsonl` whole: after a resume it holds the restored lines and those redone, none twice.

    Returns:
        Its entry {key, sha256, steps}.

    Raises:
        LeaseLostError: another driver took the run over; its history stands.
    """
    key, data = f"{token.run_prefix}/{HISTORY_FILE}", to_lines(history)
    put_owned(storage, token, key, data)
    return {**document_entry(key, data), "steps": len(history)}


def publish_student(
    job: Job,
    model: PreTrainedModel,
    state: dict[str, Tensor],
    teacher_folder: Path,
    history: list[dict[str, float]],
    plan: str,
) -> None:
    """Write the folder under `<run>/student/e<epoch>/` and the history, and publish them as "student", by rank 0.

    Args:
        job: storage, token and recipe.
        model: gives architecture and configuration.
        state: all weights by Hugging Face name, adapters not yet merged.
        teacher_folder: gives the tokenizer.
        history: one line for every optimizer step trained.
        plan: digest of the batches trained on.

    Raises:
        LeaseLostError: another driver took the run over; nothing was published.
    """
    from distill_ray.student.folder import write_folder
    from distill_ray.student.lora import merge_lora

    lora, steps = job.recipe.student.lora, len(history)
    # With the epoch in the key, a driver that lost its lease cannot touch its successor's files.
    prefix = f"{job.token.run_prefix}/student/e{job.token.epoch:04d}"
    weights, trust = merge_lora(state, lora) if lora else state, job.recipe.teacher.trust_remote_code
    with Scratch("student") as folder:
        with writing_under(Path(folder)):
            write_folder(model, weights, teacher_folder, Path(folder), trust)
        entry = store_folder(job.storage, job.token, prefix, Path(folder), {"step": steps})
    stored = store_history(job.storage, job.token, history)
    publish(job.storage, job.token, "student", {**entry, "step": steps, "plan": plan, "history": stored})


def damage(storage: Storage, entry: Mapping[str, Any]) -> str | None:
    """What of a published student's files and history is missing or cut short; None if nothing."""
    try:
        read_whole_folder(storage, entry)
        read_document(storage, entry["history"], "it is written anew")
    except IntegrityError as error:
        return str(error)
    return None


def published_student(storage: Storage, run_prefix: str) -> dict[str, Any] | None:
    """The lease record's entry of a trained student whose files and history are all there, else None."""
    entry = read_published(storage, run_prefix).get("student")
    return entry if entry is not None and damage(storage, entry) is None else None
