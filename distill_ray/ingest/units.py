"""Target objects, brought row group by row group as batches need them, verified, kept in memory or on local disk."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from distill_ray.errors import IntegrityError
from distill_ray.ingest.plan import PlanUnit, SeqRef
from distill_ray.storage import Storage, read_verified
from distill_ray.storage.atomic import write_at
from distill_ray.targets import CaptureIdentity, StoredSequence, UnitReader, unit_key
from distill_ray.targets.container import MAGIC

T = TypeVar("T")

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


class RangedUnit:
    """A unit in the store or on local disk: a sequence costs one read of its row group, about 1 MiB, digest checked."""

    def __init__(self, storage: Storage, identity: CaptureIdentity, unit: PlanUnit) -> None:
        """Fetches the footer.

        Raises:
            NotFoundError: no such object.
            IntegrityError: altered, or of another capture or unit.
        """
        self._storage, self._unit = storage, unit
        self._key = unit_key(identity, unit.hash)
        self._where = f"{storage.uri}/{self._key}"
        # Two batches may ask at once; the reader and what it keeps serve one at a time.
        self._lock = threading.RLock()
        self._fetched: list[int] = []
        self._reader = self._verified(
            lambda: UnitReader(unit.bytes, self._fetch, identity.fingerprint, unit.hash, self._where)
        )

    def sequence(self, i: int) -> StoredSequence:
        """Raises IntegrityError when the bytes are not those that were captured, however often they are read."""
        with self._lock:
            return self._sequences(i, i + 1)[0]

    def _sequences(self, start: int, stop: int) -> list[StoredSequence]:
        return self._verified(lambda: self._reader.sequences(start, stop))

    def _verified(self, read: Callable[[], T]) -> T:
        def attempt() -> T:
            self._fetched.clear()
            try:
                return read()
            except IntegrityError:
                for start in self._fetched:
                    self._forget(start)
                raise

        return read_verified(attempt)

    def _fetch(self, start: int, length: int) -> bytes:
        self._fetched.append(start)
        return self._storage.get_range(self._key, start, length)

    def _forget(self, start: int) -> None:
        """What was fetched from there is damaged: nothing of it may stay."""

    def _compare(self, digest: str) -> None:
        """The footer vouches for each row group; which footer it must be, only the digest of the whole object tells."""
        if digest != self._unit.sha256:
            raise IntegrityError(
                f"{self._where}: SHA-256 {digest}, but the run's manifest says {self._unit.sha256}: altered since it "
                "was captured; run `distill-ray capture` again"
            )


class MemoryUnit(RangedUnit):
    """A unit whose row groups stay in memory, parsed; compared with the run's manifest once all are there."""

    def __init__(self, storage: Storage, identity: CaptureIdentity, unit: PlanUnit) -> None:
        self._parts: dict[int, bytes] = {}
        self._groups: dict[int, list[StoredSequence]] = {}
        super().__init__(storage, identity, unit)
        # It reaches back into row groups, and only what is of the footer was verified.
        self._footer, self._parts = self._parts, {}

    def sequence(self, i: int) -> StoredSequence:
        first, stop = self._reader.group_of(i)
        with self._lock:
            if first not in self._groups:
                self._groups[first] = self._sequences(first, stop)
                if len(self._groups) == self._reader.groups:
                    self._compare_parts()
            return self._groups[first][i - first]

    def _fetch(self, start: int, length: int) -> bytes:
        self._parts[start] = data = super()._fetch(start, length)
        return data

    def _forget(self, start: int) -> None:
        self._parts.pop(start, None)

    def _compare_parts(self) -> None:
        whole, at = hashlib.sha256(MAGIC), len(MAGIC)
        for start, part in (*sorted(self._parts.items()), *sorted(self._footer.items())):
            whole.update(memoryview(part)[max(0, at - start) :])
            at = max(at, start + len(part))
        self._parts.clear()
        self._footer.clear()
        self._compare(whole.hexdigest())


class DiskUnit(RangedUnit):
    """A unit whose row groups stay on local disk; compared with the run's manifest once all are there.

    The copy has no name: it goes when the unit is dropped, or when the process dies, however it dies.
    """

    def __init__(self, storage: Storage, identity: CaptureIdentity, unit: PlanUnit, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(prefix="distill-ray-", dir=folder, buffering=0)  # noqa: SIM115 - lives as long as the unit
        self._folder, self._here = folder, dict[int, int]()
        self._groups: set[int] = set()
        super().__init__(storage, identity, unit)
        write_at(self._file.fileno(), MAGIC, 0, folder)

    def sequence(self, i: int) -> StoredSequence:
        with self._lock:
            found = super().sequence(i)
            first, _ = self._reader.group_of(i)
            if first not in self._groups:
                self._groups.add(first)
                if len(self._groups) == self._reader.groups:
                    self._compare(hashlib.file_digest(self._file, "sha256").hexdigest())
            return found

    def _fetch(self, start: int, length: int) -> bytes:
        if self._here.get(start, -1) >= length:
            self._fetched.append(start)
            return os.pread(self._file.fileno(), length, start)
        data = super()._fetch(start, length)
        write_at(self._file.fileno(), data, start, self._folder)
        self._here[start] = len(data)
        return data

    def _forget(self, start: int) -> None:
        self._here.pop(start, None)


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
