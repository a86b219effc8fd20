"""Tokens drawn from the teacher: checks before they are stored, and reading them back.

Legend of shapes: N rows, K kept tokens, M drawn ids of all rows together.
"""

from __future__ import annotations

import numpy as np

from distill_ray.codec import LOG_FLOOR
from distill_ray.codec.format import flat_rows
from distill_ray.errors import IntegrityError
from distill_ray.schema import Draws, TargetRows
from distill_ray.targets.identity import CaptureIdentity
from distill_ray.targets.layout import StoredDraws

TOLERANCE = 1e-3
"""Largest accepted |kept + tail − 1|, and |Δ log p| in nats between two statements of one log-probability."""


def check_draws(identity: CaptureIdentity, rows: TargetRows) -> None:
    """Draws of one sequence's rows, against the capture and against the kept tokens.

    Args:
        identity: says how many are drawn and of what.
        rows: whose kept tokens have the right shapes.

    Raises:
        IntegrityError: names the row, the numbers and what they mean.
    """
    from distill_ray.targets import kernels

    draws = rows.draws
    if (draws is not None) != bool(identity.draws):
        raise IntegrityError(
            f"rows hold {'no draws' if draws is None else 'draws'}, the capture needs {identity.draws} a row; nothing "
            "can stand in for tokens drawn from the teacher"
        )
    if draws is None:
        return
    _check_shapes(draws, len(rows.ids_NK))
    offsets = offsets_of(draws.distinct_N)
    # Only a tail of mass exactly zero has nothing to draw from.
    bare_N = (draws.distinct_N == 0) & ~((identity.draws_from == "tail") & np.isneginf(rows.log_tail_N))
    if bare_N.any():
        row = int(bare_N.argmax())
        raise IntegrityError(
            f"row {row}: 0 draws, the capture needs {identity.draws}, and its log tail mass is {rows.log_tail_N[row]}"
        )
    row = kernels.first_unsound_draws(
        np.ascontiguousarray(draws.ids_M, np.int32),
        np.ascontiguousarray(draws.counts_M, np.int32),
        np.ascontiguousarray(draws.logprobs_M, np.float32),
        offsets,
        *flat_rows(rows.ids_NK.astype(np.int32, copy=False)),
        *flat_rows(rows.logprobs_NK.astype(np.float32, copy=False)),
        identity.top_k,
        identity.vocab_size,
        identity.kept_below,
        identity.draws,
        identity.draws_from == "tail",
        np.float32(TOLERANCE),
        np.float32(LOG_FLOOR),
    )
    if row >= 0:
        part = slice(offsets[row], offsets[row + 1])
        raise IntegrityError(f"row {row}: {_fault(identity, rows, draws, row, part)}")


def decode_draws(stored: StoredDraws) -> Draws:
    """What was drawn at one sequence's rows."""
    return Draws.of_words(stored.words_M, stored.logprobs_M.astype(np.float32), stored.distinct_N)


def offsets_of(distinct_N: np.ndarray) -> np.ndarray:
    """[N + 1] int64: where each row's ids begin, and the end of the last."""
    return np.concatenate([[0], np.cumsum(distinct_N, dtype=np.int64)])


def _check_shapes(draws: Draws, n_rows: int) -> None:
    lengths = [len(a) for a in (draws.ids_M, draws.counts_M, draws.logprobs_M)]
    wanted = int(draws.distinct_N.sum(dtype=np.int64))
    if draws.distinct_N.shape != (n_rows,) or lengths != [wanted] * 3:
        raise IntegrityError(
            f"draws have shapes {lengths} for {wanted} ids of {len(draws.distinct_N)} rows, and there are {n_rows} "
            "rows; the engine dropped or added positions"
        )


def _fault(identity: CaptureIdentity, rows: TargetRows, draws: Draws, row: int, part: slice) -> str:
    """What is wrong with the draws of one row, in the order in which the compiled check looks."""
    ids_K, logprobs_K = rows.ids_NK[row], np.maximum(rows.logprobs_NK[row], LOG_FLOOR)
    before = -1
    for id_, count, logprob in zip(draws.ids_M[part], draws.counts_M[part], draws.logprobs_M[part], strict=True):
        if not 0 <= id_ < identity.vocab_size:
            return f"id {id_} was drawn, outside 0 … {identity.vocab_size - 1}"
        if id_ <= before:
            return f"drawn ids {before}, {id_} are not distinct and ascending"
        if count < 1:
            return f"id {id_} was drawn {count} times"
        if not (np.isfinite(logprob) and logprob <= TOLERANCE):
            return f"drawn id {id_} has logprob {logprob}, not a finite log-probability"
        at = np.flatnonzero(ids_K == id_)
        if len(at) and identity.draws_from == "tail":
            return f"id {id_} was drawn from the tail, but is kept at rank {at[-1] + 1}"
        if len(at) and not abs(max(logprob, LOG_FLOOR) - logprobs_K[at[-1]]) <= TOLERANCE:
            return f"drawn id {id_} has logprob {logprob:.4f}, but is kept with {logprobs_K[at[-1]]:.4f}"
        if not len(at) and id_ < identity.kept_below and max(logprob, LOG_FLOOR) > logprobs_K[-1] + TOLERANCE:
            return (
                f"drawn id {id_} is not kept, but its logprob {logprob:.4f} is above the last kept {logprobs_K[-1]:.4f}"
            )
        before = id_
    return f"{draws.counts_M[part].sum()} draws, the capture needs {identity.draws}"
