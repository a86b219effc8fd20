"""Rows a second from stored targets on a real S3 server to micro-batches, and what a training step waits for them.

Real: the S3 server (SeaweedFS, in processes of its own on the same cores), target objects in the product's format,
plan, packing, cache and loader as a training worker has them. Every round opens an empty cache: each object is fetched,
its digest verified, its rows decoded (k = 64, V = 151,936, temperature 1). Simulated: the rows' numbers, made up like a
teacher's; nothing is trained on them.

Rival: the same rows in Parquet as lists of ids and of log-probabilities a row, read from the same server with
`to_pylist` and made into tensors; on fewer rows, since it is slow. It verifies nothing.

`step.data_wait_share` lives here too, because it needs the server: a null step takes as long as a trainer of 100,000
rows a second would, and holds no core meanwhile, as one on a GPU hardly would. It counts from before the first batch,
whose wait is `step.data_wait_first_s`; `step.data_wait_share_after_first` begins once it is there. Batches draw from
all units, so nearly every row group is fetched while the first ones are made; a longer run waits for a lesser share.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distill_ray.codec import CODEC_VERSION
from distill_ray.ingest import BatchPlan, build_plan, open_cache
from distill_ray.ingest.loader import PackLoader
from distill_ray.schema import Sequence, SourceSlice, TargetRows, Unit
from distill_ray.storage import Storage, open_storage
from distill_ray.targets import CaptureIdentity, ManifestUnit, RunManifest, encode_unit, unit_key
from distill_ray.teacher.wire import rows_from_words
from tests.bench.capture import VOCAB, K, finished
from tests.bench.measure import LEAST_REPEATS, medians
from tests.s3server import S3Server

IDENTITY = CaptureIdentity({"weights": "made up"}, "none", VOCAB, K, (1.0,), CODEC_VERSION)
PACK_TOKENS = 4096
CONSUMED_PER_S = 100_000
DISTINCT_ROWS = 1 << 14
RIVAL_KEY = "rival.parquet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--units", type=int, default=8, help="target objects (default 8)")
    parser.add_argument("--rows", type=int, default=131_072, help="rows of each, about (default 131,072)")
    parser.add_argument("--rival-rows", type=int, default=32_768, help="rows the rival reads (default 32,768)")
    parser.add_argument("--step-rows", type=int, default=10_000_000, help="the null step takes (default 10,000,000)")
    parser.add_argument("--rounds", type=int, default=LEAST_REPEATS, help=f"timed rounds (default {LEAST_REPEATS})")


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Figures named `ingest.*` and `step.data_wait_*`."""
    with stored(arguments.units, arguments.rows, arguments.rival_rows) as store:
        return rates(store, arguments.rounds) | waits(store, arguments.step_rows)


@dataclass(frozen=True)
class Store:
    """What lies on the server."""

    storage: Storage
    manifest: RunManifest
    rival_rows: int

    @property
    def rows(self) -> int:
        return self.manifest.rows

    def plan(self, epochs: int = 1) -> BatchPlan:
        return build_plan(
            self.manifest, holdout=0.0, split="train", pack_tokens=PACK_TOKENS, packs_per_batch=1, epochs=epochs
        )


@contextmanager
def stored(units: int, rows: int, rival_rows: int) -> Iterator[Store]:
    """Made-up targets on a server that lives as long as the context."""
    with (
        tempfile.TemporaryDirectory() as folder,
        S3Server(Path(folder)) as server,
        patch.dict("os.environ", server.env),
    ):
        storage = open_storage(f"{server.root}/bench")
        words, prompts, _ = finished(1, DISTINCT_ROWS)
        every = rows_from_words(words.numpy(), K, ())
        rng, summaries = np.random.default_rng(0), []
        for number in range(units):
            digest = hashlib.sha256(f"{number}".encode()).hexdigest()
            unit = Unit(digest[:32], SourceSlice("made up", digest, "file", 0, 1), 1)
            sequences, taught = _sequences(rng, prompts[0], every, rows)
            data, summary = encode_unit(IDENTITY, unit, sequences, taught, [], 0.0)
            storage.put(unit_key(IDENTITY, unit.hash), data)
            summaries.append(ManifestUnit(summary, 1, "made up"))
        storage.put(RIVAL_KEY, _lists(every, prompts[0], rival_rows))
        yield Store(storage, RunManifest(IDENTITY, tuple(summaries)), rival_rows)


def _sequences(
    rng: np.random.Generator, prompt: np.ndarray, every: TargetRows, rows: int
) -> tuple[list[Sequence], list[TargetRows]]:
    """Documents of log-normal lengths, up to a pack, cut out of the distinct rows."""
    sequences, taught = list[Sequence](), list[TargetRows]()
    while rows > 0:
        n = int(np.clip(rng.lognormal(6.0, 0.8), 8, PACK_TOKENS - 1))
        at = int(rng.integers(0, DISTINCT_ROWS - n))
        mask = np.arange(n + 1) > 0
        sequences.append(Sequence(prompt[at : at + n + 1], mask, int(rng.integers(0, 2**63))))
        taught.append(_cut(every, slice(at, at + n)))
        rows -= n
    return sequences, taught


def _cut(rows: TargetRows, part: slice) -> TargetRows:
    assert rows.entropy_N is not None
    return TargetRows(
        rows.ids_NK[part],
        rows.logprobs_NK[part],
        rows.log_tail_N[part],
        rows.actual_logprob_N[part],
        rows.actual_rank_N[part],
        rows.entropy_N[part],
    )


def _lists(every: TargetRows, prompt: np.ndarray, rows: int) -> bytes:
    """A row of Parquet each: label, ids and log-probabilities as lists, tail."""
    at = np.arange(rows) % DISTINCT_ROWS
    columns = {
        "label": prompt[1:][at],
        "ids": list(every.ids_NK[at]),
        "logprobs": list(every.logprobs_NK[at]),
        "log_tail": every.log_tail_N[at],
    }
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def load(store: Store) -> int:
    """One epoch from an empty cache; the rows that came."""
    plan = store.plan()
    with PackLoader(store.storage, IDENTITY, plan, cache=open_cache(store.storage, IDENTITY, plan.units)) as loader:
        return sum(len(batch.targets) for batch in loader)


def load_lists(store: Store) -> int:
    """The rival's rows as tensors of the same types."""
    rows = pq.read_table(io.BytesIO(store.storage.get(RIVAL_KEY))).to_pylist()
    ids = torch.tensor([row["ids"] for row in rows])
    logprobs = torch.tensor([row["logprobs"] for row in rows])
    labels, log_tail = torch.tensor([row["label"] for row in rows]), torch.tensor([row["log_tail"] for row in rows])
    assert ids.shape == logprobs.shape == (len(labels), K)
    return len(log_tail)


def rates(store: Store, rounds: int) -> dict[str, float]:
    """Rows a second of both, and how many times as many ours are."""
    ways: dict[str, tuple[Callable[[Store], int], int]] = {
        "ours": (load, store.rows),
        "pylist": (load_lists, store.rival_rows),
    }

    def checked(way: str) -> Callable[[], None]:
        work, rows = ways[way]

        def once() -> None:
            if (got := work(store)) != rows:
                raise AssertionError(f"{way}: {got} rows came of {rows}")

        return once

    seconds = medians({way: checked(way) for way in ways}, rounds)
    per_s = {way: rows / seconds[way] for way, (_, rows) in ways.items()}
    return {
        "ingest.rows_per_s": per_s["ours"],
        "ingest.pylist_rows_per_s": per_s["pylist"],
        "ingest.speedup_vs_pylist": per_s["ours"] / per_s["pylist"],
        "ingest.rows": float(store.rows),
        "ingest.stored_mib": sum(u.object_bytes for u in store.manifest.units) / 2**20,
    }


def waits(store: Store, rows: int) -> dict[str, float]:
    """Share of the time that a null step of CONSUMED_PER_S rows a second waits for its next batch."""
    plan = store.plan(max(1, round(rows / store.rows)))
    cache = open_cache(store.storage, IDENTITY, plan.units)
    first = after = 0.0
    begun = time.perf_counter()
    with PackLoader(store.storage, IDENTITY, plan, cache=cache) as loader:
        for batch in loader:
            if not after:
                after, first = time.perf_counter(), loader.wait_seconds
            time.sleep(len(batch.targets) / CONSUMED_PER_S)
        ended = time.perf_counter()
    return {
        "step.data_wait_share": loader.wait_seconds / (ended - begun),
        "step.data_wait_share_after_first": (loader.wait_seconds - first) / (ended - after),
        "step.data_wait_first_s": first,
        "step.data_wait_run_s": ended - begun,
    }
