"""How many pods, nodes and GPUs a recipe's teachers and training workers take."""

from __future__ import annotations

from dataclasses import dataclass

from distill_ray.config import Recipe
from distill_ray.errors import UserError


@dataclass(frozen=True)
class Shape:
    """A worker group: `replicas` times `hosts` pods of `gpus` GPUs at most, none at least."""

    gpus: int
    hosts: int
    replicas: int


def teacher_shape(recipe: Recipe) -> Shape:
    """One replica of the group is one teacher; one that needs more GPUs than a node has spans several pods.

    Raises:
        UserError: such a teacher would leave GPUs of its nodes unused.
    """
    teacher, per_node = recipe.teacher, recipe.cluster.teacher.gpus_per_node
    if teacher.gpus <= per_node:
        return Shape(teacher.gpus, 1, teacher.replicas.max)
    if teacher.gpus % per_node:
        raise UserError(
            f"a teacher of tensor_parallel={teacher.tensor_parallel} × pipeline_parallel={teacher.pipeline_parallel} = "
            f"{teacher.gpus} GPUs does not fill nodes of cluster.teacher.gpus_per_node={per_node}; use a multiple of "
            f"{per_node}"
        )
    return Shape(per_node, teacher.gpus // per_node, teacher.replicas.max)


def student_shape(recipe: Recipe) -> Shape:
    """Pods as full as they can be, each a replica: after a lost node, only that one is replaced.

    Raises:
        UserError: a pod's workers would have less than one CPU each.
    """
    train, nodes = recipe.train, recipe.cluster.student
    most = nodes.gpus_per_node if train.use_gpu else nodes.cpus
    each = min(most, train.workers.max)
    if nodes.cpus < each:
        raise UserError(
            f"cluster.student.cpus={nodes.cpus}: {each} training workers of one pod need as many CPUs; use at least "
            f"{each}"
        )
    return Shape(each if train.use_gpu else 0, 1, -(-train.workers.max // each))
