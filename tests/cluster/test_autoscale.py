"""Ray's own autoscaler (v2), with nodes of eight declared GPUs: they come with work and go when there is none."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.local_cluster import Shape, running
from distill_ray import corpus, targets, train
from distill_ray.config import Recipe
from distill_ray.cost import hours_held
from distill_ray.errors import BudgetSpentError
from distill_ray.lease import Lease, read_published
from distill_ray.session import ray_session
from distill_ray.storage import open_storage
from tests.cluster.simulated import captured, recipe, teacher, write_sources
from tests.cluster.watch import Watch, roles_of
from tests.stages.apart import apart
from tests.stages.cluster import counted

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

UNIT_BYTES = 16 << 10
RATE = 2000.0
IDLE_S = 8.0
GONE_S = 300.0
"""An idle node has gone well before that."""
SHAPE = Shape(teachers=4, students=2, cpus=2, autoscale=True, idle_s=IDLE_S)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of a head without GPUs, and node types that nothing asks for yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with running(tmp_path_factory.mktemp("cluster"), SHAPE) as started:
            yield started.address


def _recipe(folder: Path, version: str = "v1", **sections: dict) -> Recipe:
    return recipe(str(folder / "root"), folder / "data", UNIT_BYTES, version, **sections)


def _until(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


def _units(log: Path) -> list[list[float]]:
    """[start, end] of every unit that an engine had; an engine that opens says so with no time between."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if line[1] - line[0] > 0.01]


def test_nodes_follow_the_backlog_and_go_after_the_last_unit(address: str, tmp_path: Path) -> None:
    log = tmp_path / "units.jsonl"
    count = write_sources(tmp_path / "data", UNIT_BYTES, 45)
    with Watch(address) as watch:
        of = _recipe(tmp_path)
        manifest = apart(captured, of, address, teacher(RATE, 3.0, log))
        ended = time.monotonic()
        _until(lambda: watch.gone("teacher", ended), GONE_S, "no teacher node is left")
        # Next week: a tenth as much came.
        more = write_sources(tmp_path / "data", UNIT_BYTES, 4, first=count, seed=1)
        week, scored = time.monotonic(), len(_units(log))
        apart(captured, _recipe(tmp_path, "v2"), address, teacher(RATE, 3.0, log))
        over = time.monotonic()
        _until(lambda: watch.gone("teacher", over), GONE_S, "no teacher node is left")
    print("\n".join(watch.timeline()))

    assert watch.samples[0].nodes.get("teacher", 0) == 0
    assert watch.most("teacher", until=week) == 3, "20 units of full size are a teacher's worth"
    assert watch.most("teacher", week) == 1
    assert watch.most("student") == 0
    assert roles_of(watch.actors, "Teacher") == {"teacher"}

    # Every row once: each unit was an engine's exactly once, and is what the run refers to.
    assert scored == count == len(manifest.units)
    assert len(_units(log)) == count + more
    storage = open_storage(of.storage.root)
    planned = corpus.plan_units(of.corpus, manifest.identity.tokenizer, storage)
    assert set(manifest.units.hashes) <= set(planned.hashes)
    assert not targets.inspect(f"{storage.uri}/targets/{manifest.identity.fingerprint}", verify=True).problems


def _trained(of: Recipe, address: str) -> None:
    storage = open_storage(of.storage.root)
    with ray_session(address), Lease.acquire(storage, of.run_prefix) as lease:
        manifest = targets.read_run_manifest(storage, read_published(storage, of.run_prefix)["targets"])
        train.run(of, storage, manifest, lease.token, threading.Event())


def test_training_workers_and_teachers_keep_to_their_nodes(address: str, tmp_path: Path) -> None:
    write_sources(tmp_path / "data", UNIT_BYTES, 3)
    of = _recipe(
        tmp_path,
        train={
            "use_gpu": False,
            "precision": "fp32",
            "workers": {"min": 2, "max": 2},
            "pack_tokens": 2048,
            "global_batch_tokens": 4096,
        },
    )
    with Watch(address) as watch:
        apart(captured, of, address, teacher(RATE, 1.0, tmp_path / "log"))
        _until(lambda: watch.gone("teacher", 0.0), GONE_S, "no teacher node is left")
        begun = time.monotonic()
        apart(_trained, of, address)
        ended = time.monotonic()
        _until(lambda: watch.gone("student", ended), GONE_S, "no student node is left")
    print("\n".join(watch.timeline()))
    assert roles_of(watch.actors, "Teacher") == {"teacher"}
    assert roles_of(watch.actors, "RayTrainWorker") == {"student"}
    assert watch.most("student", until=begun) == 0, "no student node while capturing"
    assert watch.most("teacher", begun) == 0, "no GPU of a teacher while training"


def test_a_budget_is_checked_while_teachers_hold_gpus_and_a_larger_one_goes_on(address: str, tmp_path: Path) -> None:
    log = tmp_path / "units.jsonl"
    count = write_sources(tmp_path / "data", UNIT_BYTES, 19)  # one teacher's worth
    start_s, rate = 5.0, RATE / 2
    # Eight GPUs for a minute, of which a busy machine takes half to start; the whole takes 80 s after that.
    limit = 8 * 60 / 3600
    of = _recipe(tmp_path, capture={"max_gpu_hours": limit})
    with pytest.raises(BudgetSpentError, match="is spent: the teachers of this run have held") as found:
        apart(captured, of, address, teacher(rate, start_s, log))
    assert found.value.exit_code == 2
    storage = open_storage(of.storage.root)
    held = hours_held(storage, of, "capture")
    assert limit <= held < 1.3 * limit
    kept = len(_units(log))
    assert 0 < kept < count
    with pytest.raises(BudgetSpentError, match="0 of them in this command"):
        apart(captured, of, address, teacher(rate, start_s, log))
    kept_objects = [i.key for i in storage.list("targets/") if i.key.endswith(".parquet") and "/index/" not in i.key]
    manifest = apart(captured, _recipe(tmp_path, capture={"max_gpu_hours": 1.0}), address, teacher(RATE, 1.0, log))
    entry = read_published(storage, of.run_prefix)
    assert len(manifest.units) == count == entry["targets"]["captured"] + entry["targets"]["reused"]
    assert entry["targets"]["reused"] == len(kept_objects), (
        "only what was not yet written when the budget ended is lost"
    )
    assert len(_units(log)) - kept == count - len(kept_objects), "and nothing else is scored again"
    assert hours_held(storage, of, "capture") > held


def test_check_counts_what_an_autoscaler_may_bring(address: str, tmp_path: Path) -> None:
    fact = apart(counted, _recipe(tmp_path), address).fact
    assert "the autoscaler may add more" in fact
    assert "no node is labelled distill-ray/role=student now: one of the autoscaler's node types has to be" in fact
