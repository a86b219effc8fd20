"""What lies under a targets URI, and whether it is sound."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from distill_ray.codec import row_bytes
from distill_ray.errors import IntegrityError, UserError
from distill_ray.lease import read_published
from distill_ray.schema import DRAW_BYTES, ROW_DRAW_BYTES, UnitSummary
from distill_ray.storage import NotFoundError, Storage, open_storage
from distill_ray.targets.identity import CaptureIdentity, capture_prefix, unit_key
from distill_ray.targets.index import load_index, target_objects
from distill_ray.targets.manifest import read_run_manifest
from distill_ray.targets.reader import UnitReader, UnitTargets, open_unit, read_unit

_URI = re.compile(
    r"(?:(?P<root>.*?)/)?"
    r"(?:targets/(?P<fp>[0-9a-f]{32})(?:/(?P<unit>[0-9a-f]{32})\.parquet)?"
    r"|(?P<run>runs/[^/]+/[^/]+)(?:/targets\.parquet)?)/?"
)


@dataclass(frozen=True)
class InspectReport:
    """Counts are of distinct units; `verified` says whether every byte was read."""

    uri: str
    kind: str
    """"capture", "unit" or "run"."""
    fingerprint: str | None
    identity: CaptureIdentity | None
    units: int
    sequences: int
    rows: int
    supervised: int
    bytes: int
    """Bytes of all target objects."""
    mean_kept_mass: float | None
    distinct_draws: int
    """Sum over rows of the distinct tokens drawn."""
    unfinished: int
    """Completions that ended because they were as long as allowed."""
    dead: int
    teacher_seconds: float
    untimed_units: int
    """Units with rows whose capture's seconds are not known."""
    filled_units: int
    """Units with rows; the others hold dead letters alone."""
    entropy_units: int
    """Of these, units whose rows hold the teacher's entropy: an engine gives it or does not, under one fingerprint.
    Tail masses cannot differ so: their temperatures are in the fingerprint."""
    entropy_rows: int
    entropy_unknown: int
    """Units with rows of which the index does not say; `verify` reads it from the objects."""
    verified: bool
    problems: tuple[str, ...]
    engines: Mapping[str, int]
    """What computed the rows, and of how many objects it was read: of one, or with `verify` of all."""

    @property
    def bytes_per_row(self) -> float | None:
        """Object bytes a row, tokens, masks and side columns included."""
        return self.bytes / self.rows if self.rows else None

    def render(self) -> str:
        """For a terminal: one fact a line, problems last."""
        facts: dict[str, object] = {self.kind: self.uri, "fingerprint": self.fingerprint or "unknown"}
        i = self.identity
        if i is not None:
            facts["teacher"] = json.dumps(dict(i.teacher), sort_keys=True)
            facts["tokenizer"] = f"{i.tokenizer}, vocabulary {i.vocab_size:,}"
            facts["kept"] = f"top {i.top_k}, temperatures {', '.join(map(str, i.temperatures))}, codec {i.codec}"
        if self.engines:
            facts["computed by"] = "; ".join(f"{e or 'not recorded'} ({n:,} read)" for e, n in self.engines.items())
        facts["units"] = f"{self.units:,}"
        facts["sequences"] = f"{self.sequences:,}"
        facts["rows"] = f"{self.rows:,}, {self.supervised:,} supervised"
        facts["bytes"] = f"{self.bytes:,}"
        if self.bytes_per_row is not None:
            packed = f", packed {row_bytes(i.top_k, i.vocab_size)}" if i else ""
            facts["bytes per row"] = f"{self.bytes_per_row:.1f}{packed}"
        if i is not None and i.draws:
            facts["draws"] = self._drawn(i)
        if i is not None and i.generate is not None:
            finished = self.sequences - self.unfinished
            facts["completions"] = f"{finished:,} came to an end, {self.unfinished:,} were cut by max_tokens"
            facts["generated"] = json.dumps(dict(i.generate), sort_keys=True)
        if self.mean_kept_mass is not None:
            facts["mean kept mass"] = f"{self.mean_kept_mass:.6f}"
        facts["entropy"] = self._entropy()
        facts["dead letters"] = f"{self.dead:,}"
        if self.teacher_seconds:
            untimed = f", of {self.untimed_units:,} units not known" if self.untimed_units else ""
            facts["teacher time"] = f"{self.teacher_seconds:,.1f} s{untimed}"
        lines = [f"{name:<15} {value}" for name, value in facts.items()]
        how = "every byte read and verified" if self.verified else "not verified (--verify reads everything)"
        lines.append(f"{'problems':<15} {len(self.problems) or 'none'}; {how}")
        return "\n".join(lines + [f"  {p}" for p in self.problems])

    def _entropy(self) -> str:
        unknown = f", {self.entropy_unknown:,} not known (--verify reads them)" if self.entropy_unknown else ""
        return (
            f"in {self.entropy_units:,} of {self.filled_units:,} units ({self.entropy_rows:,} of {self.rows:,} rows)"
            f"{unknown}"
        )

    def _drawn(self, of: CaptureIdentity) -> str:
        whole = {"all": "the whole distribution", "tail": "outside the kept tokens"}[of.draws_from]
        text = f"{of.draws} a row from {whole} at T = {of.draws_temperature:g}"
        if not self.rows:
            return text
        size = (DRAW_BYTES * self.distinct_draws + ROW_DRAW_BYTES * self.rows) / self.rows
        return f"{text}; mean {self.distinct_draws / self.rows:.1f} distinct, {size:.1f} bytes a row"


def inspect(uri: str, verify: bool = False) -> InspectReport:
    """Describe a capture's folder, one target object, or a run.

    Args:
        uri: `<root>/targets/<fingerprint>`, `…/<unit>.parquet`, or `<root>/runs/<name>/<version>`.
        verify: read and check every object; list every problem instead of stopping at the first.

    Raises:
        UserError: the URI is none of these, or nothing is there.
    """
    match = _URI.fullmatch(uri)
    if not match:
        raise UserError(
            f"{uri} is neither <root>/targets/<fingerprint>, <root>/targets/<fingerprint>/<unit>.parquet nor "
            "<root>/runs/<name>/<version>; give one of these"
        )
    storage = open_storage("." if match["root"] is None else match["root"] or "/")
    look = _Look(storage, match["fp"], verify)
    if match["run"]:
        kind = "run"
        look.run(match["run"])
    elif match["unit"]:
        kind = "unit"
        look.unit(match["unit"])
    else:
        kind = "capture"
        look.capture()
    return look.report(uri, kind)


class _Look:
    """Gathers summaries and problems; a problem never ends the look."""

    def __init__(self, storage: Storage, fingerprint: str | None, verify: bool) -> None:
        self._storage, self._verify = storage, verify
        self._fingerprint = fingerprint
        self._identity: CaptureIdentity | None = None
        self._summaries: list[UnitSummary] = []
        self._problems: list[str] = []
        self._engines: Counter[str] = Counter()

    def run(self, prefix: str) -> None:
        """The units that a run's published manifest names."""
        entry = read_published(self._storage, prefix).get("targets")
        if entry is None:
            raise UserError(
                f"{self._storage.uri}/{prefix} has published no targets; run capture, or give the capture's own folder"
            )
        try:
            manifest = read_run_manifest(self._storage, entry)
        except IntegrityError as error:
            self._problems.append(str(error))
            return
        self._identity, self._fingerprint = manifest.identity, manifest.fingerprint
        sizes = {unit: info.size for unit, info in target_objects(self._storage, manifest.fingerprint).items()}
        for unit in manifest.units:
            self._known(unit.summary, sizes.get(unit.unit))

    def capture(self) -> None:
        """Every object of a capture, named by its index or not."""
        fingerprint = str(self._fingerprint)
        known = load_index(self._storage, fingerprint, report=self._problems.append)
        objects = target_objects(self._storage, fingerprint)
        if not known and not objects:
            raise UserError(f"{self._storage.uri}/{capture_prefix(fingerprint)} holds nothing; check the URI")
        for unit, summary in known.items():
            self._known(summary, objects[unit].size if unit in objects else None)
        unnamed = sorted(objects.keys() - known.keys())
        for unit in unnamed:
            self.unit(unit)
        if unnamed:
            self._problems.append(
                f"{len(unnamed)} objects are not in the index; the next capture verifies and adds them"
            )

    def unit(self, unit: str) -> None:
        """One object that nothing is known of: read whole."""
        try:
            read = read_unit(self._storage, str(self._fingerprint), unit)
        except NotFoundError as error:
            raise UserError(f"{error}; check the URI") from None
        except IntegrityError as error:
            self._problems.append(str(error))
            return
        self._identity = self._identity or read.identity
        self._engines[read.info.engine] += 1
        self._summaries.append(read.summary())

    def _known(self, summary: UnitSummary, size: int | None) -> None:
        at = len(self._summaries)
        self._summaries.append(summary)
        where = f"{self._storage.uri}/{unit_key(str(self._fingerprint), summary.unit)}"
        if size is None:
            self._problems.append(f"{where} is gone; run capture again")
        elif size != summary.object_bytes and not self._verify:
            self._problems.append(f"{where} has {size} bytes, recorded {summary.object_bytes}; run capture again")
        elif self._verify or self._identity is None:
            opened = self._open(summary)
            if opened is not None:
                self._summaries[at] = replace(summary, entropy=opened.info.entropy)

    def _open(self, summary: UnitSummary) -> UnitTargets | UnitReader | None:
        fingerprint = str(self._fingerprint)
        try:
            if self._verify:
                opened = read_unit(self._storage, fingerprint, summary.unit, expect_sha256=summary.object_sha256)
            else:
                opened = open_unit(self._storage, fingerprint, summary.unit, object_bytes=summary.object_bytes)
        except (IntegrityError, NotFoundError) as error:
            self._problems.append(str(error))
            return None
        self._identity = self._identity or opened.identity
        self._engines[opened.info.engine] += 1
        return opened

    def report(self, uri: str, kind: str) -> InspectReport:
        """The sums."""
        found = self._summaries
        rows = sum(s.rows for s in found)
        filled = [s for s in found if s.rows]
        with_entropy = [s for s in filled if s.entropy]
        return InspectReport(
            uri=uri,
            kind=kind,
            fingerprint=self._fingerprint,
            identity=self._identity,
            units=len(found),
            sequences=sum(len(s.lengths) for s in found),
            rows=rows,
            supervised=sum(int(s.supervised.sum()) for s in found),
            bytes=sum(s.object_bytes for s in found),
            mean_kept_mass=sum(s.kept_mass_sum for s in found) / rows if rows else None,
            distinct_draws=sum(s.distinct_draws for s in found),
            unfinished=sum(s.unfinished for s in found),
            dead=sum(s.dead for s in found),
            teacher_seconds=sum(s.teacher_seconds for s in found),
            untimed_units=sum(s.teacher_seconds == 0 for s in filled),
            filled_units=len(filled),
            entropy_units=len(with_entropy),
            entropy_rows=sum(s.rows for s in with_entropy),
            entropy_unknown=sum(s.entropy is None for s in filled),
            verified=self._verify or kind == "unit",
            problems=tuple(self._problems),
            engines=dict(sorted(self._engines.items())),
        )
