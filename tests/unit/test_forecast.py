"""The forecast against numbers worked out by hand, and the rates that it takes from earlier versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill_ray import cost
from distill_ray import report as reports
from distill_ray.config import Recipe, fingerprint, identity_of, parse_recipe
from distill_ray.cost import Basis, Forecast, NodeUsage, Rate, StoredForecast, Usage, stage_forecast, stored_forecast
from distill_ray.errors import UserError
from distill_ray.evaluate.figures import cost_figures
from distill_ray.forecast.rates import rates
from distill_ray.forecast.verb import _trained
from distill_ray.lease import Lease, document_entry, publish, read_published
from distill_ray.pipeline import _forecast
from distill_ray.report import render_html
from distill_ray.schema import Amounts
from distill_ray.storage import Storage, open_storage
from distill_ray.targets import CaptureIdentity
from tests.unit.test_report import PRICES, _report, cost_section

IDENTITY = CaptureIdentity({"weights": "w", "dtype": "bfloat16"}, "tok", 100, 4, (1.0,), 1)
BASIS = Basis(sources=3, bytes=9000, sampled_sources=2, sampled_bytes=800, captured_tokens=0, upper_bound=False)


def _recipe(root: Path | str = "/root", version: str = "2026-W48", **sections: dict[str, Any]) -> Recipe:
    stated: dict[str, Any] = {
        "storage": {"root": str(root)},
        "corpus": {"sources": ["a.jsonl"]},
        "teacher": {"model": "/teacher", "tensor_parallel": 4},
        "student": {"teacher_layers": [0]},
    }
    return parse_recipe({"name": "triage", "version": version, **stated, **sections})


# --- arithmetic


def test_hours_and_dollars_by_hand():
    # 7.2 M tokens at 1,000 a second are 2 h of a replica, and four starts of 900 s one more; each holds four GPUs.
    recipe = _recipe(cost={"teacher_gpu_hour": 3.0, "device_hour": {"h100": 2.0}})
    found = stage_forecast(recipe, "capture", 7.2e6, 7e6, Rate(1000.0, 900.0, "stated"), 4)
    assert (found.device, found.device_hours, found.dollars) == ("GPU", 12.0, 36.0)
    assert found.wall_hours == 0.75
    # Where it was measured on a type of node with a price of its own, that goes first.
    measured = stage_forecast(recipe, "capture", 7.2e6, 7e6, Rate(1000.0, 900.0, "measured", "h100"), 4)
    assert measured.dollars == 24.0
    # A start that is not stated is left out, and a capture with nothing to do starts nobody.
    assert stage_forecast(recipe, "capture", 7.2e6, 7e6, Rate(1000.0, None, "stated"), 4).device_hours == 8.0
    assert stage_forecast(recipe, "capture", 0, 0, Rate(1000.0, 900.0, "stated"), 4).device_hours == 0.0
    # One GPU a training worker, and no price for it.
    train = stage_forecast(recipe, "train", 3.6e6, 1e6, Rate(500.0, 0.0, "stated"), 2)
    assert (train.device_hours, train.wall_hours, train.dollars) == (2.0, 1.0, None)


def test_training_that_ends_with_max_steps_goes_through_so_many_batches():
    epoch = Amounts(tokens=100.0, train_tokens=60_000.0, train_supervised=6_000.0)
    batches = {"epochs": 2, "global_batch_tokens": 4096, "pack_tokens": 4096}
    whole = _trained(_recipe(train=batches | {"max_steps": 30}), epoch)
    assert (whole.train_tokens, whole.train_supervised) == (120_000, 12_000)
    cut = _trained(_recipe(train=batches | {"max_steps": 10}), epoch)
    assert (cut.train_tokens, cut.train_supervised) == pytest.approx((40_960, 4_096))


def test_without_a_rate_there_are_tokens_but_no_hours_and_no_dollars():
    recipe = _recipe(cost={"teacher_gpu_hour": 3.0})
    found = stage_forecast(recipe, "capture", 1234.4, 1000, "cost.rates.teacher_tokens_s is not stated", 1)
    assert (found.tokens, found.device_hours, found.wall_hours, found.dollars) == (1234, None, None, None)
    said = cost.forecast_sentence(Forecast((found,), 1200, StoredForecast(2_000_000_000, None, None), BASIS))
    assert "capture 1,234 tokens: no hours, cost.rates.teacher_tokens_s is not stated" in said
    assert "$" not in said
    assert "stores 2 GB of targets, for 1,200 target rows" in said


def test_stored_bytes_by_hand():
    train = {"global_batch_tokens": 4096, "pack_tokens": 4096, "checkpoint_every": 10, "keep_checkpoints": 2}
    recipe = _recipe(train=train, cost={"storage_gb_month": 0.5})
    new = Amounts(tokens=2_010_000, sequences=10_000)
    # 41 steps make checkpoints at 10, 20, 30 and 40; two are kept, of 12 + 2 bytes a parameter.
    found = stored_forecast(recipe, new, 200.0, 41 * 4096, 1_000_000)
    assert found.targets == 400_000_000
    assert found.run == 2 * 14_000_000 + 2_000_000
    assert found.model == 2_000_000
    assert found.dollars_month == pytest.approx(0.5 * (0.4 + 0.03 + 0.002))
    # None is saved after the last step; fp32 trains on 4 bytes more a parameter.
    recipe = _recipe(train=train | {"precision": "fp32"}, export={"dtype": "float32"})
    found = stored_forecast(recipe, new, 200.0, 20 * 4096, 1_000_000)
    assert (found.run, found.model) == (16_000_000 + 4_000_000, 4_000_000)
    # Every 20th step stays as well.
    recipe = _recipe(train=train | {"keep_every": 2})
    assert stored_forecast(recipe, new, 200.0, 81 * 4096, 1_000_000).run == 6 * 14_000_000 + 2_000_000
    assert stored_forecast(recipe, new, 200.0, 81 * 4096, None) == StoredForecast(400_000_000, None, None)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"teacher_start_s": 60.0}, "teacher_start_s has no effect without teacher_tokens_s"),
        ({"student_tokens_s": 0.0}, "greater than 0"),
        ({"teacher_tokens_s": 5.0, "teacher_start_s": -1.0}, "greater than or equal to 0"),
        ({"tokens_s": 5.0}, "tokens_s"),
    ],
)
def test_rates_that_mean_nothing_are_refused(stated: dict[str, float], said: str):
    with pytest.raises(UserError, match=said):
        _recipe(cost={"rates": stated})


def test_rates_are_no_price_and_change_no_report():
    assert _recipe(cost={"rates": {"teacher_tokens_s": 5.0}}).cost.prices() == _recipe().cost.prices()


# --- rates


def _published(storage: Storage, version: str, teacher: CaptureIdentity = IDENTITY, **usage: Any) -> Recipe:
    """A version with usage and report: a replica of four GPUs, and two workers whose tokens are half supervised."""
    recipe = _recipe(storage.uri, version)
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        capture = {"device": "GPU", "devices": 4, "node": ("h100", 1, 240.0, 1600.0, 400.0, 9, 50_000)} | usage
        for stage, device, devices, node in (
            ("capture", capture["device"], capture["devices"], capture["node"]),
            ("train", "GPU", 1, ("a100", 2, 60.0, 180.0, 20.0, 40, 4000)),
        ):
            cost.write_usage(
                storage, lease.token, Usage(stage, lease.token.epoch, device, devices, True, (NodeUsage(*node),))
            )
        lines = b"".join(
            json.dumps({"step": s, "tokens": 100, "input_tokens": 200}).encode() + b"\n" for s in range(40)
        )
        storage.put(f"{recipe.run_prefix}/metrics.jsonl", lines)
        history = document_entry(f"{recipe.run_prefix}/metrics.jsonl", lines) | {"steps": 40}
        publish(storage, lease.token, "student", {"sha256": "s", "history": history})
        report, steps = _report({})
        report["identity"]["teacher"] = fingerprint(dict(teacher.teacher))
        report["recipe"] = json.loads(json.dumps(identity_of(recipe)))
        reports.write_report(storage, lease.token, report, steps, settings={}, require={})
    return recipe


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path))


def test_rates_come_from_the_newest_version_that_measured_them(storage: Storage):
    _published(storage, "2026-W9", node=("h100", 1, 0.0, 4.0, 0.0, 1, 1))
    _published(storage, "2026-W47")
    _published(storage, "2026-W49")  # after this one
    notes: list[str] = []
    found = rates(_recipe(storage.uri), storage, IDENTITY, notes)
    # 2,000 device seconds of four GPUs are 500 s of the replica, which started for 60 s.
    assert found["capture"] == Rate(100.0, 60.0, "measured in 2026-W47 on h100", "h100")
    # 4,000 supervised of 8,000 tokens in 200 s of workers.
    assert found["train"] == Rate(40.0, 30.0, "measured in 2026-W47 on a100", "a100")
    assert notes == []
    stated = _recipe(storage.uri, cost={"rates": {"student_tokens_s": 7.0}})
    assert rates(stated, storage, IDENTITY, notes)["train"] == Rate(7.0, None, "stated")


def test_another_teacher_student_or_device_measures_nothing_for_this_one(storage: Storage):
    other = CaptureIdentity({"weights": "other"}, "tok", 100, 4, (1.0,), 1)
    _published(storage, "2026-W46", devices=2)
    _published(storage, "2026-W47", teacher=other)
    recipe = _recipe(storage.uri, student={"teacher_layers": [0, 1]})
    found = rates(recipe, storage, IDENTITY, [])
    assert "cost.rates.teacher_tokens_s is not stated, and no version of triage has measured it" in str(
        found["capture"]
    )
    assert "cost.rates.student_tokens_s" in str(found["train"])
    assert isinstance(rates(_recipe(storage.uri), storage, None, [])["capture"], str)


def test_a_damaged_report_is_named_and_an_older_version_speaks(storage: Storage):
    _published(storage, "2026-W46")
    damaged = _published(storage, "2026-W47")
    storage.put(f"{damaged.run_prefix}/report.json", b"{}")
    notes: list[str] = []
    found = rates(_recipe(storage.uri), storage, IDENTITY, notes)
    assert isinstance(found["capture"], Rate)
    assert found["capture"].origin == "measured in 2026-W46 on h100"
    assert len(notes) == 1
    assert "2026-W47/report.json" in notes[0]


def test_a_run_that_has_begun_gets_no_forecast_of_its_rest(storage: Storage):
    recipe = _recipe(storage.uri)
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        publish(storage, lease.token, "identity", {"fingerprint": "f", "of": {}})
    assert _forecast(recipe, storage, lambda _: None) is None
    assert cost.FORECAST not in read_published(storage, recipe.run_prefix)


# --- beside what it was


def test_the_reports_cost_holds_what_the_run_published_before_it_began(storage: Storage):
    recipe, made = _recipe(storage.uri), {"stages": []}
    kept, took = cost.Stored(1, 2, 3), cost.TargetsTime(4.0, 0)
    assert cost_figures(recipe, storage, {"targets": {}, cost.FORECAST: made}, kept, took)[cost.FORECAST] == made
    assert cost_figures(recipe, storage, {"targets": {}}, kept, took)[cost.FORECAST] is None


def _both(**basis: Any) -> dict[str, Any]:
    recipe = _recipe(cost={k: v for k, v in PRICES.items() if k != "serving"})
    stages = (
        stage_forecast(recipe, "capture", 1_600_000, 1.6e6, Rate(2000.0, 100.0, "stated"), 1),
        stage_forecast(recipe, "train", 3000, 2000, "cost.rates.student_tokens_s is not stated", 8),
    )
    made = Forecast(stages, 1_590_000, StoredForecast(2_400_000_000, 2 * 10**9, 10**9), Basis(**vars(BASIS) | basis))
    return cost_section(**PRICES) | {cost.FORECAST: json.loads(json.dumps(made.to_json(), allow_nan=False))}


def test_the_comparison_by_hand():
    rows = {name: (before, was) for name, before, was in cost.compared(_both())}
    assert rows["capture, tokens"] == (1_600_000, 2_000_000)
    # 800 s and a start of 100 s, four GPUs; it was 720 + 2,520 + 360 s.
    assert rows["capture, device hours"] == (pytest.approx(1.0), pytest.approx(1.0))
    assert rows["capture, dollars"] == (pytest.approx(3.0), pytest.approx(3.0))
    assert rows["train, supervised tokens"] == (2000, 2400)
    assert rows["train, device hours"] == (None, 2.0)
    assert rows["stored targets, bytes"] == (2_400_000_000, 3_000_000_000)
    assert rows["stored in the run's own folder, bytes"] == (2_000_000_000, 1_000_000_000)
    assert "stored targets, bytes" not in {name for name, *_ in cost.compared(_both(captured_tokens=5))}


def test_the_page_shows_the_forecast_beside_what_it_was():
    report, history = _report({}, costs=_both(notes=("1 source(s) <were> never read",)))
    page = render_html(report, history)
    for text in (
        "<tr><td>Capture, tokens</td><td class=number>1,600,000</td><td class=number>2,000,000</td>"
        "<td class=number>1.25</td></tr>",
        "<tr><td>Train, device hours</td><td class=number>not known</td><td class=number>2</td>"
        "<td class=number>–</td></tr>",
        "rate of capture: stated; cost.rates.student_tokens_s is not stated; 1 source(s) &lt;were&gt; never read.",
    ):
        assert text in page, text
    report, history = _report({}, costs=cost_section(**PRICES))
    assert "No forecast was made before this run began" in render_html(report, history)
