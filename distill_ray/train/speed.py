"""What a step's line says of speed and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from distill_ray.config.student import TrainSection
from distill_ray.ingest import BatchPlan

if TYPE_CHECKING:
    import torch

    from distill_ray.student.flops import ModelFlops

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes of one `ru_maxrss`."""


class Speed:
    """Figures of one worker's steps; the lines are rank 0's.

    Tokens and FLOPs of a step follow from the plan, so that no rank has to ask the others.

    Args:
        plan: of the run.
        flops: of the student; None for a mixture of experts.
        section: precision, and perhaps the device's peak.
        world: workers, each with one device like this one.
        device: this worker's.
        say: told why there is no MFU on a GPU.
    """

    def __init__(
        self,
        plan: BatchPlan,
        flops: ModelFlops | None,
        section: TrainSection,
        world: int,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        import torch

        from distill_ray.student.flops import peak_flops

        self._plan, self._flops, self._world = plan, flops, world
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        self._peak = peak_flops(section, name)
        self._device = device if device.type == "cuda" else None
        if self._flops is None and self._peak is not None:
            say("no MFU is reported: the student is a mixture of experts")
        elif name is not None and self._peak is None:
            say(f"no MFU is reported: the {section.precision} peak of {name} is not known; train.peak_tflops states it")

    def of(self, step: int, seconds: float) -> dict[str, float]:
        """Figures of a step that took `seconds`, its waiting for data included, its checkpoint not."""
        import torch

        lengths = self._plan.lengths(step)
        tokens = int(lengths.sum())
        found = {
            "time": round(time.time(), 3),
            "workers": self._world,
            "input_tokens": tokens,
            "tokens_per_s": round(tokens / seconds, 2),
            "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT,
        }
        if self._device is not None:
            found["cuda_peak_bytes"] = torch.cuda.max_memory_allocated(self._device)
        if self._flops is not None and self._peak is not None:
            flops = self._flops.of_step(lengths, self._plan.supervised(step))
            found["mfu"] = round(flops / (seconds * self._world * self._peak), 6)
        return found
