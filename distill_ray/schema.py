"""What crosses stage boundaries: units, sequences, target rows, summaries. Plain dataclasses over numpy.

Legend of shapes: N target rows (positions), K kept tokens, V real vocabulary, n tokens of one sequence (N = n − 1).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

ARTEFACT_OF = {"capture": "targets", "train": "student", "evaluate": "report", "export": "export"}
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


@dataclass(frozen=True)
class DeadLetter:
    """A document or sequence that failed for its own reasons."""

    unit: str
    source: str
    record: int
    """0-based record number in the slice."""
    reason: str


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
    """int32 rank of token t+1, 1 the most likely."""
    entropy_N: np.ndarray | None = None
    """float32 entropy in nats; None where the engine cannot give it."""
    log_tail_at: dict[float, np.ndarray] = field(default_factory=dict)
    """Temperature T ≠ 1 → float32 [N] log tail mass of softmax(z / T) outside the same K ids."""


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

    @property
    def rows(self) -> int:
        """Target rows of the unit: one less than its tokens for each sequence."""
        return int(np.sum(self.lengths)) - len(self.lengths)
