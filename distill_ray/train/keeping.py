"""When a run's checkpoints are written, what they are called by, and which of them stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from distill_ray import checkpoints
from distill_ray.storage import StorageError
from distill_ray.train.bad_loss import applied
from distill_ray.train.result import HISTORY_FILE, to_lines
from distill_ray.train.saving import Saver

if TYPE_CHECKING:
    from distill_ray.student.engine import StudentEngine
    from distill_ray.train.job import Job


class Keeper:
    """One rank's side of a run's checkpoints; every rank calls `save` at the same steps."""

    def __init__(
        self,
        job: Job,
        saver: Saver,
        engine: StudentEngine,
        plan: str,
        say: Callable[[str], None],
        published: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._job, self._saver, self._engine, self._plan, self._say = job, saver, engine, plan, say
        self._published = published

    def save(self, step: int, history: list[dict[str, float]]) -> None:
        """Copy the state; it is written, uploaded and published beside the next steps.

        Nothing is copied where every step since the last one was skipped: the state is that of the last one.
        """
        recent = [line["loss"] for line in applied(history[-self._job.recipe.train.checkpoint_every :])]
        if not recent:
            return
        if self._saver.in_flight:
            self._say(f"the checkpoint before step {step} is still being stored, so training waits for it")
            self._saver.land()
        history = list(history)

        def stage(folder: Path) -> Callable[[], list[Path]]:
            write = self._engine.stage(folder)

            def files() -> list[Path]:
                paths = write()
                if self._engine.rank == 0:
                    paths.append(folder / HISTORY_FILE)
                    paths[-1].write_bytes(to_lines(history))
                return paths

            return files

        self._saver.begin(step, stage, lambda files: self._publish(step, sum(recent) / len(recent), files))

    def _publish(self, step: int, loss: float, files: list[checkpoints.StoredFile]) -> None:
        train, storage, token = self._job.recipe.train, self._job.storage, self._job.token
        world, stage = self._engine.world, train.zero_stage
        checkpoints.publish(storage, token, step, files, loss=loss, world_size=world, zero_stage=stage, plan=self._plan)
        multiples = train.keep_every * train.checkpoint_every
        try:
            self._published(step)
            checkpoints.prune(storage, token, keep=train.keep_checkpoints, multiples_of=multiples)
        except StorageError as error:  # the checkpoint counts; the next one tells and prunes for it, too
            self._say(f"the checkpoint of step {step} is stored, but not what follows it: {error}")
