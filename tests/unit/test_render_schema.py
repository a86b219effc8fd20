"""Manifests against the schemas of KubeRay and Kubernetes, and every file that the project ships of them."""

from __future__ import annotations

import ast
import copy
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from distill_ray import render
from distill_ray.config import load_recipe
from distill_ray.config.cluster import ROLE_LABEL
from tests.unit.kube_schema import REPO, check_builtin, cluster_of, pod_templates, problems
from tests.unit.render_fakes import of_kind, recipe_of, rendered

SHIPPED = {
    "cluster/raycluster.local.yaml": ("smollm2-135m.kind", "raycluster"),
    "cluster/raycluster.h100.yaml": ("llama3.3-70b-to-8b.h100x16", "raycluster"),
    "cluster/raycluster.spot.yaml": ("reasoning-70b-to-8b.h100x16", "raycluster"),
    "jobs/manifests/support-triage.cronjob.yaml": ("llama3.3-70b-to-8b.h100x16", "cronjob"),
}
FULL = {
    "pin_by_label": True,
    "priority_class": "weekly",
    "secrets": ["s3"],
    "region": "eu-central-1",
    "endpoint_url": "http://s3.example.com",
    "head": {"image": "d:1", "aws_role": "arn:aws:iam::123456789012:role/d", "node_selector": {"a": "b"}},
    "teacher": {"image": "t:1", "gpu_product": "H100"},
    "student": {"image": "s:1", "spot": True},
}
SPANNING = {"model": "s3://b/t", "tensor_parallel": 8, "pipeline_parallel": 2}
Change = Callable[[dict[str, Any]], Any]


def check(document: dict[str, Any]) -> list[str]:
    """Everything wrong with one document."""
    if document["apiVersion"].startswith("ray.io/"):
        found = problems(document)
        builtin = pod_templates(document)
    else:
        found, builtin = [], [document]
    for one in builtin:
        try:
            check_builtin(one)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{one['kind']}: {error.message}")
    return found


@pytest.mark.parametrize("kind", render.KINDS)
@pytest.mark.parametrize("with_queue", [False, True])
def test_every_kind_passes_the_schemas(kind: str, with_queue: bool):
    if with_queue and kind == "raycronjob":
        pytest.skip("a RayCronJob cannot have a queue")
    section = FULL | ({"queue": "weekly"} if with_queue else {})
    weekly = kind in ("cronjob", "raycronjob")
    documents = rendered(kind, recipe_of(None if weekly else "2026-W48", cluster=section, teacher=SPANNING))
    assert {d["kind"]: check(d) for d in documents if check(d)} == {}


@pytest.mark.parametrize("kind", ["rayjob", "raycronjob", "raycluster"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(enableInTreeAutoscalling=True), "enableInTreeAutoscalling"),
        (lambda c: c["workerGroupSpecs"][0].update(numOfHost=2), "numOfHost"),
        (lambda c: c["workerGroupSpecs"][1].update(maxReplicas="2"), "'2' is not of type 'integer'"),
        (lambda c: c["autoscalerOptions"].update(version="v3"), "'v3' is not one of"),
        (lambda c: c["authOptions"].update(mode="tokens"), "'tokens' is not one of"),
        (lambda c: c.pop("headGroupSpec"), "'headGroupSpec' is a required property"),
        (lambda c: c["headGroupSpec"]["template"]["spec"].update(restartPolicies="Never"), "restartPolicies"),
        (lambda c: c["headGroupSpec"]["template"]["spec"]["containers"][0].pop("name"), "'name' is a required"),
        (lambda c: c["headGroupSpec"]["template"]["spec"]["containers"][0]["env"].append({"nam": "x"}), "nam"),
    ],
)
def test_a_planted_wrong_field_is_found(kind: str, change: Change, says: str):
    made = {"rayjob": "RayJob", "raycronjob": "RayCronJob", "raycluster": "RayCluster"}[kind]
    document = of_kind(rendered(kind, recipe_of(None if kind == "raycronjob" else "v1")), made)
    assert problems(document) == []
    wrong = copy.deepcopy(document)
    change(cluster_of(wrong))
    assert any(says in problem for problem in problems(wrong)), problems(wrong)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("CronJob", lambda d: d["spec"].update(concurrencyPolices="Forbid")),
        ("CronJob", lambda d: d["spec"]["jobTemplate"]["spec"]["template"]["spec"].update(volume=[])),
        ("CronJob", lambda d: d["spec"].update(startingDeadlineSeconds="6 days")),
        ("ConfigMap", lambda d: d.update(dat={})),
        ("ServiceAccount", lambda d: d["metadata"].update(anotations={})),
    ],
)
def test_a_planted_wrong_field_of_kubernetes_own_is_found(kind: str, change: Change):
    document = next(d for d in rendered("cronjob", recipe_of(None)) if d["kind"] == kind)
    assert check(document) == []
    wrong = copy.deepcopy(document)
    change(wrong)
    assert check(wrong) != []


def test_a_wrong_pod_is_found_through_kubernetes_own_schema():
    document = of_kind(rendered("rayjob", recipe_of()), "RayJob")
    container = cluster_of(document)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["resources"]["limit"] = {"cpu": "1"}
    assert any("PodTemplate" in problem for problem in check(document))


@pytest.mark.parametrize("path", SHIPPED)
def test_shipped_manifests_are_what_render_gives(path: str, capsys: pytest.CaptureFixture[str]):
    from distill_ray.cli import main

    recipe, kind = SHIPPED[path]
    source = f"jobs/recipes/{recipe}.toml"
    assert main(["render", str(REPO / source), "--kind", kind]) == 0
    made = capsys.readouterr().out
    again = f"write it again: distill-ray render {source} --kind {kind} --output {path}"
    assert made == (REPO / path).read_text(), again
    assert {d["kind"]: check(d) for d in yaml.safe_load_all(made) if check(d)} == {}


@pytest.mark.parametrize("path", sorted((REPO / "jobs" / "recipes").glob("*.toml")), ids=lambda p: p.name)
def test_every_recipe_with_a_cluster_renders(path: Path):
    if "cluster" not in tomllib.loads(path.read_text()):
        assert path.name == "quickstart.cpu.toml"  # runs on this machine alone
        return
    for kind in ("rayjob", "cronjob", "raycluster"):
        documents = render.manifests(load_recipe(path), path.read_text(), kind)
        assert {d["kind"]: check(d) for d in documents if check(d)} == {}


def test_every_file_of_cluster_and_jobs_is_of_a_kind_that_a_test_reads():
    for folder in ("cluster", "jobs"):
        for path in sorted((REPO / folder).rglob("*")):
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            name = path.relative_to(REPO).as_posix()
            if path.suffix == ".py":
                ast.parse(path.read_text())
            elif path.suffix == ".yaml":
                assert name in SHIPPED or name == "cluster/aws.ray-up.yaml", f"{name}: no test reads it"
            else:
                # test_config.py reads all of these.
                assert path.parent.name == "recipes", f"{name}: no test reads it"
                assert path.suffix == ".toml"


def ray_up() -> dict[str, Any]:
    return yaml.safe_load((REPO / "cluster" / "aws.ray-up.yaml").read_text())


def test_the_ray_up_file_is_valid_for_ray_itself():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(ray_up()))


def test_ray_refuses_a_wrong_field_of_the_ray_up_file():
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    wrong = ray_up()
    wrong["available_node_types"]["teacher"]["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(wrong))


def test_the_ray_up_file_pins_what_the_manifests_pin():
    types = ray_up()["available_node_types"]
    assert {name: t["labels"] for name, t in types.items()} == {
        "driver": {ROLE_LABEL: "driver"},
        "teacher": {ROLE_LABEL: "teacher"},
        "student": {ROLE_LABEL: "student"},
    }
    market = {name: "InstanceMarketOptions" in t["node_config"] for name, t in types.items()}
    assert market == {"driver": False, "teacher": True, "student": False}
    assert (types["teacher"]["min_workers"], types["student"]["min_workers"]) == (0, 0)
    assert types["driver"]["resources"]["GPU"] == 0
