"""Target objects, brought row group by row group as batches need them, kept in memory or on local disk."""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

from distill_ray.ingest.plan import PlanUnit, SeqRef
from distill_ray.ingest.units import DiskUnit, MemoryUnit, RangedUnit
from distill_ray.storage import Storage
from distill_ray.targets import CaptureIdentity, StoredSequence

_COPIES = 2
"""A unit in memory takes its object's bytes and the columns parsed out of them."""
_READS_AT_ONCE = 16
_REMOTE_OPEN = 256
"""Footers of objects that find no room that are kept parsed, some 100 KiB each."""


class OpenUnit(Protocol):
    """A unit of which any sequence can be read, verified, by any thread."""

    def sequence(self, i: int) -> StoredSequence: ...


Open = Callable[[PlanUnit], OpenUnit]


class UnitCache:
    """Stored sequences, out of objects that are fetched row group by row group and then kept.

    Batches draw from all units at random, so the first ones touch them all: to fetch each whole would make the first
    step wait for everything. Once the bound is reached nothing is dropped for another unit, which would be as likely
    to be wanted as the dropped one: of the others, every read goes to the store.

    Args:
        keep: opens a unit whose row groups stay once they are read.
        pass_by: opens a unit of which nothing stays.
        units: the units of the plan, whose sizes the bound counts.
        max_bytes: bound on the objects kept.
        max_units: bound on their number.
        say: called once, with a sentence, when a unit finds no room.
    """

    def __init__(
        self,
        keep: Open,
        pass_by: Open,
        units: Iterable[PlanUnit],
        max_bytes: int,
        max_units: int | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._keep, self._pass_by = keep, pass_by
        self._units = {u.hash: u for u in units}
        self._max_bytes, self._max_units = max_bytes, len(self._units) if max_units is None else max_units
        self._kept: dict[str, Future[OpenUnit]] = {}
        self._passing: OrderedDict[str, Future[OpenUnit]] = OrderedDict()
        self._bytes, self._full, self._say = 0, False, say
        self._reads = ThreadPoolExecutor(_READS_AT_ONCE, "unit-read")

    @property
    def kept(self) -> int:
        """Units that stay once they are read."""
        return len(self._kept)

    def read(self, refs: Sequence[SeqRef]) -> list[StoredSequence]:
        """The sequences, in the order of `refs`; from one thread at a time. Raises what fetching or reading raises."""
        return self.begin(refs)()

    def begin(self, refs: Sequence[SeqRef]) -> Callable[[], list[StoredSequence]]:
        """Start to read, from one thread at a time; what is returned waits and gives what `read` does, to any thread.

        The reads of the batches to come go on while one is decoded.
        """
        indices: dict[str, list[int]] = {}
        for ref in refs:
            indices.setdefault(ref.unit, []).append(ref.index)
        # All are opened before any is waited for: a pool's threads never wait for what stands behind them.
        sources = {unit: self._source(self._units[unit]) for unit in indices}
        parts = {unit: self._reads.submit(_sequences, source, indices[unit]) for unit, source in sources.items()}
        while len(self._passing) > _REMOTE_OPEN:
            self._passing.popitem(last=False)

        def end() -> list[StoredSequence]:
            ordered = {unit: iter(part.result()) for unit, part in parts.items()}
            return [next(ordered[ref.unit]) for ref in refs]

        return end

    def close(self) -> None:
        """Nothing more is fetched; what is under way is finished first."""
        self._reads.shutdown(wait=True, cancel_futures=True)

    def _source(self, unit: PlanUnit) -> Future[OpenUnit]:
        if unit.hash in self._kept:
            return self._kept[unit.hash]
        if self._has_room(unit):
            self._bytes += unit.bytes
            self._kept[unit.hash] = self._reads.submit(self._keep, unit)
            return self._kept[unit.hash]
        if unit.hash not in self._passing:
            self._passing[unit.hash] = self._reads.submit(self._pass_by, unit)
        self._passing.move_to_end(unit.hash)
        return self._passing[unit.hash]

    def _has_room(self, unit: PlanUnit) -> bool:
        fits = self._bytes + unit.bytes <= self._max_bytes and len(self._kept) < self._max_units
        if not fits and not self._full:
            self._full = True
            self._say(
                f"this worker has room for {len(self._kept)} of {len(self._units)} target objects and "
                f"{self._max_bytes / 2**30:.1f} of {sum(u.bytes for u in self._units.values()) / 2**30:.1f} GiB; the "
                "others are read from the store sequence by sequence, in every epoch: more local disk (TMPDIR) or a "
                "higher limit of open files would spare that"
            )
        return fits


def _sequences(source: Future[OpenUnit], indices: list[int]) -> list[StoredSequence]:
    unit = source.result()
    return [unit.sequence(i) for i in indices]


def open_cache(
    storage: Storage,
    identity: CaptureIdentity,
    units: tuple[PlanUnit, ...],
    *,
    memory_bytes: int = 2 * 2**30,
    disk_bytes: int | None = None,
    folder: Path | None = None,
    sharers: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> UnitCache:
    """A cache in memory where all units fit there, else on local disk; close it after use.

    Args:
        storage: where the target objects lie.
        identity: of the capture.
        units: of the plan.
        memory_bytes: most memory for whole units.
        disk_bytes: most local disk; None takes this process's part of half of what is free.
        folder: where on the local disk; None takes the system's folder for temporary files.
        sharers: processes of this node that each open such a cache.
        say: called once, with a sentence, when a unit finds no room.
    """
    pass_by = partial(RangedUnit, storage, identity)
    if _COPIES * sum(u.bytes for u in units) <= memory_bytes:
        return UnitCache(partial(MemoryUnit, storage, identity), pass_by, units, memory_bytes, say=say)
    place = folder or Path(tempfile.gettempdir())
    bound = shutil.disk_usage(place).free // 2 // sharers if disk_bytes is None else disk_bytes
    # Each unit on disk holds a file descriptor; half of them are left to everything else.
    descriptors = _allow_open_files() // 2
    return UnitCache(partial(DiskUnit, storage, identity, folder=place), pass_by, units, bound, descriptors, say)


def _allow_open_files() -> int:
    """Raise this process's limit of open files (often 1,024) to the most it may have, and return that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return soft if soft != resource.RLIM_INFINITY else 2**20
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
