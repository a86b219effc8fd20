"""What teachers do with the GPUs that they hold: a capture on Ray's autoscaler, from no node to some and back to none.

The cluster is `cluster/local_cluster.py --autoscale`: real raylets on this machine, each with eight GPUs that are
declared and not there, added and removed by Ray's autoscaler (v2). The teacher is simulated: it takes `--start-s` to
open, then `--rate` rows/s, and gives rows of real size (k = 64, V = 151,936). All else is the product. Units vary ten
times in size.

`busy_share` is the seconds in which engines had a unit over the seconds in which GPUs were held, as the cluster itself
counts them (all of them, from the moment an actor is placed): starts, waits and ends are in it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from cluster.local_cluster import Shape, running
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
        "autoscale.first_node_s": first - asked,
        "autoscale.all_nodes_s": all_there - asked,
        "autoscale.most_nodes": most,
        "autoscale.student_nodes": watch.most("student"),
        "autoscale.gone_s": (gone or float("inf")) - last,
        "autoscale.units": units,
        "autoscale.rows": manifest.rows,
        "autoscale.units_taught": sum(end - start > 0.01 for start, end in lines),
        "autoscale.size_ratio": max(sizes) / min(sizes),
    }
