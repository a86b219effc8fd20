"""Attention inside documents only."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(document_ids_BT: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Block-causal mask: a token sees itself and earlier tokens of its own document.

    Padding (document −1) sees itself alone: a row that sees nothing gives NaN in a softmax.

    Args:
        document_ids_BT: [B, T] integers, −1 for padding.
        dtype: None gives booleans (True = may attend), for PyTorch's scaled-dot-product attention. A float type
            gives 0 and the type's lowest value, for attention that *adds* its mask (transformers' "eager").

    Returns:
        [B, 1, T, T].
    """
    size = document_ids_BT.shape[1]
    position_T = torch.arange(size, device=document_ids_BT.device)
    same = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    same &= (document_ids_BT >= 0)[:, :, None]
    visible = same & (position_T[:, None] >= position_T[None, :])
    visible |= torch.eye(size, dtype=torch.bool, device=document_ids_BT.device)
    visible = visible[:, None]
    if dtype is None:
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)
