"""infra/monitoring: rules and dashboard speak of metrics that there are, and every alert is tested."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_ray.metrics import METRICS

FOLDER = Path(__file__).parents[2] / "infra" / "monitoring"
EXPORTED = {metric.exported for metric in METRICS.values()}
_NAME = re.compile(r"\b(?:ray_)?distill_\w+")

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed; it comes with Debian's package prometheus"
)


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return json.loads((FOLDER / "dashboard.json").read_text())


def named(expressions: Iterator[str]) -> set[str]:
    """Metrics of ours that queries name."""
    return {name for expression in expressions for name in _NAME.findall(expression)}


def queries(board: dict[str, Any]) -> Iterator[str]:
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"]


def test_rules_and_dashboard_name_only_what_is_exported() -> None:
    assert named(rule["expr"] for rule in rules()) <= EXPORTED
    assert named(queries(dashboard())) == EXPORTED, "the dashboard shows every metric that there is"


@pytest.mark.parametrize(
    "expression",
    [
        "ray_distill_train_los > 1",
        "rate(ray_distill_teacher_idle_seconds[5m])",
        "distill_train_loss",
        "sum(ray_distill_train_loss_total)",
    ],
    ids=["misspelt", "counter without _total", "without ray_", "gauge with _total"],
)
def test_a_wrong_name_is_found(expression: str) -> None:
    assert not named(iter([expression])) <= EXPORTED


def test_the_tests_of_the_rules_name_only_what_is_exported() -> None:
    tests = yaml.safe_load((FOLDER / "rules.test.yaml").read_text())["tests"]
    assert named(series["series"] for test in tests for series in test["input_series"]) <= EXPORTED


def test_every_alert_is_tested_firing_and_not_firing() -> None:
    tests = yaml.safe_load((FOLDER / "rules.test.yaml").read_text())["tests"]
    seen = {(case["alertname"], bool(case["exp_alerts"])) for test in tests for case in test.get("alert_rule_test", [])}
    assert seen == {(rule["alert"], fires) for rule in rules() for fires in (True, False)}


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_panels_lie_side_by_side_and_query_the_chosen_source() -> None:
    board = dashboard()
    assert [each["name"] for each in board["templating"]["list"]] == ["datasource", "run", "version"]
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
            assert 'run=~"$run"' in target["expr"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))


def test_the_pod_monitor_scrapes_all_pods_of_ray_clusters() -> None:
    monitor = yaml.safe_load((FOLDER / "podmonitor.yaml").read_text())
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    spec = monitor["spec"]
    assert spec["selector"]["matchExpressions"] == [{"key": "ray.io/cluster", "operator": "Exists"}]
    assert [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]] == ["metrics"]
    for manifest in (FOLDER.parents[1] / "cluster").glob("raycluster.*.yaml"):
        cluster = next(d for d in yaml.safe_load_all(manifest.read_text()) if d["kind"] == "RayCluster")["spec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            ports = [port["name"] for port in group["template"]["spec"]["containers"][0]["ports"]]
            assert "metrics" in ports, manifest.name


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300)


@needs_promtool
def test_promtool_accepts_the_rules_and_their_tests_hold() -> None:
    done = promtool("check", "rules", FOLDER / "rules.yaml")
    assert done.returncode == 0, done.stderr
    done = promtool("test", "rules", FOLDER / "rules.test.yaml")
    assert done.returncode == 0, done.stderr + done.stdout


@needs_promtool
@pytest.mark.parametrize("alert", [rule["alert"] for rule in rules()])
@pytest.mark.parametrize("expression", ["vector(0) > 1", "max by (run, version, stage) ({run=~'.+'}) > -1"])
def test_an_alert_that_never_or_always_fires_fails_its_test(tmp_path: Path, alert: str, expression: str) -> None:
    text = yaml.safe_load((FOLDER / "rules.yaml").read_text())
    for rule in text["groups"][0]["rules"]:
        if rule["alert"] == alert:
            rule["expr"] = expression
            rule.pop("for", None)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(text))
    shutil.copy(FOLDER / "rules.test.yaml", tmp_path)
    done = promtool("test", "rules", tmp_path / "rules.test.yaml")
    assert done.returncode != 0
    assert alert in done.stderr + done.stdout
