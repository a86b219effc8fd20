"""What no run refers to and is old, by kind, and its removal.

A unit leaves the index before its object goes. A kill in between leaves a sound object that the index does not name:
the next capture verifies and indexes it again, or the next gc removes it. The other order would leave the index naming
what is gone. A folder's manifest goes first, so that what a kill leaves of it is no whole folder to anybody.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from distill_ray import targets
from distill_ray.gc.references import References, read_runs
from distill_ray.storage import ObjectInfo, Storage
from distill_ray.units import HASH, in_sorted, texts

KINDS = ("target objects", "checkpoints", "students", "exports", "runs without a record", "half-written objects")
_UNIT = re.compile(r"targets/([0-9a-f]{32})/([0-9a-f]{32})\.parquet")
_FOLDERS = (
    ("checkpoints", re.compile(r"runs/[^/]+/[^/]+/checkpoints/[^/]+/e\d+")),
    ("students", re.compile(r"runs/[^/]+/[^/]+/student/e\d+")),
    ("exports", re.compile(r"models/[^/]+/[^/]+/[^/]+(?=/)")),
)
_RUN = re.compile(r"runs/[^/]+/[^/]+(?=/)")
_BATCH = 10_000
"""Units removed between two looks at who works."""
_AT_ONCE = 8
_LONGEST_WRITE_S = 86400.0
"""What is being written now is younger than this, whatever `--days` says."""


@dataclass
class Folder:
    """A folder that goes as one, or stays."""

    kind: str
    keys: list[str] = field(default_factory=list)
    bytes: int = 0
    newest: float = 0.0
    """Unix seconds of its youngest object."""

    def add(self, info: ObjectInfo) -> None:
        self.keys.append(info.key)
        self.bytes += info.size
        self.newest = max(self.newest, info.modified)


@dataclass(frozen=True)
class Garbage:
    """What would go."""

    units: dict[str, np.ndarray]
    """Capture fingerprint → [n] ascending unit hashes."""
    unit_bytes: int
    folders: dict[str, Folder]
    """Prefix → what lies there."""
    half_written: tuple[ObjectInfo, ...]
    notes: tuple[str, ...]
    """What stays although nobody may refer to it, and why."""

    def counts(self) -> dict[str, tuple[int, int]]:
        """Kind → how many, bytes."""
        found = {kind: [0, 0] for kind in KINDS}
        found["target objects"] = [sum(len(hashes) for hashes in self.units.values()), self.unit_bytes]
        for folder in self.folders.values():
            found[folder.kind][0] += 1
            found[folder.kind][1] += folder.bytes
        found["half-written objects"] = [len(self.half_written), sum(info.size for info in self.half_written)]
        return {kind: (n, size) for kind, (n, size) in found.items()}

    def render(self) -> str:
        """Lines for a terminal."""
        lines = [f"{kind:<22} {n:>9,} {size:>18,} bytes" for kind, (n, size) in self.counts().items()]
        return "\n".join([*lines, *(f"note    {note}" for note in self.notes)])


def collect(storage: Storage, *, older_than: float) -> Garbage:
    """Find what nobody refers to.

    Args:
        storage: the root.
        older_than: Unix seconds; what was written later stays, whoever wrote it.

    Raises:
        IntegrityError: a run's record is damaged, so that what it refers to is not known.
    """
    references = References(storage, read_runs(storage))
    units, unit_bytes = _units(storage, references, older_than)
    folders: dict[str, Folder] = {}
    for root in ("runs/", "models/"):
        for info in storage.list(root):
            _sort(info, references, folders)
    old = {prefix: each for prefix, each in folders.items() if each.newest < older_than}
    before = min(older_than, time.time() - _LONGEST_WRITE_S)
    half_written = tuple(info for info in storage.half_written() if info.modified < before)
    return Garbage(units, unit_bytes, old, half_written, tuple(references.notes))


def _units(storage: Storage, references: References, older_than: float) -> tuple[dict[str, np.ndarray], int]:
    if references.all_captures:
        references.notes.append("all target objects stay: a driver has just begun and has not said what it uses")
        return {}, 0
    found: dict[str, list[tuple[bytes, int]]] = {}
    size = 0
    for info in storage.list("targets/"):
        match = _UNIT.fullmatch(info.key)
        if match and info.modified < older_than and match[1] not in references.whole_captures:
            found.setdefault(match[1], []).append((match[2].encode(), info.size))
    units: dict[str, np.ndarray] = {}
    for capture, each in found.items():
        objects = np.sort(np.array(each, [("hash", HASH), ("size", np.int64)]), order="hash")
        loose = objects[~in_sorted(references.units(capture), objects["hash"])]
        if len(loose):
            units[capture] = loose["hash"]
            size += int(loose["size"].sum())
    return units, size


def _sort(info: ObjectInfo, references: References, folders: dict[str, Folder]) -> None:
    """Put an object under the folder that it would go with; nothing where it stays."""
    if references.is_held(info.key):
        return
    run = _RUN.match(info.key)
    if run and run[0] not in references.records:
        folders.setdefault(run[0], Folder("runs without a record")).add(info)
        return
    for kind, pattern in _FOLDERS:
        # A name that only begins like a folder's, and documents of the run itself, match nothing.
        match = pattern.match(info.key)
        if match and info.key.startswith(f"{match[0]}/") and match[0] not in references.folders:
            folders.setdefault(match[0], Folder(kind)).add(info)


def remove(storage: Storage, garbage: Garbage, shown: Callable[[int], None] = lambda n: None) -> None:
    """Remove what `collect` found, but for what a driver that began since may use.

    Args:
        storage: the root.
        garbage: found a moment ago.
        shown: told how many objects have just gone.
    """
    now = References(storage, read_runs(storage))
    for capture, hashes in garbage.units.items():
        for start in range(0, len(hashes), _BATCH):
            now = now.refreshed()
            if now.all_captures or capture in now.whole_captures:
                break
            batch = hashes[start : start + _BATCH]
            remove_units(storage, capture, batch[~in_sorted(now.units(capture), batch)], shown)
    now = now.refreshed()
    for prefix, folder in garbage.folders.items():
        if prefix in now.folders or prefix in now.records or now.is_held(f"{prefix}/"):
            continue
        manifests_first = sorted(folder.keys, key=lambda key: not key.endswith("/manifest.json"))
        for key in manifests_first:
            storage.delete(key)
        shown(len(folder.keys))
    for info in garbage.half_written:
        storage.discard(info)
        shown(1)


def remove_units(
    storage: Storage, capture: str, hashes: np.ndarray, shown: Callable[[int], None] = lambda n: None
) -> None:
    """Take units out of the index, then remove their objects. `hashes` ascend."""
    targets.drop_units(storage, capture, hashes)
    going = texts(hashes)
    # Before the objects: nobody could tell any more what a witness by itself was made from.
    witnessed = set(targets.witnessed(storage, capture)).intersection(going)
    _delete(storage, (targets.witness_key(capture, unit) for unit in witnessed))
    _delete(storage, (targets.unit_key(capture, unit) for unit in going))
    shown(len(hashes))


def remove_lone_witnesses(storage: Storage, capture: str) -> None:
    """Of units whose object is gone by other hands."""

    def look(unit: str) -> None:
        if storage.head(targets.unit_key(capture, unit)) is None:
            storage.delete(targets.witness_key(capture, unit))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(look, targets.witnessed(storage, capture)):
            pass


def _delete(storage: Storage, keys: Iterable[str]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(storage.delete, keys):
            pass
