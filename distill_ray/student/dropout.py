"""Training without dropout: the teacher's targets are deterministic, and a resumed step must equal the first one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


def remove_dropout(model: PreTrainedModel) -> list[str]:
    """Set every source of random noise in the forward pass to 0, in modules and configuration; in place.

    Modules read the rate from their own attribute, from an `nn.Dropout`, or from the configuration at every call.

    Returns:
        `name=rate` of every configuration field that was not 0 (dropout, layer drop, router jitter).
    """
    for module in model.modules():
        _silence(module)
    config = model.config
    return sorted({x for part in (config, config.get_text_config()) for x in _silence_config(part)})


def _is_noise(name: str, value: object) -> bool:
    return isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name)


def _silence(module: nn.Module) -> None:
    from torch.nn.modules.dropout import _DropoutNd

    if isinstance(module, _DropoutNd):
        module.p = 0.0
    for name in [n for n, value in vars(module).items() if _is_noise(n, value)]:
        setattr(module, name, 0.0)


def _silence_config(config: PretrainedConfig) -> list[str]:
    found = {n: value for n, value in vars(config).items() if _is_noise(n, value)}
    for name in found:
        setattr(config, name, 0.0)
    return [f"{name}={value:g}" for name, value in found.items()]
