"""distill_ray: weekly, restartable distillation of large language models on a Ray cluster.

from distill_ray import load_recipe, run
report = run(load_recipe("jobs/recipes/quickstart.cpu.toml"))
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from distill_ray.config import Recipe, load_recipe

# No process of a run asks a model hub or a statistics server for anything. Here, because transformers and vllm read
# these when they are imported; in a runtime_env they would cost every process of Ray's a second one before it starts.
for _name, _value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}.items():
    os.environ.setdefault(_name, _value)

if TYPE_CHECKING:
    from distill_ray.pipeline import run

__all__ = ["Recipe", "load_recipe", "run"]


def __getattr__(name: str) -> Any:
    # `run` brings ray and torch; a recipe can be loaded and checked without either.
    if name == "run":
        from distill_ray.pipeline import run

        return run
    raise AttributeError(f"module 'distill_ray' has no attribute {name!r}")
