"""What a teacher's Ray actor asks of the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_ray.config.sections import TeacherSection

_CPU_TEACHER_CPUS = 0.5
"""CPUs that a teacher without a GPU asks for; not a reading task's share, or Ray Data would fuse reading into it."""


def needed_resources(section: TeacherSection) -> dict[str, float]:
    """Ray resources of one teacher; the engine's own processes use the GPUs that Ray gives to its actor."""
    if section.use_gpu:
        return {"GPU": section.gpus}
    return {"CPU": _CPU_TEACHER_CPUS}


def actor_resources(section: TeacherSection, selector: Mapping[str, str]) -> dict[str, Any]:
    """The same as options of an actor, on nodes that `selector` selects by their labels."""
    needed = needed_resources(section)
    options = {"num_gpus": needed.get("GPU", 0), "num_cpus": needed.get("CPU", 0)}
    return {**options, "label_selector": dict(selector)} if selector else options
