"""How many weights a student has, without building it."""

from __future__ import annotations

from distill_ray.config import Recipe
from distill_ray.storage import stage_folder


def weight_counts(recipe: Recipe) -> tuple[int, int] | None:
    """Parameters that are trained, and entries of a model folder, where a tied weight lies under both its names.

    None with adapters: what is trained is then another number, and checkpoints hold other parts.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from distill_ray.student.build import cut_config

    section, trust = recipe.student, recipe.teacher.trust_remote_code
    if section.lora is not None:
        return None
    folder = stage_folder(section.model or section.config or recipe.teacher.model, weights=False)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
    if section.teacher_layers is not None:
        config = cut_config(config, section.teacher_layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    return sum(p.numel() for p in model.parameters()), sum(t.numel() for t in model.state_dict().values())
