"""A teacher that takes the time of a real one and uses no GPU, whatever it declares: that of `tests.bench.idle`.

Its rows are of real size (k = 64, V = 151,936) and pass every check; it needs a recipe with SmolLM2's tokenizer and so
many rows of vocabulary (`recipe`).
"""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from distill_ray import capture
from distill_ray.config import Recipe, parse_recipe
from distill_ray.lease import Lease
from distill_ray.session import ray_session
from distill_ray.storage import open_storage
from distill_ray.targets import RunManifest
from distill_ray.telemetry import Progress
from tests.assets import tiny_llama_folder
from tests.bench.capture import VOCAB, K
from tests.bench.idle import DOCUMENT_CHARS, SimulatedTeacher, prose_topics

GPUS = 8


class StartingTeacher(SimulatedTeacher):
    """It also takes `start_s` to open, loading included, and says where and when it worked.

    Args:
        rate: rows a second.
        start_s: seconds that it takes to open.
        log: file that gets a line [start, end] of every unit.
    """

    def __init__(self, rate: float, start_s: float, log: Path) -> None:
        since = time.monotonic()
        super().__init__(rate, log)
        time.sleep(max(0.0, since + start_s - time.monotonic()))


def recipe(root: str, sources: Path, unit_bytes: int, version: str = "v1", **sections: dict[str, Any]) -> Recipe:
    """A recipe whose teacher takes 8 GPUs of a labelled node, and up to four of them."""
    stated = {
        "storage": {"root": root},
        "corpus": {"sources": [f"{sources}/*.jsonl"], "window_tokens": 2048, "unit_bytes": unit_bytes, "holdout": 0.1},
        "teacher": {
            "model": str(tiny_llama_folder(rows=VOCAB)),
            "dtype": "float32",
            "tensor_parallel": GPUS,
            "replicas": {"min": 0, "max": 4},
        },
        "capture": {"top_k": K},
        "student": {"teacher_layers": [0]},
        "cluster": {"pin_by_label": True},
    }
    merged = {name: stated.get(name, {}) | sections.get(name, {}) for name in stated | sections}
    return parse_recipe({"name": "autoscale", "version": version, **merged})


def write_sources(folder: Path, unit_bytes: int, full_units: float, first: int = 0, seed: int = 0) -> int:
    """Files of one unit each, from a tenth of a unit's size to all of it, as much as so many full ones; how many."""
    folder.mkdir(parents=True, exist_ok=True)
    text, rng, written, count = "\n".join(prose_topics().values()), random.Random(seed), 0.0, 0
    while written < full_units * unit_bytes:
        size = int(unit_bytes * math.exp(rng.uniform(math.log(0.1), 0.0)))
        lines, number = "", 0
        while True:
            start = rng.randrange(len(text) - DOCUMENT_CHARS)
            said = f"Document {number} of source {first + count}. "
            line = json.dumps({"text": said + text[start : start + min(DOCUMENT_CHARS, size // 3)]}) + "\n"
            if len(lines) + len(line.encode()) > size:
                break
            lines, number = lines + line, number + 1
        (folder / f"{first + count:05d}.jsonl").write_text(lines)
        written += len(lines)
        count += 1
    return count


def captured(of: Recipe, address: str, factory: Callable[[], Any], progress: type[Progress] = Progress) -> RunManifest:
    """The product's capture of a recipe on a running cluster, in a process that connects once."""
    storage = open_storage(of.storage.root)
    with ray_session(address), Lease.acquire(storage, of.run_prefix) as lease:
        return capture.run(of, storage, lease.token, threading.Event(), progress, engine_factory=factory)


def teacher(rate: float, start_s: float, log: Path) -> partial[StartingTeacher]:
    """An engine factory."""
    return partial(StartingTeacher, rate, start_s, log)
