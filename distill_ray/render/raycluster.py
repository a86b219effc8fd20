"""The Ray cluster of a run: a head that drives, and two groups that come and go with the work."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from distill_ray.config import Recipe
from distill_ray.config.cluster import ROLE_LABEL, STUDENT_ROLE, TEACHER_ROLE
from distill_ray.errors import UserError
from distill_ray.render.pods import DRIVER_ROLE, Manifest, nodes_of, pod_template
from distill_ray.render.shape import Shape, student_shape, teacher_shape


def cluster_spec(recipe: Recipe, recipe_map: str | None = None) -> Manifest:
    """Spec of a RayCluster.

    Args:
        recipe: what is rendered.
        recipe_map: ConfigMap with the recipe, where the cluster is of one job.

    Raises:
        UserError: the recipe names no image, does not pin its roles, or has a shape that no pods have.
    """
    if not recipe.cluster.pin_by_label:
        raise UserError(
            "cluster.pin_by_label=false: teachers and training workers would start on each other's nodes, in the wrong "
            f"image; the manifests label the nodes with {ROLE_LABEL}, so set [cluster] pin_by_label = true"
        )
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": recipe.cluster.teacher.idle_timeout_s,
            "resources": {
                "requests": {"cpu": "500m", "memory": "1Gi"},
                "limits": {"cpu": "1", "memory": "1Gi"},
            },
        },
        "headGroupSpec": {
            "labels": {ROLE_LABEL: DRIVER_ROLE},
            "rayStartParams": {
                "dashboard-host": "0.0.0.0",
                # Reading, tokenising and writing tasks run here too: no GPU node is started for them alone.
                "num-cpus": str(recipe.cluster.head.cpus),
                "num-gpus": "0",
            },
            "template": pod_template(recipe, DRIVER_ROLE, recipe_map=recipe_map),
        },
        "workerGroupSpecs": [
            _group(recipe, TEACHER_ROLE, teacher_shape(recipe)),
            _group(recipe, STUDENT_ROLE, student_shape(recipe)),
        ],
    }


def _group(recipe: Recipe, role: str, shape: Shape) -> Manifest:
    nodes: Any = nodes_of(recipe, role)
    return {
        "groupName": role,
        # Ray's autoscaler reads labels here alone; as a parameter of `ray start` they would be ignored.
        "labels": {ROLE_LABEL: role},
        "replicas": 0,
        "minReplicas": 0,
        "maxReplicas": shape.replicas,
        "numOfHosts": shape.hosts,
        "idleTimeoutSeconds": nodes.idle_timeout_s,
        "rayStartParams": {"num-cpus": str(nodes.cpus), "num-gpus": str(shape.gpus)},
        "template": pod_template(recipe, role, gpus=shape.gpus),
    }
