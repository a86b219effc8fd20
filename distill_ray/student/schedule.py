"""Learning rate as a pure function of the step, so that a resume needs no scheduler state."""

from __future__ import annotations

import math

from distill_ray.config.student import TrainSection


def learning_rate(step: int, steps: int, section: TrainSection) -> float:
    """Linear warm-up to the peak, then a cosine down to `final_lr_fraction` of it at the last step.

    Args:
        step: 0-based optimizer step.
        steps: optimizer steps of the whole run.
        section: peak, warm-up share and final share.
    """
    warmup = math.ceil(section.warmup_fraction * steps)
    if step < warmup:
        return section.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.learning_rate * (section.final_lr_fraction + (1.0 - section.final_lr_fraction) * cosine)
