"""A run that is captured and trained, made in storage by hand: what evaluation and export start from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill_ray.config import Recipe, parse_recipe
from distill_ray.lease import LeaseToken, document_entry, publish, read_published
from distill_ray.schema import Sequence, SourceSlice, Unit
from distill_ray.storage import Storage
from distill_ray.targets import (
    CaptureIdentity,
    RunManifest,
    encode_unit,
    read_run_manifest,
    unit_key,
    write_run_manifest,
)
from tests.assets import TINY_VOCAB, tiny_teacher_folder
from tests.unit.targets_fakes import exact_rows

K = 16
HELD_OUT = range(1, 8)
"""Document keys below the holdout's bound; training documents have keys far above it."""


@dataclass
class Run:
    """A run that is captured and trained: the student after training is the teacher itself, before it one layer."""

    recipe: Recipe
    storage: Storage
    token: LeaseToken
    sequences: list[Sequence]

    @property
    def published(self) -> dict[str, dict[str, Any]]:
        return read_published(self.storage, self.recipe.run_prefix)

    @property
    def manifest(self) -> RunManifest:
        return read_run_manifest(self.storage, self.published["targets"])

    def with_(self, **sections: dict[str, Any]) -> Run:
        data = self.recipe.model_dump()
        for name, changes in sections.items():
            data[name] = {**data[name], **changes}
        return replace(self, recipe=parse_recipe(data))


def random_sequences() -> list[Sequence]:
    rng = np.random.default_rng(3)
    found = []
    for i in range(10):
        n = int(rng.integers(5, 40))
        mask = rng.random(n) < 0.7
        mask[0], mask[-1] = False, True
        key = HELD_OUT[i] if i < len(HELD_OUT) else 2**63 + i
        found.append(Sequence(rng.integers(3, TINY_VOCAB, n).astype(np.int32), mask, key))
    return found


@torch.no_grad()
def row_logits(model: PreTrainedModel, sequence: Sequence) -> np.ndarray:
    ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None]
    return model(input_ids=ids).logits[0, :-1].double().numpy()


def store_capture(storage: Storage, recipe: Recipe, token: LeaseToken, sequences: list[Sequence]) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher_folder(), dtype=torch.float32)
    identity = CaptureIdentity(
        {"weights": "tiny", "engine": "test", "dtype": "float32"}, "tokenizer-hash", TINY_VOCAB, K, (1.0,), 1
    )
    units, summaries = [], {}
    for name, part in (("a", sequences[:4]), ("b", sequences[4:])):
        content = hashlib.sha256(name.encode()).hexdigest()
        unit = Unit(content[:32], SourceSlice(f"{name}.jsonl", content, "lines", 0, 1000), 1000)
        rows = [exact_rows(row_logits(teacher, s), s.tokens[1:], K) for s in part]
        data, summary = encode_unit(identity, unit, part, rows, [], 0.5)
        storage.put(unit_key(identity, unit.hash), data)
        units.append(unit)
        summaries[unit.hash] = summary
    entry = write_run_manifest(storage, token, identity, units, summaries)
    publish(storage, token, "targets", entry | {"captured_tokens": int(summaries[units[0].hash].lengths.sum())})


def store_student(storage: Storage, recipe: Recipe, token: LeaseToken, folder: Path) -> None:
    prefix, files = f"{recipe.run_prefix}/student", []
    for path in sorted(folder.iterdir()):
        storage.upload(path, f"{prefix}/{path.name}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append({"name": path.name, "size": path.stat().st_size, "sha256": digest})
    manifest = json.dumps({"step": 2, "files": files}).encode()
    storage.put(f"{prefix}/manifest.json", manifest)
    step = {"loss": 3.0, "ce": 4.0, "kl_t": 2.0, "kl_t1": 2.0, "tokens": 50, "seconds": 0.1}
    lines = [json.dumps({"step": number, **step}) for number in (0, 1)]
    history = ("\n".join(lines) + "\n").encode()
    storage.put(f"{recipe.run_prefix}/metrics.jsonl", history)
    entry = {**document_entry(f"{prefix}/manifest.json", manifest), "step": 2}
    entry["history"] = {**document_entry(f"{recipe.run_prefix}/metrics.jsonl", history), "steps": 2}
    publish(storage, token, "student", entry)


def tiny_recipe(root: Path) -> Recipe:
    return parse_recipe(
        {
            "name": "tiny",
            "version": "2026-W47",
            "storage": {"root": str(root)},
            "corpus": {"sources": ["*.jsonl"], "holdout": 0.25, "window_tokens": 64},
            "teacher": {"model": str(tiny_teacher_folder()), "engine": "transformers", "use_gpu": False},
            "capture": {"top_k": K},
            "student": {"teacher_layers": [0]},
            "train": {"precision": "fp32", "use_gpu": False, "pack_tokens": 64, "global_batch_tokens": 128},
            "evaluate": {"batch_packs": 2, "ece_bins": 10},
            "export": {"licence": "apache-2.0"},
        }
    )


def prompt_logits(folder: Path | str, dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits.float()
