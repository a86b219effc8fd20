"""Steps whose loss went wrong: which they are, and when there are too many."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from distill_ray.config.student import TrainSection
from distill_ray.errors import UserError

if TYPE_CHECKING:
    from distill_ray.student.engine import StepResult

Line = dict[str, float]
"""One step's line of metrics.jsonl; with `skipped` = 1 where the update was left out."""

RECENT = 50
"""Steps that the median is taken over."""
LEAST = 10
"""Steps before which no loss is a spike: the first ones fall steeply, and a median of few says little."""
MOST_SKIPPED = 10
"""Skipped steps in a row that end the run."""


class BadStepError(UserError):
    """A bad step that ends the run."""


def spike_bound(section: TrainSection, history: Sequence[Line]) -> float:
    """Loss above which the next step is a spike; infinite where none is, or where the median is not above 0 (a KL
    estimated from draws may fall below).

    A pure function of the lines before it, which a checkpoint brings along: a resume judges as the first run did.
    """
    recent = [line["loss"] for line in applied(history[-2 * RECENT :])[-RECENT:]]
    if not section.loss_spike or len(recent) < LEAST:
        return math.inf
    middle = statistics.median(recent)
    return section.loss_spike * middle if middle > 0 else math.inf


def applied(history: Sequence[Line]) -> list[Line]:
    """The lines of steps whose update was made."""
    return [line for line in history if "skipped" not in line]


def check(section: TrainSection, step: int, result: StepResult, bound: float, history: Sequence[Line]) -> bool:
    """Whether the step was a good one.

    Args:
        section: says what to do about a bad one.
        step: its number.
        result: of the step; the same on every rank, and so is what is decided here.
        bound: `spike_bound` before the step.
        history: lines of the steps before it.

    Raises:
        BadStepError: it was a bad one, and `on_bad_loss` is "stop" or too many in a row were skipped.
    """
    spike = result.loss > bound
    if math.isfinite(result.loss) and not spike and math.isfinite(result.grad_norm) and not result.skipped:
        return True
    fact = f"the loss of step {step} is {result.loss}"
    if spike and math.isfinite(result.loss):
        fact += f", above train.loss_spike={section.loss_spike} times the median of recent steps, {bound:.6g}"
    elif math.isfinite(result.loss):
        fact = f"the gradient norm of step {step} is {result.grad_norm} at a loss of {result.loss}"
    remedy = (
        f'lower train.learning_rate={section.learning_rate} or use train.precision = "fp32", and give a new --version'
    )
    if section.on_bad_loss == "stop":
        raise BadStepError(f"{fact}; {remedy}")
    before = sum(1 for _ in takewhile(lambda line: "skipped" in line, reversed(history)))
    if before + 1 >= MOST_SKIPPED:
        raise BadStepError(f"{fact}, the {before + 1}th step in a row that was skipped; {remedy}")
    return False


def line_of(step: int, figures: Line, good: bool) -> Line:
    """The step's line for metrics.jsonl. JSON has no word for what is not finite: such figures are left out."""
    line: Line = {"step": step} | {name: value for name, value in figures.items() if math.isfinite(value)}
    return line if good else line | {"skipped": 1}
