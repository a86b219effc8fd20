"""Metrics as Prometheus would see them: scraped from a node's agent after real work on a real cluster."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from distill_ray.capture.emitting import live_teachers
from distill_ray.metrics import LABELS, METRICS, Meters
from tests.stages.test_capture import ShortTeacher, _recipe, _run, _write
from tests.stages.test_train import new_run

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("ray_cluster")]

WITHIN_S = 60.0
"""Processes tell their node's agent every 10 s."""

FORGOTTEN_S = 25.0
"""Then an agent has forgotten a gauge that nobody tells it of any more."""
DRIVER = """
import sys, time
from distill_ray.metrics import Meters
from distill_ray.session import ray_session
with ray_session(sys.argv[1]):
    meters = Meters("ended", "v1", "train")
    meters.set("train_steps", 7)
    time.sleep(12)
    meters.add("train_bad_steps", 1)
"""

Samples = dict[str, float]


def scraped(**labels: str) -> Samples:
    """Our samples with these labels, by name, as the node's agent exports them."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "distill" in sample.name and labels.items() <= sample.labels.items():
                assert set(LABELS) <= sample.labels.keys()
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def awaited(there: Callable[[Samples], bool], **labels: str) -> Samples:
    """The samples once they are as wanted; as they are after a minute."""
    until = time.monotonic() + WITHIN_S
    while not there(found := scraped(**labels)) and time.monotonic() < until:
        time.sleep(0.5)
    return found


@pytest.mark.long
def test_every_declared_metric_is_exported_under_its_name() -> None:
    meters = Meters("declared", "v1", "train")
    for metric in METRICS.values():
        emit = meters.set if metric.kind == "gauge" else meters.add
        emit(metric.name.removeprefix("distill_"), 3.0)
    names = {metric.exported for metric in METRICS.values()}
    found = awaited(lambda samples: names <= samples.keys(), run="declared")
    assert found == dict.fromkeys(names, 3.0)
    for _ in range(int(FORGOTTEN_S / 5)):
        time.sleep(5)
        meters.refresh()
    assert scraped(run="declared") == found, "a gauge that is set again stays"


@pytest.mark.long
def test_what_a_driver_emits_last_is_counted_and_its_gauges_go_with_it(cluster_address: str) -> None:
    subprocess.run([sys.executable, "-c", DRIVER, cluster_address], check=True, timeout=300)
    labels = {"run": "ended", "version": "v1", "stage": "train"}
    found = awaited(lambda samples: "ray_distill_train_bad_steps_total" in samples, **labels)
    assert found["ray_distill_train_bad_steps_total"] == 1
    time.sleep(FORGOTTEN_S)
    assert scraped(**labels) == {"ray_distill_train_bad_steps_total": 1}


def test_a_capture_is_seen_by_prometheus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted() -> int:
        seen.append(live_teachers())
        return seen[-1]

    monkeypatch.setattr("distill_ray.capture.verb.live_teachers", counted)
    monkeypatch.setattr("distill_ray.capture.emitting._LOOK_S", 0.2)
    for name in "abc":
        _write(tmp_path / "corpus", f"{name}.jsonl", [f"{name} is a class", f"{name} is an object too", ""])
    cost = {"teacher_gpu_hour": 2.0}
    recipe = _recipe(
        tmp_path / "root", f"{tmp_path}/corpus/*.jsonl", version="seen", cost=cost, capture={"max_refused": 1.0}
    )
    manifest = _run(recipe, partial(ShortTeacher, seconds=1.0))
    assert max(seen) == 1  # it goes as soon as no unit waits for it
    labels = {"run": recipe.name, "version": "seen", "stage": "capture"}
    end = {"ray_distill_teacher_actors": 0, "ray_distill_capture_units_done": 3}
    found = awaited(lambda s: end.items() <= s.items(), **labels)  # no teachers: also before the first one
    assert found["ray_distill_capture_units"] == found["ray_distill_capture_units_done"] == 3
    assert found["ray_distill_capture_rows_total"] == manifest.rows
    assert found["ray_distill_capture_documents_total"] == 6
    assert found["ray_distill_capture_dead_letters_total"] == manifest.dead == 3
    assert found["ray_distill_teacher_busy_seconds_total"] >= 3.0
    assert found["ray_distill_teacher_actors"] == 0
    assert "ray_distill_cost_dollars" not in found  # no GPU


@pytest.mark.long
def test_a_training_is_seen_by_prometheus(tmp_path: Path) -> None:
    run = new_run(tmp_path, "seen", train={"peak_tflops": 0.05, "checkpoint_every": 3})
    run.train()
    lines = run.history()
    labels = {"run": run.recipe.name, "version": "seen", "stage": "train"}
    end = {"ray_distill_checkpoint_age_seconds": 0, "ray_distill_train_steps_done": len(lines)}
    found = awaited(lambda s: end.items() <= s.items(), **labels)
    last = lines[-1]
    assert found["ray_distill_train_steps"] == found["ray_distill_train_steps_done"] == len(lines)
    for name in ("loss", "ce", "kl_t", "kl_t1", "kept_mass", "top1_agreement", "grad_norm", "mfu", "workers"):
        assert found[f"ray_distill_train_{name}"] == pytest.approx(last[name]), name
    assert found["ray_distill_train_learning_rate"] == pytest.approx(last["lr"])
    assert found["ray_distill_train_tokens_total"] == sum(line["input_tokens"] for line in lines)
    assert found["ray_distill_train_data_wait_seconds_total"] == pytest.approx(sum(line["data_s"] for line in lines))
    assert found["ray_distill_train_host_peak_bytes"] > 100 * 2**20
    assert found["ray_distill_checkpoint_step"] == (len(lines) - 1) // 3 * 3
    assert found["ray_distill_checkpoint_blocked_seconds_total"] > 0
    assert found["ray_distill_checkpoint_age_seconds"] == 0
    for absent in ("cuda_peak_bytes", "bad_steps_total"):
        assert f"ray_distill_train_{absent}" not in found
