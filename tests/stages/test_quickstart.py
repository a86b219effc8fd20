"""`make quickstart`'s own recipe on a real S3 server: every stage, then again with nothing recomputed."""

from __future__ import annotations

import json
import sys

import pytest

from distill_ray.lease import read_published
from distill_ray.storage import open_storage
from tests.assets import REPO
from tests.stages.jobs import Process

pytestmark = [pytest.mark.quickstart, pytest.mark.timeout(3600)]

COMMAND = [sys.executable, str(REPO / "jobs" / "quickstart.py"), "--root"]


def test_the_quickstart_recipe_passes_every_stage_on_s3(s3_uri: str):
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
    objects = {o.key: o.version for o in storage.list("")}

    again = Process([*COMMAND, s3_uri])
    assert again.wait(120) == 0, again.stderr
    print(again.stdout.splitlines()[-1])
    assert read_published(storage, "runs/quickstart/demo") == entries
    assert {o.key: o.version for o in storage.list("")} == objects
