"""What the loss asks of a device: reduce a chunk of rows to a few logits and sums, then differentiate it.

With N rows, every one is reduced to its K + 1 named logits and the log-sum-exp of the rest, at one or two temperatures.
That is all an objective sees, and its gradient in these numbers is all that is needed to go back: a token j of the rest
gets drest·exp(z_j/T − rest)/T. So one pass of matrix products makes the logits of a chunk and two the gradients, and
the logits of one chunk are the only ones that exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distill_ray.losses.partition import RowIds


@dataclass(frozen=True)
class HeadInputs:
    """The head of one call. V is the real vocabulary; further rows of weight and bias are padding."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    ids: RowIds
    vocab_size: int
    temperatures: tuple[float, ...]
    """Distinct; 1 is among them."""
    kept: tuple[float, ...]
    """Those whose rest gets a gradient; without gradients, none."""
    needs: tuple[bool, bool, bool]
    """Whether hidden states, weight and bias get a gradient."""
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def kind(self) -> torch.dtype:
        """Type of products and sums: float32, or float64 for float64 input."""
        return accumulate_type(self.hidden_ND)

    def as_given(
        self, hidden_ND: Tensor | None, weight_VD: Tensor | None, bias_V: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Accumulated gradients in the types of what they are of; None where none was asked for."""
        return (
            hidden_ND,
            None if weight_VD is None else weight_VD.to(self.weight_VD.dtype),
            None if bias_V is None or self.bias_V is None else bias_V.to(self.bias_V.dtype),
        )


@dataclass(frozen=True)
class RowSums:
    """What a chunk of n rows is reduced to, in float64: the objective works on these few numbers only."""

    logits_NE: Tensor
    """Logits of `RowIds.ids_NE`, soft-cap and scale applied."""
    rest: dict[float, Tensor]
    """[n] LSE of logits / T over all other tokens, for each temperature T; −inf where there are none."""
    top_N: Tensor
    """Largest logit among the other tokens."""


class HeadPass(Protocol):
    """One call of the loss on one device. Chunks go in order, each scored, then differentiated if at all."""

    @property
    def chunks(self) -> list[slice]:
        """Rows of each chunk, in order."""
        ...

    def score(self, chunk: int) -> RowSums:
        """Make the logits of a chunk and reduce them."""
        ...

    def differentiate(self, chunk: int, dlogits_NE: Tensor, drest: dict[float, Tensor]) -> None:
        """Add the gradients of the chunk scored last, given those in its sums (of `kept` temperatures)."""
        ...

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight and bias, in their types; None where not asked for."""
        ...


def accumulate_type(x: Tensor) -> torch.dtype:
    """Float32, or float64 for float64: in bf16 a sum over thousands of rows stops growing after a few hundred."""
    return torch.promote_types(x.dtype, torch.float32)
