"""What runs a recipe on a Ray cluster of its own: once, or every week."""

from __future__ import annotations

import shlex

from distill_ray.config import Recipe
from distill_ray.config.naming import submission_id
from distill_ray.errors import UserError
from distill_ray.render.names import weekly_name
from distill_ray.render.pods import DRIVER_ROLE, RECIPE_FILE, RECIPE_FOLDER, Manifest, image_of, labels_of
from distill_ray.render.raycluster import cluster_spec

TRIGGER = "distill-ray-trigger"
"""Service account, role and binding of the pod that a CronJob starts; it may create jobs and nothing else."""

_RECIPE = f"{RECIPE_FOLDER}/{RECIPE_FILE}"
_CATCH_UP_S = 6 * 86400
"""How late a CronJob may still start a job: a Monday's until Sunday. A later one would be next week's run, which
captures what is new of both weeks by itself."""


def rayjob(recipe: Recipe, name: str, recipe_map: str, options: tuple[str, ...]) -> Manifest:
    """The RayJob of one version."""
    job: Manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(recipe, name) | _elastic(recipe),
        "spec": _job_spec(recipe, recipe_map, _run(options, shlex.quote(recipe.version)), submission_id(recipe)),
    }
    job["metadata"]["labels"] |= {"distill-ray/version": recipe.version} | _queued(recipe)
    return job


def raycronjob(recipe: Recipe, recipe_map: str, options: tuple[str, ...]) -> Manifest:
    """A RayCronJob: alpha in KubeRay 1.7, with no concurrencyPolicy.

    Two of its jobs at once are two clusters with one version: the run's lease lets one of them write, and the other
    ends.

    Raises:
        UserError: the recipe names a queue.
    """
    if recipe.cluster.queue is not None:
        raise UserError(
            f"cluster.queue={recipe.cluster.queue!r}: a RayCronJob of KubeRay 1.7 gives its jobs no labels, so Kueue "
            "would never admit them; use --kind cronjob, or leave the queue out"
        )
    # The version is known when the job starts, on the head, whose shell expands this.
    entrypoint = _run(options, '"$(python -m distill_ray.render.week)"')
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCronJob",
        "metadata": _metadata(recipe, weekly_name(recipe)),
        "spec": {
            "schedule": recipe.cluster.schedule,
            "timeZone": "Etc/UTC",
            "suspend": False,
            "jobTemplate": _job_spec(recipe, recipe_map, entrypoint, recipe.name),
        },
    }


def cronjob(recipe: Recipe, recipe_map: str, options: tuple[str, ...]) -> list[Manifest]:
    """A plain CronJob whose pod renders this week's RayJob and creates it, with the rights that it needs for that."""
    command = ["distill-ray", "render", _RECIPE, "--kind", "rayjob", "--create", *options]
    container: Manifest = {
        "name": "render",
        "image": image_of(recipe, DRIVER_ROLE),
        "command": command,
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "512Mi"}},
        "securityContext": {"allowPrivilegeEscalation": False, "seccompProfile": {"type": "RuntimeDefault"}},
        "volumeMounts": [{"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True}],
    }
    pod: Manifest = {
        "serviceAccountName": TRIGGER,
        "restartPolicy": "OnFailure",
        "containers": [container],
        "volumes": [{"name": "recipe", "configMap": {"name": recipe_map}}],
    }
    job: Manifest = {
        "backoffLimit": 6,
        "activeDeadlineSeconds": 3600,
        "ttlSecondsAfterFinished": 86400,
        "template": {"metadata": {"labels": labels_of(recipe)}, "spec": pod},
    }
    schedule: Manifest = {
        "schedule": recipe.cluster.schedule,
        "timeZone": "Etc/UTC",
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": _CATCH_UP_S,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {"spec": job},
    }
    head: Manifest = {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": _metadata(recipe, weekly_name(recipe))}
    return [*_trigger(recipe), head | {"spec": schedule}]


def queue_metadata(recipe: Recipe) -> Manifest:
    """Labels and annotations by which Kueue admits an object; none without a queue."""
    labels = _queued(recipe)
    return ({"labels": labels} if labels else {}) | _elastic(recipe)


def _job_spec(recipe: Recipe, recipe_map: str, entrypoint: str, job_id: str) -> Manifest:
    cluster = recipe.cluster
    return {
        # KubeRay hands the command to the head itself: no pod of a submitter, and no second shell that would expand it.
        "submissionMode": "HTTPMode",
        "entrypoint": entrypoint,
        # No entrypointNumCpus: with resources of its own the driver could be placed on any node, a teacher's too.
        "jobId": job_id,
        "backoffLimit": cluster.retries,
        "activeDeadlineSeconds": int(cluster.deadline_hours * 3600),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": cluster.keep_finished_s,
        "suspend": cluster.queue is not None,
        "rayClusterSpec": cluster_spec(recipe, recipe_map),
    }


def _run(options: tuple[str, ...], version: str) -> str:
    return f"{shlex.join(['distill-ray', 'run', _RECIPE, *options])} --version {version} --address auto"


def _metadata(recipe: Recipe, name: str) -> Manifest:
    return {"name": name, "namespace": recipe.cluster.namespace, "labels": labels_of(recipe)}


def _queued(recipe: Recipe) -> dict[str, str]:
    return {"kueue.x-k8s.io/queue-name": recipe.cluster.queue} if recipe.cluster.queue is not None else {}


def _elastic(recipe: Recipe) -> Manifest:
    # Kueue refuses a cluster that scales itself, unless its workload may change after it was admitted.
    return {"annotations": {"kueue.x-k8s.io/elastic-job": "true"}} if recipe.cluster.queue is not None else {}


def _trigger(recipe: Recipe) -> list[Manifest]:
    metadata = {
        "name": TRIGGER,
        "namespace": recipe.cluster.namespace,
        "labels": {"app.kubernetes.io/name": "distill-ray"},
    }
    rules = [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]},
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["create"]},
    ]
    group = "rbac.authorization.k8s.io"
    subject = {"kind": "ServiceAccount", "name": TRIGGER, "namespace": recipe.cluster.namespace}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": dict(metadata)},
        {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": dict(metadata), "rules": rules},
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": dict(metadata),
            "roleRef": {"apiGroup": group, "kind": "Role", "name": TRIGGER},
            "subjects": [subject],
        },
    ]
