"""All documents of one kind of manifest, and their text."""

from __future__ import annotations

import hashlib

from distill_ray.config import Recipe
from distill_ray.config.cluster import STUDENT_ROLE, TEACHER_ROLE
from distill_ray.errors import UserError
from distill_ray.render import jobs
from distill_ray.render.names import cluster_name, run_name, weekly_name
from distill_ray.render.pods import DRIVER_ROLE, RECIPE_FILE, Manifest, labels_of, nodes_of, service_account_of
from distill_ray.render.raycluster import cluster_spec

KINDS = ("rayjob", "raycronjob", "cronjob", "raycluster")


def manifests(recipe: Recipe, text: str, kind: str, options: tuple[str, ...] = ()) -> list[Manifest]:
    """What `kubectl apply` makes a run, a weekly run or a cluster from.

    Args:
        recipe: the parsed recipe; its version is the run's.
        text: the recipe's TOML, which the driver reads again on the cluster.
        kind: one of KINDS.
        options: of the command line that changed the recipe when it was parsed (--root, --set), and do so there.

    Returns:
        The documents, in an order in which each finds what it refers to.

    Raises:
        UserError: the recipe lacks something that the manifest needs, or contradicts it.
    """
    accounts = _accounts(recipe)
    if kind == "raycluster":
        return [*accounts, _raycluster(recipe)]
    if "://" not in recipe.storage.root:
        raise UserError(
            f"storage.root={recipe.storage.root} is a folder of one machine, and every attempt runs on a new cluster; "
            "use s3://bucket/prefix, or --root"
        )
    if kind == "rayjob":
        name = run_name(recipe)
        recipe_map = _recipe_map(recipe, name, text)
        return [*accounts, recipe_map, jobs.rayjob(recipe, name, recipe_map["metadata"]["name"], options)]
    if "version" in recipe.model_fields_set:
        raise UserError(
            f"version={recipe.version!r} is stated, and a weekly job would do that one run again and again; leave it "
            "out, the version is then the ISO week in which a job starts"
        )
    recipe_map = _recipe_map(recipe, weekly_name(recipe), text)
    weekly = jobs.raycronjob if kind == "raycronjob" else jobs.cronjob
    made = weekly(recipe, recipe_map["metadata"]["name"], options)
    return [*accounts, recipe_map, *(made if isinstance(made, list) else [made])]


def to_yaml(documents: list[Manifest], caption: str) -> str:
    """A multi-document text for `kubectl apply -f -`, with a comment before it."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    body = yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, explicit_start=True, width=120, allow_unicode=True)
    return f"# {caption}\n{body}"


def _raycluster(recipe: Recipe) -> Manifest:
    queued = jobs.queue_metadata(recipe)
    metadata: Manifest = {"name": cluster_name(recipe), "namespace": recipe.cluster.namespace, **queued}
    metadata["labels"] = labels_of(recipe) | queued.get("labels", {})
    spec = cluster_spec(recipe) | ({"suspend": True} if queued else {})
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": spec}


def _recipe_map(recipe: Recipe, name: str, text: str) -> Manifest:
    # Named after its content: a recipe that is changed later leaves a job that has started as it is.
    name = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    metadata = {"name": name, "namespace": recipe.cluster.namespace, "labels": labels_of(recipe)}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "immutable": True,
        "data": {RECIPE_FILE: text},
    }


def _accounts(recipe: Recipe) -> list[Manifest]:
    found: dict[str, Manifest] = {}
    roles: dict[str, str] = {}
    for role in (DRIVER_ROLE, TEACHER_ROLE, STUDENT_ROLE):
        name, arn = service_account_of(recipe, role), nodes_of(recipe, role).aws_role
        metadata: Manifest = {
            "name": name,
            "namespace": recipe.cluster.namespace,
            "labels": {"app.kubernetes.io/name": "distill-ray"},
        }
        if arn is not None:
            if roles.setdefault(name, arn) != arn:
                raise UserError(f"service account {name} is given two IAM roles, {roles[name]} and {arn}; state one")
            metadata["annotations"] = {"eks.amazonaws.com/role-arn": arn}
        if arn is None and name in found:
            continue
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}
        found[name] = account | {"automountServiceAccountToken": role == DRIVER_ROLE}  # each pod states its own, too
    return list(found.values())
