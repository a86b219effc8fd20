"""Attention by document: a kernel that takes sequences of many lengths stands in for the mask over a whole pack.

A boolean mask of [B, 1, T, T] takes time and memory by T² and rules the flash kernel out. Here a document of n tokens
costs n², and a row's padding as much as a document of its length.

transformers looks a layer's attention up by name at every call, and hands a mask of four dimensions to every layer as
it is. So the bounds of the documents travel as that mask, int32 [1, 1, 1, S + 1]. Being an argument of each layer,
they are there again where gradient checkpointing runs it a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from distill_ray.student.flops import layer_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_HEAD = 256
_NO_ARGUMENT = ("softcap", "s_aux", "position_bias")
"""What some layers ask of attention and the kernel has no argument for: soft-caps, sinks, biases by position."""


@dataclass(frozen=True)
class Kernel:
    """Attention over sequences laid end to end, and what it takes."""

    name: str
    """Of this attention in transformers' registry."""
    call: Callable[..., Any]
    """With the signature of `varlen_attn`, and a gradient; gives a Tensor where no more is asked of it."""
    dtypes: tuple[torch.dtype, ...]
    """Of queries, keys and values."""
    capability: tuple[int, int] | None = None
    """The least CUDA device that runs it; None: any device."""

    def install(self, model: PreTrainedModel) -> str | None:
        """Let this kernel do the attention of every layer from here on, if each asks only what it does exactly.

        The layers are asked by a pass over a few tokens, where the model is; the kernel itself is not run. Called
        with another mask than bounds, or with none, the model goes on attending as before.

        Returns:
            None; or why not, and then the model is as it was.
        """
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        config = model.config.get_text_config()
        name, before = type(model).__name__, config._attn_implementation
        if before != "sdpa":
            return f"{name} attends by transformers' {before!r}, which may do more than the kernel can"
        if not model.is_backend_compatible():
            return f"{name} does not look its attention up in transformers' registry"
        if (unfit := self._unfit_device()) is not None:
            return unfit
        AttentionMaskInterface.register(self.name, sdpa_mask)
        config._attn_implementation = self.name
        objection = _ask_layers(self, model)
        AttentionInterface.register(self.name, partial(_attend, self))
        if objection is not None:
            config._attn_implementation = before
            return f"{name}: {objection}"
        return None

    def _unfit_device(self) -> str | None:
        if self.capability is None:
            return None
        if not (torch.cuda.is_available() and torch.backends.cuda.is_flash_attention_available()):
            return "this torch has no flash attention, or no GPU"
        found = torch.cuda.get_device_capability()
        return None if found >= self.capability else f"the GPU's compute capability {found} is below {self.capability}"


FLASH = Kernel("distill_ray_flash", varlen_attn, (torch.bfloat16, torch.float16), (8, 0))


@torch.no_grad()
def _ask_layers(kernel: Kernel, model: PreTrainedModel) -> str | None:
    """What keeps a layer from the kernel; None where nothing does. Leaves a listener under the kernel's name."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    device = next(model.parameters()).device
    bounds = torch.tensor([0, 1, 2, 3, 4, 5, 6, 8], dtype=torch.int32, device=device)[None, None, None]
    windows: list[int | None] = []
    objections: list[str] = []

    def listen(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **asked: Any):
        windows.append(asked.get("sliding_window"))
        sizes = sorted({x.shape[-1] for x in (query, key, value)})
        if mask is not bounds:
            objections.append("a layer gets another mask than the model was given")
        if query.dtype not in kernel.dtypes:
            objections.append(f"attention is in {query.dtype}, which the kernel does not take")
        if len(sizes) > 1 or sizes[0] > _MAX_HEAD or sizes[0] % 8:
            objections.append(f"heads are of sizes {sizes}, not of one multiple of 8 up to {_MAX_HEAD}")
        objections.extend(f"a layer asks for {n}" for n in _NO_ARGUMENT if asked.get(n) is not None)
        if asked.get("dropout"):
            objections.append("a layer asks for dropout")
        return sdpa_attention_forward(module, query, key, value, None, scaling=asked.get("scaling"))

    AttentionInterface.register(kernel.name, listen)
    was_training = model.training
    model.train()  # dropout is asked for in training alone
    model.base_model(input_ids=torch.arange(8, device=device)[None], attention_mask=bounds, use_cache=False)
    model.train(was_training)
    expected = layer_windows(model.config.get_text_config())
    if windows != expected:
        objections.append(f"layers ask for the sliding windows {windows}, but the configuration says {expected}")
    return objections[0] if objections else None


def _attend(
    kernel: Kernel,
    module: nn.Module,
    query: Tensor,  # [B, H, T, Q]; keys and values may have fewer heads
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for each layer: attention [B, T, H, Q]."""
    if mask is None or mask.dtype != torch.int32:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **rest)
    rows, length = query.shape[0], query.shape[2]
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    bounds, grouped = mask.view(-1), query.shape[1] != key.shape[1]
    # The kernel counts the tokens before this one, a model's window this one as well.
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    # No document is longer than its row. The kernel only counts its blocks by this, and those beyond an end return.
    longest = length
    out = kernel.call(
        query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=window, enable_gqa=grouped
    )
    return out.unflatten(0, (rows, length)), None
