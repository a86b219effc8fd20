"""Where a run stands, told by storage alone: no Ray, no teacher, no source is opened."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill_ray.config import Recipe
from distill_ray.cost import NodeUsage, Usage, write_usage
from distill_ray.lease import Lease
from distill_ray.status import Status, status
from distill_ray.status.progress import span
from distill_ray.storage import Storage, open_storage
from distill_ray.train.worker import make_plan
from tests.unit import run_fakes
from tests.unit.run_fakes import OF


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return run_fakes.recipe_in(tmp_path)


@pytest.fixture
def storage(recipe: Recipe) -> Storage:
    return open_storage(recipe.storage.root)


def _line(found: Status, stage: str) -> str:
    return next(line for line in found.render().splitlines() if line.split()[0] == stage)


def test_a_run_never_started_names_the_versions_that_were(recipe: Recipe, storage: Storage):
    with Lease.acquire(storage, "runs/tiny/v0"):
        pass
    assert "never started here; versions that were: v0" in status(recipe).render()


def test_a_capture_half_done_counts_its_own_units_and_the_teachers_time_left(recipe: Recipe, storage: Storage):
    units = run_fakes.planned(recipe, storage)
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        run_fakes.begin(storage, lease.token)
        run_fakes.capture(storage, list(units)[:3])
        other = run_fakes.source(Path(recipe.storage.root).parent / "other.jsonl", "other")
        elsewhere = recipe.corpus.model_copy(update={"sources": (str(other),)})
        run_fakes.capture(storage, run_fakes.planned(recipe.model_copy(update={"corpus": elsewhere}), storage))
        found = status(recipe)
    left = len(units) - 3
    assert left > 3
    assert f"3 of {len(units)} units done, {left} left, about {span(30.0 * left)} for one" in _line(found, "capture")
    assert list(found.due) == ["capture", "audit", "train", "evaluate", "export"]
    assert _line(found, "train").split(maxsplit=1)[1] == "to do"


def test_a_source_no_capture_has_read_is_not_read_by_status(recipe: Recipe, storage: Storage):
    units = run_fakes.planned(recipe, storage)
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        run_fakes.begin(storage, lease.token)
        run_fakes.capture(storage, units)
    cached = {info.key for info in storage.list("cache/")}
    run_fakes.source(Path(recipe.storage.root).parent / "data" / "c.jsonl", "c")
    line = _line(status(recipe), "capture")
    assert f"{len(units)} units of this teacher stored" in line
    assert re.search(r"not known: .*c\.jsonl is new or changed", line)
    assert {info.key for info in storage.list("cache/")} == cached


def test_training_tells_steps_pace_loss_and_what_a_stop_would_cost(recipe: Recipe, storage: Storage, tmp_path: Path):
    units = run_fakes.planned(recipe, storage)
    run_fakes.capture(storage, units)
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        run_fakes.begin(storage, lease.token)
        manifest = run_fakes.publish_targets(storage, lease.token, units)
        total = make_plan(recipe, manifest).steps
        assert total > 7
        run_fakes.train(storage, lease.token, 7, (2, 4), tmp_path)
        found = status(recipe)
    assert _line(found, "train").split(maxsplit=1)[1] == (
        f"step 7 of {total}, loss 2, 2.5 s a step, {span(2.5 * (total - 7))} of training left; last checkpoint at step "
        "4: 3 step(s) would be trained again"
    )
    assert f"done; {len(units)} units, {manifest.rows:,} rows" in _line(found, "capture")
    assert list(found.due) == ["audit", "train", "evaluate", "export"]


def test_a_checkpoint_newer_than_the_stored_history_counts(recipe: Recipe, storage: Storage, tmp_path: Path):
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        run_fakes.train(storage, lease.token, 1, (4,), tmp_path)
    line = _line(status(recipe), "train")
    assert "step 4 (of how many is not known: the targets are not captured yet)" in line
    assert line.endswith("last checkpoint at step 4")


def test_a_skipped_step_without_a_loss_leaves_the_last_one_shown(recipe: Recipe, storage: Storage, tmp_path: Path):
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        run_fakes.train(storage, lease.token, 3, (2,), tmp_path)
    key = f"{recipe.run_prefix}/metrics.jsonl"
    storage.put(key, storage.get(key) + b'{"step": 3, "seconds": 2.0, "skipped": 1}\n')
    assert "step 4 (of how many is not known: the targets are not captured yet), loss 6," in _line(
        status(recipe), "train"
    )


def test_what_all_commands_held_is_told_with_dollars_where_there_are_prices(tmp_path: Path):
    prices: dict[str, Any] = {"device_hour": {"h100": 4.0}}
    recipe = run_fakes.recipe_in(tmp_path, cost=prices)
    storage = open_storage(recipe.storage.root)
    for epoch in (1, 2):
        with Lease.acquire(storage, recipe.run_prefix) as lease:
            node = NodeUsage("h100", 2, 360.0, 3060.0, 180.0, 5, 500)
            write_usage(storage, lease.token, Usage("capture", epoch, "GPU", 2, epoch == 2, (node,)))
    assert status(recipe).cost == "capture 2 GPU hours (85% busy), $8.00 in 2 command(s)"
    assert _line(status(recipe), "cost") == "  cost      capture 2 GPU hours (85% busy), $8.00 in 2 command(s)"
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        node = NodeUsage("a100", 4, 0.0, 7200.0, 0.0, 5, 500)
        write_usage(storage, lease.token, Usage("train", 3, "GPU", 1, True, (node,)))
    assert status(recipe).cost == (
        "capture 2 GPU hours (85% busy), train 2 GPU hours (100% busy), $8.00 of capture, the rest has no price in 3 "
        "command(s)"
    )
    storage.put(f"{recipe.run_prefix}/usage/e0001-capture.json", b"{")
    assert re.search(r"\$4\.00 of capture.*; not counted: .*e0001-capture\.json", status(recipe).cost)
    assert status(run_fakes.recipe_in(tmp_path, "v2")).cost == ""


def test_a_damaged_history_is_said(recipe: Recipe, storage: Storage, tmp_path: Path):
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        run_fakes.train(storage, lease.token, 3, (2,), tmp_path)
    key = f"{recipe.run_prefix}/metrics.jsonl"
    storage.put(key, storage.get(key)[:-9])
    assert "line 3 of the training history is no step" in _line(status(recipe), "train")


def test_a_lost_target_object_is_what_the_next_run_captures(recipe: Recipe, storage: Storage):
    units = run_fakes.planned(recipe, storage)
    run_fakes.capture(storage, units)
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        run_fakes.publish_targets(storage, lease.token, units)
    assert "capture" not in status(recipe).due
    storage.delete(f"targets/{OF.fingerprint}/{units[0].hash}.parquet")
    assert f"does capture (1 of {len(units)} target objects missing" in status(recipe).render()


def test_who_renewed_the_lease_last_and_when(recipe: Recipe, storage: Storage):
    path, pid = Path(recipe.storage.root, recipe.run_prefix, "lease.json"), os.getpid()
    with Lease.acquire(storage, recipe.run_prefix):
        assert f"process {pid} (epoch 1), good for" in _line(status(recipe), "lease")
    stale = path.stat().st_mtime - 600
    os.utime(path, (stale, stale))
    assert f"given back 10 min ago by host {os.uname().nodename}, process {pid}" in _line(status(recipe), "lease")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "expires_at": stale + 60}))
    os.utime(path, (stale, stale))
    found = status(recipe)
    assert found.owner is None
    assert re.search(r"last renewed 10 min ago by .*, ran out 9 min ago", _line(found, "lease"))


def test_status_loads_no_framework(recipe: Recipe, storage: Storage):
    units = run_fakes.planned(recipe, storage)
    run_fakes.capture(storage, units)
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        run_fakes.begin(storage, lease.token)
        run_fakes.publish_targets(storage, lease.token, units)
    path = Path(recipe.storage.root).parent / "recipe.json"
    path.write_text(recipe.model_dump_json())
    code = (
        "import json, sys\nfrom distill_ray.config import Recipe\nfrom distill_ray.status import status\n"
        f"print(status(Recipe.model_validate_json(open({str(path)!r}).read())).render())\n"
        "print([m for m in ('torch', 'transformers', 'ray', 'vllm', 'deepspeed') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert out.endswith("[]\n"), out


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (119, "119 s"), (3540, "59 min"), (3599, "1 h 0 min"), (12000, "3 h 20 min"), (200_000, "2 d 7 h")],
)
def test_spans(seconds: float, said: str):
    assert span(seconds) == said
