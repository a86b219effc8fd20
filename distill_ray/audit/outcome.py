"""What an audit compared and found, for people and as the document that a run publishes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from distill_ray.audit.tolerance import Tolerance
from distill_ray.audit.unit import SequenceFigures
from distill_ray.targets import RunManifest

SCHEMA_VERSION = 1
IN_CAPTURE = ", in the capture"
"""Ends the name of a path by which the teachers scored again that captured."""
_PATHS = {"vllm": "vLLM's public path", "transformers": "transformers, dense"}


def path_of(engine: str, *, loaded: bool) -> str:
    """The path by which an engine scores again; `loaded`: for the audit, and not by whoever captured."""
    return _PATHS[engine] + ("" if loaded else IN_CAPTURE)


@dataclass
class Outcome:
    """Sums over what was compared so far."""

    read: int = 0
    """Sequences compared with the corpus."""
    sequences: int = 0
    """Sequences scored again."""
    rows: int = 0
    worst: float = 0.0
    worst_at: tuple[str, int, int] | None = None
    """Unit, sequence, row of the largest difference."""
    moved_mass: float = 0.0
    failure: str | None = None
    sampled: dict[str, list[int]] = field(default_factory=dict)
    """Unit → places of its sequences that were scored again."""

    def add(self, unit: str, sequences: tuple[int, ...], found: SequenceFigures) -> None:
        self.sampled.setdefault(unit, []).extend(sequences)
        self.sequences += len(sequences)
        self.rows += found.rows
        self.moved_mass += found.moved_mass
        if found.worst > self.worst or self.worst_at is None:
            self.worst, self.worst_at = found.worst, (unit, *found.worst_at)

    @property
    def mean_moved_mass(self) -> float:
        return self.moved_mass / max(1, self.rows)


def _not_compared(manifest: RunManifest, engine: str) -> list[str]:
    """Columns that the engine cannot give."""
    if engine == "transformers":
        return []
    return ["entropy", *(f"tail at T = {t:g}" for t in manifest.identity.extra_temperatures)]


def limits(manifest: RunManifest, engine: str, tolerance: Tolerance, *, loaded: bool) -> Iterator[str]:
    """What this audit cannot see, one sentence each; `loaded`: it loads the teacher itself."""
    if not loaded:
        yield (
            "scored again by the processes that captured: what they loaded wrongly does not show; "
            "`distill-ray audit --engine` loads the teacher anew"
        )
    if missing := _not_compared(manifest, engine):
        yield f"not compared, {_PATHS[engine]} does not give it: {', '.join(missing)}"
    if manifest.identity.draws:
        fell = "" if manifest.identity.draws_from == "tail" else " and, over a whole unit, to how many fell in the tail"
        yield f"drawn tokens are held to their log-probabilities{fell}; which of several alike were drawn does not show"
    if not tolerance.judges_every_number:
        yield (
            f"the teacher computes in {manifest.identity.teacher['dtype']}: log-probabilities are held to "
            f"{tolerance.logprob:g} nats each, rows to {tolerance.row_mass:g} of moved mass and their mean to "
            f"{tolerance.mean_mass:g}; a smaller error in a single row does not show"
        )


def sentence(outcome: Outcome) -> str:
    """The outcome in one line."""
    verdict = "sound" if outcome.failure is None else "NOT sound"
    return (
        f"{verdict}: {outcome.read} sequences read, {outcome.sequences} scored again ({outcome.rows:,} rows), largest "
        f"|Δ log p| beyond the codec's rounding {outcome.worst:.1e} nats, mean moved mass {outcome.mean_moved_mass:.1e}"
    )


def document_of(
    manifest: RunManifest, outcome: Outcome, engine: str, tolerance: Tolerance, *, loaded: bool
) -> dict[str, Any]:
    """Plain JSON values: what was compared, by what, how exactly, and the first difference if there is one."""
    unit, sequence, position = outcome.worst_at or (None, None, None)
    return {
        "schema_version": SCHEMA_VERSION,
        "passed": outcome.failure is None,
        "failure": outcome.failure,
        "capture": manifest.fingerprint,
        "engine": engine,
        "path": path_of(engine, loaded=loaded),
        "dtype": manifest.identity.teacher["dtype"],
        "tolerance": asdict(tolerance),
        "not_compared": _not_compared(manifest, engine),
        "units": len(outcome.sampled),
        "sequences_read": outcome.read,
        "sequences": outcome.sequences,
        "rows": outcome.rows,
        "worst_nats": outcome.worst,
        "worst_at": {"unit": unit, "sequence": sequence, "position": position},
        "mean_moved_mass": outcome.mean_moved_mass,
        "sampled": outcome.sampled,
    }
