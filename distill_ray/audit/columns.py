"""Checks on what a row holds beside its kept ids: tails, the actual next token, entropy.

Legend of shapes: N rows, K kept tokens, R ≥ K re-scored tokens of each row, the most likely first.
"""

from __future__ import annotations

import numpy as np

from distill_ray.audit.pair import Check, Pair, span
from distill_ray.codec import Interval, unrounded_half, unrounded_log

MASS_NOISE = 2e-6
"""Mass by which a tail that was summed may be off, whatever its size."""
SUBTRACTED_NOISE = 2e-9
"""Mass, a token of the vocabulary, by which a tail computed as 1 − Σp may be off: the float32 sum over all V that
normalises a row errs for all its tokens alike (SmolLM2, V = 49,152, vLLM's public path: 2.8e-5 seen, 1e-4 allowed)."""


def column_checks(pair: Pair) -> list[Check]:
    """Everything a row holds beside its kept ids."""
    stored, again, slack = pair.stored, pair.again, pair.slack
    actual = unrounded_log(stored.actual_logprob_N)
    # Only the public path leaves out the entropy, and has no tail but by subtraction.
    noise = MASS_NOISE if again.entropy_N is not None else SUBTRACTED_NOISE * pair.vocab_size
    checks = [
        _tail_check(pair, 1.0, pair.bounds.log_tail_N, again.log_tail_N, noise),
        Check(
            ~(actual.distance(again.actual_logprob_N, slack) == 0),
            lambda t: (
                f"the actual next token {stored.tokens[t + 1]} has log-probability {stored.actual_logprob_N[t]:.4f} "
                f"stored and {again.actual_logprob_N[t]:.4f} scored again; {span(actual, (t,), slack)}"
            ),
        ),
        _rank_check(pair),
    ]
    checks += [
        _tail_check(pair, T, unrounded_log(stored.log_tail_at[T]), again.log_tail_at[T], noise)
        for T in sorted(stored.log_tail_at.keys() & again.log_tail_at.keys())
    ]
    if stored.entropy_N is not None and again.entropy_N is not None:
        kept_N, new_N = stored.entropy_N, again.entropy_N.astype(np.float64)
        # |dH| = |Σ p ε (log p + 1)| ≤ (H + 1) max|ε|, and half as much again for the second order.
        entropy, width_N = unrounded_half(kept_N), 1.5 * slack * (new_N + 1)
        checks.append(
            Check(
                ~(entropy.distance(new_N, width_N) == 0),
                lambda t: f"the entropy is {kept_N[t]:.4f} stored and {new_N[t]:.4f} scored again",
            )
        )
    return checks


def _tail_check(pair: Pair, T: float, stored: Interval, log_tail_N: np.ndarray, noise: float) -> Check:
    """The mass of softmax(z / T) outside the stored ids."""
    scaled_NR = np.exp(pair.again.logprobs_NK.astype(np.float64) / T)
    beyond_N = np.exp(log_tail_N.astype(np.float64))
    scale_N = (1 - beyond_N) / scaled_NR.sum(axis=1)  # exp(−a_T): log p_T = log p / T − a_T
    outside_N = scale_N * np.where(pair.kept_NR, 0.0, scaled_NR).sum(axis=1)
    high_N = beyond_N + outside_N
    # Stored ids beyond rank R lie in the re-scored tail, each with no more than the R-th one's mass.
    low_N = high_N - scale_N * scaled_NR[:, -1] * (~pair.found_NK).sum(axis=1)
    width = np.exp(2 * pair.slack / T)
    # What is scored again and not stored lies in the stored tail: known without a subtraction.
    least_N = np.maximum(low_N / width - noise, outside_N / width - MASS_NOISE)
    bad_N = ~((np.exp(stored.low) <= high_N * width + noise) & (np.exp(stored.high) >= least_N))

    def say(t: int) -> str:
        low, high = np.exp(stored.low[t]), min(1.0, float(np.exp(stored.high[t])))
        return f"the tail mass at T = {T:g} is {low:.3e} to {high:.3e} stored and {high_N[t]:.3e} scored again"

    return Check(bad_N, say)


def _rank_check(pair: Pair) -> Check:
    """Rank of the actual token, up to ties; beyond rank R only its lower bound is known."""
    again, rank_N = pair.again, pair.stored.actual_rank_N
    actual_N1 = again.actual_logprob_N[:, None].astype(np.float64)
    least_N = 1 + (again.logprobs_NK > actual_N1 + 2 * pair.slack).sum(axis=1)
    most_N = (again.logprobs_NK >= actual_N1 - 2 * pair.slack).sum(axis=1)
    open_N = most_N == again.logprobs_NK.shape[1]
    if pair.stored.entropy_N is None:  # by vLLM's public path, which ranks among all ids
        most_N += pair.vocab_size - pair.kept_below
    bad_N = (rank_N < least_N) | (~open_N & (rank_N > most_N))
    return Check(
        bad_N,
        lambda t: (
            f"the actual next token {pair.stored.tokens[t + 1]} has rank {rank_N[t]} stored, scored again "
            + (f"at least {least_N[t]}" if open_N[t] else f"{least_N[t]} to {most_N[t]}")
        ),
    )
