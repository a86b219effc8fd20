"""How far this corpus is from the last one: a sketch of the held-out sequences, kept beside every report.

The held-out documents are chosen by their hash, so they are a sample of the corpus that does not depend on its order
or place; they are read for evaluation anyway. The names say that nothing else was looked at.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_ray.errors import IntegrityError
from distill_ray.storage.parquet import read_table

DEFINITIONS = {
    "held_out_token_js": "Jensen–Shannon divergence in nats (0 … ln 2) between the token frequencies of the held-out "
    "sequences of this run and of the run it is compared with",
    "held_out_token_js_by_chance": "the same between two samples of these sizes drawn token by token from both "
    "together: what no drift at all would give; documents repeat their own words, so somewhat more is no drift either",
    "held_out_entropy_delta": "mean entropy in nats of the teacher's kept tokens plus one bucket for the tail, over "
    "supervised held-out rows, less that of the run it is compared with",
}
_META = b"distill_ray_held_out"
_DRAWS = 4


@dataclass
class HeldOutSketch:
    """Token counts of the held-out sequences, and the teacher's entropy over their supervised rows."""

    tokenizer: str
    capture: str
    """Fingerprint: entropies of two teachers, or at two k, are not compared."""
    counts: np.ndarray
    """[V] int64."""
    rows: int = 0
    entropy: float = 0.0
    """Sum over rows, nats."""

    def add(self, tokens: np.ndarray, logprobs_NK: np.ndarray, log_tail_N: np.ndarray) -> None:
        """Count the tokens of some sequences and the teacher's rows of them (temperature 1)."""
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        log_NB = np.concatenate([logprobs_NK, log_tail_N[:, None]], axis=1).astype(np.float64)
        # p log p → 0 as p → 0; a kept mass of 1 has a log tail of −inf.
        self.entropy -= float((np.exp(log_NB) * np.where(np.isfinite(log_NB), log_NB, 0.0)).sum())
        self.rows += len(log_tail_N)

    def to_bytes(self) -> bytes:
        """Parquet: the tokens that occur, with their counts; a few bytes each."""
        ids = np.flatnonzero(self.counts)
        about = f"{self.tokenizer} {self.capture} {len(self.counts)} {self.rows} {self.entropy!r}"
        table = pa.table({"token": ids.astype(np.int32), "count": self.counts[ids]})
        sink = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({_META: about}), sink, compression="zstd")
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> HeldOutSketch:
        """The inverse. Raises IntegrityError, naming `where`."""
        try:
            table = read_table(data)
            tokenizer, capture, size, rows, entropy = (table.schema.metadata or {})[_META].decode().split(" ")
            counts = np.zeros(int(size), np.int64)
            counts[table["token"].to_numpy()] = table["count"].to_numpy()
            return cls(tokenizer, capture, counts, int(rows), float(entropy))
        except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
            raise IntegrityError(
                f"{where} is no sketch of held-out tokens ({type(error).__name__}: {error})"
            ) from error


def corpus_drift(now: HeldOutSketch, then: HeldOutSketch, against: str) -> dict[str, Any]:
    """The report's `drift`; a figure that cannot be compared is None, and `note` says why.

    Args:
        now: of this run.
        then: of the run it is compared with.
        against: that run's version.
    """
    notes = []
    js = chance = delta = None
    if now.tokenizer != then.tokenizer or len(now.counts) != len(then.counts):
        notes.append(f"{against} has another tokenizer, so its tokens are not these")
    elif not (now.counts.any() and then.counts.any()):
        notes.append("one of the two has no held-out token")
    else:
        js, chance = jensen_shannon(now.counts, then.counts), _by_chance(now.counts, then.counts)
    if now.capture != then.capture:
        notes.append(f"{against} has another capture, so its teacher's entropies are not compared with these")
    elif now.rows and then.rows:
        delta = now.entropy / now.rows - then.entropy / then.rows
    return {
        "against": against,
        "held_out_token_js": js,
        "held_out_token_js_by_chance": chance,
        "held_out_entropy_delta": delta,
        "note": "; ".join(notes),
    }


def unknown_drift(against: str, problem: str) -> dict[str, Any]:
    """The report's `drift` where there is an earlier run whose sketch cannot be read."""
    figures = dict.fromkeys(DEFINITIONS)
    return {"against": against, **figures, "note": f"the held-out tokens of {against} cannot be read: {problem}"}


def jensen_shannon(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors of counts, in nats."""
    p, q = a / a.sum(), b / b.sum()
    middle = (p + q) / 2

    def divergence(x: np.ndarray) -> float:
        there = x > 0
        return float((x[there] * np.log(x[there] / middle[there])).sum())

    return max(0.0, (divergence(p) + divergence(q)) / 2)


def _by_chance(a: np.ndarray, b: np.ndarray) -> float:
    together = (a / a.sum() + b / b.sum()) / 2
    rng = np.random.Generator(np.random.PCG64(0))
    sizes = int(a.sum()), int(b.sum())
    drawn = ([rng.multinomial(size, together) for size in sizes] for _ in range(_DRAWS))
    return float(np.mean([jensen_shannon(x, y) for x, y in drawn]))


def drift_warning(report: Mapping[str, Any], bound: float | None) -> str:
    """A sentence where the tokens drifted past `evaluate.drift_warn`, or it cannot be told; empty otherwise."""
    found = report.get("drift")
    if bound is None or found is None:
        return ""
    js = found["held_out_token_js"]
    if js is None:
        return f"whether the corpus drifted past evaluate.drift_warn = {bound:g} is not known: {found['note']}"
    if js <= bound:
        return ""
    return (
        f"the corpus drifted: held_out_token_js = {js:.3g} nats against {found['against']}, evaluate.drift_warn = "
        f"{bound:g} ({found['held_out_token_js_by_chance']:.3g} would be chance)"
    )
