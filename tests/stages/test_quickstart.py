"""`make quickstart`'s own recipe on a real S3 server: every stage, then again with nothing recomputed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from distill_ray import cost
from distill_ray.config import load_recipe, parse_recipe
from distill_ray.forecast import predict
from distill_ray.lease import read_published
from distill_ray.storage import open_storage
from tests.assets import REPO
from tests.stages.jobs import Process

pytestmark = [pytest.mark.quickstart, pytest.mark.timeout(3600)]

RECIPE = REPO / "jobs" / "recipes" / "quickstart.cpu.toml"
COMMAND = [sys.executable, str(REPO / "jobs" / "quickstart.py"), "--root"]


def _forecast_is_what_it_was(root: str, was: dict[str, Any], empty: str) -> None:
    """Given the rates that the run measured, an empty store's forecast of the same corpus is within a fifth of it."""
    recipe = load_recipe(str(RECIPE), root=root)
    measured = {each.stage: each.rate for each in predict(recipe).stages}
    rates = {
        f"{who}_{name}": getattr(measured[stage], name)
        for stage, who in (("capture", "teacher"), ("train", "student"))
        for name in ("tokens_s", "start_s")
    }
    stated = parse_recipe({**recipe.model_dump(), "storage": {"root": empty}, "cost": {"rates": rates}})
    predicted = predict(stated)
    print(cost.forecast_sentence(predicted))
    rows = [row for row in cost.compared(was | {"forecast": predicted.to_json()}) if "dollars" not in row[0]]
    assert len(rows) == 6
    for name, before, is_ in rows:
        print(f"{name}: forecast {before:,.4g}, was {is_:,.4g}")
        assert before == pytest.approx(is_, rel=0.2), name


def test_the_quickstart_recipe_passes_every_stage_on_s3(s3_uri: str, tmp_path: Path):
    first = Process([*COMMAND, s3_uri])
    assert first.wait(1200) == 0, first.stderr
    print(first.stdout)
    storage = open_storage(s3_uri)
    entries = read_published(storage, "runs/quickstart/demo")
    report = json.loads(storage.get("runs/quickstart/demo/report.json"))
    assert report["after"]["kl_t1"] <= 0.4 * report["before"]["kl_t1"]
    assert "student before" in first.stdout
    assert s3_uri in first.stdout
    assert json.loads(storage.get("models/quickstart/latest.json"))["version"] == "demo"
    # Of the run's own forecast the rates were missing: nobody had measured any.
    assert report["cost"]["forecast"]["stages"][0]["missing"]
    _forecast_is_what_it_was(s3_uri, report["cost"], str(tmp_path))
    objects = {o.key: o.version for o in storage.list("")}

    again = Process([*COMMAND, s3_uri])
    assert again.wait(120) == 0, again.stderr
    print(again.stdout.splitlines()[-1])
    assert read_published(storage, "runs/quickstart/demo") == entries
    assert {o.key: o.version for o in storage.list("")} == objects
