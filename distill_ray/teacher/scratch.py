"""Memory for a tile's logits that is kept from tile to tile.

A head makes a new tensor at every call. Large ones a CPU's allocator takes from the kernel and gives back, so that each
call touches fresh pages, which costs up to a third of the matrix product itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Scratch(TorchDispatchMode):
    """Context in which the first new tensor [R ≤ rows, width] of this type lies in kept memory; all others are new.

    One at most in each use of the context: a head that makes two of the same shape must not find them overlap. The
    tensor is overwritten by the next use.

    Args:
        rows: most rows.
        width: columns, exactly.
        dtype: of the logits.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._memory_RW = torch.empty(rows, width, dtype=dtype)
        self._given = False

    def __enter__(self) -> Scratch:
        self._given = False
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._given and func is torch.ops.aten.empty.memory_format and self._fits(args[0], kwargs):
            self._given = True
            return self._memory_RW[: args[0][0]]
        return func(*args, **kwargs)

    def _fits(self, shape: Any, options: dict[str, Any]) -> bool:
        rows, width = self._memory_RW.shape
        device = options.get("device")
        return (
            len(shape) == 2
            and shape[0] <= rows
            and shape[1] == width
            and (options.get("dtype") or torch.get_default_dtype()) is self._memory_RW.dtype
            and (device is None or torch.device(device).type == "cpu")
            and not options.get("pin_memory")
        )
