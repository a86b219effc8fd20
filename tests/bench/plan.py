"""What the driver does before it captures a corpus of a million units of which half are done: time and memory.

`plan_units` enumerates the corpus, `pending_units` compares it with the store, `dataset.blocks` makes the input of Ray
Data. Ray is not started: one process does it all and keeps all blocks in memory, where the product makes them in an
actor on the driver's machine, which hands each to Ray's object store.

Real: that code, the cached indices of the sources, the index of the capture (objects of 1,000 units in shuffled order,
64 sequences a unit) and the files both lie in. Simulated: the sources are empty files, 1,000 units in each, whose
layout is known from the last run, as in a weekly rerun; target objects are names in a listing, which comes as S3's do,
a page of 1,000 keys at a time. No network: its latency comes on top, once for each of the counted calls (reading goes
by 8 or 16 calls at a time).

Memory is the peak of a process of its own less what it held after its imports. Times are medians, small and large
corpora in turns, each in a fresh process.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from distill_ray import corpus, targets
from distill_ray.codec import CODEC_VERSION
from distill_ray.config.sections import CorpusSection
from distill_ray.corpus.index import SourceIndex, keep_index
from distill_ray.schema import UnitSummary
from distill_ray.storage import Storage, find_sources, open_storage
from distill_ray.targets import CaptureIdentity, capture_prefix
from distill_ray.units import texts
from tests.bench.measure import LEAST_REPEATS, apart, resident_mib
from tests.bench.paged import OBJECT_BYTES, PagedStorage

UNITS_PER_SOURCE = 1000
SEQUENCES = 64
INDEX_BATCH = 1000
TOP_K = 64
TOKENIZER = "bench"
IDENTITY = CaptureIdentity({"weights": "bench"}, TOKENIZER, 128_256, TOP_K, (1.0,), CODEC_VERSION)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--units", type=int, default=1_000_000, help="units of the large corpus (default 1,000,000)")
    parser.add_argument("--rounds", type=int, default=LEAST_REPEATS, help=f"timed rounds (default {LEAST_REPEATS})")


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Figures named `plan.*`; `growth_10x` is the time of the large corpus over that of one a tenth as large."""
    with tempfile.TemporaryDirectory() as temporary:
        many, few = Path(temporary) / "many", Path(temporary) / "few"
        make(many, arguments.units // UNITS_PER_SOURCE)
        make(few, arguments.units // UNITS_PER_SOURCE // 10)
        rounds = [(measured(few), measured(many)) for _ in range(arguments.rounds)]
    small, large = (medians_of([r[i] for r in rounds]) for i in range(2))
    growth = {
        "plan.seconds_tenth": small["plan.seconds"],
        "plan.growth_10x": large["plan.seconds"] / small["plan.seconds"],
    }
    return large | growth


def medians_of(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def section(folder: Path) -> CorpusSection:
    """`[corpus]` over the sources of `make`."""
    return CorpusSection(sources=(f"{folder}/corpus/*.jsonl",))


def make(folder: Path, sources: int) -> None:
    """Sources with a warm cache, and a store that has captured every second unit of them."""
    (folder / "corpus").mkdir(parents=True)
    for i in range(sources):
        (folder / f"corpus/part-{i:06d}.jsonl").touch()
    storage = open_storage(str(folder / "root"))
    of = section(folder)
    cuts = [i * of.unit_bytes for i in range(UNITS_PER_SOURCE)]
    for uri, info in find_sources(of.sources).items():
        content = hashlib.sha256(uri.encode()).hexdigest()
        index = SourceIndex(content, UNITS_PER_SOURCE * of.unit_bytes, ["text"], cuts, [], [])
        keep_index(storage, uri, info, of.unit_bytes, index)
    done = corpus.plan_units(of, TOKENIZER, storage).hashes[::2]
    np.save(folder / "done.npy", done)
    fill_index(storage, done)


def fill_index(storage: Storage, done: np.ndarray) -> None:
    """Index units as captures do: many at a time, in the order in which they happened to end."""
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(done)
    lengths, supervised = np.full(SEQUENCES, 4096, np.int32), np.full(SEQUENCES, 4095, np.int32)
    for start in range(0, len(shuffled), INDEX_BATCH):
        batch = texts(shuffled[start : start + INDEX_BATCH])
        keys = rng.integers(0, 2**64, (len(batch), SEQUENCES), np.uint64)
        targets.append_index(
            storage,
            IDENTITY,
            [
                UnitSummary(
                    unit, lengths, supervised, keys[i], OBJECT_BYTES, unit + unit, 0.9 * 4095 * SEQUENCES, 0, 1.0
                )
                for i, unit in enumerate(batch)
            ],
        )


def measured(folder: Path) -> dict[str, float]:
    """Figures of one planning in a process of its own."""
    (figures, before), peak = apart(once, folder)
    return figures | {"plan.driver_mib": peak - before}


def once(folder: Path) -> tuple[dict[str, float], float]:
    """Plan, compare, make the blocks: figures, and the MiB held before."""
    # Imports that the product makes on the way, and first uses of what it loads late.
    from distill_ray.capture import dataset
    from distill_ray.capture.verb import pending_units

    importlib.import_module("pyarrow.parquet")
    storage = PagedStorage(folder / "root", capture_prefix(IDENTITY), folder / "done.npy")
    before, _ = resident_mib()
    times = [time.perf_counter()]
    units = corpus.plan_units(section(folder), TOKENIZER, storage, top_k=TOP_K)
    times.append(time.perf_counter())
    pending = pending_units(storage, IDENTITY, units, fail)
    times.append(time.perf_counter())
    blocks = list(dataset.blocks(pending))
    times.append(time.perf_counter())
    if sum(b.num_rows for b in blocks) != len(pending) != len(units) // 2:
        raise AssertionError(f"{len(units)} units, {len(pending)} pending, {sum(b.num_rows for b in blocks)} in blocks")
    enumerating, comparing, making = np.diff(times).tolist()
    figures = {
        "plan.units": len(units),
        "plan.pending": len(pending),
        "plan.seconds": times[-1] - times[0],
        "plan.enumerate_seconds": enumerating,
        "plan.compare_seconds": comparing,
        "plan.blocks_seconds": making,
        "plan.list_calls": storage.list_calls,
        "plan.gets": storage.gets,
        "plan.blocks": len(blocks),
    }
    return figures, before


def fail(problem: str) -> None:
    """Nothing in the made store is broken."""
    raise AssertionError(problem)
