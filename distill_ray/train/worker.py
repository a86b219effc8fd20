"""The function every training worker runs."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from distill_ray import checkpoints
from distill_ray.config import Recipe
from distill_ray.errors import DistillError, UserError
from distill_ray.ingest import BatchPlan, build_plan, open_cache
from distill_ray.lease import LeaseToken
from distill_ray.storage import Storage, StorageError, stage_folder
from distill_ray.targets import RunManifest
from distill_ray.train.restoring import restore_newest
from distill_ray.train.result import HISTORY_FILE, publish_student, published_student, store_history, to_lines
from distill_ray.train.saving import Saver

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill_ray.ingest.batch import PackedBatch
    from distill_ray.ingest.loader import PackLoader
    from distill_ray.student.engine import StepResult, StudentEngine

T = TypeVar("T")
_HISTORY_EVERY_S = 30.0


@dataclass(frozen=True)
class Job:
    """Everything a worker needs; travels to it once."""

    recipe: Recipe
    storage: Storage
    manifest: RunManifest
    token: LeaseToken
    board: Any
    """Handle of the `Board` actor."""


def make_plan(recipe: Recipe, manifest: RunManifest) -> BatchPlan:
    """Every training batch of the run; the same on every worker and after every resume."""
    train = recipe.train
    return build_plan(
        manifest,
        holdout=recipe.corpus.holdout,
        split="train",
        seed=train.seed,
        epochs=train.epochs,
        pack_tokens=train.pack_tokens,
        packs_per_batch=train.packs_per_batch,
    )


def work(config: dict[str, Job]) -> None:
    """Ray Train's entry point on each worker. Errors that a retry cannot mend are marked final on the board."""
    import ray

    job = config["job"]
    ray.get(job.board.enter.remote())
    if ray.get(job.board.final_error.remote()):
        return
    try:
        _Run(job).run()
    except DistillError as error:
        # A store that does not answer may answer the restarted group; a wrong recipe or a lost lease stays so.
        ray.get(job.board.fail.remote(error, not isinstance(error, StorageError)))
        raise


class _Waited:
    """Batches, and the seconds that were spent waiting for them."""

    def __init__(self, batches: Iterator[PackedBatch]) -> None:
        self._batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[PackedBatch]:
        return self

    def __next__(self) -> PackedBatch:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - started


class _Run:
    """One worker's run: restore, iterate, loss, step, save."""

    def __init__(self, job: Job) -> None:
        import torch
        from ray import train as ray_train

        context = ray_train.get_context()
        self.job, self.recipe, self.storage, self.token = job, job.recipe, job.storage, job.token
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.here = context.get_local_world_size()
        if not self.recipe.train.use_gpu:
            # The same number in every run on this machine: it decides the order of sums.
            cpus = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cpus // self.here))
        self.plan = make_plan(self.recipe, job.manifest)
        self.digest = self.plan.digest
        self.history: list[dict[str, float]] = []
        self.student_ids: int | None = None
        self._stored_at = time.monotonic()

    def run(self) -> None:
        """Restore, train to the end of the plan or to a stop, save or publish."""
        import ray

        # Its weights are wanted only where the student is cut from them.
        cut = self.recipe.student.teacher_layers is not None
        teacher_folder = stage_folder(self.recipe.teacher.model, weights=cut)
        engine, model = self._start(teacher_folder)
        # Not before the engine has given each rank its GPU: a collective would put all of them on the first one.
        if self._on_rank_0(self._nothing_to_do):
            return
        start, self.history = restore_newest(self.job, engine, self.digest)
        if self.rank == 0:
            ray.get(self.job.board.start.remote(start))
        stop, saver = False, Saver(self.storage, self.token)
        with self._batches(start) as batches:
            waited = _Waited(batches)
            for step in range(start, self.plan.steps):
                begun, waited.seconds = time.perf_counter(), 0.0
                result = engine.train_step(waited, self.plan.steps, flag=int(stop), arrived=int(saver.arrived))
                seconds = time.perf_counter() - begun
                if result.arrived == self.world:
                    saver.land()
                saver.check()
                stop = self._record(
                    step, result, {"seconds": seconds, "data_s": waited.seconds, "save_s": saver.take()}
                )
                done = step + 1 == self.plan.steps
                if not done and (result.flags or (step + 1) % self.recipe.train.checkpoint_every == 0):
                    self._save(saver, engine, step + 1)
                if result.flags and not done:
                    saver.drain()
                    if self.rank == 0:
                        self._store_history()
                    return
        saver.drain()
        self._finish(engine, model, teacher_folder)

    def _nothing_to_do(self) -> bool:
        """A group restarted after the last publication would train again and write over what is published."""
        import ray

        return (
            ray.get(self.job.board.stopping.remote())
            or published_student(self.storage, self.token.run_prefix) is not None
        )

    def _start(self, teacher_folder: Path) -> tuple[StudentEngine, PreTrainedModel]:
        from distill_ray.ingest.loader import rank_micro_batches
        from distill_ray.student.build import build_initial
        from distill_ray.student.engine import StudentEngine
        from distill_ray.student.lora import add_lora
        from distill_ray.student.module import DistillModule, loss_spec, shared_vocabulary

        recipe, train = self.recipe, self.recipe.train
        model, config = build_initial(recipe, teacher_folder, say=self._say)
        identity = self.job.manifest.identity
        self.student_ids = shared_vocabulary(model, identity.vocab_size, identity.top_k)
        spec = partial(loss_spec, config, self.student_ids, recipe.loss)
        module = DistillModule(model, spec(), lambda step: spec(step=step, steps=self.plan.steps))
        if recipe.student.lora:
            add_lora(model, recipe.student.lora, train.seed)
        if train.gradient_checkpointing:
            # The reentrant kind would need inputs that require gradients, which frozen embeddings do not give.
            model.gradient_checkpointing_enable({"use_reentrant": False})
        full = rank_micro_batches([()] * train.packs_per_batch, self.rank, self.world, train.micro_batch_packs)
        return StudentEngine.start(module, train, micro_steps=len(full)), model

    def _batches(self, start: int) -> PackLoader:
        from distill_ray.ingest.loader import PackLoader

        identity = self.job.manifest.identity
        return PackLoader(
            self.storage,
            identity,
            self.plan,
            cache=open_cache(self.storage, identity, self.plan.units, sharers=self.here, say=self._say),
            temperature=lambda step: self.recipe.loss.temperature_at(step, self.plan.steps),
            student_ids=self.student_ids,
            draws=self.recipe.loss.needs_draws,
            rank=self.rank,
            world=self.world,
            micro_batch_packs=self.recipe.train.micro_batch_packs,
            start_step=start,
        )

    def _record(self, step: int, result: StepResult, times: dict[str, float]) -> bool:
        """Keep the step's line; on rank 0 also tell the driver, and answer whether it wants to stop."""
        import ray

        if not math.isfinite(result.loss):
            raise UserError(
                f"the loss of step {step} is {result.loss}; lower "
                f"train.learning_rate={self.recipe.train.learning_rate} or "
                'use train.precision = "fp32", and give a new --version'
            )
        line = {"step": step, **asdict(result), **{name: round(s, 6) for name, s in times.items()}}
        del line["flags"], line["arrived"]
        self.history.append(line)
        if self.rank != 0:
            return False
        if time.monotonic() - self._stored_at > _HISTORY_EVERY_S:
            self._store_history()
        return bool(ray.get(self.job.board.post.remote(line)))

    def _save(self, saver: Saver, engine: StudentEngine, step: int) -> None:
        """Write the state; it is uploaded and published beside the next steps."""
        if saver.in_flight:
            self._say(f"the checkpoint before step {step} is still being stored, so training waits for it")
            saver.land()
        history = list(self.history)

        def write(folder: Path) -> list[Path]:
            paths = engine.save(folder)
            if self.rank == 0:
                paths.append(folder / HISTORY_FILE)
                paths[-1].write_bytes(to_lines(history))
            return paths

        saver.begin(step, write, lambda files: self._publish(step, history, files))

    def _publish(self, step: int, history: list[dict[str, float]], files: list[checkpoints.StoredFile]) -> None:
        train = self.recipe.train
        recent = [line["loss"] for line in history[-train.checkpoint_every :]]
        checkpoints.publish(
            self.storage,
            self.token,
            step,
            files,
            loss=sum(recent) / len(recent),
            world_size=self.world,
            zero_stage=train.zero_stage,
            plan=self.digest,
        )
        checkpoints.prune(self.storage, self.token, keep=train.keep_checkpoints)

    def _finish(self, engine: StudentEngine, model: PreTrainedModel, teacher_folder: Path) -> None:
        state = engine.export_state()

        def publish_all() -> None:
            assert state is not None
            publish_student(self.job, model, state, teacher_folder, self.history, self.digest)

        self._on_rank_0(publish_all)

    def _on_rank_0(self, act: Callable[[], T]) -> T:
        """Rank 0 acts, all ranks get its answer or its error: none is left waiting in a collective."""
        import torch.distributed as dist

        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = act()
            except DistillError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def _say(self, text: str) -> None:
        """One sentence for the user, from rank 0 alone; every rank may call it."""
        if self.rank == 0:
            self.job.board.note.remote(text)

    def _store_history(self) -> None:
        store_history(self.storage, self.token, self.history)
        self._stored_at = time.monotonic()
