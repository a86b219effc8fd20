"""Low-rank adapters: added through peft, merged by their formula when the student is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from distill_ray.config.student import LoraSection
from distill_ray.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_ADAPTER = "default"


def check_targets(model: PreTrainedModel, section: LoraSection) -> None:
    """Whether adapters can go where the recipe wants them; the model may be without storage.

    Raises:
        UserError: no module has such a name, one is no `nn.Linear`, or the output head is among them.
    """
    from torch import nn

    head = model.get_output_embeddings()
    named = {n: m for n, m in model.named_modules() if n.split(".")[-1] in section.targets}
    linear = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    has = ", ".join(sorted(linear)) or "none"
    missing = set(section.targets) - {n.split(".")[-1] for n in named}
    if missing:
        raise UserError(
            f"student.lora.targets: {type(model).__name__} has no module named {', '.join(sorted(missing))}; "
            f"its linear modules are: {has}"
        )
    if any(m is head for m in named.values()):
        raise UserError("student.lora.targets may not name the output head: the loss owns its weight; remove it")
    for name, module in named.items():
        if not isinstance(module, nn.Linear):
            raise UserError(
                f"student.lora.targets: {name} of {type(model).__name__} is of type {type(module).__name__}, and "
                f"adapters go beside nn.Linear alone, of which it has: {has}; name these, or train the whole student "
                "without [student.lora]"
            )


def add_lora(model: PreTrainedModel, section: LoraSection, seed: int) -> PreTrainedModel:
    """Put adapters beside the linear modules named in `section.targets` and freeze all else; in place.

    The adapters start as the zero update (B = 0); A is drawn from `seed`, the same on every rank.

    Raises UserError as `check_targets` does.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    check_targets(model, section)
    head = cast("torch.nn.Linear", model.get_output_embeddings())
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # peft divides it as a float
        lora_dropout=0.0,
        target_modules=list(section.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    for name, parameter in model.named_parameters():
        is_adapter = f".lora_A.{_ADAPTER}." in name or f".lora_B.{_ADAPTER}." in name
        parameter.requires_grad_(is_adapter)
        # Frozen and trained weights share one dtype: DeepSpeed flattens them together, and export expects it.
        parameter.data = parameter.data.to(head.weight.dtype)
    return model


def merge_lora(state: dict[str, torch.Tensor], section: LoraSection) -> dict[str, torch.Tensor]:
    """The state dict of the plain model: W + (alpha / rank)·B·A in place of each adapted W, computed in float32.

    Args:
        state: full state dict of a model made by `add_lora`.
        section: rank and alpha of the adapters.
    """
    merged: dict[str, torch.Tensor] = {}
    for name, weight in state.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        if ".base_layer." not in name:
            merged[name] = weight
            continue
        stem, _, leaf = name.partition(".base_layer.")
        if leaf == "weight":
            a = state[f"{stem}.lora_A.{_ADAPTER}.weight"].float()
            b = state[f"{stem}.lora_B.{_ADAPTER}.weight"].float()
            weight = (weight.float() + (section.alpha / section.rank) * (b @ a)).to(weight.dtype)
        merged[f"{stem}.{leaf}"] = weight
    return merged
