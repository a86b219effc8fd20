"""Withdrawing a source: every stored row of its content, in every capture, and who was trained on it."""

from __future__ import annotations

import itertools
import os.path
import re
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from distill_ray import corpus, targets
from distill_ray.errors import IntegrityError, UserError
from distill_ray.forgotten import read_forgotten, record_forgotten
from distill_ray.gc.garbage import remove_lone_witnesses, remove_units
from distill_ray.gc.references import Run, read_runs
from distill_ray.registry import read_latest
from distill_ray.storage import NotFoundError, Storage, matching
from distill_ray.units import HASH, in_sorted

_READERS = 16
_BATCH = 1000
_CAPTURE = re.compile(r"targets/([0-9a-f]{32})/")


@dataclass(frozen=True)
class Trained:
    """A run that uses rows of the withdrawn content."""

    prefix: str
    """`runs/<name>/<version>`."""
    units: int
    """Of its manifest."""
    student: bool
    """Whether a student was trained on them."""
    model: str
    """Where that student is published; empty where it is not."""
    latest: bool
    """Whether `latest.json` names it."""

    def render(self) -> str:
        """One line."""
        what = "no student yet"
        if self.student:
            what = f"STUDENT TRAINED, published at {self.model}" if self.model else "STUDENT TRAINED, not published"
        return f"{self.prefix}: {self.units:,} unit(s), {what}" + (", which is the latest" if self.latest else "")


@dataclass(frozen=True)
class Found:
    """What withdrawing would remove, and whom it concerns."""

    contents: dict[str, tuple[str, ...]]
    """SHA-256 of each content that lies, or lay, at a named source → every URI it is known at."""
    named: tuple[str, ...]
    """The URIs that the pattern matches."""
    units: dict[str, np.ndarray]
    """Capture fingerprint → [n] ascending hashes of units of these contents."""
    unreadable: tuple[str, ...]
    """Keys of objects whose source this program cannot tell: damaged, or written by another version of it. They stay,
    since they may be somebody's; so their rows may, too."""
    runs: tuple[Trained, ...]

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """Other URIs with the same content."""
        return tuple(sorted({uri for uris in self.contents.values() for uri in uris} - set(self.named)))

    def render(self) -> str:
        """Lines for a terminal."""
        units = sum(map(len, self.units.values()))
        lines = [f"source    {uri}" for uri in self.named]
        lines += [
            f"ALSO AT   {uri}: the same content; its rows are the same ones, and go too" for uri in self.elsewhere
        ]
        lines += [
            f"rows of   {len(self.contents)} content(s): {units:,} target object(s) in {len(self.units)} capture(s)"
        ]
        if self.unreadable:
            lines.append(
                f"UNKNOWN   {len(self.unreadable):,} target object(s) do not tell their source (one: "
                f"{self.unreadable[0]}): damaged, or of another version of distill_ray; they STAY. Use that version, "
                "or delete them yourself"
            )
        return "\n".join([*lines, *(f"used by   {run.render()}" for run in self.runs)])


def find(storage: Storage, pattern: str, shown: Callable[[int], None] = lambda n: None) -> Found:
    """What is stored of a source; the footer of every target object is read, so it takes a request for each.

    Args:
        storage: the root.
        pattern: URI of the source, or a glob of the kind that `corpus.sources` takes; it need not exist any more.
        shown: told how many objects have just been looked at.

    Raises:
        UserError: nothing under the root was ever read from such a source.
        IntegrityError: a run's record, or the record of withdrawn sources, is damaged.
    """
    pattern = pattern if "://" in pattern else os.path.abspath(os.path.expanduser(pattern))
    runs = read_runs(storage)
    manifests = {run.prefix: manifest for run in runs if (manifest := _manifest(storage, run)) is not None}
    known = list(corpus.indexed_sources(storage))
    known += [(uri, content) for content, w in read_forgotten(storage).contents.items() for uri in w.uris]
    read = {uri for manifest in manifests.values() for uri in manifest.units.table["source"].unique().to_pylist()}
    named = matching(pattern, read | {uri for uri, _ in known})
    suspects: dict[str, set[str]] = {}
    for manifest in manifests.values():
        for unit in manifest.units:
            if unit.source in named:
                suspects.setdefault(unit.unit, set()).add(unit.source)
    wanted = {content for uri, content in known if uri in named}
    stored, unreadable = _stored(storage, shown)
    # A source that is not in the index any more: the units that a manifest has from it say what it held.
    for objects in stored.values():
        for unit, content in objects.items():
            if unit in suspects:
                wanted.add(content)
                known += [(uri, content) for uri in suspects[unit]]
    if not wanted:
        raise UserError(
            f"nothing under {storage.uri} was read from {pattern}: no run's manifest and no indexed source has it; "
            "give the URI as corpus.sources had it"
        )
    contents = {content: tuple(sorted({u for u, c in known if c == content})) for content in sorted(wanted)}
    units = {capture: _ascending(u for u, c in objects.items() if c in wanted) for capture, objects in stored.items()}
    units = {capture: hashes for capture, hashes in units.items() if len(hashes)}
    concerned = [
        _trained(storage, run, count)
        for run in runs
        if run.prefix in manifests and (count := _used(manifests[run.prefix], units, suspects))
    ]
    return Found(contents, tuple(sorted(named)), units, unreadable, tuple(concerned))


def forget(storage: Storage, found: Found, shown: Callable[[int], None] = lambda n: None) -> None:
    """Remove what `find` found. Killed at any moment, the same command finishes it.

    The contents are recorded first, so that no capture puts back what goes; then each capture's index, then objects.

    Raises:
        UserError: a driver is at work on a capture that has such rows.
    """
    record_forgotten(storage, found.contents, {run.prefix: run.units for run in found.runs})
    # Looked at after the record is written: whoever begins from now on meets it when planning.
    working = [run for run in read_runs(storage) if run.live and (run.capture is None or run.capture in found.units)]
    if working:
        raise UserError(
            f"{len(working)} run(s) are being worked on and may read or write these rows: "
            + "; ".join(f"{run.prefix} by {run.record.owner}" for run in working)
            + "; stop them, or wait for them, then run this again. Nothing was removed yet; from now on no run that "
            "begins captures them"
        )
    for capture, hashes in found.units.items():
        remove_units(storage, capture, hashes, shown)
    for capture in _captures(storage):
        remove_lone_witnesses(storage, capture)


def _manifest(storage: Storage, run: Run) -> targets.RunManifest | None:
    entry = run.record.published.get("targets")
    if entry is None:
        return None
    try:
        return targets.read_run_manifest(storage, entry)
    except IntegrityError as error:
        raise UserError(
            f"which sources {run.prefix} was trained on cannot be told: {error}. Bring its manifest back first"
        ) from error


def _stored(storage: Storage, shown: Callable[[int], None]) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Of every capture: unit → content of its source; and the keys of objects that do not say."""
    found: dict[str, dict[str, str]] = {}
    unreadable: list[str] = []
    for capture in _captures(storage):
        contents = found[capture] = dict[str, str]()
        names = (unit for unit, _ in targets.each_object(storage, capture))

        def one(unit: str, capture: str = capture) -> tuple[str, str | None]:
            try:
                content = targets.open_unit(storage, capture, unit).info.unit.source.content
                return unit, sys.intern(content)  # thousands of units have one source
            except IntegrityError:
                return unit, None
            except NotFoundError:
                return unit, ""

        with ThreadPoolExecutor(_READERS) as pool:
            while batch := list(itertools.islice(names, _BATCH)):
                for unit, content in pool.map(one, batch):
                    if content is None:
                        unreadable.append(targets.unit_key(capture, unit))
                    elif content:
                        contents[unit] = content
                shown(len(batch))
    return found, tuple(unreadable)


def _captures(storage: Storage) -> list[str]:
    return sorted({match[1] for info in storage.list("targets/") if (match := _CAPTURE.match(info.key))})


def _ascending(units: Iterable[str]) -> np.ndarray:
    return np.array(sorted(units), HASH)


def _used(manifest: targets.RunManifest, units: dict[str, np.ndarray], suspects: dict[str, set[str]]) -> int:
    """Units of a run that are of these contents, gone already or not."""
    hashes = manifest.units.hashes
    gone = in_sorted(units.get(manifest.fingerprint, _ascending(())), hashes)
    gone |= in_sorted(_ascending(suspects), hashes)
    return int(gone.sum())


def _trained(storage: Storage, run: Run, units: int) -> Trained:
    published, (_, name, version) = run.record.published, run.prefix.split("/")
    export = published.get("export")
    model = "" if export is None else f"{storage.uri}/{export['key'].rpartition('/')[0]}"
    try:
        latest = read_latest(storage, name)
    except IntegrityError:
        latest = None  # it names no model that anybody could load
    return Trained(run.prefix, units, "student" in published, model, latest is not None and latest.version == version)
