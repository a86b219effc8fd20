"""One micro-batch: packs of stored sequences, laid out as tensors, with decoded targets for the supervised rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from distill_ray import codec
from distill_ray.errors import CannotCaptureError, IntegrityError, UserError
from distill_ray.ingest.attention import document_bounds
from distill_ray.ingest.drawn import DrawnRows
from distill_ray.ingest.plan import Pack, SeqRef
from distill_ray.losses import SparseTargets
from distill_ray.targets import StoredSequence


@dataclass(frozen=True)
class PackedBatch:
    """B packs of T tokens and the targets of their N supervised rows."""

    input_ids: Tensor
    """int64 [B, T]; 0 in padding."""
    position_ids: Tensor
    """int64 [B, T], from 0 in each document; 0 in padding."""
    document_ids: Tensor
    """int64 [B, T], the document's number within its pack; −1 in padding."""
    rows: Tensor
    """int64 [N] positions into the flattened B·T whose *next* token is supervised."""
    targets: SparseTargets
    """N rows, on the same order as `rows`."""
    actual_logprob_N: Tensor
    """float32 teacher's log-probability of the actual next token."""
    actual_rank_N: Tensor
    """int64 teacher's rank of it, 1 the most likely."""
    tokens: int
    """Tokens that are not padding."""
    step: int = 0
    """Global batch."""
    micro: int = 0
    """Micro-batch within the step, on this rank."""
    micro_steps: int = 1
    """Micro-batches of the step, the same on every rank."""
    supervised: int = 0
    """Supervised tokens of the whole step over all ranks: what the loss is divided by."""
    batch_id: int = 0
    """`ingest.batch_id` of its sequences; over ranks and micro-batches they add up to that of the step."""
    bounds: Tensor | None = None
    """int32 [S + 1], `document_bounds`; set by `to`, before a GPU holds the ids and would have to be waited for."""

    @property
    def last(self) -> bool:
        """Whether the optimizer steps after this micro-batch."""
        return self.micro == self.micro_steps - 1

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device."""
        names = ("input_ids", "position_ids", "document_ids", "rows", "actual_logprob_N", "actual_rank_N")
        moved = {n: getattr(self, n).to(device, non_blocking=non_blocking) for n in names}
        bounds = document_bounds(self.document_ids) if self.bounds is None else self.bounds
        moved["bounds"] = bounds.to(device, non_blocking=non_blocking)
        return replace(self, targets=self.targets.to(device, non_blocking=non_blocking), **moved)


@dataclass(frozen=True)
class TargetFormat:
    """How the stored rows are read."""

    top_k: int
    vocab_size: int
    temperature: float = 1.0
    student_ids: int | None = None
    """Ids that the student's softmax runs over; None: all of `vocab_size`."""
    draws_from: str | None = None
    """Make targets of what was drawn from "all" of the distribution or from its "tail"; None: of the exact top k."""


@dataclass
class _Rows:
    """Supervised rows gathered over the documents of a micro-batch."""

    positions: list[np.ndarray]
    labels: list[np.ndarray]
    packed: list[np.ndarray]
    log_tail_T: list[np.ndarray]
    actual_logprob: list[np.ndarray]
    actual_rank: list[np.ndarray]
    drawn: DrawnRows
    origins: list[tuple[SeqRef, np.ndarray]] = field(default_factory=list)
    """The sequence of each document and which of its rows are supervised."""

    def add(self, at: int, ref: SeqRef, stored: StoredSequence, form: TargetFormat) -> None:
        # Row t predicts token t + 1, so it is supervised where the mask of token t + 1 says so.
        rows = np.flatnonzero(stored.loss_mask[1:])
        if len(rows) != ref.supervised:
            raise IntegrityError(
                f"unit {ref.unit} sequence {ref.index} supervises {len(rows)} tokens, but the manifest says "
                f"{ref.supervised}; run `distill-ray inspect --verify` on the targets"
            )
        self.origins.append((ref, rows))
        self.positions.append(at + rows)
        self.labels.append(stored.tokens[rows + 1])
        self.packed.append(stored.packed_NB[rows])
        self.actual_logprob.append(stored.actual_logprob_N[rows])
        self.actual_rank.append(stored.actual_rank_N[rows])
        if form.draws_from is not None:
            if stored.draws is None:
                raise CannotCaptureError(
                    f"unit {ref.unit} holds no tokens drawn from the teacher; set capture.draws and capture again"
                )
            self.drawn.add(stored.draws, rows)
        if (temperature := form.temperature) != 1.0:
            if temperature not in stored.log_tail_at:
                raise CannotCaptureError(
                    f"unit {ref.unit} holds temperatures {[1.0, *stored.log_tail_at]}, not {temperature}; add it to "
                    "capture.temperatures and capture again"
                )
            self.log_tail_T.append(stored.log_tail_at[temperature][rows])


def _decode(rows: _Rows, form: TargetFormat) -> SparseTargets:
    packed = np.concatenate([np.zeros((0, codec.row_bytes(form.top_k, form.vocab_size)), np.uint8), *rows.packed])
    ids, logprobs, log_tail = codec.decode(packed, form.top_k, form.vocab_size)
    if form.student_ids is not None and ids.max(initial=-1) >= form.student_ids:
        _refuse_ids(rows, ids, form.student_ids, "keeps")
    at_T: tuple[Tensor | None, Tensor | None] = (None, None)
    if form.temperature != 1.0:
        log_tail_T = _joined(rows.log_tail_T, np.float32)
        logprobs_T = codec.at_temperature(logprobs, log_tail_T, form.temperature)
        at_T = (torch.from_numpy(np.asarray(logprobs_T, np.float32)), torch.from_numpy(log_tail_T))
    head = SparseTargets(
        torch.from_numpy(ids.astype(np.int64)),
        torch.from_numpy(logprobs),
        torch.from_numpy(log_tail),
        torch.from_numpy(_joined(rows.labels, np.int64)),
        None,
        form.temperature,
        *at_T,
    )
    if form.draws_from is None:
        return head
    drawn = rows.drawn.padded()
    if form.student_ids is not None and drawn.ids_NM.max(initial=-1) >= form.student_ids:
        _refuse_ids(rows, drawn.ids_NM, form.student_ids, "drew")
    return drawn.targets(head, form.draws_from)


def _refuse_ids(rows: _Rows, ids_NK: np.ndarray, limit: int, verb: str) -> None:
    """Name the first row that keeps, or drew, an id the student has no logit for."""
    start = 0
    for ref, index in rows.origins:
        high = ids_NK[start : start + len(index)].max(axis=1)
        start += len(index)
        for row in np.flatnonzero(high >= limit)[:1]:
            raise _beyond_student(ref, f"row {index[row]} {verb} id {high[row]}", limit)


def _beyond_student(ref: SeqRef, fact: str, limit: int) -> UserError:
    return UserError(
        f"unit {ref.unit} sequence {ref.index} {fact}, but the student has logits for ids below {limit} only; choose "
        "a student with as many embedding rows as the teacher, or capture with a lower capture.top_k and no draws"
    )


def _joined(parts: list[np.ndarray], kind: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, kind), *parts]).astype(kind, copy=False)


def _width(packs: Sequence[Pack], pack_tokens: int) -> int:
    """The longest pack rounded up to an eighth of the budget: few distinct shapes, little padding in a last pack."""
    longest = max((sum(ref.length for ref in pack) for pack in packs), default=0)
    grain = max(1, -(-pack_tokens // 8))
    return min(pack_tokens, max(grain, -(-longest // grain) * grain))


def collate(
    packs: Sequence[Pack],
    read: Callable[[SeqRef], StoredSequence],
    form: TargetFormat,
    pack_tokens: int,
) -> PackedBatch:
    """Lay packs out as tensors and decode the targets of supervised rows only.

    Args:
        packs: B packs, of which any may be empty.
        read: gives the stored sequence.
        form: top_k, vocabulary and temperature of the targets.
        pack_tokens: T is at most this; less where every pack is much shorter.

    Raises:
        IntegrityError: a stored sequence is not what the manifest says.
        CannotCaptureError: the temperature was not captured, or the draws were not.
        UserError: a kept or drawn id or a token is beyond the student's rows.
    """
    width = _width(packs, pack_tokens)
    ids = np.zeros((len(packs), width), np.int64)
    positions = np.zeros_like(ids)
    documents = np.full_like(ids, -1)
    rows = _Rows([], [], [], [], [], [], DrawnRows())
    for b, pack in enumerate(packs):
        at = 0
        for number, ref in enumerate(pack):
            stored = read(ref)
            if len(stored.tokens) != ref.length:
                raise IntegrityError(
                    f"unit {ref.unit} sequence {ref.index} has {len(stored.tokens)} tokens, but the manifest says "
                    f"{ref.length}; run `distill-ray inspect --verify` on the targets"
                )
            if form.student_ids is not None and stored.tokens.max() >= form.student_ids:
                raise _beyond_student(ref, f"has token id {stored.tokens.max()}", form.student_ids)
            span = slice(at, at + ref.length)
            ids[b, span] = stored.tokens
            positions[b, span] = np.arange(ref.length)
            documents[b, span] = number
            rows.add(b * width + at, ref, stored, form)
            at += ref.length
    return PackedBatch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(documents),
        torch.from_numpy(_joined(rows.positions, np.int64)),
        _decode(rows, form),
        torch.from_numpy(_joined(rows.actual_logprob, np.float32)),
        torch.from_numpy(_joined(rows.actual_rank, np.int64)),
        tokens=sum(ref.length for pack in packs for ref in pack),
    )
