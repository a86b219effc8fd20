"""DeepSpeed's checkpoint files as copies in memory first, which are written while training goes on."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor


class StagedCheckpoint(TorchCheckpointEngine):
    """What DeepSpeed gives its files to: `save` copies to the host's memory, `take` gives what writes the copies."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._staged: deque[tuple[Any, str]] = deque()

    def save(self, state_dict: Any, path: str) -> None:
        self._staged.append((host_copy(state_dict), path))

    def take(self) -> Callable[[], None]:
        """Writes what was saved since the last call, once, in any thread; frees each copy as soon as it is written."""
        staged, self._staged = self._staged, deque()

        def write() -> None:
            while staged:
                super(StagedCheckpoint, self).save(*staged.popleft())

        return write


def host_copy(state: Any) -> Any:
    """A copy of nested containers that shares no memory with them, its tensors on the CPU.

    A tensor that occurs several times (a tied weight) is copied once and occurs as often. One that is a view of a
    larger storage, as every weight is under ZeRO 1 and 2, is copied alone.
    """
    return _copied(state, {})


def _copied(value: Any, tensors: dict[tuple[Any, ...], Tensor]) -> Any:
    if isinstance(value, Tensor):
        # State dicts hold a new tensor object for each name, so a tied weight is known by its memory.
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if place not in tensors:
            tensors[place] = value.detach().to("cpu", copy=True)
        return tensors[place]
    if isinstance(value, dict):
        found = copy.copy(value)  # with what else its type carries, such as a module's `_metadata`
        found.update((key, _copied(item, tensors)) for key, item in value.items())
        return found
    if type(value) in (list, tuple):
        return type(value)(_copied(item, tensors) for item in value)
    return copy.deepcopy(value)
