"""What a teacher's Ray actor asks of the cluster."""

from __future__ import annotations

from distill_ray.config.sections import TeacherSection

_CPU_TEACHER_CPUS = 0.5
"""CPUs that a teacher without a GPU asks for; not a reading task's share, or Ray Data would fuse reading into it."""


def needed_resources(section: TeacherSection) -> dict[str, float]:
    """Ray resources of one teacher; the engine's own processes use the GPUs that Ray gives to its actor."""
    if section.use_gpu:
        return {"GPU": section.gpus}
    return {"CPU": _CPU_TEACHER_CPUS}


def actor_resources(section: TeacherSection) -> dict[str, float]:
    """The same as options of an actor."""
    needed = needed_resources(section)
    return {"num_gpus": needed.get("GPU", 0), "num_cpus": needed.get("CPU", 0)}
