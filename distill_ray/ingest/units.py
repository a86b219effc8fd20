"""One target object, its row groups fetched as they are asked for and verified; what was fetched may stay."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from distill_ray.errors import IntegrityError
from distill_ray.ingest.plan import PlanUnit
from distill_ray.storage import Storage, read_verified
from distill_ray.storage.atomic import write_at
from distill_ray.targets import CaptureIdentity, StoredSequence, UnitReader, unit_key
from distill_ray.targets.container import MAGIC

T = TypeVar("T")


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
