"""How many teachers a backlog is worth, where they may run, and what a budget says; no cluster is started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill_ray import cost
from distill_ray.capture.budget import Budget
from distill_ray.capture.dataset import pool_size
from distill_ray.config import Recipe, identity_of, parse_recipe
from distill_ray.cost import ActorTime, Meter
from distill_ray.errors import BudgetSpentError, IntegrityError, UserError
from distill_ray.lease import Lease
from distill_ray.preflight.hardware import Node, Nodes
from distill_ray.storage import Storage, open_storage
from distill_ray.teacher import actor_resources
from distill_ray.units import Units
from tests.unit.targets_fakes import unit
from tests.unit.test_cost_spent import Clock


def _recipe(replicas: dict[str, int], **sections: dict[str, Any]) -> Recipe:
    stated = {
        "storage": {"root": "/root"},
        "corpus": {"sources": ["a.jsonl"], "unit_bytes": 1024},
        "teacher": {"model": "/teacher", "tensor_parallel": 8, "replicas": replicas},
        "student": {"teacher_layers": [0]},
    }
    merged = {name: stated.get(name, {}) | sections.get(name, {}) for name in stated | sections}
    return parse_recipe({"name": "tiny", **merged})


def _pending(count: int, size: int = 1024) -> Units:
    return Units.of([replace(unit(f"u{i}"), bytes=size) for i in range(count)])


@pytest.mark.parametrize(
    ("replicas", "units", "size", "found"),
    [
        ((0, 8), 1, 1024, (1, 1, 1)),
        ((0, 8), 20, 1024, (1, 1, 8)),
        ((0, 8), 21, 1024, (1, 2, 8)),
        ((0, 8), 200, 102, (1, 1, 8)),  # many units of a tenth
        ((0, 8), 1000, 1024, (1, 8, 8)),
        ((4, 8), 30, 1024, (4, 4, 8)),
        ((4, 8), 3, 1024, (3, 3, 3)),
    ],
)
def test_teachers_follow_the_backlog(replicas: tuple[int, int], units: int, size: int, found: tuple[int, int, int]):
    recipe = _recipe({"min": replicas[0], "max": replicas[1]})
    assert pool_size(recipe, _pending(units, size)) == found


def test_teachers_without_gpus_begin_with_the_least_and_ray_data_adds_more():
    recipe = _recipe({"min": 1, "max": 4}, teacher={"use_gpu": False})
    assert pool_size(recipe, _pending(1000)) == (1, 1, 4)


def test_pinning_is_placement_and_selects_by_role():
    free, pinned = _recipe({"max": 1}), _recipe({"max": 1}, cluster={"pin_by_label": True})
    assert identity_of(free) == identity_of(pinned)
    assert actor_resources(free.teacher, free.cluster.selector("teacher")) == {"num_gpus": 8, "num_cpus": 0}
    assert actor_resources(pinned.teacher, pinned.cluster.selector("teacher")) == {
        "num_gpus": 8,
        "num_cpus": 0,
        "label_selector": {"distill-ray/role": "teacher"},
    }
    assert free.cluster.besides("student") == {}
    assert pinned.cluster.besides("student") == {"distill-ray/role": "!student"}


def test_a_label_that_no_node_has_is_said_unless_a_node_may_come():
    nodes = [Node(4, 0, {}), Node(4, 8, {"distill-ray/role": "teacher"})]
    teacher, student = {"distill-ray/role": "teacher"}, {"distill-ray/role": "student"}
    assert Nodes(nodes, False).missing({}) == ""
    assert Nodes(nodes, False).missing(teacher) == ""
    with pytest.raises(UserError, match=r"none of the 2 node\(s\) is labelled distill-ray/role=student; start nodes"):
        Nodes(nodes, False).missing(student)
    assert "no node is labelled distill-ray/role=student now" in Nodes(nodes, True).missing(student)


@contextmanager
def _command(storage: Storage, limit: float | None, **teacher: Any) -> Iterator[tuple[Budget, Meter]]:
    """A command of the run: its budget, and the meter that keeps what it spends."""
    recipe = _recipe({"max": 8}, capture={} if limit is None else {"max_gpu_hours": limit}, teacher=teacher)
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        meter = Meter(storage, lease.token, "capture", cost.held(recipe, "capture"), Clock())
        yield Budget(recipe, storage, lease.token.epoch), meter
        assert meter.close() is None


def _post(meter: Meter, budget: Budget, **seconds: float) -> None:
    for actor, spent in seconds.items():
        meter.post(ActorTime(actor, spent, 0.0, 0.0, 0.0))
    budget.hold(meter.seconds())


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path))


def test_a_budget_counts_all_gpus_of_all_commands(storage: Storage):
    with _command(storage, 10.0) as (budget, meter):
        budget.check()
        _post(meter, budget, a=1350.0, b=450.0)  # 8 GPUs each: 4 hours
    with _command(storage, 10.0) as (budget, meter):
        _post(meter, budget, a=1350.0, b=900.0)  # 5 more
        assert budget.shown() == {"budget_spent": 0.9}
        with pytest.raises(BudgetSpentError, match=r"max_gpu_hours=10 is.*held 10\.2 GPU-hours, 6\.2 of them") as found:
            _post(meter, budget, b=1440.0)
        assert found.value.exit_code == 2
    with _command(storage, 10.0) as (budget, _), pytest.raises(BudgetSpentError, match="0 of them in this command"):
        budget.check()
    with _command(storage, 11.0) as (budget, _):
        budget.check()


def test_what_a_command_has_stored_itself_is_not_counted_twice(storage: Storage):
    recipe = _recipe({"max": 8}, capture={"max_gpu_hours": 10.0})
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        meter = Meter(storage, lease.token, "capture", cost.held(recipe, "capture"), Clock())
        meter.post(ActorTime("a", 1350.0, 0.0, 0.0, 0.0))
        assert cost.hours_held(storage, recipe, "capture") == 3.0
        budget = Budget(recipe, storage, lease.token.epoch)
        budget.hold(meter.seconds())
        assert budget.hours == 3.0


def test_hours_of_processes_count_where_teachers_use_no_gpu(storage: Storage):
    with _command(storage, 0.5, use_gpu=False, tensor_parallel=1) as (budget, meter):
        _post(meter, budget, a=1000.0)
        with pytest.raises(BudgetSpentError, match="process-hours"):
            _post(meter, budget, b=801.0)


def test_without_a_limit_nothing_is_refused(storage: Storage):
    with _command(storage, None) as (budget, meter):
        _post(meter, budget, a=1e9)
        assert budget.shown() == {}


def test_what_earlier_commands_held_must_be_known(storage: Storage):
    storage.put("runs/tiny/v1/usage/e0001-capture.json", b"{")
    recipe = _recipe({"max": 8}, capture={"max_gpu_hours": 1.0}).model_copy(update={"version": "v1"})
    with pytest.raises(IntegrityError, match="e0001-capture"):
        Budget(recipe, storage, 2)
