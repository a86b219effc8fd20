"""Device seconds, dollars and break-even against numbers worked out by hand; usage objects as commands leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill_ray import cost
from distill_ray.config import Recipe, parse_recipe
from distill_ray.cost import ActorTime, Meter, NodeUsage, StageUsage, Usage
from distill_ray.cost.meter import STORE_EVERY_S, Held
from distill_ray.errors import IntegrityError, LeaseLostError, UserError
from distill_ray.lease import Lease
from distill_ray.storage import Storage, StorageError, open_storage
from tests.unit.test_cost_spent import Clock


def _recipe(root: Path | str = "/root", **sections: dict[str, Any]) -> Recipe:
    stated: dict[str, Any] = {
        "storage": {"root": str(root)},
        "corpus": {"sources": ["a.jsonl"]},
        "teacher": {"model": "/teacher", "tensor_parallel": 4},
        "student": {"teacher_layers": [0]},
    }
    return parse_recipe({"name": "tiny", "version": "v1", **stated, **sections})


def _node(node_type: str = "local", seconds: tuple[float, float, float] = (0.0, 3600.0, 0.0), tokens: int = 0) -> Any:
    return NodeUsage(node_type, 1, *seconds, done=1, tokens=tokens)


def _usage(stage: str, epoch: int, *nodes: NodeUsage, device: Any = "GPU") -> Usage:
    return Usage(stage, epoch, device, 1, True, nodes)


# --- how it comes into storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path))


def test_two_commands_of_which_one_was_killed_are_summed_by_stage_and_node_type(storage: Storage):
    recipe, clock = _recipe(storage.uri), Clock()
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        meter = Meter(storage, lease.token, "capture", cost.held(recipe, "capture"), clock)
        meter.post(ActorTime("a", 1.0, 9.0, 5.0, 1.0, "h100", 1, 100))
        clock.now += STORE_EVERY_S
        meter.post(ActorTime("a", 1.0, 9.0, 15.0, 2.0, "h100", 2, 200))
        meter.post(ActorTime("b", 2.0, 20.0, 7.0, 0.5, "a100", 1, 50))  # too soon after the last write: killed here
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        meter = Meter(storage, lease.token, "capture", cost.held(recipe, "capture"), clock)
        meter.post(ActorTime("c", 0.0, 10.0, 0.0, 0.0, "h100"))
        meter.post(ActorTime("c", 0.0, 10.0, 30.0, 3.0, "h100", 3, 300))
        assert meter.close() is None
        meter = Meter(storage, lease.token, "train", cost.held(recipe, "train"), clock)
        for name in "def":
            meter.post(ActorTime(name, 0.0, 5.0, 50.0, 5.0, "h100", 4, 400))
        assert meter.close() is None
    usages, problems = cost.read_usage(storage, recipe.run_prefix)
    assert problems == []
    assert [(u.epoch, u.stage, u.ended) for u in usages] == [
        (1, "capture", False),
        (2, "capture", True),
        (2, "train", True),
    ]
    # 4 GPUs a teacher: (1 + 9 + 10) s of starts, (15 + 30) s busy, (2 + 3) s idle; one GPU a training worker.
    assert cost.by_stage(usages) == [
        StageUsage("capture", "GPU", 2, NodeUsage("h100", 2, 80.0, 180.0, 20.0, 5, 500)),
        StageUsage("train", "GPU", 1, NodeUsage("h100", 3, 15.0, 150.0, 15.0, 12, 1200)),
    ]
    assert cost.hours_held(storage, recipe) == pytest.approx((280 + 180) / 3600)
    assert cost.hours_held(storage, recipe, "capture") == pytest.approx(280 / 3600)


def test_a_process_is_counted_from_its_first_post_on(storage: Storage):
    recipe = _recipe(storage.uri)
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        meter = Meter(storage, lease.token, "capture", Held("GPU", 2), Clock())
        meter.post(ActorTime("a", 3.0, 0.0, 0.0, 0.0))
    assert cost.hours_held(storage, recipe) == pytest.approx(6 / 3600)


def test_starts_are_counted_until_an_actor_is_ready(storage: Storage):
    recipe = _recipe(storage.uri)
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        meter = Meter(storage, lease.token, "capture", Held("GPU", 2), Clock())
        assert [meter.starting("a"), meter.starting("b"), meter.starting("a")] == [1, 1, 2]
        meter.ready("a")
        assert [meter.starting("a"), meter.starting("b")] == [1, 2]


def test_processes_on_cpus_are_no_gpu_hours(storage: Storage):
    recipe = _recipe(storage.uri, teacher={"model": "/teacher", "use_gpu": False, "tensor_parallel": 2})
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        meter = Meter(storage, lease.token, "capture", cost.held(recipe, "capture"), Clock())
        meter.post(ActorTime("a", 0.0, 0.0, 1800.0, 0.0))
    assert cost.hours_held(storage, recipe) == 0
    assert cost.device_hours(cost.read_usage(storage, recipe.run_prefix)[0], "CPU process") == 1.0


def test_a_command_that_lost_the_run_cannot_write_and_says_so_at_its_end(storage: Storage):
    recipe, clock = _recipe(storage.uri), Clock()
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        old = lease.token
    with Lease.acquire(storage, recipe.run_prefix):
        meter = Meter(storage, old, "capture", Held("GPU", 1), clock)
        meter.post(ActorTime("a", 1.0, 0.0, 0.0, 0.0))
        assert isinstance(meter.close(), LeaseLostError)
    assert cost.read_usage(storage, recipe.run_prefix) == ([], [])


def test_a_write_that_failed_is_made_good_by_the_next(storage: Storage):
    recipe, clock = _recipe(storage.uri), Clock()

    class Flaky:
        away = True

        def __getattr__(self, name: str) -> Any:
            if self.away:
                raise StorageError("away")
            return getattr(storage, name)

    flaky: Any = Flaky()
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        meter = Meter(flaky, lease.token, "capture", Held("GPU", 1), clock)
        meter.post(ActorTime("a", 1.0, 0.0, 0.0, 0.0))
        flaky.away = False
        clock.now += STORE_EVERY_S
        meter.post(ActorTime("a", 11.0, 0.0, 0.0, 0.0))
        assert cost.hours_held(storage, recipe) == pytest.approx(11 / 3600)
        flaky.away = True
        assert isinstance(meter.close(), StorageError)


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"schema_version": 99}', b'{"schema_version": 1, "stage": "capture"}'])
def test_a_damaged_object_is_named_and_no_sum_is_given_as_if_it_were_whole(data: bytes, storage: Storage):
    recipe = _recipe(storage.uri)
    storage.put(f"{recipe.run_prefix}/usage/e0001-capture.json", data)
    usages, (problem,) = cost.read_usage(storage, recipe.run_prefix)
    assert usages == []
    assert "e0001-capture.json" in problem
    assert "restore it, or delete it" in problem
    with pytest.raises(IntegrityError, match="e0001-capture"):
        cost.hours_held(storage, recipe)


# --- dollars


def test_a_type_of_node_goes_before_the_roles_price_and_nothing_is_guessed():
    usages = [
        _usage("capture", 1, _node("h100"), _node("a100"), _node("h100/spot")),
        _usage("train", 1, _node("h100")),
    ]
    stages = cost.by_stage(usages)
    prices = _recipe(cost={"device_hour": {"h100": 4.0, "a100": 2.0}, "student_gpu_hour": 9.0}).cost
    # Of the spot node nothing is known, so neither is the capture's sum, nor the total.
    assert cost.dollars_by_stage(prices, stages) == {"train": 4.0}
    prices = _recipe(cost={"device_hour": {"h100": 4.0, "a100": 2.0}, "teacher_gpu_hour": 1.5}).cost
    assert cost.dollars_by_stage(prices, stages) == {"capture": 7.5, "train": 4.0, "total": 11.5}
    assert cost.dollars_by_stage(_recipe().cost, stages) == {}


def test_processes_on_cpus_cost_what_their_node_type_says_and_never_a_gpus_price():
    stages = cost.by_stage([_usage("train", 1, _node(), device="CPU process")])
    assert cost.dollars_by_stage(_recipe(cost={"student_gpu_hour": 9.0}).cost, stages) == {}
    assert cost.dollars_by_stage(_recipe(cost={"device_hour": {"local": 0.5}}).cost, stages)["total"] == 0.5


SERVING = {
    "tokens_per_request": 2000,
    "teacher_million_tokens": 1.0,
    "student_million_tokens": 0.1,
    "horizon_days": 7,
}


def test_break_even_by_hand():
    # A request saves 2,000 / 10⁶ · 0.9 $ = 0.0018 $; 126 $ in 7 days are 70,000 requests, 10,000 a day.
    prices = _recipe(cost={"serving": SERVING}).cost
    found = cost.break_even(prices, 126.0, None)
    assert found["saving_per_request"] == pytest.approx(0.0018)
    assert found["requests_per_day"] == pytest.approx(10_000)
    said = cost.sentence(found)
    for text in (
        "From 10,000 requests a day",
        "after 7 days",
        "$126.00",
        "2,000 tokens",
        "$0.002 ($1 a million",
        "($0.1",
    ):
        assert text in said, said
    assert "storage not counted (cost.storage_gb_month is not stated)" in said
    # A month has 30.4375 days: 4.348214… $ a month are 1 $ in 7 days.
    stored = cost.break_even(prices, 125.0, 30.4375 / 7)
    assert stored["requests_per_day"] == pytest.approx(10_000)
    assert "$125.00 of devices and $1.00 of storage for 7 days" in cost.sentence(stored)


def test_break_even_from_gpu_hours_of_a_million_tokens():
    serving = {k: v for k, v in SERVING.items() if "million" not in k}
    serving |= {"teacher_gpu_hours": 0.5, "student_gpu_hours": 0.05}
    prices = {"teacher_gpu_hour": 2.0, "student_gpu_hour": 2.0, "serving": serving}
    assert cost.break_even(_recipe(cost=prices).cost, 126.0, None)["requests_per_day"] == pytest.approx(10_000)
    del prices["student_gpu_hour"]
    assert cost.break_even(_recipe(cost=prices).cost, 126.0, None) == {"missing": ["cost.student_gpu_hour"]}


def test_a_student_that_saves_nothing_never_pays():
    found = cost.break_even(_recipe(cost={"serving": SERVING | {"student_million_tokens": 1.0}}).cost, 126.0, None)
    assert "requests_per_day" not in found
    assert "never pays for itself" in cost.sentence(found)


def test_what_is_missing_is_named_and_gives_no_figure():
    found = cost.break_even(_recipe().cost, None, None)
    assert found == {
        "missing": [
            "the dollars of this run",
            "cost.serving.tokens_per_request",
            "cost.serving.horizon_days",
            "cost.serving.teacher_million_tokens (or teacher_gpu_hours)",
            "cost.serving.student_million_tokens (or student_gpu_hours)",
        ]
    }
    assert "cost.serving.horizon_days" in cost.sentence(found)


def test_a_million_tokens_priced_twice_is_refused():
    with pytest.raises(UserError, match="teacher_million_tokens and teacher_gpu_hours both"):
        _recipe(cost={"serving": {"teacher_million_tokens": 1.0, "teacher_gpu_hours": 1.0}})


# --- the report's section


def _account(recipe: Recipe, usages: list[Usage], **more: Any) -> dict[str, Any]:
    stored = cost.Stored(targets=3_000_000_000, run=1_500_000_000, model=500_000_000)
    return cost.account(recipe, usages, stored=stored, targets=cost.TargetsTime(1800.0, 0), **more)


def test_the_account_by_hand():
    prices = {"teacher_gpu_hour": 3.0, "student_gpu_hour": 2.0, "storage_gb_month": 0.02, "serving": SERVING}
    usages = [
        _usage("capture", 1, _node("h100", (360.0, 3600.0, 3240.0), 500_000)),
        _usage("capture", 3, _node("h100", (0.0, 3600.0, 0.0), 1_500_000)),
        _usage("train", 3, _node("h100", (0.0, 7200.0, 0.0), 9)),
        _usage("evaluate", 4, _node("h100", (0.0, 1800.0, 0.0), 9)),
    ]
    found = _account(_recipe(cost=prices), usages)
    # Capture: 2 h + 1 h at 3 $; training 2 h and evaluation ½ h at 2 $; 2 M teacher tokens.
    assert found["dollars"] == {"capture": 9.0, "train": 4.0, "evaluate": 1.0, "total": 14.0}
    assert (found["commands"], found["gpu_hours"]) == (3, 5.5)
    assert found["dollars_per_million_teacher_tokens"] == pytest.approx(4.5)
    assert found["storage"]["dollars_per_month"] == pytest.approx(0.1)
    # 1,800 s of a replica of four GPUs, whichever run paid for them.
    assert found["targets"] == {"teacher_seconds": 1800.0, "device_hours": 2.0, "untimed_units": 0, "dollars": 6.0}
    requests = (14.0 + 0.1 * 7 / 30.4375) / (7 * 0.0018)
    assert found["break_even"]["requests_per_day"] == pytest.approx(requests)
    assert found["usage"][0] | {"stage": "", "device": ""} == {
        "stage": "", "device": "", "node_type": "h100", "commands": 2, "processes": 2, "start_s": 360.0,
        "busy_s": 7200.0, "idle_s": 3240.0, "done": 2, "tokens": 2_000_000, "device_hour": 3.0, "dollars": 9.0,
    }  # fmt: skip
    json.dumps(found, allow_nan=False)
    stored, targets = cost.measured(found)
    assert cost.account(_recipe(cost=prices), usages, stored=stored, targets=targets) == found


def test_without_prices_there_is_no_dollar_anywhere():
    found = _account(_recipe(), [_usage("capture", 1, _node("h100", tokens=1000))])
    assert found["dollars"] == {}
    assert "dollars_per_million_teacher_tokens" not in found
    assert "dollars_per_month" not in found["storage"]
    assert "dollars" not in found["targets"]
    assert "requests_per_day" not in found["break_even"]


def test_a_run_of_reused_targets_costs_no_teacher_and_says_what_they_took():
    found = _account(_recipe(cost={"teacher_gpu_hour": 3.0, "student_gpu_hour": 2.0}), [_usage("train", 1, _node())])
    assert found["dollars"] == {"train": 2.0, "total": 2.0}
    assert found["targets"]["dollars"] == 6.0
    assert "dollars_per_million_teacher_tokens" not in found


@pytest.mark.parametrize("more", [{"unknown": ["capture"]}, {"problems": ["e0001-capture.json is damaged"]}])
def test_a_total_that_lacks_something_is_none(more: dict[str, list[str]]):
    recipe = _recipe(cost={"student_gpu_hour": 2.0, "serving": SERVING})
    found = _account(recipe, [_usage("train", 1, _node())], **more)
    assert found["dollars"] == {"train": 2.0}
    assert found["break_even"] == {"missing": ["the dollars of this run"]}
    assert len(found["notes"]) == 1
