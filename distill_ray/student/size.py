"""The student without its weights: its modules, and how many weights they hold."""

from __future__ import annotations

from typing import Any

from distill_ray.causal_lm import causal_lm_shell
from distill_ray.config import Recipe
from distill_ray.storage import stage_folder
from distill_ray.student.build import cut_config


def student_shell(recipe: Recipe) -> Any:
    """The student's model before training and adapters, without storage.

    Raises UserError: transformers has no causal language model for its configuration.
    """
    from transformers import AutoConfig

    section, trust = recipe.student, recipe.teacher.trust_remote_code
    folder = stage_folder(section.model or section.config or recipe.teacher.model, weights=False)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
    if section.teacher_layers is not None:
        config = cut_config(config, section.teacher_layers)
    return causal_lm_shell(config, trust_remote_code=trust)


def weight_count(recipe: Recipe) -> int | None:
    """Parameters, tied ones once; None with adapters: what is trained is then another number, and checkpoints hold
    other parts."""
    return None if recipe.student.lora else sum(p.numel() for p in student_shell(recipe).parameters())
