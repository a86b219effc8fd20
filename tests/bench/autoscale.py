"""What teachers do with the GPUs that they hold: a capture on Ray's autoscaler, from no node to some and back to none.

The cluster is `cluster/local_cluster.py --autoscale`: real raylets on this machine, each with eight GPUs that are
declared and not there, added and removed by Ray's autoscaler (v2). The teacher is simulated: it takes `--start-s` to
open, then `--rate` rows/s, and gives rows of real size (k = 64, V = 151,936). All else is the product. Units vary ten
times in size.

`rows_lost` and `rows_doubled` compare what the run refers to, read back, with the sources read and tokenised here.
`scale_up_s` is from the first GPU that was asked for in vain to the last node that came, `scale_down_s` from the last
unit's end to that of the last node. `busy_share` is the seconds in which engines had a unit over the seconds in which
GPUs were held, as the cluster itself counts them (all of them, from the moment an actor is placed): starts, waits and
ends are in it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from cluster.local_cluster import Shape, running
from distill_ray import corpus, targets
from distill_ray.config import Recipe
from distill_ray.storage import open_storage
from tests.cluster.simulated import GPUS, captured, recipe, teacher, write_sources
from tests.cluster.watch import Watch
from tests.stages.apart import apart

BYTES_A_ROW = 4
FULL_UNITS = 50
"""As much work as so many units of full size; worth three teachers."""
TEACHERS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes", type=float, default=12.0, help="about how long capture takes (default 12; smoke 2)"
    )
    parser.add_argument("--rate", type=float, default=2000.0, help="rows/s of one teacher (default 2,000)")
    parser.add_argument("--start-s", type=float, default=15.0, help="seconds that a teacher takes to open (default 15)")
    parser.add_argument("--idle-s", type=float, default=20.0, help="the autoscaler's idle time of a node (default 20)")


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Figures named `autoscale.*`; prints the timeline of nodes."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_worker_niceness", "0")  # as tests/conftest.py says
    unit_s = arguments.minutes * 60 * TEACHERS / FULL_UNITS
    unit_bytes = int(unit_s * arguments.rate * BYTES_A_ROW)
    shape = Shape(teachers=4, students=1, cpus=2, autoscale=True, idle_s=arguments.idle_s)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        units = write_sources(folder / "data", unit_bytes, FULL_UNITS)
        sizes = [path.stat().st_size for path in (folder / "data").iterdir()]
        of, log = recipe(str(folder / "root"), folder / "data", unit_bytes), folder / "units.jsonl"
        with running(folder / "cluster", shape) as cluster, Watch(cluster.address) as watch:
            begun = time.monotonic()
            manifest = apart(captured, of, cluster.address, teacher(arguments.rate, arguments.start_s, log))
            ended = time.monotonic()
            while watch.gone("teacher", ended) is None and time.monotonic() - ended < 300:
                time.sleep(0.5)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        wanted, stored = rows_wanted(of, manifest), rows_stored(of, manifest)
    print("\n".join(watch.timeline()))
    asked, first, gone = watch.asked_first(), watch.first("teacher", 1), watch.gone("teacher", ended)
    most = watch.most("teacher")
    all_there = watch.first("teacher", most)
    assert asked is not None
    assert first is not None
    assert all_there is not None
    assert len(manifest.units) == units
    busy, held = sum(end - start for start, end in lines), watch.held_s("teacher") / GPUS
    last = max(end for _, end in lines)
    return {
        "autoscale.busy_share": busy / held,
        "autoscale.busy_s": busy,
        "autoscale.held_s": held,
        "autoscale.capture_s": ended - begun,
        "autoscale.scale_up_first_s": first - asked,
        "autoscale.scale_up_s": all_there - asked,
        "autoscale.nodes_max": most,
        "autoscale.student_nodes": watch.most("student"),
        "autoscale.scale_down_s": (gone or float("inf")) - last,
        "autoscale.units": units,
        "autoscale.rows": manifest.rows,
        "autoscale.rows_lost": rows_beyond(wanted, stored),
        "autoscale.rows_doubled": rows_beyond(stored, wanted),
        "autoscale.units_taught": sum(end - start > 0.01 for start, end in lines),
        "autoscale.size_ratio": max(sizes) / min(sizes),
    }


Sequences = Counter[bytes]
"""How often there is a sequence of these token ids, int64."""


def rows_wanted(of: Recipe, manifest: targets.RunManifest) -> Sequences:
    """Every sequence of the corpus."""
    tokenizer = corpus.load_tokenizer(of.teacher.model)
    planned = corpus.plan_units(of.corpus, manifest.identity.tokenizer, open_storage(of.storage.root))
    return Counter(
        s.tokens.astype(np.int64).tobytes()
        for unit in planned
        for s in corpus.read_unit_sequences(unit, of.corpus, tokenizer)[0]
    )


def rows_stored(of: Recipe, manifest: targets.RunManifest) -> Sequences:
    """Every sequence that the run refers to."""
    storage, found = open_storage(of.storage.root), Counter[bytes]()
    for unit in manifest.units:
        stored = targets.read_unit(storage, manifest.fingerprint, unit.unit, expect_sha256=unit.object_sha256)
        found.update(stored.sequence(i).tokens.astype(np.int64).tobytes() for i in range(len(unit.lengths)))
    return found


def rows_beyond(more: Sequences, less: Sequences) -> int:
    """Rows of sequences that the first has more often than the second."""
    return sum(count * (len(tokens) // 8 - 1) for tokens, count in (more - less).items())
