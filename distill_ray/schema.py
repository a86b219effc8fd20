"""What crosses stage boundaries: units, sequences, target rows, summaries. Plain dataclasses over numpy.

Legend of shapes: N target rows (positions), K kept tokens, V real vocabulary, n tokens of one sequence (N = n − 1),
M drawn ids of all rows together.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np

ARTEFACT_OF = {"capture": "targets", "audit": "audit", "train": "student", "evaluate": "report", "export": "export"}
"""Stages in order → the name under which a run's record publishes what they made."""


@dataclass(frozen=True)
class SourceSlice:
    """A stable part of one source object.

    `kind` "lines": the records whose first byte lies in [start, stop) of the uncompressed bytes; "row_groups": Parquet
    row groups start … stop − 1; "rows": rows start … stop − 1 of the whole file, all in one row group that is too large
    for one unit; "file": the whole object as one document.
    """

    uri: str
    content: str
    """SHA-256 of the whole source object, hex."""
    kind: str
    start: int
    stop: int
    version: str = ""
    """Version of the object when it was planned; a reader that meets another one refuses. Empty: not checked."""


@dataclass(frozen=True)
class Unit:
    """The smallest piece of work: one source slice, one target object."""

    hash: str
    """32 hex digits over content, slice, tokenizer, template, format and chunking; not the path."""
    source: SourceSlice
    bytes: int
    """Source bytes of the slice, for progress and ETA."""
    multiplicity: int = 1
    """How many times this very content occurs among the sources."""


@dataclass(frozen=True)
class Sequence:
    """Token ids that the teacher scores and the student trains on, never tokenised again."""

    tokens: np.ndarray
    """[n] int32."""
    loss_mask: np.ndarray
    """[n] bool; True where the token is supervised. Entry 0 is always False: nothing predicts token 0."""
    doc_key: int
    """64-bit hash of the source document's content; decides the held-out split."""
    finish: str | None = None
    """Why a completion that the teacher wrote ended, one of `FINISHES`; None where the corpus gave the tokens."""


FINISHES = ("stop", "length")
"""A completion ends by an end token or a stop text, or because it is as long as allowed."""


UNKNOWN_RECORD = -1
"""`DeadLetter.record` of a sequence that the teacher refused: windows no longer know their record."""


@dataclass(frozen=True)
class Amounts:
    """Text as the pipeline counts it; no whole numbers where they are reckoned from a sample."""

    tokens: float = 0.0
    sequences: float = 0.0
    supervised: float = 0.0
    """Of the tokens."""
    train_tokens: float = 0.0
    """Tokens of the sequences that are not held out."""
    train_supervised: float = 0.0
    """Supervised ones of these."""

    @property
    def rows(self) -> float:
        """Target rows: one less than its tokens for each sequence."""
        return self.tokens - self.sequences

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, factor: float) -> Amounts:
        """So many times as much."""
        return Amounts(*(getattr(self, f.name) * factor for f in fields(self)))


@dataclass(frozen=True)
class DeadLetter:
    """A document or sequence that failed for its own reasons."""

    unit: str
    source: str
    record: int
    """0-based record number in the slice; `UNKNOWN_RECORD` for a sequence that the teacher refused."""
    reason: str


COUNT_SHIFT = 20
"""A drawn id and its count as one 32-bit word: id | count << 20, so V ≤ 2^20 and a row has at most 4,095 draws."""
DRAW_BYTES, ROW_DRAW_BYTES = 6, 4
"""Stored bytes of each distinct token drawn at a row, and of each row: Parquet has no integers below 4 bytes."""


@dataclass(frozen=True)
class Draws:
    """Tokens drawn from the teacher at every row, with replacement: row after row, each row's distinct ids ascending.

    A row's counts sum to the capture's number of draws; only a row with nothing to draw from has none.
    """

    ids_M: np.ndarray
    """int32."""
    counts_M: np.ndarray
    """int32 how often each was drawn, ≥ 1."""
    logprobs_M: np.ndarray
    """float32 log-probability, temperature 1 whatever they were drawn at."""
    distinct_N: np.ndarray
    """uint16 ids of each row, which sum to M."""

    @classmethod
    def of_words(cls, words_M: np.ndarray, logprobs_M: np.ndarray, distinct_N: np.ndarray) -> Draws:
        """From uint32 id | count << 20."""
        ids_M = (words_M & np.uint32((1 << COUNT_SHIFT) - 1)).astype(np.int32)
        return cls(ids_M, (words_M >> np.uint32(COUNT_SHIFT)).astype(np.int32), logprobs_M, distinct_N)

    @classmethod
    def joined(cls, parts: list[Draws]) -> Draws:
        """Those of consecutive rows."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def words(self) -> np.ndarray:
        """[M] uint32 id | count << 20."""
        return self.ids_M.astype("<u4") | self.counts_M.astype("<u4") << np.uint32(COUNT_SHIFT)


@dataclass(frozen=True)
class TargetRows:
    """The teacher's distribution over token t+1 given tokens ≤ t, for t = 0 … N − 1, before the codec."""

    ids_NK: np.ndarray
    """int32, in rank order (most likely first)."""
    logprobs_NK: np.ndarray
    """float32, natural logarithm, temperature 1, descending."""
    log_tail_N: np.ndarray
    """float32 log(1 − P), P the kept mass."""
    actual_logprob_N: np.ndarray
    """float32 log-probability of token t+1."""
    actual_rank_N: np.ndarray
    """int32 rank of token t+1 among the ids that may be kept, 1 the most likely."""
    entropy_N: np.ndarray | None = None
    """float32 entropy in nats; None where the engine cannot give it."""
    log_tail_at: dict[float, np.ndarray] = field(default_factory=dict)
    """Temperature T ≠ 1 → float32 [N] log tail mass of softmax(z / T) outside the same K ids."""
    draws: Draws | None = None
    """None where the capture keeps none."""

    @classmethod
    def joined(cls, parts: list[TargetRows]) -> TargetRows:
        """Those of consecutive rows; all parts hold the same columns, and there is one at least."""
        first, entropies = parts[0], [p.entropy_N for p in parts if p.entropy_N is not None]
        return cls(
            ids_NK=np.concatenate([p.ids_NK for p in parts]),
            logprobs_NK=np.concatenate([p.logprobs_NK for p in parts]),
            log_tail_N=np.concatenate([p.log_tail_N for p in parts]),
            actual_logprob_N=np.concatenate([p.actual_logprob_N for p in parts]),
            actual_rank_N=np.concatenate([p.actual_rank_N for p in parts]),
            entropy_N=np.concatenate(entropies) if entropies else None,
            log_tail_at={t: np.concatenate([p.log_tail_at[t] for p in parts]) for t in first.log_tail_at},
            draws=None if first.draws is None else Draws.joined([p.draws for p in parts if p.draws is not None]),
        )


@dataclass(frozen=True)
class UnitSummary:
    """What planning, resume and batch order need of one captured unit, without opening its object."""

    unit: str
    lengths: np.ndarray
    """[S] int32 tokens of each sequence, in stored order."""
    supervised: np.ndarray
    """[S] int32 supervised tokens of each sequence."""
    doc_keys: np.ndarray
    """[S] uint64."""
    object_bytes: int
    object_sha256: str
    kept_mass_sum: float
    """Sum over rows of the kept mass."""
    dead: int
    """Dead letters of the unit."""
    teacher_seconds: float
    """Seconds the teacher spent on the unit; 0 where they are not known."""
    entropy: bool | None = None
    """Whether its rows hold the teacher's entropy; None where the index does not say."""
    distinct_draws: int = 0
    """Sum over rows of the distinct tokens drawn; 0 where the capture keeps none."""
    unfinished: int = 0
    """Completions that ended because they were as long as allowed; 0 where the teacher wrote none."""

    @property
    def rows(self) -> int:
        """Target rows of the unit: one less than its tokens for each sequence."""
        return int(np.sum(self.lengths)) - len(self.lengths)
