"""Pod templates of the three roles."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from distill_ray.config import Recipe
from distill_ray.config.cluster import ROLE_LABEL, NodesSection, WorkersSection
from distill_ray.errors import UserError

DRIVER_ROLE = "driver"
RECIPE_FOLDER = "/etc/distill-ray"
RECIPE_FILE = "recipe.toml"

# Terms of the clouds for a spot node; a pod that must not be on one avoids them all, whoever's cluster it is.
_SPOT_LABELS = {
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
_AFTER_DRAIN_S = 30
"""Seconds that a pod has beyond its drain, for Ray to end its processes."""

Manifest = dict[str, Any]


def nodes_of(recipe: Recipe, role: str) -> NodesSection:
    """The section that describes a role's pods."""
    return recipe.cluster.head if role == DRIVER_ROLE else getattr(recipe.cluster, role)


def image_of(recipe: Recipe, role: str) -> str:
    """The role's image.

    Raises:
        UserError: the recipe names none.
    """
    image = nodes_of(recipe, role).image
    if image is None:
        key = "head" if role == DRIVER_ROLE else role
        raise UserError(
            f"cluster.{key}.image is not stated, and there is no image to start from by default; build the images and "
            f'name them, say [cluster.{key}] image = "…/distill-ray-{role}:0.1.0"'
        )
    return image


def service_account_of(recipe: Recipe, role: str) -> str:
    """The role's Kubernetes service account."""
    return nodes_of(recipe, role).service_account or f"distill-ray-{role}"


def labels_of(recipe: Recipe, role: str | None = None) -> dict[str, str]:
    """Kubernetes labels by which a run's objects are found."""
    labels = {"app.kubernetes.io/name": "distill-ray", "distill-ray/name": recipe.name}
    return labels | ({ROLE_LABEL: role} if role else {})


def pod_template(recipe: Recipe, role: str, *, gpus: int = 0, recipe_map: str | None = None) -> Manifest:
    """A pod template for Ray nodes.

    Args:
        recipe: what is rendered.
        role: driver, teacher or student.
        gpus: of one pod.
        recipe_map: ConfigMap that holds the recipe, mounted where the driver reads it.
    """
    nodes = nodes_of(recipe, role)
    volumes: list[Manifest] = [{"name": "scratch", "emptyDir": {"sizeLimit": f"{nodes.disk_gib}Gi"}}]
    mounts: list[Manifest] = [{"name": "scratch", "mountPath": "/scratch"}]
    if recipe_map is not None:
        volumes.append({"name": "recipe", "configMap": {"name": recipe_map}})
        mounts.append({"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True})
    spec: Manifest = {
        "serviceAccountName": service_account_of(recipe, role),
        # Ray's autoscaler in the head pod asks Kubernetes for pods; teachers and workers ask it for nothing.
        "automountServiceAccountToken": role == DRIVER_ROLE,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": recipe.cluster.drain_s + _AFTER_DRAIN_S,
        **_placement(recipe, role, gpus),
        "containers": [_container(recipe, role, gpus, mounts)],
        "volumes": volumes,
    }
    metadata: Manifest = {"labels": labels_of(recipe, role)}
    if not _is_spot(nodes):
        metadata["annotations"] = {
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "karpenter.sh/do-not-disrupt": "true",
        }
    return {"metadata": metadata, "spec": spec}


def _is_spot(nodes: NodesSection) -> bool:
    return isinstance(nodes, WorkersSection) and nodes.spot


def _placement(recipe: Recipe, role: str, gpus: int) -> Manifest:
    found: Manifest = {}
    nodes = nodes_of(recipe, role)
    if recipe.cluster.priority_class is not None:
        found["priorityClassName"] = recipe.cluster.priority_class
    selector = dict(nodes.node_selector)
    if isinstance(nodes, WorkersSection) and nodes.gpu_product is not None:
        selector["nvidia.com/gpu.product"] = nodes.gpu_product
    if selector:
        found["nodeSelector"] = selector
    tolerations = []
    if role != DRIVER_ROLE:
        tolerations.append({"key": ROLE_LABEL, "operator": "Equal", "value": role, "effect": "NoSchedule"})
    if gpus:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if _is_spot(nodes):
        tolerations.append({"key": recipe.cluster.spot_taint, "operator": "Exists", "effect": "NoSchedule"})
    else:
        avoid = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in _SPOT_LABELS.items()]
        required = {"nodeSelectorTerms": [{"matchExpressions": avoid}]}
        found["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    if tolerations:
        found["tolerations"] = tolerations
    return found


def _container(recipe: Recipe, role: str, gpus: int, mounts: list[Manifest]) -> Manifest:
    nodes = nodes_of(recipe, role)
    ports = {"metrics": 8080}
    if role == DRIVER_ROLE:
        ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, **ports}
    resources = {"cpu": str(nodes.cpus), "memory": f"{nodes.memory_gib}Gi", "ephemeral-storage": f"{nodes.disk_gib}Gi"}
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    container: Manifest = {
        # KubeRay takes the first container for Ray's.
        "name": "ray-head" if role == DRIVER_ROLE else "ray-worker",
        "image": image_of(recipe, role),
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "env": [{"name": name, "value": value} for name, value in _environment(recipe).items()],
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": {"allowPrivilegeEscalation": False, "seccompProfile": {"type": "RuntimeDefault"}},
        "volumeMounts": mounts,
    }
    if recipe.cluster.secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in recipe.cluster.secrets]
    return container


def _environment(recipe: Recipe) -> dict[str, str]:
    cluster = recipe.cluster
    found = {
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(cluster.drain_s),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TMPDIR": "/scratch",
        # Else TMPDIR would move Ray's session too, away from /tmp/ray, which KubeRay shares between containers.
        "RAY_TMPDIR": "/tmp",
        "XDG_CACHE_HOME": "/scratch",
    }
    if cluster.region is not None:
        found["AWS_REGION"] = cluster.region
    if cluster.endpoint_url is not None:
        if urlsplit(cluster.endpoint_url).username is not None:
            raise UserError(
                "cluster.endpoint_url holds a user name or password, which the manifest would show; leave them out and "
                "name a Kubernetes secret in cluster.secrets"
            )
        found["AWS_ENDPOINT_URL"] = cluster.endpoint_url
    return found
