"""Which sequences make up which batch: a pure function of the run manifest and the recipe's identity.

World size, workers, caches and listing order have no part in it, so a resume on other hardware goes on with the very
next batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from distill_ray.corpus import held_out
from distill_ray.errors import UserError
from distill_ray.ingest.mixing import epoch_counts, times_of
from distill_ray.ingest.packing import pack_lengths
from distill_ray.targets import ManifestUnit, RunManifest


@dataclass(frozen=True)
class SeqRef:
    """One sequence of one unit."""

    unit: str
    index: int
    """0-based, in stored order."""
    length: int
    """Tokens."""
    supervised: int
    """Supervised tokens; each is one target row."""


def batch_id(refs: Iterable[SeqRef]) -> int:
    """Tells sets of sequences apart: the sum of a 32-bit hash of each, so that parts of a batch add up to its own.

    Exact as a float64 up to 2 million sequences.
    """
    return sum(
        int.from_bytes(hashlib.blake2b(f"{ref.unit} {ref.index}".encode(), digest_size=4).digest(), "big")
        for ref in refs
    )


Pack = tuple[SeqRef, ...]
"""Sequences that share one row of pack_tokens tokens; empty where a rank has nothing to do."""


@dataclass(frozen=True)
class PlanUnit:
    """A target object the plan draws from."""

    hash: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class _Sequences:
    """S candidate sequences as columns, in the order of (unit hash, index)."""

    unit_S: np.ndarray
    index_S: np.ndarray
    length_S: np.ndarray
    supervised_S: np.ndarray
    doc_key_S: np.ndarray

    def where(self, rows: np.ndarray) -> _Sequences:
        columns = (self.unit_S, self.index_S, self.length_S, self.supervised_S, self.doc_key_S)
        return _Sequences(*(c[rows] for c in columns))


@dataclass(frozen=True)
class BatchPlan:
    """The packs of a whole run, all epochs, in order; batch `step` is packs step·B … step·B + B − 1.

    An epoch need not end on a batch boundary; only the very last batch may be short.
    """

    capture: str
    """Capture fingerprint: the teacher's numbers, by identity."""
    units: tuple[PlanUnit, ...]
    pack_tokens: int
    packs_per_batch: int
    sequences: _Sequences
    order_E: np.ndarray
    """[E] int64 row of `sequences` of each entry, pack after pack."""
    offsets: np.ndarray
    """[packs + 1] int64 into `order_E`."""

    @property
    def packs(self) -> int:
        return len(self.offsets) - 1

    @property
    def steps(self) -> int:
        """Batches of the whole run, the short last one included."""
        return -(-self.packs // self.packs_per_batch)

    @property
    def tokens(self) -> int:
        """Tokens of all entries, every epoch counted."""
        return int(self.sequences.length_S[self.order_E].sum())

    @property
    def fill(self) -> float:
        """Share of the packs' tokens that hold data."""
        return self.tokens / (self.packs * self.pack_tokens)

    @property
    def digest(self) -> str:
        """SHA-256 of what the batches hold, by identity, and of their order, hex; equal plans give equal batches.

        Capture and unit hashes say what an object holds. Its checksum has no part: a damaged object that was captured
        again holds the same rows in other bytes, and a run must go on over it. Nor have units without a sequence of
        this split.
        """
        s = self.sequences
        used, place_S = np.unique(s.unit_S, return_inverse=True)
        found = hashlib.sha256(f"{self.capture} {self.pack_tokens} {self.packs_per_batch} ".encode())
        found.update(" ".join(self.units[u].hash for u in used).encode())
        for column in (place_S, s.index_S, s.length_S, s.supervised_S, self.order_E, self.offsets):
            found.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
        return found.hexdigest()

    def _entries(self, step: int) -> tuple[int, int]:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside the plan's 0 … {self.steps - 1}")
        first = step * self.packs_per_batch
        return first, min(first + self.packs_per_batch, self.packs)

    def batch(self, step: int) -> list[Pack]:
        """The packs of global batch `step`, the same whatever the number of workers.

        Raises:
            IndexError: no such step.
        """
        first, last = self._entries(step)
        return [self._pack(p) for p in range(first, last)]

    def _pack(self, pack: int) -> Pack:
        s, rows = self.sequences, self.order_E[self.offsets[pack] : self.offsets[pack + 1]]
        return tuple(
            SeqRef(self.units[s.unit_S[r]].hash, int(s.index_S[r]), int(s.length_S[r]), int(s.supervised_S[r]))
            for r in rows
        )

    def supervised(self, step: int) -> int:
        """Supervised tokens of global batch `step` over all ranks: the loss's normaliser."""
        return int(self.sequences.supervised_S[self._rows(step)].sum())

    def lengths(self, step: int) -> np.ndarray:
        """int64 [documents] tokens of each sequence of global batch `step`."""
        return self.sequences.length_S[self._rows(step)]

    def _rows(self, step: int) -> np.ndarray:
        first, last = self._entries(step)
        return self.order_E[self.offsets[first] : self.offsets[last]]


def _columns(units: list[ManifestUnit]) -> _Sequences:
    counts = [len(u.lengths) for u in units]

    def joined(parts: list[np.ndarray], kind: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype=kind), *(np.asarray(p, dtype=kind) for p in parts)])

    return _Sequences(
        np.repeat(np.arange(len(units)), counts),
        joined([np.arange(n) for n in counts], np.int64),
        joined([u.lengths for u in units], np.int64),
        joined([u.supervised for u in units], np.int64),
        joined([u.doc_keys for u in units], np.uint64),
    )


def _training_order(
    s: _Sequences, times_S: np.ndarray, seed: int, epochs: int, pack_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    orders, sizes = [], []
    for epoch in range(epochs):
        entries = np.repeat(np.arange(len(s.length_S)), epoch_counts(times_S, s.doc_key_S, seed, epoch))
        rng = np.random.Generator(np.random.PCG64([seed, epoch]))
        shuffled = rng.permutation(entries)
        order, offsets = pack_lengths(s.length_S[shuffled], pack_tokens)
        # Packing closes full packs first and leaves the poorly filled ones last: shuffle the packs as well.
        packs = rng.permutation(len(offsets) - 1)
        size = np.diff(offsets)[packs]
        starts = np.repeat(offsets[packs] - (np.cumsum(size) - size), size)
        orders.append(shuffled[order[starts + np.arange(len(order))]])
        sizes.append(size)
    return np.concatenate(orders), np.concatenate([[0], np.cumsum(np.concatenate(sizes))])


def build_plan(
    manifest: RunManifest,
    *,
    holdout: float,
    split: Literal["train", "held_out"],
    pack_tokens: int,
    packs_per_batch: int,
    seed: int = 0,
    epochs: int = 1,
    max_steps: int | None = None,
    max_sequences: int | None = None,
    mix: Mapping[str, float] = MappingProxyType({}),
) -> BatchPlan:
    """Plan every batch of a run. A million sequences take a few seconds.

    `train`: sequences of documents not held out, with at least one supervised token, each as often as its unit
    occurs in the corpus, times the weight of its source; a permutation by PCG64([seed, epoch]) for each epoch.
    `held_out`: the other documents, once each, ordered by document hash, the first `max_sequences` of them.

    Args:
        manifest: the run's units; their order does not matter.
        holdout: share of documents held out, 0 … 0.5.
        split: which side to plan.
        pack_tokens: tokens of one packed row.
        packs_per_batch: packed rows of one optimizer step.
        seed: fixes the order; `train` only.
        epochs: passes; `train` only.
        max_steps: batches at most; `train` only.
        max_sequences: `held_out` only; None takes all.
        mix: weights by source, see `mixing`; 1 where none is stated; `train` only.

    Raises:
        UserError: this split holds no supervised token, a sequence is longer than pack_tokens, or a pattern of `mix`
            matches no source, or two match one.
    """
    units = sorted(manifest.units, key=lambda u: u.unit)
    every = _columns(units)
    side = held_out(every.doc_key_S, holdout) == (split == "held_out")
    s = every.where(side & (every.supervised_S > 0))
    if not len(s.length_S):
        raise UserError(
            f"the {split} split has no supervised token: {int(side.sum())} of {len(side)} sequences fall on it at "
            f"corpus.holdout={holdout}; change corpus.holdout or add documents"
        )
    if s.length_S.max() > pack_tokens:
        raise UserError(
            f"a sequence has {int(s.length_S.max())} tokens, more than pack_tokens={pack_tokens}; "
            "raise train.pack_tokens"
        )
    if split == "train":
        times_U = times_of([u.source for u in units], np.array([u.multiplicity for u in units]), mix)
        order, offsets = _training_order(s, times_U[s.unit_S], seed, epochs, pack_tokens)
        if not len(order):
            raise UserError(
                f"train.mix={dict(mix)} leaves nothing of {len(s.length_S)} training sequences in {epochs} epoch(s); "
                "raise a weight, or train.epochs"
            )
        if max_steps is not None:
            offsets = offsets[: max_steps * packs_per_batch + 1]
            order = order[: offsets[-1]]
    else:
        s = s.where(np.lexsort((s.index_S, s.unit_S, s.doc_key_S))[:max_sequences])
        order, offsets = pack_lengths(s.length_S, pack_tokens)
    table = tuple(PlanUnit(u.unit, u.object_sha256, int(u.object_bytes)) for u in units)
    return BatchPlan(manifest.fingerprint, table, pack_tokens, packs_per_batch, s, order, offsets)
