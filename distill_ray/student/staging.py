"""DeepSpeed's checkpoint files as copies in memory first, which are written while training goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

_PLAIN_COPY = StagingOptions(
    use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
)


class StagedCheckpoint(TorchCheckpointEngine):
    """What DeepSpeed gives its files to: `save` copies to the host's memory, `take` gives what writes the copies."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._staged: deque[tuple[Any, str]] = deque()

    def save(self, state_dict: Any, path: str) -> None:
        # A stager keeps its copies for as long as what they are of lives, so each file has one of its own.
        stager = DefaultStager(_PLAIN_COPY)
        self._staged.append((stager.stage(state_dict), path))
        stager.close()

    def take(self) -> Callable[[], None]:
        """Writes what was saved since the last call, once, in any thread; frees each copy as soon as it is written."""
        staged, self._staged = self._staged, deque()

        def write() -> None:
            while staged:
                super(StagedCheckpoint, self).save(*staged.popleft())

        return write
