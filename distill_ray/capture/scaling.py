"""How many teachers a backlog is worth."""

from __future__ import annotations

from distill_ray.config import Recipe

_UNITS_PER_TEACHER = 20
"""Units of full size (about 1 M tokens) that a teacher is started for, where the recipe's range leaves it open: a start
takes minutes in which its GPUs do nothing, and 20 units are some half an hour of a 70B teacher."""


def teachers_for(recipe: Recipe, units: int, size: int) -> tuple[int, int, int]:
    """Least, first and greatest number of teachers.

    Teachers with GPUs are asked for at once, as many as the backlog in bytes is worth: an actor that waits for a node
    is what makes Ray's autoscaler add one. Ray Data by itself adds actors only where their GPUs are there already.

    Args:
        recipe: its range.
        units: that are pending, at least one.
        size: their source bytes.
    """
    replicas, most = recipe.teacher.replicas, min(recipe.teacher.replicas.max, units)
    least = max(1, min(replicas.min, most))
    if not recipe.teacher.gpus:
        return least, least, most  # they share CPUs with the readers, which Ray Data sees to
    worth = -(-size // (_UNITS_PER_TEACHER * recipe.corpus.unit_bytes))
    return least, max(least, min(most, worth)), most
