"""`capture.max_gpu_hours`: what a run's teachers have held their GPUs for, over all of its commands."""

from __future__ import annotations

from collections.abc import Mapping

from distill_ray.config import Recipe
from distill_ray.cost import held, hours_held
from distill_ray.errors import BudgetSpentError
from distill_ray.storage import Storage


class Budget:
    """The account of one command, beside what the run's usage tells of those before.

    Args:
        recipe: with the limit.
        storage: the recipe's root.
        epoch: of this command's lease.

    Raises:
        IntegrityError: what earlier commands held is not known.
    """

    def __init__(self, recipe: Recipe, storage: Storage, epoch: int) -> None:
        self._limit, self._holds = recipe.capture.max_gpu_hours, held(recipe, "capture")
        self._earlier = (
            0.0
            if self._limit is None
            else hours_held(storage, recipe, "capture", device=self._holds.device, but_epoch=epoch)
        )
        self._hours = 0.0

    def hold(self, seconds: Mapping[str, float]) -> None:
        """Seconds that each teacher of this command has held its devices, its start included.

        Raises:
            BudgetSpentError: with all commands before, as much as `capture.max_gpu_hours`.
        """
        self._hours = sum(seconds.values()) * self._holds.count / 3600
        self.check()

    def check(self) -> None:
        """Raises BudgetSpentError where nothing is left."""
        if self._limit is None or self.hours < self._limit:
            return
        unit = "GPU-hours" if self._holds.device == "GPU" else "process-hours (its teachers use no GPU)"
        raise BudgetSpentError(
            f"capture.max_gpu_hours={self._limit:g} is spent: the teachers of this run have held {self.hours:.4g} "
            f"{unit}, {self._hours:.4g} of them in this command. Every finished unit is kept; raise "
            "capture.max_gpu_hours, and the same command goes on from there"
        )

    @property
    def hours(self) -> float:
        """Of all commands: GPU-hours, or hours of processes where teachers use no GPU."""
        return self._earlier + self._hours

    def shown(self) -> dict[str, float]:
        """For progress: what share of the budget is spent, where there is one."""
        return {} if self._limit is None else {"budget_spent": round(self.hours / self._limit, 4)}
