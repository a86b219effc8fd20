"""The function every training worker runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from distill_ray.cost import Beat, Stopwatch, node_type
from distill_ray.errors import DistillError
from distill_ray.ingest import open_cache
from distill_ray.storage import StorageError, stage_folder
from distill_ray.train import preemption
from distill_ray.train.bad_loss import check, line_of, spike_bound
from distill_ray.train.board import GO, LEAVE, STOP
from distill_ray.train.history import HistoryUpload
from distill_ray.train.hopeless import hopeless
from distill_ray.train.job import Job, make_plan
from distill_ray.train.keeping import Keeper
from distill_ray.train.meeting import patiently
from distill_ray.train.restoring import restore_newest
from distill_ray.train.result import publish_student, published_student, store_history
from distill_ray.train.saving import Saver
from distill_ray.train.speed import Speed
from distill_ray.train.tensorboard import EventFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill_ray.ingest.batch import PackedBatch
    from distill_ray.ingest.loader import PackLoader
    from distill_ray.student.engine import StepResult, StudentEngine

T = TypeVar("T")
STOPPED = "stopped"


def work(config: dict[str, Job]) -> str | None:
    """Ray Train's entry point on each worker. Errors that a retry cannot mend are marked final on the board.

    Returns:
        `preemption.LEFT` where the group is to be started again.
    """
    import ray

    job = config["job"]
    ray.get(job.board.enter.remote())
    if ray.get(job.board.final_error.remote()):
        return None
    watch = Stopwatch(node_type=node_type())
    beat = Beat(watch, job.meter)
    run = None
    try:
        run = _Run(job, watch)
        return run.run()
    except DistillError as error:
        # A store that does not answer may answer the restarted group; a wrong recipe or a lost lease stays so.
        ray.get(job.board.fail.remote(error, not isinstance(error, StorageError)))
        raise
    except Exception as error:
        at = None if run is None else run.at
        end = hopeless(error, job.recipe.train, at, lambda step: ray.get(job.board.out_of_memory.remote(step)))
        if end is not None:
            ray.get(job.board.fail.remote(end, True))
        raise
    finally:
        beat.close()


class _Waited:
    """Batches, and the seconds that were spent waiting for them."""

    def __init__(self, batches: Iterator[PackedBatch], watch: Stopwatch) -> None:
        self._batches, self._watch, self.seconds = batches, watch, 0.0

    def __iter__(self) -> Iterator[PackedBatch]:
        return self

    def __next__(self) -> PackedBatch:
        started = time.perf_counter()
        self._watch.enter("idle")
        try:
            return next(self._batches)
        finally:
            self._watch.enter("busy")
            self.seconds += time.perf_counter() - started


class _Run:
    """One worker's run: restore, iterate, loss, step, save."""

    def __init__(self, job: Job, watch: Stopwatch) -> None:
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
        self.told = GO
        self.at: int | None = None
        """The step that it is in."""
        self._events = EventFile()
        self._upload = HistoryUpload(partial(store_history, self.storage, self.token), self._say)
        self._watch = watch

    def run(self) -> str | None:
        """Restore, train to the end of the plan or to a stop, save or publish; says why it ended before the end."""
        import ray

        # Its weights are wanted only where the student is cut from them.
        cut = self.recipe.student.teacher_layers is not None
        teacher_folder = stage_folder(self.recipe.teacher.model, weights=cut)
        self._watch.enter("loading")
        engine, model, self.speed = self._start(teacher_folder)
        # Not before the engine has given each rank its GPU: a collective would put all of them on the first one.
        if self._on_rank_0(self._nothing_to_do):
            return None
        start, self.history = restore_newest(self.job, engine, self.digest)
        if self.rank == 0:
            ray.get(self.job.board.start.remote(start))
        self._watch.enter("idle")
        ended = self._train(engine, start)
        if ended is None:
            self._finish(engine, model, teacher_folder)
        return ended

    def _train(self, engine: StudentEngine, start: int) -> str | None:
        """Every step from `start` on; says why where it ended early, for a stop or because a node goes."""
        saver = Saver(self.storage, self.token)
        keeper = Keeper(self.job, saver, engine, self.digest, self._say, self._saved)
        with self._batches(start) as batches:
            waited = _Waited(batches, self._watch)
            for step in range(start, self.plan.steps):
                result = self._step(engine, saver, waited, step)
                ends = bool(result.flags or result.leaving)
                if step + 1 == self.plan.steps:
                    break
                if ends or (step + 1) % self.recipe.train.checkpoint_every == 0:
                    keeper.save(step + 1, self.history)
                if ends:
                    saver.drain()
                    self._on_rank_0(self._store_history)
                    return STOPPED if result.flags else self._left(step + 1)
        saver.drain()
        return None

    def _left(self, steps: int) -> str:
        why = "there is room for more workers" if self.told == LEAVE else "a node is about to be taken away"
        self._say(f"{why}: the workers leave after {steps} steps, which are saved")
        return preemption.LEFT

    def _step(self, engine: StudentEngine, saver: Saver, batches: _Waited, step: int) -> StepResult:
        """One step and its line; on rank 0 also what is to be done after it."""
        self.at, train = step, self.recipe.train
        begun, batches.seconds = time.perf_counter(), 0.0
        bound = spike_bound(train, self.history)
        self._watch.enter("busy")
        result = engine.train_step(
            batches,
            self.plan.steps,
            flag=int(self.told == STOP),
            arrived=int(saver.arrived),
            leave=lambda: self.told == LEAVE or preemption.notice() is not None,
            skip_above=bound if train.on_bad_loss == "skip" else None,
        )
        seconds = time.perf_counter() - begun
        self._watch.enter("idle")
        if result.arrived == self.world:
            saver.land()
        saver.check()
        good = check(train, step, result, bound, self.history)
        times = {"seconds": seconds, "data_s": batches.seconds, "save_s": saver.take()}
        self.told = self._record(step, result, times | self.speed.of(step, seconds), good)
        return result

    def _nothing_to_do(self) -> bool:
        """A group restarted after the last publication would train again and write over what is published."""
        import ray

        return (
            ray.get(self.job.board.stopping.remote())
            or published_student(self.storage, self.token.run_prefix) is not None
        )

    def _start(self, teacher_folder: Path) -> tuple[StudentEngine, PreTrainedModel, Speed]:
        from distill_ray.ingest.loader import rank_micro_batches
        from distill_ray.student.build import build_initial
        from distill_ray.student.engine import StudentEngine
        from distill_ray.student.flops import ModelFlops
        from distill_ray.student.frozen import freeze
        from distill_ray.student.lora import add_lora
        from distill_ray.student.module import DistillModule, loss_spec, shared_vocabulary
        from distill_ray.student.varlen import FLASH

        recipe, train = self.recipe, self.recipe.train
        model, config = build_initial(recipe, teacher_folder, say=self._say)
        identity = self.job.manifest.identity
        self.student_ids = shared_vocabulary(model, identity.vocab_size, identity.top_k)
        spec = partial(loss_spec, config, self.student_ids, recipe.loss)
        kernel = FLASH if train.use_gpu else None
        module = DistillModule(model, spec(), lambda step: spec(step=step, steps=self.plan.steps), kernel)
        if module.masked_because is not None:
            self._say(f"attention goes by a mask over each pack, exact but slower: {module.masked_because}")
        freeze(model, recipe.student.freeze)
        if recipe.student.lora:
            add_lora(model, recipe.student.lora, train.seed)
        if train.gradient_checkpointing:
            # The reentrant kind would need inputs that require gradients, which frozen embeddings do not give.
            model.gradient_checkpointing_enable({"use_reentrant": False})
        full = rank_micro_batches([()] * train.packs_per_batch, self.rank, self.world, train.micro_batch_packs)
        flops = ModelFlops.of(module)  # before its weights are partitioned
        engine = StudentEngine.start(module, train, micro_steps=len(full))
        return engine, model, Speed(self.plan, flops, train, self.world, engine.device, self._say)

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

    def _record(self, step: int, result: StepResult, measured: dict[str, float], good: bool) -> int:
        """Keep the step's line; on rank 0 also tell the driver, and answer whether to go on, stop or leave."""
        import ray

        figures = {**asdict(result), **{name: round(s, 6) for name, s in measured.items()}}
        for name in ("flags", "arrived", "leaving", "skipped"):
            del figures[name]
        line = line_of(step, figures, good)
        if not good:
            self._say(f"step {step} was skipped: loss {result.loss:.6g}, gradient norm {result.grad_norm:.6g}")
        self.history.append(line)
        if self.rank != 0:
            return GO
        self._watch.did(1, int(result.tokens))
        self._upload.tick(self.history)
        return ray.get(self.job.board.post.remote(line))

    def _saved(self, step: int) -> None:
        """A checkpoint counts; told in a thread of rank 0."""
        self.job.board.saved.remote(step)
        self._events.store(self.storage, self.token, self.history[:step])

    def _finish(self, engine: StudentEngine, model: PreTrainedModel, teacher_folder: Path) -> None:
        state = engine.export_state()

        def publish_all() -> None:
            assert state is not None
            self._upload.wait()
            self._events.store(self.storage, self.token, self.history)  # before it: a published run is not gone over
            publish_student(self.job, model, state, teacher_folder, self.history, self.digest)

        self._on_rank_0(publish_all)

    def _on_rank_0(self, act: Callable[[], T]) -> T:
        """Rank 0 acts, however long it takes; all ranks get its answer or its error."""

        def answer() -> Any:
            try:
                return act() if self.rank == 0 else None
            except DistillError as error:
                return error

        found = patiently(answer)[0]
        if isinstance(found, DistillError):
            raise found
        return found

    def _say(self, text: str) -> None:
        """One sentence for the user, from rank 0 alone; every rank may call it."""
        if self.rank == 0:
            self.job.board.note.remote(text)

    def _store_history(self) -> None:
        self._upload.wait()
        store_history(self.storage, self.token, self.history)
