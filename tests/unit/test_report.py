"""Metrics against hand-worked and brute-force values, the gate, and the two report documents."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from distill_ray import cost
from distill_ray.config import parse_recipe
from distill_ray.errors import IntegrityError, UserError
from distill_ray.report import (
    Evaluation,
    KeptMassHistogram,
    MetricSums,
    RunIdentity,
    ScoredRows,
    TargetFigures,
    Timings,
    TokenCounts,
    build_report,
    check_require,
    failures,
    judge,
    model_card,
    read_history,
    render_html,
    render_table,
    to_bytes,
)

N = 200


def _scored(seed: int, quality: float) -> ScoredRows:
    rng = np.random.default_rng(seed)
    confidence_N = rng.uniform(0.05, 1, N).astype(np.float32)
    return ScoredRows(
        actual_logprob_N=np.log(rng.uniform(0.01, 1, N)),
        kl_t1_N=rng.exponential(1 - quality, N),
        acceptance_N=rng.uniform(quality, 1, N),
        agree_N=rng.random(N) < quality,
        confidence_N=confidence_N,
        correct_N=rng.random(N) < confidence_N,
    )


def _cut(rows: ScoredRows, where: np.ndarray) -> ScoredRows:
    return ScoredRows(**{f.name: getattr(rows, f.name)[where] for f in fields(ScoredRows)})


def test_metrics_do_not_depend_on_how_rows_are_batched() -> None:
    rows = _scored(1, 0.7)
    whole, parts = MetricSums(15), MetricSums(15)
    whole.add(rows)
    for where in np.array_split(np.arange(N), 7):
        parts.add(_cut(rows, where))
    assert parts.metrics("student") == pytest.approx(whole.metrics("student"), rel=1e-12)


def test_perplexity_and_ece_by_hand() -> None:
    # Four rows: confidences .9 .9 .1 .1, right, wrong, wrong, wrong → ECE = ½·|.9 − .5| + ½·|.1 − 0| = .25
    confidence_N = np.array([0.9, 0.9, 0.1, 0.1])
    rows = ScoredRows(
        actual_logprob_N=np.log([0.5, 0.25, 0.5, 0.25]),
        kl_t1_N=np.array([0.0, 1.0, 2.0, 3.0]),
        acceptance_N=np.array([1.0, 0.5, 0.5, 0.0]),
        agree_N=np.array([True, True, True, False]),
        confidence_N=confidence_N,
        correct_N=np.array([True, False, False, False]),
    )
    sums = MetricSums(bins=10)
    sums.add(rows)
    metrics = sums.metrics("student")
    assert metrics["ece"] == pytest.approx(0.25)
    assert metrics["perplexity"] == pytest.approx(math.sqrt(8))
    assert (metrics["kl_t1"], metrics["acceptance"], metrics["top1_agreement"], metrics["rows"]) == (1.5, 0.5, 0.75, 4)
    assert sums.calibration() == {
        "confidence": pytest.approx([0.1, 0.9]),
        "accuracy": pytest.approx([0, 0.5]),
        "rows": [2, 2],
    }


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_metric_that_is_not_finite_is_an_error(value: float) -> None:
    rows = _scored(1, 0.7)
    rows.actual_logprob_N[3] = value
    sums = MetricSums(bins=4)
    sums.add(rows)
    with pytest.raises(UserError, match=r"student after: perplexity=(nan|inf).*over 200 held-out rows"):
        sums.metrics("student after")


def test_no_rows_is_an_error_not_a_division() -> None:
    with pytest.raises(UserError, match="no supervised held-out row"):
        MetricSums(bins=4).metrics("teacher")


def test_kept_mass_histogram_holds_both_ends() -> None:
    histogram = KeptMassHistogram(bins=4)
    histogram.add(np.array([-np.inf, 0.0, 1e-7, math.log(0.3)], dtype=np.float32))
    assert histogram.to_json()["counts"] == [2, 0, 1, 1]


METRICS = {
    "teacher": {"perplexity": 10.0, "kl_t1": 0.0, "top1_agreement": 1.0, "ece": 0.02, "acceptance": 1.0},
    "before": {"perplexity": 90.0, "kl_t1": 3.0, "top1_agreement": 0.2, "ece": 0.3, "acceptance": 0.2},
    "after": {"perplexity": 14.0, "kl_t1": 0.3, "top1_agreement": 0.8, "ece": 0.05, "acceptance": 0.75},
}


def test_gate_senses_and_prefixes() -> None:
    gate = judge(METRICS, {"kl_t1": 0.3, "after.top1_agreement": 0.8, "before.kl_t1": 2.0, "acceptance": 0.9})
    assert list(gate) == ["acceptance", "after.top1_agreement", "before.kl_t1", "kl_t1"]
    verdicts = {b["metric"]: (b["sense"], b["value"], b["passed"]) for b in gate.values()}
    assert verdicts == {
        "after.kl_t1": ("at most", 0.3, True),
        "after.top1_agreement": ("at least", 0.8, True),
        "before.kl_t1": ("at most", 3.0, False),
        "after.acceptance": ("at least", 0.75, False),
    }
    assert failures(gate) == [
        "after.acceptance = 0.75, required at least 0.9",
        "before.kl_t1 = 3, required at most 2",
    ]
    assert judge(METRICS, {}) == {}


@pytest.mark.parametrize("name", ["kl", "after.kl", "rows", "student.kl_t1", ".kl_t1", "a.after.kl_t1"])
def test_a_bound_on_an_unknown_metric_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(name)):
        check_require({"kl_t1": 1.0, name: 1.0})


AUDIT = {
    "path": "vLLM's public path",
    "dtype": "float32",
    "units": 4,
    "sequences": 8,
    "rows": 1234,
    "worst_nats": 1.2e-5,
    "tolerance": {"logprob": 2e-3, "row_mass": 0.05, "mean_mass": 0.02},
}


def cost_section(problems: tuple[str, ...] = (), **prices: Any) -> dict[str, Any]:
    """Of a run of one command on GPUs."""
    recipe = parse_recipe(
        {
            "name": "triage",
            "storage": {"root": "/root"},
            "corpus": {"sources": ["a.jsonl"]},
            "teacher": {"model": "/teacher", "tensor_parallel": 2},
            "student": {"teacher_layers": [0]},
            "cost": prices,
        }
    )
    usages = [
        cost.Usage("capture", 1, "GPU", 2, True, (cost.NodeUsage("h<1>00", 3, 720.0, 2520.0, 360.0, 9, 2_000_000),)),
        cost.Usage("train", 1, "GPU", 1, True, (cost.NodeUsage("a100", 8, 0.0, 7200.0, 0.0, 40, 2400),)),
    ]
    stored, targets = cost.Stored(3_000_000_000, 10**9, 10**9), cost.TargetsTime(5400.0, 1)
    return cost.account(recipe, usages, stored=stored, targets=targets, problems=problems)


SERVING = {
    "tokens_per_request": 2000,
    "teacher_million_tokens": 1.0,
    "student_million_tokens": 0.1,
    "horizon_days": 7,
}
PRICES: dict[str, Any] = {
    "teacher_gpu_hour": 3.0,
    "student_gpu_hour": 2.0,
    "storage_gb_month": 0.02,
    "serving": SERVING,
}


def _report(
    require: dict[str, float], audit: dict | None = None, costs: dict | None = None
) -> tuple[dict, list[dict[str, float]]]:
    history = [
        {"step": s, "loss": 5 / s, "ce": 6 / s, "kl_t": 4 / s, "kl_t1": 4 / s, "tokens": 100, "seconds": 0.5}
        for s in range(1, 41)
    ]
    sums = [MetricSums(15) for _ in range(3)]
    for s, quality in zip(sums, (1.0, 0.2, 0.8), strict=True):
        s.add(_scored(int(quality * 10), quality))
    kept = KeptMassHistogram()
    kept.add(-np.random.default_rng(0).exponential(3, N))
    report = build_report(
        Evaluation(*sums, kept_mass=kept, tokens_per_s=1234.5),
        recipe={
            "capture": {"top_k": 64},
            "loss": {"objective": "bucket", "temperature": 2.0, "hard_label_weight": 0.25},
        },
        identity=RunIdentity(
            "triage", "2026-W47", "c" * 32, 3, "d" * 32, "t<e>acher", "k" * 32, "s" * 64, "r" * 32, "small", "b" * 32
        ),
        timings=Timings({"capture": 12.5, "train": 60.0}, {"teacher": 500.0, "train": 900.0, "evaluate": 1234.5}, 1),
        tokens=TokenCounts(captured=1000, reused=200, supervised_train=2400, held_out=N),
        targets=TargetFigures(
            rows=1197,
            bytes_per_row=210.4,
            mean_kept_mass=0.93,
            dead_letters=2,
            documents=41,
            refused={"empty: no <text>": 2},
        ),
        history=history,
        require=require,
        audit=audit,
        cost=costs,
    )
    return report, history


def test_report_json_has_the_stated_keys_and_only_finite_values() -> None:
    report, _ = _report({"kl_t1": 0.5})
    loaded = json.loads(to_bytes(report))
    assert loaded == report
    for model in ("teacher", "before", "after"):
        assert {"perplexity", "kl_t1", "top1_agreement", "ece", "acceptance", "rows"} == set(loaded[model])
    assert {"identity", "timings", "tokens", "targets", "gate", "schema_version"} <= set(loaded)
    assert loaded["before"]["kl_t1"] > loaded["after"]["kl_t1"]
    with pytest.raises(IntegrityError, match=r"after\.ece = nan"):
        to_bytes({**report, "after": {**report["after"], "ece": math.nan}})


class _Tags(HTMLParser):
    """Well-formedness as far as a plot's markup goes: ids are unique, references resolve, nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.refs: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            value = value or ""
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "srcset"):
                (self.refs if value.startswith("#") else self.fetched).append(value.removeprefix("#"))
            self.refs += re.findall(r"url\(#([^)]*)\)", value)


def test_report_html_is_self_contained_and_complete() -> None:
    report, history = _report({"kl_t1": 0.5, "acceptance": 2.0})
    page = render_html(report, history)
    assert render_html(json.loads(to_bytes(report)), history) == page, "written anew, it must be the same"
    tags = _Tags()
    tags.feed(page)
    assert not tags.fetched
    assert "http" not in page
    assert "@import" not in page
    assert len(tags.ids) == len(set(tags.ids))
    assert set(tags.refs) <= set(tags.ids)
    assert page.count("<svg") == 3
    assert "prefers-color-scheme: dark" in page
    assert "#010203" not in page
    assert "t&lt;e&gt;acher" in page
    for text in ("Perplexity", "Dead letters", "training step", "kept mass", "student before", "failed", "at least 2"):
        assert text in page, text
    assert len(page) < 400_000


def test_report_html_says_which_rates_were_not_measured() -> None:
    report, history = _report({})
    assert "500 (capture time of 1 of 3 units not known)" in render_html(report, history)
    report["timings"]["untimed_units"] = 0
    assert "500</td>" in render_html(report, history)
    report["timings"] |= {"untimed_units": 3, "tokens_per_s": {"evaluate": 1234.5}}
    page = render_html(report, history)
    assert "not measured (capture time of 3 of 3 units not known)" in page
    assert 'Tokens/s, train</td><td class="number">not measured<' in page


def test_the_page_says_what_was_used_what_it_cost_and_when_it_has_paid() -> None:
    report, history = _report({}, costs=cost_section(**PRICES))
    assert json.loads(to_bytes(report))["cost"] == report["cost"]
    page = render_html(report, history)
    for text in (
        "<h2>Usage and cost</h2>",
        "<td>h&lt;1&gt;00</td><td>GPUs, 3 process(es)</td>",
        "720 s (20%)</td>",
        "2,520 s (70%)</td>",
        "360 s (10%)</td>",
        "1.000</td>",  # GPU-hours
        "$3.00</td>",
        "$4.00</td>",
        "One student, all stages</th><th class=number>$7.00</th>",
        "million teacher tokens</td><td class=number>$1.5000</td>",
        "3.000 GB</td>",
        "dollars a month</td><td class=number>$0.10</td>",
        "3.000, without 1 units whose time is not known",
        "requests a day on, the student has paid for itself after 7 days",
        "$1 a million tokens",
    ):
        assert text in page, text
    assert page.count("<svg") == 4
    tags = _Tags()
    tags.feed(page)
    assert not tags.fetched
    assert len(tags.ids) == len(set(tags.ids))


def test_a_page_without_prices_shows_no_dollar_and_says_what_is_missing() -> None:
    report, history = _report({}, costs=cost_section())
    page = render_html(report, history)
    assert not re.search(r"\$\d", page)
    assert "no price" in page
    assert "not reckoned, since not stated or not known are the dollars of this run" in page
    assert "cost.serving.tokens_per_request" in page
    printed = render_table(report)
    assert "used    3 GPU-hours in 1 command(s)" in printed
    assert "$" not in printed
    assert "pays" not in printed


def test_the_last_lines_of_a_run_say_what_was_spent_and_when_it_has_paid() -> None:
    report, _ = _report({}, costs=cost_section(**PRICES))
    *_, used, pays = render_table(report).splitlines()
    assert used == "used    3 GPU-hours in 1 command(s), $7.00"
    # 7 $ and a week's storage of 0.10 $ a month, by 7 days of 0.0018 $ a request.
    assert pays.startswith("pays    From 557 requests a day on")


def test_usage_that_could_not_be_read_is_said() -> None:
    report, history = _report({}, costs=cost_section(**PRICES, problems=("e0001-audit.json is damaged",)))
    assert "Not in these figures: e0001-audit.json is damaged." in render_html(report, history)
    assert "total" not in report["cost"]["dollars"]


def test_report_html_before_any_training_step_leaves_the_loss_curve_out() -> None:
    report, _ = _report({})
    assert render_html(report, []).count("<svg") == 2


def test_the_report_says_what_was_audited_or_that_nothing_was() -> None:
    report, history = _report({}, AUDIT)
    assert json.loads(to_bytes(report))["audit"] == AUDIT
    page = render_html(report, history)
    for text in ("8 sequences of 4 units, 1,234 rows", "1.2e-05 nats", "public path, float32", "0.002 nats"):
        assert text in page, text
    report, history = _report({})
    assert report["audit"] is None
    assert "no audit compared" in render_html(report, history)


def test_history_is_one_line_a_step_from_the_first_on() -> None:
    good = b'{"step": 0, "loss": 3.0}\n{"step": 1, "loss": 2.0}\n'
    assert read_history(good) == [{"step": 0, "loss": 3.0}, {"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    ("third", "said"),
    [
        (b'{"step": 2, "lo', "line 3 .* is no step"),
        (b'{"loss": 2.0}', "line 3 .* is no step"),
        (b"[]", "line 3 .* is no step"),
        (b'{"step": 1, "loss": 2.0}', "line 3 .* is step 1, not 2"),
        (b'{"step": 3, "loss": 2.0}', "line 3 .* is step 3, not 2"),
    ],
)
def test_a_history_with_a_broken_missing_or_repeated_line_is_refused(third: bytes, said: str) -> None:
    good = b'{"step": 0, "loss": 3.0}\n{"step": 1, "loss": 2.0}\n'
    with pytest.raises(IntegrityError, match=said):
        read_history(good + third + b"\n")


def test_model_card_front_matter_is_yaml_with_lineage() -> None:
    import yaml

    report, _ = _report({"kl_t1": 0.5})
    card = model_card(report, teacher="llama: 70b", base="small: 1b", licence="apache-2.0", dtype="float16")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) | {"license": "apache-2.0", "base_model": "small: 1b"} == yaml.safe_load(front)
    for text in (
        "c" * 32,
        "d" * 32,
        "r" * 32,
        "s" * 64,
        "t<e>acher",
        "| student before training | small |",
        "b" * 32,
        "objective `bucket`, temperature 2, weight of the hard labels 0.25",
        "apache-2.0",
        '"top_k": 64',
        "| float16 |",
        "passed",
    ):
        assert text in body, text


def test_the_hubs_own_reader_finds_the_figures_in_the_card() -> None:
    from huggingface_hub import ModelCard

    report, _ = _report({})
    read = ModelCard(model_card(report, teacher="t", base=None, licence="mit", dtype="float16")).data
    assert (read.license, read.base_model, read.model_name) == ("mit", None, "triage 2026-W47")
    assert {found.metric_type: found.metric_value for found in read.eval_results} == {
        name: report["after"][name] for name in ("perplexity", "kl_t1", "top1_agreement", "ece", "acceptance", "rows")
    }


def test_a_card_of_a_report_that_does_not_know_its_start_says_nothing_of_it() -> None:
    report, _ = _report({})
    del report["identity"]["start"], report["identity"]["start_weights"]
    assert "before training" not in model_card(report, teacher="t", base="t", licence="mit", dtype="float16")


def test_the_printed_table_has_aligned_columns() -> None:
    report, _ = _report({})
    lines = render_table(report).splitlines()
    assert lines[0].split("  ")[0] == "held-out text"
    assert len({len(line) for line in lines}) == 1
    assert any(line.startswith("KL to the teacher") and "0.0000" in line for line in lines)
