"""The teacher: what turns token ids into target rows. The only home of `import vllm`.

`open_engine` gives the engine the recipe names; both stand behind `Engine`, so capture never knows which one runs.
Importing this package imports neither torch nor vllm.
"""

from distill_ray.teacher.engine import (
    CapturePath,
    Engine,
    open_engine,
    require_ids,
    resolve_dtype,
    token_ids,
    vocabulary_size,
)
from distill_ray.teacher.generation import Answer, writing_of
from distill_ray.teacher.placement import actor_resources, needed_resources
from distill_ray.teacher.weights import weights_identity

__all__ = [
    "Answer",
    "CapturePath",
    "Engine",
    "actor_resources",
    "needed_resources",
    "open_engine",
    "require_ids",
    "resolve_dtype",
    "token_ids",
    "vocabulary_size",
    "weights_identity",
    "writing_of",
]
