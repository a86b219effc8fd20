"""Whether a cluster can hold a run: what its parts need, what nodes there are, what the recipe says may be added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_ray.config import Recipe
from distill_ray.config.cluster import ROLE_LABEL, STUDENT_ROLE, TEACHER_ROLE
from distill_ray.errors import UserError
from distill_ray.submit.client import Client
from distill_ray.teacher.placement import needed_resources
from distill_ray.train.placement import is_elastic, worker_resources


@dataclass(frozen=True)
class Need:
    """Processes of one kind; each has to fit one node."""

    what: str
    count: int
    each: Mapping[str, float]
    """Ray resources of one."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that its node must have."""
    remedy: str = ""


@dataclass(frozen=True)
class Nodes:
    """`count` nodes with the same resources and labels."""

    count: int
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


def needs(recipe: Recipe) -> list[Need]:
    """What the run cannot do without. Teachers and training workers run one after the other."""
    cluster, teacher, train = recipe.cluster, recipe.teacher, recipe.train
    name, workers = ("min", train.workers.min) if is_elastic(train) else ("max", train.workers.max)
    found = [
        Need(
            f"teacher.replicas.min={teacher.replicas.min}",
            max(1, teacher.replicas.min),
            needed_resources(teacher),
            cluster.selector(TEACHER_ROLE),
            "lower teacher.tensor_parallel, pipeline_parallel or replicas.min",
        ),
        Need(
            f"train.workers.{name}={workers}",
            workers,
            worker_resources(train),
            cluster.selector(STUDENT_ROLE),
            f"lower train.workers.{name}",
        ),
    ]
    submit = cluster.submit
    if submit.driver_labels:
        cpus = {"CPU": submit.driver_cpus} if submit.driver_cpus else {}
        found.append(Need("the driver", 1, cpus, submit.driver_labels, "change cluster.submit.driver_labels"))
    return found


def missing(found: Sequence[Need], nodes: Sequence[Nodes]) -> list[str]:
    """A sentence on each need that these nodes, were they idle, cannot hold."""
    lacking = []
    for need in found:
        fitting = [n for n in nodes if all(n.labels.get(key) == value for key, value in need.labels.items())]
        places = sum(n.count * _places(need, n) for n in fitting)
        if places < need.count:
            wanted = " and ".join(f"{n:g} {name}" for name, n in need.each.items())
            label = "".join(f" labelled {key}={value}" for key, value in need.labels.items())
            where = f"{wanted or 'a place'} on each of its nodes{label}, {need.count} time(s)"
            lacking.append(f"{need.what} needs {where}; there is room for {places}: {need.remedy}")
    return lacking


def _places(need: Need, nodes: Nodes) -> int:
    """How many of the need one of these nodes holds; for an empty need one."""
    return int(min((nodes.resources.get(name, 0.0) // n for name, n in need.each.items()), default=1))


def require_room(client: Client, recipe: Recipe) -> None:
    """Raises UserError where neither the nodes that are there nor those that may come can hold the run."""
    present = present_nodes(client)
    lacking = missing(needs(recipe), present)
    if lacking and recipe.cluster.submit.grows_to:
        # The groups include what of them is there already; the driver's node is not of them.
        lacking = missing(needs(recipe), groups(recipe) + present_outside(recipe, present))
    if not lacking:
        return
    grows = recipe.cluster.submit.grows_to
    more = "" if grows else "; if its autoscaler adds nodes, state in cluster.submit.grows_to which"
    gpus = sum(n.count * n.resources.get("GPU", 0) for n in present)
    cpus = sum(n.count * n.resources.get("CPU", 0) for n in present)
    raise UserError(
        f"the cluster at {client.get_address()} cannot hold this run: it has {gpus:g} GPU(s) and {cpus:g} CPU(s) on "
        f"{len(present)} node(s)"
        + ("" if not grows else f" and may grow to {_grown(recipe)}")
        + ".\n  "
        + "\n  ".join(lacking)
        + f"\nor add nodes{more}"
    )


def groups(recipe: Recipe) -> list[Nodes]:
    """The recipe's `grows_to`."""
    return [
        Nodes(g.nodes, {"CPU": g.cpus, "GPU": g.gpus}, {ROLE_LABEL: g.role} if g.role else {})
        for g in recipe.cluster.submit.grows_to
    ]


def present_outside(recipe: Recipe, present: Sequence[Nodes]) -> list[Nodes]:
    """The present nodes that cannot be of any group of `grows_to`."""
    kinds = [(group.resources, group.labels.get(ROLE_LABEL)) for group in groups(recipe)]
    return [
        node
        for node in present
        if not any(
            all(node.resources.get(name, 0) == n for name, n in resources.items())
            and node.labels.get(ROLE_LABEL) in (role, None)
            for resources, role in kinds
        )
    ]


def _grown(recipe: Recipe) -> str:
    return ", ".join(
        f"{g.nodes} × ({g.gpus} GPU, {g.cpus} CPU{f', {g.role}' if g.role else ''})"
        for g in recipe.cluster.submit.grows_to
    )


def present_nodes(client: Client) -> list[Nodes]:
    """The live nodes, each by itself, as the dashboard has them."""
    rows: list[dict[str, Any]] = client.read("/api/v0/nodes?limit=10000&detail=True")["result"]["result"]
    return [Nodes(1, row["resources_total"] or {}, row.get("labels") or {}) for row in rows if row["state"] == "ALIVE"]
