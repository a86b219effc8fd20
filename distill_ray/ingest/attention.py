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


def document_bounds(document_ids_BT: Tensor) -> Tensor:
    """Where each document begins in the flattened B·T tokens, and B·T at the end: what a mask says, in S + 1 numbers.

    A document's tokens lie side by side. The padding of a row is one more document, whose states nobody reads: a
    kernel leaves what lies outside all sequences unwritten, and needs room for each sequence, so not one a token.

    Args:
        document_ids_BT: [B, T] integers, −1 for padding. On a GPU, the host waits for the number of documents.

    Returns:
        int32 [S + 1].
    """
    first_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)  # a row's first token begins a document
    first_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    starts_S = first_BT.flatten().nonzero()[:, 0]
    return torch.cat([starts_S, starts_S.new_tensor([first_BT.numel()])]).int()
