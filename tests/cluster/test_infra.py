"""Every file in infra/ is of a kind that some test reads, and what Kubernetes and Helm get from there is right."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from distill_ray.config.cluster import ROLE_LABEL

INFRA = Path(__file__).parents[2] / "infra"
KUBERNETES = "1.33"
ACCOUNTS = ("distill-ray-driver", "distill-ray-teacher", "distill-ray-student")

# Folder of infra/ → kinds of files there, and the test that reads them.
READ = {
    "images": {".Dockerfile": "test_images.py", ".dockerignore": "test_images.py"},
    "terraform": {".tf": "test_terraform.py"},
    "helm": {".yaml": "test_infra.py"},
    "kueue": {".yaml": "test_infra.py"},
    "kubernetes": {".yaml": "test_infra.py"},
    "monitoring": {".yaml": "test_monitoring.py", ".json": "test_monitoring.py"},
}

# The keys of each chart that the values may use, as the charts document them; a list stands for items of that form.
_RESOURCES: dict[str, Any] = {"requests": {"cpu": str, "memory": str}, "limits": {"cpu": str, "memory": str}}
_GATES = [{"name": str, "enabled": bool}]
CHARTS: dict[str, dict[str, Any]] = {
    "kuberay-operator": {
        "image": {"tag": str},
        "singleNamespaceInstall": bool,
        "crNamespacedRbacEnable": bool,
        "watchNamespace": [str],
        "featureGates": _GATES,
        "nodeSelector": {ROLE_LABEL: str},
        "priorityClassName": str,
        "resources": _RESOURCES,
    },
    "kueue": {
        "controllerManager": {
            "featureGates": _GATES,
            "nodeSelector": {ROLE_LABEL: str},
            "manager": {"priorityClassName": str, "resources": _RESOURCES},
        },
        "managerConfig": {"controllerManagerConfigYaml": str},
    },
    "cluster-autoscaler": {
        "cloudProvider": str,
        "fullnameOverride": str,
        "image": {"tag": str},
        "rbac": {"create": bool, "serviceAccount": {"create": bool, "name": str}},
        "extraArgs": {
            "scale-down-unneeded-time": str,
            "scale-down-delay-after-add": str,
            "expander": str,
            "skip-nodes-with-local-storage": bool,
        },
        "nodeSelector": {ROLE_LABEL: str},
        "priorityClassName": str,
    },
    "nvidia-device-plugin": {
        "tolerations": [{"key": str, "operator": str, "effect": str}],
        "nodeSelector": {"nvidia.com/gpu.present": str},
    },
}


class _NoDuplicates(yaml.SafeLoader):
    """YAML whose mappings name each key once."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    if doubled := [key for key, n in Counter(keys).items() if n > 1]:
        raise ValueError(f"keys named twice: {doubled}")
    return dict(zip(keys, (loader.construct_object(value, deep=True) for _, value in node.value), strict=True))


_NoDuplicates.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def documents(folder: str) -> list[dict[str, Any]]:
    """Every YAML document of one folder of infra/."""
    files = sorted((INFRA / folder).glob("*.yaml"))
    return [each for file in files for each in yaml.load_all(file.read_text(), _NoDuplicates)]


def of_kind(kind: str) -> list[dict[str, Any]]:
    """The documents of one kind under kubernetes/ and kueue/."""
    return [each for each in documents("kubernetes") + documents("kueue") if each["kind"] == kind]


def unread(paths: list[Path]) -> list[str]:
    """Files of infra/ that no test reads."""
    found = []
    for path in paths:
        folder, *rest = path.parts
        if not rest or path.suffix not in READ.get(folder, {}):
            found.append(str(path))
    return found


def values(chart: str) -> dict[str, Any]:
    """What is given to a Helm chart."""
    return yaml.load((INFRA / "helm" / f"{chart}.values.yaml").read_text(), _NoDuplicates)


def misfits(given: Any, form: Any, where: str = "") -> list[str]:
    """Where values differ from the form of their chart."""
    if isinstance(form, dict):
        if not isinstance(given, dict):
            return [f"{where}: not a mapping"]
        unknown = [f"{where}.{key}" for key in given.keys() - form.keys()]
        return unknown + [
            m for key in given.keys() & form.keys() for m in misfits(given[key], form[key], f"{where}.{key}")
        ]
    if isinstance(form, list):
        if not isinstance(given, list):
            return [f"{where}: not a list"]
        return [m for i, each in enumerate(given) for m in misfits(each, form[0], f"{where}[{i}]")]
    return [] if type(given) is form else [f"{where}: {given!r} is no {form.__name__}"]


def test_every_file_is_of_a_kind_that_a_test_reads():
    left_behind = {".terraform", ".terraform.lock.hcl"}
    files = [p.relative_to(INFRA) for p in INFRA.rglob("*") if p.is_file() and not left_behind & set(p.parts)]
    files = [path for path in files if ".tfstate" not in path.name]
    assert files
    assert unread(files) == []
    tests = {name for kinds in READ.values() for name in kinds.values() if name != "test_monitoring.py"}
    assert all((Path(__file__).parent / name).exists() for name in tests)


def test_a_file_of_another_kind_or_place_is_noticed():
    assert unread([Path("helm/values.yml"), Path("README.md"), Path("images/notes.txt"), Path("new/a.yaml")]) == [
        "helm/values.yml",
        "README.md",
        "images/notes.txt",
        "new/a.yaml",
    ]


@pytest.mark.parametrize(
    "document", documents("kubernetes"), ids=lambda each: f"{each['kind']}-{each['metadata']['name']}"
)
def test_kubernetes_takes_it(document: dict[str, Any]):
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_kubernetes_would_refuse_a_wrong_field():
    policy = copy.deepcopy(of_kind("NetworkPolicy")[0])
    policy["spec"]["ingres"] = policy["spec"].pop("ingress")
    with pytest.raises(kubernetes_validate.ValidationError, match="ingres"):
        kubernetes_validate.validate(policy, KUBERNETES, strict=True)


def test_names_are_those_that_manifests_use():
    assert [each["metadata"]["name"] for each in of_kind("Namespace")] == ["distill-ray"]
    assert {*ACCOUNTS, "default"} == {each["metadata"]["name"] for each in of_kind("ServiceAccount")}
    assert "distill-ray-weekly" in {each["metadata"]["name"] for each in of_kind("PriorityClass")}
    namespaced = [
        each for kind in ("ServiceAccount", "ResourceQuota", "NetworkPolicy", "LocalQueue") for each in of_kind(kind)
    ]
    assert {each["metadata"]["namespace"] for each in namespaced} == {"distill-ray"}


def test_only_the_head_gets_a_token_of_kubernetes():
    told = {each["metadata"]["name"]: each["automountServiceAccountToken"] for each in of_kind("ServiceAccount")}
    assert [name for name, mounted in told.items() if mounted] == ["distill-ray-driver"]


def test_no_pod_reaches_the_instance_metadata_nor_is_reached_from_elsewhere():
    (policy,) = (each["spec"] for each in of_kind("NetworkPolicy"))
    assert policy["podSelector"] == {}
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert all(rule["from"] for rule in policy["ingress"])
    blocks = [to["ipBlock"] for rule in policy["egress"] for to in rule["to"] if "ipBlock" in to]
    assert blocks
    assert all("169.254.169.254/32" in block["except"] for block in blocks)


def test_the_quota_of_the_namespace_is_no_less_than_kueue_s():
    (quota,) = (each["spec"]["hard"] for each in of_kind("ResourceQuota"))
    (queue,) = (each["spec"] for each in of_kind("ClusterQueue"))
    resources = [each for flavor in queue["resourceGroups"][0]["flavors"] for each in flavor["resources"]]
    gpus = sum(int(each["nominalQuota"]) for each in resources if each["name"] == "nvidia.com/gpu")
    assert int(quota["requests.nvidia.com/gpu"]) == gpus


def test_the_queue_takes_the_namespace_and_its_flavors_exist():
    (queue,), (local,) = of_kind("ClusterQueue"), of_kind("LocalQueue")
    assert local["metadata"]["name"] == "distill-ray"
    assert local["spec"] == {"clusterQueue": queue["metadata"]["name"]}
    assert queue["spec"]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "distill-ray"}
    assert {each["apiVersion"] for each in documents("kueue")} == {"kueue.x-k8s.io/v1beta2"}
    named = [flavor["name"] for group in queue["spec"]["resourceGroups"] for flavor in group["flavors"]]
    assert sorted(named) == sorted(each["metadata"]["name"] for each in of_kind("ResourceFlavor"))


@pytest.mark.parametrize("chart", sorted(path.name.removesuffix(".values.yaml") for path in (INFRA / "helm").iterdir()))
def test_values_are_what_their_chart_knows(chart: str):
    assert misfits(values(chart), CHARTS[chart]) == []


def test_a_misspelt_or_mistyped_value_is_noticed():
    wrong = values("kuberay-operator") | {"watchNamespaces": ["distill-ray"], "singleNamespaceInstall": "true"}
    found = misfits(wrong, CHARTS["kuberay-operator"])
    assert sorted(found) == [".singleNamespaceInstall: 'true' is no bool", ".watchNamespaces"]


def test_operators_run_beside_the_head_and_see_what_they_must():
    assert values("kuberay-operator")["watchNamespace"] == ["distill-ray"]
    kueue = values("kueue")
    # Kueue refuses a RayJob with an autoscaler unless this is on.
    assert {"name": "ElasticJobsViaWorkloadSlices", "enabled": True} in kueue["controllerManager"]["featureGates"]
    config = yaml.load(kueue["managerConfig"]["controllerManagerConfigYaml"], _NoDuplicates)
    assert {"ray.io/rayjob", "ray.io/raycluster"} <= set(config["integrations"]["frameworks"])
    selectors = [values("kuberay-operator"), kueue["controllerManager"], values("cluster-autoscaler")]
    assert all(each["nodeSelector"] == {ROLE_LABEL: "head"} for each in selectors)


def test_the_device_plugin_runs_on_every_tainted_node():
    tolerated = {each["key"] for each in values("nvidia-device-plugin")["tolerations"]}
    taints = {taint["key"] for flavor in of_kind("ResourceFlavor") for taint in flavor["spec"].get("nodeTaints", [])}
    assert taints <= tolerated
