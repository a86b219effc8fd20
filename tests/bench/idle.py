"""How much of its time a fast teacher waits, in a real capture: through Ray Data, onto a real S3 server 50 ms away.

The teacher is simulated: its rows are as vLLM's workers give them (k = 64, V = 151,936, real-looking distributions;
every check and the codec run on them), and `score()` sleeps so that it makes `--rate` rows/s, as three H100s do of a
70B teacher. All else is the product: `capture.run`, its tokenizer, its pool, its codec, its storage. A proxy delays
each direction of every request by 25 ms.

`teacher_idle_share` is idle / (idle + busy) from the moment the engine is open, the wait for the first unit included;
`_with_start` counts the start, too. Busy is the engine's own time: no pickling, no waiting. The last wait, for the
writers at the end, is not in it. The peak is the PSS of all processes but the S3 server's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from distill_ray import capture
from distill_ray.config import Recipe, parse_recipe
from distill_ray.lease import Lease, read_published
from distill_ray.schema import TargetRows
from distill_ray.session import ray_session
from distill_ray.storage.s3 import S3Storage
from distill_ray.targets import read_run_manifest
from distill_ray.teacher.engine import finite_or_reason
from distill_ray.teacher.wire import rows_from_words
from tests.assets import prose_topics, tiny_llama_folder  # pyright: ignore[reportAttributeAccessIssue]
from tests.bench.capture import VOCAB, K, finished
from tests.delayed import DelayedProxy
from tests.s3server import S3Server

RATE = 20_000
DELAY_S = 0.025
POOL_ROWS = 1 << 14
DOCUMENT_CHARS = 8192
WINDOW = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--units", type=int, default=32, help="units of the corpus (default 32)")
    parser.add_argument("--unit-kib", type=int, default=256, help="KiB of text in a unit (default 256, 3 s)")
    parser.add_argument("--rate", type=int, default=RATE, help=f"rows/s of the teacher (default {RATE:,})")


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Figures named `capture.*`."""
    with tempfile.TemporaryDirectory() as scratch, S3Server(Path(scratch) / "s3") as server:
        folder = Path(scratch)
        write_corpus(folder / "corpus.jsonl", arguments.units * arguments.unit_kib << 10)
        with DelayedProxy(int(server.endpoint.rpartition(":")[2]), DELAY_S) as proxy:
            os.environ.update(server.env | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"})
            storage = TimedStorage(f"{server.root}/run", folder / "uploads.jsonl")
            recipe = make_recipe(storage.uri, folder / "corpus.jsonl", arguments.unit_kib << 10)
            with ray_session("local", num_cpus=4), peak_memory(server) as peak:
                captured(recipe, storage, partial(SimulatedTeacher, arguments.rate, folder / "units.jsonl"))
            entry = read_published(storage, recipe.run_prefix)["targets"]
            rows = read_run_manifest(storage, entry).rows
        uploads = [json.loads(line) for line in (folder / "uploads.jsonl").read_text().splitlines()]
        units = [json.loads(line) for line in (folder / "units.jsonl").read_text().splitlines()]
    waits = waited(units)
    return figures(entry["teacher_of_command"], rows, uploads) | waits | {"capture.idle_peak_gib": peak[0] / 2**30}


def figures(spent: dict[str, Any], rows: int, uploads: list[dict[str, float]]) -> dict[str, float]:
    """From the run's record and the log of uploads."""
    busy, idle, start = (spent[name] for name in ("busy_s", "idle_s", "start_s"))
    return {
        "capture.teacher_idle_share": idle / (idle + busy),
        "capture.teacher_idle_share_with_start": (idle + start) / (idle + busy + start),
        "capture.teacher_busy_s": busy,
        "capture.teacher_idle_s": idle,
        "capture.teacher_start_s": start,
        "capture.idle_rows_per_s": rows / (idle + busy),
        "capture.idle_rows_per_busy_s": rows / busy,
        "capture.idle_units": len(uploads),
        "capture.idle_upload_s": statistics.median(u["seconds"] for u in uploads),
        "capture.idle_upload_mib": statistics.median(u["bytes"] for u in uploads) / 2**20,
    }


def waited(units: list[tuple[float, float]]) -> dict[str, float]:
    """From when the engine was open, twice, and then when it had each unit: the wait for the first, and the others."""
    gaps = [start - end for (_, end), (start, _) in pairwise(units)]
    return {
        "capture.idle_first_wait_s": gaps[0],
        "capture.idle_wait_s": statistics.median(gaps[1:]),
        "capture.idle_longest_wait_s": max(gaps[1:]),
    }


class SimulatedTeacher:
    """An engine of a given speed: rows of a pool, made to speak of each sequence's own tokens."""

    vocab_size = VOCAB
    version, notes = "simulated", ()

    def __init__(self, rate: float, log: Path) -> None:
        self._rate, self._log = rate, log
        self._pool_PW = finished(1, POOL_ROWS)[0].numpy()
        self._note(time.monotonic())

    def score(self, sequences: list[np.ndarray]) -> list[TargetRows | str]:
        started = time.monotonic()
        found = [finite_or_reason(rows_from_words(self._words(s), K, ())) for s in sequences]
        rows = sum(len(s) - 1 for s in sequences)
        time.sleep(max(0.0, started + rows / self._rate - time.monotonic()))
        self._note(started)
        return found

    def score_again(self, sequences: list[np.ndarray]) -> None: ...

    def close(self) -> None: ...

    def _note(self, since: float) -> None:
        with self._log.open("a") as log:
            log.write(json.dumps([since, time.monotonic()]) + "\n")

    def _words(self, tokens: np.ndarray) -> np.ndarray:
        """[N, W]: the pool's rows, with each actual token at the pool's rank, or where the row has it anyway."""
        next_N = tokens[1:].astype(np.int32)
        words_NW = np.take(self._pool_PW, np.arange(int(tokens[0]), int(tokens[0]) + len(next_N)), 0, mode="wrap")
        at_N = words_NW[:, 2 * K + 2].copy() - 1
        is_next_NK = words_NW[:, :K] == next_N[:, None]
        has_N = is_next_NK.any(1)
        at_N[has_N] = is_next_NK[has_N].argmax(1)
        rows = np.flatnonzero(at_N < K)
        words_NW[rows, at_N[rows]] = next_N[rows]
        words_NW[rows, 2 * K + 1] = words_NW[rows, K + at_N[rows]]
        words_NW[:, 2 * K + 2] = at_N + 1
        return words_NW


class TimedStorage(S3Storage):
    """Notes seconds and size of every target object written."""

    def __init__(self, uri: str, log: Path) -> None:
        super().__init__(uri)
        self._log = log

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        started = time.monotonic()
        found = super().put_if(key, data, version)
        if key.startswith("targets/"):
            line = json.dumps({"seconds": time.monotonic() - started, "bytes": len(data)}) + "\n"
            with self._log.open("a") as log:  # one short write: whole, whoever else appends
                log.write(line)
        return found


def captured(recipe: Recipe, storage: S3Storage, factory: partial[SimulatedTeacher]) -> None:
    """The product's capture of the whole recipe."""
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        capture.run(recipe, storage, lease.token, threading.Event(), engine_factory=factory)


def make_recipe(root: str, source: Path, unit_bytes: int) -> Recipe:
    """A recipe whose teacher has V ids and SmolLM2's tokenizer."""
    return parse_recipe(
        {
            "name": "idle",
            "version": "v1",
            "storage": {"root": root},
            "corpus": {"sources": [str(source)], "window_tokens": WINDOW, "unit_bytes": unit_bytes},
            "teacher": {"model": str(tiny_llama_folder(rows=VOCAB)), "dtype": "float32", "use_gpu": False},
            "capture": {"top_k": K},
            "student": {"teacher_layers": [0]},
        }
    )


def write_corpus(path: Path, size: int) -> None:
    """At least `size` bytes of prose, no document twice."""
    text = "\n".join(prose_topics().values())
    with path.open("w") as out:
        number = 0
        while out.tell() < size:
            start = number * DOCUMENT_CHARS % (len(text) - DOCUMENT_CHARS)
            out.write(json.dumps({"text": f"Document {number}. {text[start : start + DOCUMENT_CHARS]}"}) + "\n")
            number += 1


@contextmanager
def peak_memory(server: S3Server, every_s: float = 3.0) -> Iterator[list[float]]:
    """Most bytes of PSS over this process and its descendants, without the server's, as of the end of the block."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            peak[0] = max(peak[0], tree_pss(server.pid))

    sampler = threading.Thread(target=watch, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()


def tree_pss(but: int) -> float:
    """Bytes now; processes that vanish meanwhile count nothing."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            total += 0 if process.pid == but else process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total
