"""Checks on the teacher's rows before they are stored; afterwards nobody can tell a shifted row from a poor teacher."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from distill_ray.codec import LOG_FLOOR
from distill_ray.codec.format import flat_rows
from distill_ray.errors import IntegrityError
from distill_ray.schema import FINISHES, Sequence, TargetRows
from distill_ray.targets.draws import TOLERANCE, check_draws
from distill_ray.targets.identity import CaptureIdentity


def check_sequence(identity: CaptureIdentity, sequence: Sequence) -> None:
    """Token ids, mask and end of one sequence.

    Raises:
        IntegrityError: empty, ids outside the vocabulary, a mask that does not fit, or a completion without its end.
    """
    if (sequence.finish in FINISHES) != (identity.generate is not None):
        wanted = "none, since the corpus gave its tokens" if identity.generate is None else " or ".join(FINISHES)
        raise IntegrityError(f"the sequence ended by {sequence.finish!r}; expected {wanted}")
    tokens, mask = sequence.tokens, sequence.loss_mask
    if tokens.ndim != 1 or len(tokens) < 1:
        raise IntegrityError(f"tokens have shape {tokens.shape}; a sequence needs at least one token")
    if tokens.min() < 0 or tokens.max() >= identity.vocab_size:
        at = int(np.flatnonzero((tokens < 0) | (tokens >= identity.vocab_size))[0])
        raise IntegrityError(
            f"token {at} has id {tokens[at]}, outside 0 … {identity.vocab_size - 1}; "
            "the corpus was tokenised with another vocabulary than the teacher's"
        )
    if mask.shape != tokens.shape or mask.dtype != np.bool_ or mask[0]:
        raise IntegrityError(
            f"loss mask is {mask.dtype} {mask.shape} with entry 0 {bool(mask[0]) if mask.size else None} for "
            f"{len(tokens)} tokens; it needs one bool a token, and nothing predicts token 0"
        )


def check_rows(identity: CaptureIdentity, tokens: np.ndarray, rows: TargetRows) -> np.ndarray:
    """Shapes, mass, alignment and draws of one sequence's rows. Order, duplicates and id range are the codec's checks.

    Args:
        identity: gives K, V and the temperatures.
        tokens: [n] ids of the sequence.
        rows: [N, K] with N = n − 1; row t speaks of token t + 1.

    Returns:
        kept_N float64, the kept mass of each row.

    Raises:
        IntegrityError: names the row, the numbers and what they mean.
    """
    kept_N = _check_kept(identity, tokens, rows)
    check_draws(identity, rows)
    return kept_N


def _check_kept(identity: CaptureIdentity, tokens: np.ndarray, rows: TargetRows) -> np.ndarray:
    from distill_ray.targets import kernels

    _check_shapes(identity, len(tokens), rows)
    kept_N = np.empty(len(rows.ids_NK))
    if len(kept_N) == 0:
        return kept_N
    if identity.token_ids is not None:
        _refuse(
            rows.ids_NK.max(axis=1) >= identity.token_ids,
            lambda t: f"id {rows.ids_NK[t].max()} is kept, and the tokenizer has ids below {identity.token_ids} only",
        )
    sound = kernels.rows_are_sound(
        *flat_rows(rows.ids_NK.astype(np.int32, copy=False)),
        *flat_rows(rows.logprobs_NK.astype(np.float32, copy=False)),
        identity.top_k,
        rows.log_tail_N.astype(np.float32, copy=False),
        tokens[1:].astype(np.int32, copy=False),
        rows.actual_logprob_N.astype(np.float32, copy=False),
        rows.actual_rank_N.astype(np.int32, copy=False),
        identity.vocab_size,
        np.float32(TOLERANCE),
        np.float32(LOG_FLOOR),
        kept_N,
    )
    return kept_N if sound and _columns_are_sound(rows) else check_rows_plainly(identity, tokens, rows)


def _columns_are_sound(rows: TargetRows) -> bool:
    entropy_N = rows.entropy_N
    if entropy_N is not None and not (np.isfinite(entropy_N) & (entropy_N >= -TOLERANCE)).all():
        return False
    return all(bool((tail_N <= TOLERANCE).all()) for tail_N in rows.log_tail_at.values())


def check_rows_plainly(identity: CaptureIdentity, tokens: np.ndarray, rows: TargetRows) -> np.ndarray:
    """`check_rows` in numpy, without draws: decides, and says what is wrong, where the compiled pass found a fault."""
    _check_shapes(identity, len(tokens), rows)
    _check_finite(rows)
    kept_N = np.exp(rows.logprobs_NK).sum(axis=1, dtype=np.float64)
    total_N = kept_N + np.exp(rows.log_tail_N.astype(np.float64))
    _refuse(
        ~(np.abs(total_N - 1) <= TOLERANCE),
        lambda t: (
            f"kept mass {kept_N[t]:.6f} + tail {np.exp(rows.log_tail_N[t]):.6f} = {total_N[t]:.6f}, not 1 within "
            f"{TOLERANCE}; the log-probabilities are not normalised over the real vocabulary"
        ),
    )
    for temperature, tail_N in rows.log_tail_at.items():
        _refuse(
            ~(tail_N <= TOLERANCE),
            lambda t, v=tail_N, T=temperature: f"log tail mass at T={T} is {v[t]}, not a log mass (≤ 0)",
        )
    _check_actual(identity, tokens[1:], rows)
    return kept_N


def _refuse(bad_N: np.ndarray, say: Callable[[int], str]) -> None:
    if bad_N.any():
        row = int(np.argmax(bad_N))
        raise IntegrityError(f"row {row}: {say(row)}")


def _brief(values_K: np.ndarray) -> str:
    """The first values, up to the one that breaks the order."""
    broken = np.flatnonzero(~(values_K[1:] <= values_K[:-1]))
    stop = int(broken[0]) + 2 if len(broken) else 1
    shown = ", ".join(f"{v:.4f}" for v in values_K[max(0, stop - 3) : stop])
    return f"… {shown} at rank {stop}"


def _check_shapes(identity: CaptureIdentity, n: int, rows: TargetRows) -> None:
    shape = rows.ids_NK.shape
    if shape != (n - 1, identity.top_k):
        raise IntegrityError(
            f"rows have shape {shape}, {n} tokens at top_k={identity.top_k} need {(n - 1, identity.top_k)}; "
            "the engine dropped or added positions"
        )
    columns = {
        "logprobs": (rows.logprobs_NK, shape),
        "log tail": (rows.log_tail_N, shape[:1]),
        "actual logprob": (rows.actual_logprob_N, shape[:1]),
        "actual rank": (rows.actual_rank_N, shape[:1]),
        **{f"log tail at T={t}": (v, shape[:1]) for t, v in rows.log_tail_at.items()},
    }
    if rows.entropy_N is not None:
        columns["entropy"] = (rows.entropy_N, shape[:1])
    for name, (array, want) in columns.items():
        if array.shape != want:
            raise IntegrityError(f"{name} has shape {array.shape}, the ids need {want}")
    if tuple(sorted(rows.log_tail_at)) != identity.extra_temperatures:
        raise IntegrityError(
            f"rows hold log tails at T={sorted(rows.log_tail_at)}, the capture needs "
            f"{list(identity.extra_temperatures)}; nothing can stand in for a missing normaliser"
        )


def _check_finite(rows: TargetRows) -> None:
    # `not <=` rather than `>`: NaN fails it too. Sorted first, so that no later check takes disorder for a shift.
    disorder_NK = ~(rows.logprobs_NK[:, 1:] <= rows.logprobs_NK[:, :-1])
    _refuse(
        np.isnan(rows.logprobs_NK[:, 0]) | np.asarray(disorder_NK.any(axis=1)),
        lambda t: f"kept logprobs {_brief(rows.logprobs_NK[t])} are not numbers in descending order",
    )
    _refuse(
        ~(rows.actual_logprob_N <= TOLERANCE),
        lambda t: f"actual logprob is {rows.actual_logprob_N[t]}, not a log-probability",
    )
    entropy_N = rows.entropy_N
    if entropy_N is not None:
        _refuse(
            ~(np.isfinite(entropy_N) & (entropy_N >= -TOLERANCE)),
            lambda t: f"entropy is {entropy_N[t]} nats, not a finite number ≥ 0",
        )


def _check_actual(identity: CaptureIdentity, next_N: np.ndarray, rows: TargetRows) -> None:
    """Rows, actual tokens and ranks must speak of the same position; a shift by one fails almost every row."""
    rank_N = rows.actual_rank_N.astype(np.int64)
    _refuse(
        (rank_N < 1) | (rank_N > identity.vocab_size),
        lambda t: f"actual rank {rank_N[t]} is outside 1 … {identity.vocab_size}",
    )
    actual_N = np.maximum(rows.actual_logprob_N, LOG_FLOOR)
    last_N = np.maximum(rows.logprobs_NK[:, -1], LOG_FLOOR)
    is_next_NK = rows.ids_NK == next_N[:, None]
    is_kept_N = is_next_NK.any(axis=1)
    at_N = is_next_NK.argmax(axis=1)
    row_N = np.arange(len(next_N))
    at_next_N = np.maximum(rows.logprobs_NK[row_N, at_N], LOG_FLOOR)
    _refuse(
        is_kept_N & ~(np.abs(at_next_N - actual_N) <= TOLERANCE),
        lambda t: (
            f"actual logprob {actual_N[t]:.4f} of token {next_N[t]}, but the row gives that token "
            f"{at_next_N[t]:.4f} (rank {at_N[t] + 1}); rows and tokens are shifted against each other"
        ),
    )
    # Ties (common in bfloat16) may be ranked either way round, so the rank is judged by its log-probability.
    k = identity.top_k
    at_rank_N = np.maximum(rows.logprobs_NK[row_N, np.minimum(rank_N, k) - 1], LOG_FLOOR)
    agrees_N = np.where(rank_N <= k, np.abs(at_rank_N - actual_N) <= TOLERANCE, actual_N <= at_rank_N + TOLERANCE)
    _refuse(
        ~agrees_N,
        lambda t: (
            f"actual rank {rank_N[t]} with logprob {actual_N[t]:.4f} disagrees with the row "
            f"({at_rank_N[t]:.4f} at rank {min(rank_N[t], k)}); rows and tokens are shifted against each other"
        ),
    )
    _refuse(
        ~is_kept_N & ((actual_N > last_N + TOLERANCE) | (np.exp(actual_N) > np.exp(rows.log_tail_N) + TOLERANCE)),
        lambda t: (
            f"token {next_N[t]} is not kept, but its logprob {actual_N[t]:.4f} is above the last kept one "
            f"({last_N[t]:.4f}) or the log tail mass ({rows.log_tail_N[t]:.4f}); rows and tokens are shifted"
        ),
    )
