"""How far a corpus is from the last one: the sketch by hand, what is not compared, and where it is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_ray import evaluate
from distill_ray.config import parse_recipe
from distill_ray.errors import IntegrityError
from distill_ray.evaluate.figures import drift
from distill_ray.evaluate.verb import _publish, _store_sketch
from distill_ray.lease import Lease, publish, read_published
from distill_ray.report import (
    Baseline,
    HeldOutSketch,
    corpus_drift,
    drift_warning,
    failures,
    judge,
    read_report,
    render_html,
    to_bytes,
    unjudged,
    unknown_drift,
)
from distill_ray.report.drift import jensen_shannon
from distill_ray.storage import Storage, open_storage
from distill_ray.train.result import store_history
from tests.unit.test_gate import BASE
from tests.unit.test_report import _report


def _sketch(
    tokens: list[int], capture: str = "c", tokenizer: str = "tok", entropy: float = math.log(2)
) -> HeldOutSketch:
    """Of these tokens, V = 8, and two rows of the given entropy."""
    sketch = HeldOutSketch(tokenizer, capture, np.zeros(8, np.int64))
    sketch.add(np.array(tokens, np.int64), np.zeros((0, 1), np.float32), np.zeros(0, np.float32))
    sketch.rows, sketch.entropy = 2, 2 * entropy
    return sketch


def test_the_divergence_by_hand():
    assert jensen_shannon(np.array([2, 0]), np.array([0, 3])) == pytest.approx(math.log(2))
    assert jensen_shannon(np.array([2, 4, 0]), np.array([1, 2, 0])) == pytest.approx(0, abs=1e-15)
    # p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4)
    by_hand = (math.log(4 / 3) + math.log(2 / 3) / 2 + math.log(2) / 2) / 2
    assert jensen_shannon(np.array([7, 0]), np.array([1, 1])) == pytest.approx(by_hand)


def test_tokens_and_entropies_add_up_over_batches():
    rng = np.random.default_rng(0)
    p_NB = rng.dirichlet(np.ones(4), 6)
    log_NB = np.log(p_NB).astype(np.float32)
    whole, parts = (HeldOutSketch("tok", "c", np.zeros(8, np.int64)) for _ in range(2))
    tokens = rng.integers(0, 8, 50)
    whole.add(tokens, log_NB[:, :3], log_NB[:, 3])
    for some, rows in zip(np.array_split(tokens, 3), np.array_split(np.arange(6), 3), strict=True):
        parts.add(some, log_NB[rows, :3], log_NB[rows, 3])
    assert whole.entropy == pytest.approx(-(p_NB * np.log(p_NB)).sum(), rel=1e-6)
    assert whole.counts.sum() == 50
    assert (parts.counts == whole.counts).all()
    assert (parts.rows, parts.entropy) == (6, pytest.approx(whole.entropy))


def test_a_row_without_a_tail_has_a_finite_entropy():
    sketch = HeldOutSketch("tok", "c", np.zeros(8, np.int64))
    sketch.add(np.array([1]), np.log(np.array([[0.5, 0.5]], np.float32)), np.array([-np.inf], np.float32))
    assert sketch.entropy == pytest.approx(math.log(2))


def test_a_sketch_is_read_back_as_it_was_and_damage_is_refused():
    sketch = _sketch([1, 1, 7])
    data = sketch.to_bytes()
    again = HeldOutSketch.from_bytes(data, "here")
    assert (again.counts == sketch.counts).all()
    assert (again.tokenizer, again.capture, again.rows, again.entropy) == ("tok", "c", 2, sketch.entropy)
    for broken in (data[:-3], b"", b"PAR1"):
        with pytest.raises(IntegrityError, match="here is no sketch"):
            HeldOutSketch.from_bytes(broken, "here")


def test_drift_and_what_would_be_chance():
    rng = np.random.default_rng(1)
    same = [_sketch(rng.integers(0, 8, 4000).tolist()) for _ in range(2)]
    found = corpus_drift(*same, "w47")
    assert found["against"] == "w47"
    assert 0 < found["held_out_token_js_by_chance"] < 0.003
    assert found["held_out_token_js"] < 3 * found["held_out_token_js_by_chance"]
    far = corpus_drift(_sketch(rng.integers(0, 4, 4000).tolist(), entropy=1.0), same[0], "w47")
    assert far["held_out_token_js"] > 50 * far["held_out_token_js_by_chance"]
    assert far["held_out_entropy_delta"] == pytest.approx(1.0 - math.log(2))
    assert far["note"] == ""


@pytest.mark.parametrize(
    ("then", "none", "note"),
    [
        (_sketch([1], tokenizer="other"), "held_out_token_js", "w47 has another tokenizer"),
        (_sketch([1], capture="other"), "held_out_entropy_delta", "w47 has another capture"),
        (_sketch([]), "held_out_token_js", "no held-out token"),
    ],
)
def test_what_cannot_be_compared_is_left_out_and_said(then: HeldOutSketch, none: str, note: str):
    found = corpus_drift(_sketch([1, 2]), then, "w47")
    assert note in found["note"]
    figures = ("held_out_token_js", "held_out_entropy_delta")
    assert [name for name in figures if found[name] is None] == [none]


def test_the_warning_is_past_the_bound_alone_and_never_silent():
    found = {"drift": corpus_drift(_sketch([1, 1]), _sketch([2, 2]), "w47")}
    assert drift_warning(found, None) == drift_warning(found, 0.7) == drift_warning({"drift": None}, 0.1) == ""
    assert "the corpus drifted: held_out_token_js = 0.693 nats against w47" in drift_warning(found, 0.1)
    assert "is not known: the held-out tokens of w47 cannot" in drift_warning({"drift": unknown_drift("w47", "x")}, 0.1)


def test_a_bound_on_drift_is_not_judged_before_there_is_any():
    report, _ = _report({})
    bounds = {"drift.held_out_token_js": {"max": 0.1}}
    assert "no earlier run" in unjudged(judge(report, bounds))[0]
    unknown = judge(report | {"drift": unknown_drift("w47", "gone")}, bounds)
    assert "of w47 cannot be read: gone" in unjudged(unknown)[0]
    far = report | {"drift": corpus_drift(_sketch([1]), _sketch([2]), "w47")}
    assert failures(judge(far, bounds)) == ["drift.held_out_token_js = 0.6931, required at most 0.1"]


def test_the_page_shows_drift_and_json_takes_it():
    report, history = _report({})
    assert "no earlier run to compare" in render_html(report, history)
    report["drift"] = corpus_drift(_sketch([1]), _sketch([2], capture="other"), "w47") | {"warning": "it drifted"}
    page = render_html(report, history)
    for text in ("0.6931 nats (", "w47 has another capture", "it drifted"):
        assert text in page, text
    assert json.loads(to_bytes(report))["drift"]["held_out_entropy_delta"] is None


# Where it is kept.


def _evaluated(storage: Storage, version: str, tokens: list[int], **section: Any) -> Any:
    """A run's report with its sketch, as evaluation leaves them."""
    recipe = parse_recipe({**BASE, "version": version, "evaluate": section})
    report, history = _report({})
    history = [line | {"step": i} for i, line in enumerate(history)]
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        stored = store_history(storage, lease.token, history)
        publish(storage, lease.token, "student", {"sha256": report["identity"]["student"], "history": stored})
        sketch = _sketch(tokens)
        last = Baseline("2026-W47", {}) if version != "2026-W47" else None
        report["drift"] = drift(recipe, storage, sketch, last)
        _publish(recipe, storage, lease.token, report, history, _store_sketch(storage, lease.token, sketch))
    return recipe


def test_this_week_is_compared_with_the_sketch_that_last_week_published(tmp_path: Path):
    storage = open_storage(str(tmp_path))
    _evaluated(storage, "2026-W47", [1, 1])
    recipe = _evaluated(storage, "2026-W48", [2, 2])
    found = read_report(storage, recipe.run_prefix)["drift"]
    assert (found["against"], found["held_out_token_js"]) == ("2026-W47", pytest.approx(math.log(2)))
    assert read_report(storage, "runs/tiny/2026-W47")["drift"] is None
    storage.put("runs/tiny/2026-W47/held-out-tokens.parquet", b"damaged")
    lost = drift(recipe, storage, _sketch([1]), Baseline("2026-W47", {}))
    assert lost is not None
    assert "SHA-256" in lost["note"]
    gone = drift(recipe, storage, _sketch([1]), Baseline("2026-W47", None, "no report"))
    assert gone is not None
    assert "no report" in gone["note"]


def test_another_bound_on_drift_is_judged_anew_and_the_sketch_stays(tmp_path: Path):
    storage = open_storage(str(tmp_path))
    _evaluated(storage, "2026-W47", [1, 1])
    _evaluated(storage, "2026-W48", [2, 2])
    strict = parse_recipe({**BASE, "version": "2026-W48", "evaluate": {"drift_warn": 0.1}})
    published = read_published(storage, strict.run_prefix)
    assert evaluate.outdated(strict, published) == "another evaluate.drift_warn"
    assert evaluate.only_bounds_changed(strict, storage, published)
    with Lease.acquire(storage, strict.run_prefix) as lease:
        evaluate.rejudge(strict, storage, lease.token)
    after = read_published(storage, strict.run_prefix)
    assert evaluate.outdated(strict, after) is None
    assert after["report"]["held_out_tokens"] == published["report"]["held_out_tokens"]
    assert "the corpus drifted" in read_report(storage, strict.run_prefix)["drift"]["warning"]
