"""What an API server does with a custom resource: defaults, then its schema; but here no unknown field is dropped.

Rules in CEL (`x-kubernetes-validations`) are not run; in KubeRay's types they compare an object with its former self or
guard fields that are not rendered.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

REPO = Path(__file__).parents[2]
_CRDS = REPO.parent / "shared" / "kuberay-crds"

_METADATA = {"name", "namespace", "labels", "annotations"}
KUBERNETES = "1.33"


def problems(document: dict[str, Any]) -> list[str]:
    """Everything wrong with a KubeRay object, `path: message`; skips the test where the CRDs are absent."""
    kind = document["kind"]
    if not _CRDS.is_dir():
        pytest.skip(f"KubeRay's CRDs are not at {_CRDS}")
    schema = _schema(kind)
    filled = _defaulted(document, schema)
    found = [f"{e.json_path}: {e.message}" for e in jsonschema.Draft202012Validator(schema).iter_errors(filled)]
    found += [f"metadata: {key} is unknown" for key in document["metadata"].keys() - _METADATA]
    if document["apiVersion"] != "ray.io/v1":
        found.append(f"apiVersion: {document['apiVersion']}")
    return found


def check_builtin(document: dict[str, Any]) -> None:
    """Raise what kubernetes-validate finds wrong with an object of Kubernetes itself."""
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def pod_templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a KubeRay object, as objects of Kubernetes' own: its schema knows more than the CRD's."""
    cluster = cluster_of(document)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
        for group in groups
    ]


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    """The RayCluster's spec in a KubeRay object."""
    spec = document["spec"]
    job = spec.get("jobTemplate", spec)
    return job.get("rayClusterSpec", job)


@functools.cache
def _schema(kind: str) -> dict[str, Any]:
    path = _CRDS / f"ray.io_{kind.lower()}s.yaml"
    crd = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)  # safe, and ten times as fast
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with every object closed to unknown fields, in words that jsonschema knows."""
    if schema.get("x-kubernetes-int-or-string"):
        schema = {k: v for k, v in schema.items() if k not in ("type", "anyOf")} | {"type": ["integer", "string"]}
    made = dict(schema)
    if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            made[key] = _strict(schema[key])
    if "properties" in schema:
        made["properties"] = {name: _strict(inner) for name, inner in schema["properties"].items()}
    return made


def _defaulted(value: Any, schema: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_defaulted(item, schema.get("items", {})) for item in value]
    if not isinstance(value, dict):
        return value
    known: dict[str, Any] = schema.get("properties", {})
    more = schema.get("additionalProperties")
    rest = more if isinstance(more, dict) else {}
    defaults = {name: inner["default"] for name, inner in known.items() if "default" in inner}
    return {k: _defaulted(v, known.get(k, rest)) for k, v in (defaults | value).items()}
