"""Bounds by dotted name and against the latest version: what is judged, what is refused, what is said not to be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_ray.config import Recipe, parse_recipe
from distill_ray.config.bounds import KEYS
from distill_ray.errors import UserError
from distill_ray.evaluate import require_held_out
from distill_ray.evaluate.figures import baseline, holdout
from distill_ray.lease import Lease
from distill_ray.registry import publish_latest
from distill_ray.report import Baseline, failures, judge, model_card, render_html, unjudged, write_report
from distill_ray.schema import UnitSummary
from distill_ray.storage import open_storage
from distill_ray.targets import CaptureIdentity, ManifestUnit, RunManifest
from tests.unit.test_report import AUDIT, PRICES, _report, cost_section

BASE = {
    "name": "tiny",
    "version": "2026-W48",
    "storage": {"root": "/root"},
    "corpus": {"sources": ["a.jsonl"], "holdout": 0.5},
    "teacher": {"model": "/teacher"},
    "student": {"teacher_layers": [0]},
}


def _recipe(require: dict[str, Any], **evaluate: Any) -> Recipe:
    return parse_recipe({**BASE, "evaluate": {"require": require, **evaluate}})


def _bounds(require: dict[str, Any], **evaluate: Any) -> dict[str, Any]:
    return _recipe(require, **evaluate).evaluate.bounds()


def _pair() -> tuple[dict[str, Any], dict[str, Any]]:
    """This week's report and last week's, on the same held-out sequences."""
    now, _ = _report({})
    now |= {"holdout": {"fingerprint": "same", "sequences": 9}}
    then = json.loads(json.dumps(now))
    now["after"] |= {"kl_t1": 0.30, "top1_agreement": 0.70}
    then["after"] |= {"kl_t1": 0.25, "top1_agreement": 0.72}
    return now, then


def _judged(require: dict[str, Any], now: dict[str, Any], then: dict[str, Any] | None, **evaluate: Any) -> Any:
    found = judge(now, _bounds(require, **evaluate), None if then is None else Baseline("2026-W47", then))
    return {name: b["passed"] for name, b in found.items()}, found


def _leaves(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def test_every_number_of_a_report_can_be_bounded():
    report, _ = _report({}, AUDIT, cost_section(**PRICES))
    skipped = ("schema_version", "recipe.", "kept_mass.", "targets.refused.")
    assert [key for key in _leaves(report) if key not in KEYS and not key.startswith(skipped)] == []
    from distill_ray.student.engine import StepResult

    between_ranks = {"flags", "arrived", "leaving"}
    assert {f"training.last.{f.name}" for f in fields(StepResult) if f.name not in between_ranks} <= KEYS


def test_a_dotted_name_is_the_same_quoted_or_as_a_table_in_a_table():
    import tomllib

    quoted = tomllib.loads('"after.kl_t1" = 0.15\n"targets.bytes_per_row" = { max = 300, min = 1 }')
    nested = tomllib.loads("after.kl_t1 = 0.15\ntargets.bytes_per_row = { max = 300, min = 1 }")
    assert quoted != nested
    assert _bounds(quoted) == _bounds(nested) == {"after.kl_t1": 0.15, "targets.bytes_per_row": {"max": 300, "min": 1}}


@pytest.mark.parametrize(
    ("require", "said"),
    [
        ({"klt1": 0.1}, "unknown metric(s) klt1"),
        ({"after.klt1": {"max": 0.1}}, "Near: after.kl_t1"),
        ({"timings.seconds.export": {"max": 1.0}}, "unknown metric(s) timings.seconds.export"),
        ({"targets.bytes_per_row": 300.0}, '"targets.bytes_per_row" = { max = 300 } or { min = 300 }'),
        ({"kl_t1": {}}, "evaluate.require.kl_t1: states no bound"),
        ({"kl_t1": {"min": 2.0, "max": 1.0}}, "min=2.0 is greater than max=1.0"),
        ({"kl_t1": {"max_rise": -0.1}}, "evaluate.require.kl_t1.max_rise: Input should be greater than or equal to 0"),
        ({"kl_t1": {"max": 1.0, "most": 1.0}}, "evaluate.require.kl_t1.most: unknown key"),
        ({"kl_t1": "0.1"}, "evaluate.require.kl_t1: Input should be a valid number"),
    ],
)
def test_what_cannot_be_judged_is_refused_with_the_recipe(require: dict[str, Any], said: str):
    with pytest.raises(UserError) as caught:
        _recipe(require)
    assert said in str(caught.value)
    assert "[number]" not in str(caught.value)


def test_a_recipe_with_bounds_survives_being_dumped_and_parsed_again():
    recipe = _recipe({"kl_t1": 0.1, "after.ece": {"max_rise": 0.01}})
    assert parse_recipe(recipe.model_dump()) == recipe


def test_a_direction_stated_wins_over_the_metrics_own():
    now, _ = _pair()
    passed, found = _judged({"kl_t1": {"min": 0.2, "max": 0.29}, "targets.dead_letters": {"max": 2}}, now, None)
    assert passed == {"kl_t1 min": True, "kl_t1 max": False, "targets.dead_letters": True}
    assert failures(found) == ["after.kl_t1 = 0.3, required at most 0.29"]


def test_what_was_not_measured_fails_and_says_so():
    now, _ = _pair()
    passed, found = _judged({"audit.worst_nats": {"max": 1.0}}, now, None)
    assert passed == {"audit.worst_nats": False}
    assert failures(found) == ["audit.worst_nats = unknown, required at most 1 (it was not measured in this run)"]


@pytest.mark.parametrize(("allowed", "passed"), [(0.06, True), (0.04, False)])
def test_a_rise_and_a_drop_are_against_the_latest_version(allowed: float, passed: bool):
    now, then = _pair()
    require = {"kl_t1": {"max_rise": allowed}, "after.top1_agreement": {"max_drop": allowed / 2.5}}
    found, verdicts = _judged(require, now, then)
    assert found == {"kl_t1": passed, "after.top1_agreement": passed}
    if not passed:
        assert "after.kl_t1 = 0.3, required a rise of at most 0.04 from 0.25 (2026-W47)" in failures(verdicts)
    better, _ = _judged(require, then, now)
    assert better == {"kl_t1": True, "after.top1_agreement": True}, "it got better"


def _other_sequences(then: dict[str, Any]) -> None:
    then["holdout"] = {"fingerprint": "other", "sequences": 8}


def _unknown_sequences(then: dict[str, Any]) -> None:
    del then["holdout"]


def _other_teacher(then: dict[str, Any]) -> None:
    then["identity"]["capture"] = "e" * 32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_other_sequences, "2026-W47 was scored on other held-out sequences (8, here 9)"),
        (_unknown_sequences, "other held-out sequences (unknown, here 9)"),
        (_other_teacher, "another capture"),
    ],
)
def test_other_held_out_sequences_or_targets_are_not_judged_but_said_or_fail(change: Any, said: str):
    now, then = _pair()
    change(then)
    passed, found = _judged({"kl_t1": {"max_rise": 9.0}}, now, then)
    assert passed == {"kl_t1": None}
    assert failures(found) == []
    (sentence,) = unjudged(found)
    assert said in sentence
    passed, found = _judged({"kl_t1": {"max_rise": 9.0}}, now, then, on_other_holdout="fail")
    assert passed == {"kl_t1": False}
    assert said in failures(found)[0]
    passed, _ = _judged({"targets.bytes_per_row": {"max_rise": 0.0}}, now, then)
    assert passed == {"targets.bytes_per_row": True}, "not a held-out figure"


def test_calibration_errors_over_other_bins_are_not_compared():
    now, then = _pair()
    now["recipe"], then["recipe"] = ({"evaluate": {"ece_bins": n}} for n in (15, 20))
    passed, _ = _judged({"ece": {"max_rise": 9.0}, "kl_t1": {"max_rise": 9.0}}, now, then)
    assert passed == {"ece": None, "kl_t1": True}


def test_the_first_version_and_an_unreadable_one_are_not_judged_silently():
    now, _ = _pair()
    passed, found = _judged({"kl_t1": {"max_rise": 9.0}}, now, None)
    assert passed == {"kl_t1": None}
    assert "no latest version" in unjudged(found)[0]
    found = judge(now, _bounds({"kl_t1": {"max_rise": 9.0}}), Baseline("2026-W47", None, "it is gone"))
    assert "the report of 2026-W47 cannot be read: it is gone" in unjudged(found)[0]


def test_page_and_card_show_what_was_not_judged():
    now, then = _pair()
    _other_sequences(then)
    now["gate"] = judge(now, _bounds({"kl_t1": {"max_rise": 9.0}}), Baseline("2026-W47", then))
    page = render_html(now, [])
    for text in (
        "not judged: 2026-W47 was scored on other",
        "No bound fails, but not every one",
        "from that of 2026-W47",
    ):
        assert text in page, text
    assert "All bounds hold" not in page
    assert "not judged: after.kl_t1 = 0.3" in model_card(now, teacher="t", base="t", licence="l", dtype="float32")


def test_a_bare_number_without_a_direction_never_reaches_a_verdict():
    now, _ = _pair()
    with pytest.raises(UserError, match="whether more is better"):
        judge(now, {"targets.rows": 5.0})


# What the baseline is, and what makes two held-out sets the same.


def _publish(root: str, version: str, report: dict[str, Any]) -> None:
    storage = open_storage(root)
    with Lease.acquire(storage, f"runs/tiny/{version}") as lease:
        write_report(storage, lease.token, report, [], settings={}, require={})


def test_the_baseline_is_the_latest_version_and_stays_so_once_this_one_is(tmp_path: Path):
    storage, (now, then) = open_storage(str(tmp_path)), _pair()
    recipe = _recipe({})
    assert baseline(recipe, storage, None) is None
    _publish(str(tmp_path), "2026-W47", then)
    publish_latest(storage, "tiny", "2026-W47", {})
    found = baseline(recipe, storage, None)
    assert found == Baseline("2026-W47", then)
    publish_latest(storage, "tiny", "2026-W48", {})
    assert baseline(recipe, storage, now) is None, "it was held against nothing"
    assert baseline(recipe, storage, now | {"baseline": {"version": "2026-W47"}}) == found
    storage.delete("runs/tiny/2026-W47/report.json")
    gone = baseline(recipe, storage, now | {"baseline": {"version": "2026-W47"}})
    assert gone is not None
    assert gone.report is None
    assert "is published but missing" in gone.problem


def _manifest(*units: tuple[str, list[tuple[int, int]]], tokenizer: str = "tok") -> RunManifest:
    """Units of (document hash, length)."""
    found = []
    for name, documents in units:
        keys_S = np.array([key for key, _ in documents], np.uint64)
        lengths_S = np.array([length for _, length in documents], np.int32)
        summary = UnitSummary(name, lengths_S, lengths_S - 1, keys_S, 1, "sha", 1.0, 0, 1.0)
        found.append(ManifestUnit(summary, 1, f"{name}.jsonl"))
    return RunManifest(CaptureIdentity({"weights": "w"}, tokenizer, 100, 4, (1.0,), 1), tuple(found))


HELD, TRAINED = 1, 2**64 - 1
"""Document hashes on either side of the split."""


def test_the_held_out_set_is_its_sequences_not_where_they_lie():
    recipe = _recipe({})

    def of(manifest: RunManifest, recipe: Recipe = recipe) -> str:
        return holdout(recipe, manifest, require_held_out(manifest, recipe))["fingerprint"]

    plain = of(_manifest(("a", [(HELD, 9), (3, 7), (TRAINED, 8)])))
    assert plain == of(_manifest(("z", [(3, 7)]), ("b", [(TRAINED, 5), (HELD, 9)]))), "other files, other training"
    windows = of(_manifest(("a", [(HELD, 9)]), ("b", [(HELD, 7)])))
    assert windows == of(_manifest(("a", [(HELD, 7)]), ("b", [(HELD, 9)]))), "windows of one document"
    assert plain != of(_manifest(("a", [(HELD, 9), (4, 7)])))
    assert plain != of(_manifest(("a", [(HELD, 9)])))
    assert plain != of(_manifest(("a", [(HELD, 9), (3, 6)])))
    assert plain != of(_manifest(("a", [(HELD, 9), (3, 7)]), tokenizer="another"))
    few = _recipe({}, max_sequences=1)
    assert plain != of(_manifest(("a", [(HELD, 9), (3, 7)])), few)
