"""The trained student in storage: a Hugging Face folder, its manifest, then the lease record that names it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_ray.lease import publish, read_published
from distill_ray.storage import NotFoundError, Storage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from distill_ray.train.worker import Job

_MANIFEST = "manifest.json"


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
    files = []
    with tempfile.TemporaryDirectory(prefix="distill-ray-student-") as folder:
        write_folder(model, merge_lora(state, lora) if lora else state, teacher_folder, Path(folder))
        for path in sorted(p for p in Path(folder).iterdir() if p.is_file()):
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            job.storage.upload(path, f"{prefix}/{path.name}")
            files.append({"name": path.name, "size": path.stat().st_size, "sha256": digest})
    _remove_others(job.storage, prefix, {f["name"] for f in files})
    data = json.dumps({"step": steps, "files": files}, sort_keys=True, indent=1).encode()
    key = f"{prefix}/{_MANIFEST}"
    job.storage.put(key, data)
    sha256 = hashlib.sha256(data).hexdigest()
    publish(job.storage, job.token, "student", {"key": key, "sha256": sha256, "step": steps})


def published_student(storage: Storage, run_prefix: str) -> dict[str, Any] | None:
    """The lease record's entry of a trained student whose files are all there at their sizes, else None."""
    entry = read_published(storage, run_prefix).get("student")
    if entry is None:
        return None
    try:
        data = storage.get(entry["key"])
    except NotFoundError:
        return None
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        return None
    folder = entry["key"].rpartition("/")[0]
    sizes = {info.key: info.size for info in storage.list(folder + "/")}
    whole = all(sizes.get(f"{folder}/{f['name']}") == f["size"] for f in json.loads(data)["files"])
    return entry if whole else None


def _remove_others(storage: Storage, prefix: str, wanted: set[str]) -> None:
    # A weights shard left by a killed upload of another layout would be loaded beside the new ones.
    for info in list(storage.list(f"{prefix}/")):
        if info.key.removeprefix(f"{prefix}/") not in wanted:
            storage.delete(info.key)
