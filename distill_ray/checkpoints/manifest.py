"""What a checkpoint's manifest says, and which published one is the newest that is whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

from distill_ray import lease
from distill_ray.errors import IntegrityError
from distill_ray.lease import read_document, read_published
from distill_ray.storage import Storage

PUBLISHED_PREFIX = "checkpoint/"


@dataclass(frozen=True)
class StoredFile:
    name: str
    """File name; unique over all ranks."""
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """One checkpoint: everything after `step` optimizer steps."""

    step: int
    """Optimizer steps done."""
    epoch: int
    """Lease epoch that wrote it."""
    loss: float
    """Mean training loss over the steps since the checkpoint before."""
    world_size: int
    zero_stage: int
    plan: str
    """Digest of the run's batches: `step` means nothing under another plan."""
    files: tuple[StoredFile, ...]
    prefix: str
    """Key of the folder that holds the files."""

    def key_of(self, name: str) -> str:
        """Storage key of one file."""
        return f"{self.prefix}/{name}"

    def to_json(self) -> bytes:
        """Canonical bytes; their SHA-256 is what the lease record names."""
        return json.dumps(asdict(self), sort_keys=True, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Inverse of `to_json`."""
        fields = json.loads(data)
        return cls(**{**fields, "files": tuple(StoredFile(**f) for f in fields["files"])})


def step_name(step: int) -> str:
    """`step-00000400`."""
    return f"step-{step:08d}"


def folder_key(run_prefix: str, step: int, epoch: int) -> str:
    """Key of the folder that one lease epoch writes a step's files to."""
    return f"{run_prefix}/checkpoints/{step_name(step)}/e{epoch:04d}"


def published_checkpoints(storage: Storage, run_prefix: str) -> dict[int, dict[str, Any]]:
    """Step → the lease record's entry {key, sha256, step, loss, world_size, zero_stage, plan}."""
    entries = read_published(storage, run_prefix)
    return {int(e["step"]): e for name, e in entries.items() if name.startswith(PUBLISHED_PREFIX)}


def load_manifest(storage: Storage, entry: dict[str, Any]) -> Manifest:
    """Read the manifest that a lease entry names.

    Raises:
        IntegrityError: it is missing, or its bytes are not those that were published.
    """
    return Manifest.from_json(read_document(storage, entry, "an older checkpoint is used instead"))


def problems_of(storage: Storage, manifest: Manifest) -> list[str]:
    """What is missing or has the wrong size, by one listing; contents are verified when restored."""
    return lease.problems_of(storage, manifest.prefix, [asdict(file) for file in manifest.files])


def latest_whole(
    storage: Storage,
    run_prefix: str,
    *,
    say: Callable[[str], None] = lambda text: None,
    exclude: Collection[int] = (),
) -> Manifest | None:
    """The newest published checkpoint of which every file is there at its right size; None without one.

    Args:
        storage: the run's storage.
        run_prefix: `runs/<name>/<version>`.
        say: called with one sentence for every newer checkpoint that is broken and passed over.
        exclude: steps already found broken in another way (a wrong checksum).
    """
    entries = published_checkpoints(storage, run_prefix)
    for step in sorted(set(entries) - set(exclude), reverse=True):
        try:
            manifest = load_manifest(storage, entries[step])
            problems = problems_of(storage, manifest)
        except IntegrityError as error:
            problems = [str(error)]
        else:
            if not problems:
                return manifest
        say(f"checkpoint of step {step} is broken and not used: {'; '.join(problems)}; trying the one before")
    return None
