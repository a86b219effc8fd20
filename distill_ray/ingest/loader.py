"""Micro-batches of one rank, prefetched in the background."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Self

from distill_ray.errors import CannotCaptureError
from distill_ray.ingest.batch import PackedBatch, TargetFormat, collate
from distill_ray.ingest.cache import UnitCache, open_cache
from distill_ray.ingest.plan import BatchPlan, Pack, SeqRef, batch_id
from distill_ray.storage.base import Storage
from distill_ray.targets import CaptureIdentity, StoredSequence


def rank_micro_batches(batch: Sequence[Pack], rank: int, world: int, micro_batch_packs: int) -> list[list[Pack]]:
    """The micro-batches of one rank: packs rank, rank + world, … of the batch, padded with empty packs.

    Every rank gets the same number of micro-batches of the same sizes: a rank without one would leave the others
    waiting in a collective for ever.
    """
    share = -(-len(batch) // world)
    mine = list(batch[rank::world])
    mine += [()] * (share - len(mine))
    return [mine[i : i + micro_batch_packs] for i in range(0, share, micro_batch_packs)]


class PackLoader:
    """Iterates the micro-batches of one rank from `start_step` to the plan's end, decoding ahead in one thread.

    What the thread raises is raised by the iteration. Use it as a context manager, or call `close`.

    Args:
        storage: where the target objects lie.
        identity: of the capture; its top_k and vocabulary say how rows are read.
        plan: every batch of the run.
        temperature: distillation temperature, or that of each global batch; must have been captured.
        student_ids: ids that the student's softmax runs over, where fewer than the teacher's; a kept id beyond them is
            refused.
        draws: make targets of the tokens drawn from the teacher, as the `sampled` and `head_tail` objectives take them.
        rank: of this worker.
        world: number of workers.
        micro_batch_packs: packs of one forward pass.
        start_step: first global batch.
        prefetch: micro-batches decoded ahead.
        cache: gives the stored sequences, closed with the loader; None makes one by `open_cache`.
    """

    def __init__(
        self,
        storage: Storage,
        identity: CaptureIdentity,
        plan: BatchPlan,
        *,
        temperature: float | Callable[[int], float] = 1.0,
        student_ids: int | None = None,
        draws: bool = False,
        rank: int = 0,
        world: int = 1,
        micro_batch_packs: int = 1,
        start_step: int = 0,
        prefetch: int = 4,
        cache: UnitCache | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is outside a world of {world}")
        self._plan = plan
        self._rank, self._world, self._micro_batch_packs = rank, world, micro_batch_packs
        self._identity, self._temperature, self._student_ids = identity, temperature, student_ids
        self._draws = draws
        self._units = cache or open_cache(storage, identity, plan.units)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="pack-loader")
        self._work = self._micro_batches(start_step)
        self._pending: deque[Future[PackedBatch]] = deque()
        self._prefetch = max(1, prefetch)
        self._closed = False
        self.wait_seconds = 0.0
        """Seconds the consumer has waited for a batch."""

    def _micro_batches(self, start_step: int) -> Iterator[tuple[int, int, int, list[Pack]]]:
        for step in range(start_step, self._plan.steps):
            parts = rank_micro_batches(self._plan.batch(step), self._rank, self._world, self._micro_batch_packs)
            for micro, packs in enumerate(parts):
                yield step, micro, len(parts), packs

    def _begin(self, step: int, micro: int, micro_steps: int, packs: list[Pack]) -> Future[PackedBatch]:
        refs = [ref for pack in packs for ref in pack]
        return self._executor.submit(self._load, step, micro, micro_steps, packs, refs, self._units.begin(refs))

    def _load(
        self,
        step: int,
        micro: int,
        micro_steps: int,
        packs: list[Pack],
        refs: list[SeqRef],
        read: Callable[[], list[StoredSequence]],
    ) -> PackedBatch:
        temperature = self._temperature(step) if callable(self._temperature) else self._temperature
        if self._draws and temperature != self._identity.draws_temperature:
            raise CannotCaptureError(
                f"the loss takes draws at temperature {temperature}, but tokens were drawn at "
                f"{self._identity.draws_temperature}; set capture.draws_temperature and capture again"
            )
        identity = self._identity
        draws_from = identity.draws_from if self._draws else None
        form = TargetFormat(identity.top_k, identity.vocab_size, temperature, self._student_ids, draws_from)
        stored = dict(zip(refs, read(), strict=True))
        found = collate(packs, stored.__getitem__, form, self._plan.pack_tokens)
        place = {"step": step, "micro": micro, "micro_steps": micro_steps, "supervised": self._plan.supervised(step)}
        return replace(found, **place, batch_id=batch_id(refs))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PackedBatch:
        if self._closed:
            raise StopIteration
        while len(self._pending) < self._prefetch and (work := next(self._work, None)) is not None:
            self._pending.append(self._begin(*work))
        if not self._pending:
            self.close()
            raise StopIteration
        begun = time.perf_counter()
        try:
            return self._pending.popleft().result()
        finally:
            self.wait_seconds += time.perf_counter() - begun

    def close(self) -> None:
        """Stop the thread and close the cache; the batch it is working on is finished and dropped."""
        self._closed = True
        self._pending.clear()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._units.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
