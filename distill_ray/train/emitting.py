"""Training's metrics, emitted by its driver from what the workers post."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from distill_ray.config import Recipe
from distill_ray.metrics import Meters
from distill_ray.train.bad_loss import Line

_GAUGES = {
    "loss": "train_loss",
    "ce": "train_ce",
    "kl_t": "train_kl_t",
    "kl_t1": "train_kl_t1",
    "kept_mass": "train_kept_mass",
    "top1_agreement": "train_top1_agreement",
    "grad_norm": "train_grad_norm",
    "lr": "train_learning_rate",
    "tokens_per_s": "train_tokens_per_second",
    "mfu": "train_mfu",
    "workers": "train_workers",
    "host_peak_bytes": "train_host_peak_bytes",
    "cuda_peak_bytes": "train_cuda_peak_bytes",
}
_COUNTERS = {
    "input_tokens": "train_tokens",
    "data_s": "train_data_wait_seconds",
    "save_s": "checkpoint_blocked_seconds",
    "skipped": "train_bad_steps",
}
"""Figure of a step's line → metric."""
_RECENT = 50
"""Steps whose mean seconds tell when the next checkpoint is due."""
_TICK_S = 5.0


class TrainMeters:
    """Follows one command's training.

    Args:
        meters: of the stage "train".
        recipe: with its prices, and how often it saves.
        steps: of the run.
        clock: seconds, never going back.
    """

    def __init__(self, meters: Meters, recipe: Recipe, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._meters, self._clock, self._every = meters, clock, recipe.train.checkpoint_every
        price = recipe.cost.student_gpu_hour
        self._dollars_s = None if price is None or not recipe.train.use_gpu else price / 3600
        self._dollars = 0.0
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._saved_at: float | None = None
        self._ticked: float | None = None
        meters.set("train_steps", steps)

    def start(self, step: int) -> None:
        """Workers go on from `step`. A restart publishes nothing: the newest checkpoint goes on ageing."""
        self._meters.set("train_steps_done", step)
        if self._saved_at is None:
            self._saved_at = self._clock()

    def step(self, line: Line) -> None:
        """A step's line. Figures that were not finite are not in it: their gauges stay, and it counts as bad."""
        meters = self._meters
        meters.set("train_steps_done", line["step"] + 1)
        for figure, name in _GAUGES.items():
            if figure in line:
                meters.set(name, line[figure])
        for figure, name in _COUNTERS.items():
            meters.add(name, line.get(figure, 0.0))
        self._seconds.append(line["seconds"] + line["save_s"])
        meters.set("checkpoint_interval_seconds", self._every * sum(self._seconds) / len(self._seconds))
        if self._dollars_s is not None:
            self._dollars += self._seconds[-1] * line["workers"] * self._dollars_s
            meters.set("cost_dollars", round(self._dollars, 4))

    def saved(self, step: int) -> None:
        """The checkpoint of `step` counts."""
        self._saved_at = self._clock()
        self._meters.set("checkpoint_step", step)

    def bad_end(self) -> None:
        """A bad step ended the run."""
        self._meters.add("train_bad_steps", 1)

    def tick(self) -> None:
        """To be called often, also while no step ends."""
        now = self._clock()
        if self._ticked is None or now - self._ticked >= _TICK_S:
            self._ticked = now
            if self._saved_at is not None:
                self._meters.set("checkpoint_age_seconds", now - self._saved_at)
            self._meters.refresh()

    def close(self) -> None:
        """No checkpoint is due any more, and nothing is trained."""
        self._meters.set("checkpoint_age_seconds", 0.0)
        self._meters.set("train_tokens_per_second", 0.0)
