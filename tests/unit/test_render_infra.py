"""The production recipe's manifests against what infra/ makes: queue, accounts, taints, and room for all of it."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import yaml

from distill_ray import render
from distill_ray.config import load_recipe
from tests.unit.kube_schema import REPO, cluster_of
from tests.unit.render_fakes import of_kind

RECIPE = REPO / "jobs" / "recipes" / "llama3.3-70b-to-8b.h100x16.toml"
FLAVOR = {"driver": "distill-ray-head", "teacher": "distill-ray-teacher", "student": "distill-ray-student"}
UNITS = {"": 1.0, "m": 1e-3, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def infra(kind: str) -> list[dict[str, Any]]:
    paths = [*(REPO / "infra" / "kueue").glob("*.yaml"), *(REPO / "infra" / "kubernetes").glob("*.yaml")]
    documents = [d for path in paths for d in yaml.safe_load_all(path.read_text())]
    return [d for d in documents if d["kind"] == kind]


def names(kind: str) -> set[str]:
    return {d["metadata"]["name"] for d in infra(kind)}


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return of_kind(render.manifests(load_recipe(RECIPE), RECIPE.read_text(), "rayjob"), "RayJob")


@pytest.fixture(scope="module")
def groups(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    spec = cluster_of(job)
    found = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return {group["labels"]["distill-ray/role"]: group for group in found}


def number(quantity: str) -> float:
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", quantity)
    assert match is not None
    return float(match[1]) * UNITS[match[2]]


def test_what_the_job_names_is_there(job: dict[str, Any], groups: dict[str, dict[str, Any]]):
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] in names("LocalQueue")
    assert job["metadata"]["namespace"] in names("Namespace")
    for group in groups.values():
        pod = group["template"]["spec"]
        assert pod["priorityClassName"] in names("PriorityClass")
        assert pod["serviceAccountName"] in names("ServiceAccount")


def test_accounts_are_the_same_as_infra_s():
    made = render.manifests(load_recipe(RECIPE), RECIPE.read_text(), "rayjob")
    theirs = {d["metadata"]["name"]: d["automountServiceAccountToken"] for d in infra("ServiceAccount")}
    for account in (d for d in made if d["kind"] == "ServiceAccount"):
        assert account["automountServiceAccountToken"] == theirs[account["metadata"]["name"]]


def test_pods_tolerate_the_taints_of_their_nodes_and_of_no_other(groups: dict[str, dict[str, Any]]):
    flavors = {d["metadata"]["name"]: d["spec"].get("nodeTaints", []) for d in infra("ResourceFlavor")}
    for role, group in groups.items():
        tolerations = group["template"]["spec"].get("tolerations", [])
        admitted = {flavor for flavor, taints in flavors.items() if all(_tolerated(t, tolerations) for t in taints)}
        assert admitted == {FLAVOR[role], FLAVOR["driver"]}  # nodes of heads have no taint, and no GPU


def _tolerated(taint: dict[str, Any], tolerations: list[dict[str, Any]]) -> bool:
    return any(
        t["key"] == taint["key"] and (t["operator"] == "Exists" or t.get("value") == taint["value"])
        for t in tolerations
        if t["effect"] == taint["effect"]
    )


def test_the_quota_has_room_for_all_pods_at_once(groups: dict[str, dict[str, Any]]):
    (queue,) = infra("ClusterQueue")
    quotas = {
        flavor["name"]: {r["name"]: number(r["nominalQuota"]) for r in flavor["resources"]}
        for group in queue["spec"]["resourceGroups"]
        for flavor in group["flavors"]
    }
    for role, group in groups.items():
        pods = group.get("maxReplicas", 1) * group.get("numOfHosts", 1)
        wanted: Counter[str] = Counter()
        for container in group["template"]["spec"]["containers"]:
            wanted.update({n: pods * number(q) for n, q in container["resources"]["requests"].items()})
        over = {n: (v, quotas[FLAVOR[role]][n]) for n, v in wanted.items() if v > quotas[FLAVOR[role]][n]}
        assert over == {}


def test_as_many_teachers_as_gpus_allow_fit_one_node(groups: dict[str, dict[str, Any]]):
    # Pods share their node's disk: where it holds fewer of them than the GPUs would, GPUs stand idle.
    variables = (REPO / "infra" / "terraform" / "variables.tf").read_text()
    block = re.search(r'variable "teacher" \{.*?^\}', variables, re.S | re.M)
    assert block is not None
    disk = re.search(r"disk_gib\s+= (\d+)", block[0])
    assert disk is not None
    requests = groups["teacher"]["template"]["spec"]["containers"][0]["resources"]["requests"]
    pods = 8 // int(requests["nvidia.com/gpu"])
    assert pods * number(requests["ephemeral-storage"]) <= 0.9 * int(disk[1]) * 2**30
