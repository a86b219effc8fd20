"""Whether there are the GPUs, CPUs and labelled nodes that a run needs."""

from __future__ import annotations

import os
from dataclasses import dataclass

from distill_ray.config import Recipe
from distill_ray.config.cluster import ROLE_LABEL, STUDENT_ROLE, TEACHER_ROLE
from distill_ray.errors import UserError
from distill_ray.preflight.finding import Finding
from distill_ray.session import is_autoscaled, live_nodes, private_cpus


def hardware(recipe: Recipe, where: str | None) -> Finding:
    """Whether the cluster at `where`, to which Ray is connected, or else this machine, holds the run.

    Raises UserError where it cannot.
    """
    need = recipe.teacher.gpus
    workers = recipe.train.workers
    # An elastic group starts with what there is.
    name, least = ("min", workers.min) if workers.min < workers.max else ("max", workers.max)
    train = least if recipe.train.use_gpu else 0
    if where is None and recipe.cluster.pin_by_label:
        raise UserError(
            f"cluster.pin_by_label = true needs nodes labelled {ROLE_LABEL}={TEACHER_ROLE} and {STUDENT_ROLE}, which a "
            "private cluster on this machine has not; give --address of a cluster, or leave it out"
        )
    if where is None and not need and not train:
        return Finding("hardware", f"CPU only, as the recipe says; {os.cpu_count()} CPU(s) here")
    found = Nodes.present() if where else Nodes([Node(private_cpus(recipe), _local_gpus(), {})], False)
    teachers, students = (found.having(recipe.cluster.selector(role)) for role in (TEACHER_ROLE, STUDENT_ROLE))
    notes = [found.missing(recipe.cluster.selector(role)) for role in (TEACHER_ROLE, STUDENT_ROLE)]
    have = [node.gpus for node in teachers if node.gpus]
    # What is not there, an autoscaler may bring: its node types are nobody's to ask for.
    if max(have, default=0) < need and not found.autoscaled:
        raise UserError(
            f"one teacher replica needs {need} GPU(s) on one node (tensor_parallel={recipe.teacher.tensor_parallel} × "
            f"pipeline_parallel={recipe.teacher.pipeline_parallel}); nodes here have {have or [0]}; lower them, give "
            "--address of a cluster, or set teacher.use_gpu = false"
        )
    gpus = sum(node.gpus for node in students)
    if gpus < train and not found.autoscaled:
        raise UserError(
            f"train.workers.{name}={train} needs as many GPUs; {gpus} found; lower it, give --address of a "
            "cluster, or set train.use_gpu = false"
        )
    cpus = sum(node.cpus for node in students)
    if cpus < least and not found.autoscaled:
        raise UserError(
            f"train.workers.{name}={least} needs as many CPUs, one for each worker; the cluster at "
            f"{where} has {cpus} on {len(students)} node(s); lower it or add nodes"
        )
    total, cpus = sum(node.gpus for node in found.nodes), sum(node.cpus for node in found.nodes)
    more = "; the autoscaler may add more" if found.autoscaled else ""
    fact = f"{total} GPU(s) and {cpus} CPU(s) on {len(found.nodes)} node(s){more}"
    return Finding("hardware", "; ".join([fact, *filter(None, notes)]))


@dataclass(frozen=True)
class Node:
    cpus: int
    gpus: int
    labels: dict[str, str]


@dataclass(frozen=True)
class Nodes:
    """Live nodes of a cluster, and whether an autoscaler may add some."""

    nodes: list[Node]
    autoscaled: bool

    @classmethod
    def present(cls) -> Nodes:
        """Those of the cluster to which Ray is connected."""
        nodes = [
            Node(int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)), node["Labels"])
            for node in live_nodes()
        ]
        return cls(nodes, is_autoscaled())

    def having(self, selector: dict[str, str]) -> list[Node]:
        """Those with these labels."""
        return [node for node in self.nodes if selector.items() <= node.labels.items()]

    def missing(self, selector: dict[str, str]) -> str:
        """A sentence where no node has these labels now.

        Raises UserError: and none can come.
        """
        if not selector or self.having(selector):
            return ""
        label = ", ".join(f"{key}={value}" for key, value in selector.items())
        if self.autoscaled:
            return f"no node is labelled {label} now: one of the autoscaler's node types has to be"
        raise UserError(
            f"cluster.pin_by_label = true, and none of the {len(self.nodes)} node(s) is labelled {label}; start nodes "
            f"with `ray start --labels {label}`, or leave pin_by_label out"
        )


def _local_gpus() -> int:
    import torch

    return torch.cuda.device_count()
