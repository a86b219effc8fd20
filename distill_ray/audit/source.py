"""Stored sequences against the corpus tokenised again: tokens, mask, document, and whether rows speak of their tokens.

None of it needs the teacher, so it covers every sequence of a sampled unit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from distill_ray.audit.pair import Difference
from distill_ray.codec import unrounded, unrounded_log
from distill_ray.schema import UNKNOWN_RECORD, Sequence
from distill_ray.targets import CaptureIdentity, StoredSequence, UnitTargets, decode_rows

Compare = Callable[[StoredSequence, Sequence], Difference | None]

_AGREES = 2e-3
"""Nats that two statements of one log-probability may lie apart beyond their rounding; writing allows half of it."""


def compare_source(
    stored: UnitTargets, corpus: list[Sequence], compare: Compare | None = None
) -> tuple[int, Difference] | None:
    """The first stored sequence that is not the corpus's, and where; None where all of them are.

    Args:
        stored: a unit's object.
        corpus: all sequences of that unit's source, in its order. Those that the teacher refused are not stored: as
            many as the object has dead letters of that kind may be passed over.
        compare: one of them with the corpus's; `compare_sequence`, or `compare_completion` with the prompts asked.
    """
    compare = compare or compare_sequence
    refused = sum(letter.record == UNKNOWN_RECORD for letter in stored.dead)
    if len(corpus) != len(stored) + refused:
        what = f"{len(stored)} sequences are stored and {refused} were refused, the corpus gives {len(corpus)}"
        return min(len(stored), len(corpus)), Difference(0, what)
    passed = 0
    for i in range(len(stored)):
        found = compare(stored.sequence(i), corpus[i + passed])
        at = passed
        while found is not None and at < refused:
            at += 1
            if compare(stored.sequence(i), corpus[i + at]) is None:
                found, passed = None, at
        if found is not None:
            return i, found
    return None


def compare_completion(stored: StoredSequence, prompt: Sequence) -> Difference | None:
    """The first token at which a stored sequence is not this prompt with a completion, which alone is supervised.

    What the teacher wrote stands in no corpus; that its rows are of these very tokens, scoring again shows.
    """
    n = len(prompt.tokens)
    if len(stored.tokens) <= n:
        return Difference(len(stored.tokens), f"{len(stored.tokens)} tokens are stored, the prompt alone has {n}")
    written = np.arange(len(stored.tokens)) >= n
    tokens = np.where(written, stored.tokens, np.resize(prompt.tokens, len(written)))
    return compare_sequence(stored, Sequence(tokens, written, prompt.doc_key))


def compare_sequence(stored: StoredSequence, corpus: Sequence) -> Difference | None:
    """The first token at which a stored sequence is not the corpus's."""
    n, m = len(stored.tokens), len(corpus.tokens)
    both = min(n, m)
    other = np.flatnonzero(stored.tokens[:both] != corpus.tokens[:both])
    if len(other):
        t = int(other[0])
        return Difference(t, f"token {t} is {stored.tokens[t]} stored and {corpus.tokens[t]} in the corpus")
    if n != m:
        return Difference(both, f"{n} tokens are stored, the corpus has {m}")
    other = np.flatnonzero(stored.loss_mask != corpus.loss_mask)
    if len(other):
        t = int(other[0])
        now, then = ("supervised", "not supervised") if stored.loss_mask[t] else ("not supervised", "supervised")
        return Difference(t, f"token {t} is {now} as stored and {then} by the corpus")
    if stored.doc_key != corpus.doc_key:
        what = f"its document has key {stored.doc_key:016x} stored and {corpus.doc_key:016x} in the corpus"
        return Difference(0, f"{what}, which decides what is held out")
    return None


def check_alignment(identity: CaptureIdentity, stored: StoredSequence) -> Difference | None:
    """The first row that does not give the next token the log-probability stored for it.

    A row that stands at another token's place shows here wherever that token is kept or likely; only scoring again
    shows it everywhere.
    """
    next_N = stored.tokens[1:]
    ids_NK = decode_rows(identity, stored).ids_NK
    if len(ids_NK) != len(next_N):
        return Difference(min(len(ids_NK), len(next_N)), f"{len(ids_NK)} rows for {len(stored.tokens)} tokens")
    bounds, actual = (
        unrounded(stored.packed_NB, identity.top_k, identity.vocab_size),
        unrounded_log(stored.actual_logprob_N),
    )
    is_next_NK = ids_NK == next_N[:, None]
    at_N = np.where(is_next_NK.any(axis=1), is_next_NK.argmax(axis=1), identity.top_k - 1)
    row_N = np.arange(len(next_N))
    low_N = bounds.top_N.low - bounds.gap_NK.high[row_N, at_N]
    high_N = bounds.top_N.high - bounds.gap_NK.low[row_N, at_N]
    below_N = is_next_NK.any(axis=1) & (actual.high < low_N - _AGREES)
    bad_N = below_N | (actual.low > high_N + _AGREES)
    if not bad_N.any():
        return None
    t = int(np.argmax(bad_N))
    how = f"{low_N[t]:.4f} to {high_N[t]:.4f}" if is_next_NK[t].any() else f"not among its ids, at most {high_N[t]:.4f}"
    return Difference(
        t,
        f"the next token {next_N[t]} is stored with log-probability {stored.actual_logprob_N[t]:.4f}, the row gives it "
        f"{how}: rows and tokens are shifted against each other",
    )
