"""The student before training: from a folder, from layers of the teacher, or random."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from distill_ray.causal_lm import load_causal_lm
from distill_ray.config import Recipe
from distill_ray.corpus import load_tokenizer, tokens_without_row
from distill_ray.errors import UserError
from distill_ray.model_config import attention_implementation
from distill_ray.storage import stage_folder
from distill_ray.student.dropout import remove_dropout

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def build_initial(
    recipe: Recipe, teacher_folder: Path, say: Callable[[str], None] = lambda text: None
) -> tuple[PreTrainedModel, PretrainedConfig]:
    """The student's causal language model with its first weights, on the CPU; the same on every rank.

    Weights are float32 or bfloat16 by `train.precision`. Adapters are not added here (`add_lora`). Dropout is off.

    Args:
        recipe: says where the student comes from (`[student]`), its precision and the seed of random weights.
        teacher_folder: local Hugging Face folder of the teacher.
        say: called with a sentence when the configuration asks for dropout.

    Returns:
        The model and its text configuration.

    Raises:
        UserError: a layer the teacher does not have, a quantised teacher, or fewer embedding rows than tokens.
    """
    import torch

    trust = recipe.teacher.trust_remote_code
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    section = recipe.student
    if section.model is not None:
        model = load_causal_lm(stage_folder(section.model), dtype, trust)
    elif section.teacher_layers is not None:
        model = from_teacher_layers(teacher_folder, section.teacher_layers, dtype, trust)
    else:
        assert section.config is not None
        model = _random(stage_folder(section.config), dtype, recipe.train.seed, trust)
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    tokens_without_row(load_tokenizer(teacher_folder, trust), rows, "the student's")
    dropped = remove_dropout(model)
    if dropped:
        say(f"dropout is off ({', '.join(dropped)} in the student's configuration): the targets are deterministic")
    return model, model.config.get_text_config()


def _from_config(config: PretrainedConfig, dtype: torch.dtype, trust: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    config.dtype = dtype
    return AutoModelForCausalLM.from_config(
        config,
        dtype=dtype,
        trust_remote_code=trust,
        attn_implementation=attention_implementation(config),
    )


def _random(folder: Path, dtype: torch.dtype, seed: int, trust: bool) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _from_config(config, dtype, trust)


def from_teacher_layers(
    folder: Path, layers: tuple[int, ...], dtype: torch.dtype, trust: bool = False
) -> PreTrainedModel:
    """A student of the teacher's embeddings, final norm, head and the chosen layers, in the order given.

    The model is built from a configuration with that many layers, so that every layer's own index and
    per-layer setting is right, and the weights are copied by name.

    Raises:
        UserError: a layer out of range, or a teacher whose weights are quantised.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"student.teacher_layers: the teacher in {folder} is quantised, and its layers cannot be trained as they "
            "are; give an unquantised folder as student.model"
        )
    depth = config.get_text_config().num_hidden_layers
    wrong = [i for i in layers if not 0 <= i < depth]
    if wrong or not layers:
        raise UserError(
            f"student.teacher_layers={list(layers)}: the teacher has layers 0 … {depth - 1}; choose among these"
        )
    teacher = load_causal_lm(folder, dtype, trust, may_hold_more=True)
    student = _from_config(cut_config(teacher.config, layers), dtype, trust)
    source = teacher.state_dict()
    pattern = re.compile(rf"^({re.escape(_layer_prefix(teacher, depth))}\.)(\d+)(\..*)$")
    wanted = {name: pattern.sub(lambda m: f"{m[1]}{layers[int(m[2])]}{m[3]}", name) for name in student.state_dict()}
    student.load_state_dict({name: source[origin] for name, origin in wanted.items()}, strict=True)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def cut_config(config: PretrainedConfig, layers: tuple[int, ...]) -> PretrainedConfig:
    """The configuration with only `layers`; lists with one entry per layer (`layer_types`, …) are cut alike."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    depth = text.num_hidden_layers
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == depth and name in vars(text):
            setattr(text, name, [value[i] for i in layers])
    text.num_hidden_layers = len(layers)
    return cut


def _layer_prefix(model: PreTrainedModel, depth: int) -> str:
    """Name of the module list that holds the decoder layers."""
    from torch import nn

    names = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    outer = [n for n in names if not any(n.startswith(other + ".") for other in names)]
    if len(outer) != 1:
        raise UserError(
            f"student.teacher_layers: cannot tell the decoder layers of {type(model).__name__} ({len(outer)} lists of "
            f"{depth} modules); cut the model yourself and give its folder as student.model"
        )
    return outer[0]
