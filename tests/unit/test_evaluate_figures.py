"""Figures of the report that need no scoring, and whether a published report is still the recipe's."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from distill_ray import evaluate
from distill_ray.config import Recipe, fingerprint, identity_of, parse_recipe
from distill_ray.evaluate.figures import rates, recipe_fields, run_identity, untimed_units
from distill_ray.report import SCHEMA_VERSION, model_card
from distill_ray.schema import UnitSummary
from distill_ray.targets import CaptureIdentity, ManifestUnit, RunManifest
from tests.unit.test_report import _report

IDENTITY = CaptureIdentity({"weights": "w", "dtype": "bfloat16"}, "tok", 100, 4, (1.0,), 1)


def _recipe(**sections: dict[str, Any]) -> Recipe:
    data: dict[str, Any] = {
        "name": "tiny",
        "storage": {"root": "/root"},
        "corpus": {"sources": ["a.jsonl"]},
        "teacher": {"model": "/teacher"},
        "student": {"teacher_layers": [0]},
    }
    return parse_recipe({**data, **{name: data.get(name, {}) | given for name, given in sections.items()}})


def _manifest(*units: tuple[list[int], float]) -> RunManifest:
    """Units of (lengths, teacher seconds)."""
    found = []
    for i, (lengths, seconds) in enumerate(units):
        lengths_S = np.array(lengths, np.int32)
        keys = np.zeros(len(lengths), np.uint64)
        summary = UnitSummary(f"u{i}", lengths_S, lengths_S - 1, keys, 1, "sha", 1.0, 0, seconds)
        found.append(ManifestUnit(summary, 1, "source"))
    return RunManifest(IDENTITY, tuple(found))


def test_the_teachers_rate_is_over_units_of_known_seconds_alone() -> None:
    manifest = _manifest(([10, 20], 2.0), ([1000], 0.0), ([6], 1.0), ([], 0.0))
    assert rates(manifest, [], 7.0) == {"evaluate": 7.0, "teacher": 12.0}
    assert untimed_units(manifest) == 1


@pytest.mark.parametrize("empty_seconds", [0.0, 1e-7])
def test_without_a_unit_of_known_seconds_the_teacher_has_no_rate(empty_seconds: float) -> None:
    manifest = _manifest(([10, 20], 0.0), ([], empty_seconds))
    assert rates(manifest, [{"tokens": 8, "seconds": 2}], 7.0) == {"evaluate": 7.0, "train": 4.0}
    assert untimed_units(manifest) == 1


def _recipe_fingerprint(recipe: Recipe) -> str:
    return run_identity(recipe, _manifest(([3], 1.0)), "student").recipe


def test_the_student_before_training_is_named_without_its_place() -> None:
    manifest = _manifest(([3], 1.0))
    began = {"student_weights": {"sha256": "w"}}
    given = run_identity(
        _recipe(student={"teacher_layers": None, "model": "s3://secret/place/small/"}), manifest, "s", began
    )
    assert (given.start, given.start_weights) == ("small", fingerprint({"sha256": "w"}))
    cut = run_identity(_recipe(student={"teacher_layers": [0, 3]}), manifest, "s")
    assert cut.start.startswith("layers 0, 3 of ")
    assert cut.start_weights == cut.teacher
    drawn = run_identity(_recipe(student={"teacher_layers": None, "config": "/secret/tiny"}), manifest, "s")
    assert (drawn.start, drawn.start_weights) == ("random weights, seed 0, of tiny", "")


def test_the_recipes_fingerprint_is_of_what_the_figures_rest_on() -> None:
    stated = _recipe_fingerprint(_recipe())
    assert stated == _recipe_fingerprint(_recipe(teacher={"dtype": "bfloat16"}))
    assert stated == _recipe_fingerprint(_recipe(export={"dtype": "float32"}))
    assert stated != _recipe_fingerprint(_recipe(evaluate={"ece_bins": 20}))
    assert stated != _recipe_fingerprint(_recipe(train={"epochs": 2}))


def test_the_card_shows_the_reports_fingerprint_beside_the_fields_it_covers() -> None:
    manifest, recipe = _manifest(([3], 1.0)), _recipe()
    report, _ = _report({})
    report["identity"]["recipe"] = run_identity(recipe, manifest, "student").recipe
    report["recipe"] = recipe_fields(recipe, manifest)
    card = model_card(report, teacher="llama", base=None, licence="mit", dtype="float32")
    shown = json.loads(card.split("```json\n")[1].split("```")[0])
    assert f"| recipe fingerprint | `{fingerprint(shown)}` |" in card
    assert shown["teacher"]["dtype"] == "bfloat16"


def test_a_report_of_another_layout_is_made_anew() -> None:
    recipe = _recipe()
    settings = json.loads(json.dumps(identity_of(recipe.evaluate)))
    entry = {"student": "s", "settings": settings, "require": {}, "schema_version": SCHEMA_VERSION}
    entry["prices"] = recipe.cost.prices()
    published = {"student": {"sha256": "s"}, "report": entry}
    assert evaluate.outdated(recipe, published) is None
    dearer = recipe.model_copy(update={"cost": recipe.cost.model_copy(update={"teacher_gpu_hour": 3.0})})
    assert evaluate.outdated(dearer, published) == "other prices of [cost]"
    del entry["schema_version"]
    assert evaluate.outdated(recipe, published) == "another version of the software wrote it"
