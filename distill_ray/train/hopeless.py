"""Errors of a worker that a restarted group would only meet again."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from distill_ray.config.student import TrainSection
from distill_ray.errors import DistillError, UserError

_FAULTS = (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, AssertionError)
"""Of the model's code or of ours. What comes of a lost peer or device is a RuntimeError or an OSError."""


def hopeless(
    error: Exception, section: TrainSection, step: int | None, again: Callable[[int], bool]
) -> DistillError | None:
    """What to end the run with; None where another try may do better.

    Args:
        error: that a worker met.
        section: whose memory settings are named.
        step: that it was in; None before the first one.
        again: whether a group before this one ran out of memory at that step.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        if step is None or not again(step):
            return None
        return UserError(
            f"out of memory at step {step} a second time: {_first_line(error)}. Lower "
            f"train.micro_batch_packs={section.micro_batch_packs} or train.pack_tokens={section.pack_tokens}, or set "
            f"gradient_checkpointing (now {section.gradient_checkpointing}), offload (now {section.offload}) or "
            f"zero_stage={max(3, section.zero_stage)}; the same command then goes on from the last checkpoint"
        )
    if not isinstance(error, _FAULTS):
        return None
    where = traceback.extract_tb(error.__traceback__)[-1]
    return DistillError(
        f"training met {type(error).__name__} at {'its start' if step is None else f'step {step}'}, which another try "
        f"would meet again: {_first_line(error)} ({where.filename}:{where.lineno}); please report it with the log of "
        "the workers"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
