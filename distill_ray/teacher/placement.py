"""What a teacher's Ray actor asks of the cluster."""

from __future__ import annotations

from distill_ray.config.sections import TeacherSection

_CPU_TEACHER_CPUS = 0.5
"""CPUs that a teacher without a GPU asks for; not a reading task's share, or Ray Data would fuse reading into it."""


def actor_resources(section: TeacherSection) -> dict[str, float]:
    """Options of the actor; the engine's own processes use the GPUs that Ray gives to it."""
    if section.use_gpu:
        return {"num_gpus": section.tensor_parallel * section.pipeline_parallel, "num_cpus": 0}
    return {"num_cpus": _CPU_TEACHER_CPUS}
