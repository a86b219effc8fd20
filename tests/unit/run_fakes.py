"""A run in storage without a teacher or a cluster: real sources, units and target objects of random rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill_ray import checkpoints, corpus, targets
from distill_ray.config import Recipe, parse_recipe
from distill_ray.lease import LeaseToken, publish
from distill_ray.schema import Unit
from distill_ray.storage import Storage
from distill_ray.targets import CaptureIdentity
from distill_ray.train.result import store_history, to_lines
from distill_ray.units import Units
from tests.unit.targets_fakes import captured, identity

OF = identity(temperatures=(1.0,))


def recipe_in(folder: Path, version: str = "v1", **sections: dict[str, Any]) -> Recipe:
    """A recipe whose root and sources lie in `folder`; its sources are made unless they are there."""
    data = folder / "data"
    if not data.exists():
        data.mkdir(parents=True)
        for name in "ab":
            source(data / f"{name}.jsonl", name)
    stated: dict[str, Any] = {
        "storage": {"root": str(folder / "root")},
        "corpus": {"sources": [str(data / "*.jsonl")], "holdout": 0.5, "unit_bytes": 1024, "window_tokens": 64},
        "teacher": {"model": "/teacher", "tensor_parallel": 2},
        "student": {"teacher_layers": [0]},
        "train": {"epochs": 4, "global_batch_tokens": 64, "pack_tokens": 64, "workers": {"min": 4, "max": 4}},
    }
    merged = {name: stated.get(name, {}) | sections.get(name, {}) for name in stated | sections}
    return parse_recipe({"name": "tiny", "version": version, **merged})


def source(path: Path, text: str) -> Path:
    """Four units of documents that no other text has."""
    path.write_text("".join(json.dumps({"text": f"{text} {i} " * 40}) + "\n" for i in range(24)))
    return path


def planned(recipe: Recipe, storage: Storage) -> Units:
    """The units of the recipe's corpus; its sources are indexed from now on."""
    return corpus.plan_units(recipe.corpus, OF.tokenizer, storage)


def capture(storage: Storage, units: Iterable[Unit], of: CaptureIdentity = OF) -> None:
    """Target objects and index of these units; each took the teacher 30 s."""
    summaries = []
    for unit in units:
        data, summary = targets.encode_unit(of, unit, *captured(of, seed=int(unit.hash[:6], 16)), [], 30.0)
        storage.put(targets.unit_key(of, unit.hash), data)
        summaries.append(summary)
    targets.append_index(storage, of, summaries)


def begin(storage: Storage, token: LeaseToken, of: CaptureIdentity = OF) -> None:
    """What a driver publishes first."""
    publish(storage, token, "identity", {"fingerprint": "f", "of": {"capture_fingerprint": of.fingerprint}})


def publish_targets(storage: Storage, token: LeaseToken, units: Units, of: CaptureIdentity = OF) -> targets.RunManifest:
    """The run's manifest over captured units."""
    table, _ = targets.load_table(storage, of, only=units.hashes)
    entry = targets.write_run_manifest(storage, token, of, units, table)
    publish(storage, token, "targets", entry)
    return targets.read_run_manifest(storage, entry)


def history(steps: int) -> list[dict[str, float]]:
    """Lines of a training whose steps take 2 s and half a second of saving."""
    return [
        {"step": s, "loss": 8.0 - s, "ce": 1.0, "kl_t": 1.0, "kl_t1": 1.0, "tokens": 9, "seconds": 2.0, "save_s": 0.5}
        for s in range(steps)
    ]


def train(storage: Storage, token: LeaseToken, steps: int, saved: Iterable[int], folder: Path) -> None:
    """History of `steps` steps, and checkpoints after some of them."""
    store_history(storage, token, history(steps))
    shard = folder / "rank0.pt"
    shard.write_bytes(to_lines(history(1)))
    for step in saved:
        files = checkpoints.upload(storage, token, step, [shard])
        checkpoints.publish(storage, token, step, files, loss=1.0, world_size=4, zero_stage=2, plan="p")
