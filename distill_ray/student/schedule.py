"""Learning rate as a pure function of the step, so that a resume needs no scheduler state."""

from __future__ import annotations

import math

from distill_ray.config.student import TrainSection


def learning_rate(step: int, steps: int, section: TrainSection) -> float:
    """Linear warm-up to the peak, then as `schedule` says, at the last step `final_lr_fraction` of the peak.

    Args:
        step: 0-based optimizer step.
        steps: optimizer steps of the whole run.
        section: peak, schedule and its shares.
    """
    warmup = math.ceil(section.warmup_fraction * steps)
    if step < warmup:
        return section.learning_rate * (step + 1) / warmup
    height = _height(step, steps, warmup, section)
    return section.learning_rate * (section.final_lr_fraction + (1.0 - section.final_lr_fraction) * height)


def _height(step: int, steps: int, warmup: int, section: TrainSection) -> float:
    """1 at the peak, 0 where the schedule ends."""
    if section.schedule == "constant":
        return 1.0
    if section.schedule == "wsd":  # Hu et al. 2024, MiniCPM, section 4
        falling = math.ceil(section.decay_fraction * steps)
        return min(1.0, (steps - 1 - step) / falling) if falling else 1.0
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return 1.0 - progress if section.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
