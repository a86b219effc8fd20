"""Synthetic captures: rows that a teacher could have given, and a unit of them."""

from __future__ import annotations

import hashlib

import numpy as np

from distill_ray.codec import CODEC_VERSION
from distill_ray.schema import DeadLetter, Sequence, SourceSlice, TargetRows, Unit
from distill_ray.targets import CaptureIdentity

TEACHER = {"weights": "sha256:abc", "dtype": "float32", "engine": "fake"}


def identity(vocab: int = 997, k: int = 8, temperatures=(1.0, 2.0), teacher: str = "abc") -> CaptureIdentity:
    return CaptureIdentity(
        teacher={**TEACHER, "weights": teacher},
        tokenizer="tok-1",
        vocab_size=vocab,
        top_k=k,
        temperatures=temperatures,
        codec=CODEC_VERSION,
    )


def unit(name: str = "a", uri: str = "corpus/a.jsonl", multiplicity: int = 1) -> Unit:
    unit_hash = hashlib.sha256(name.encode()).hexdigest()[:32]
    source = SourceSlice(uri, hashlib.sha256(uri.encode()).hexdigest(), "lines", 0, 1000)
    return Unit(unit_hash, source, 1000, multiplicity)


def dead_letter(of: Unit) -> DeadLetter:
    return DeadLetter(of.hash, of.source.uri, 3, "empty document")


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def exact_rows(logits_NV: np.ndarray, next_N: np.ndarray, k: int, temperatures=(), entropy: bool = True) -> TargetRows:
    """Rows by definition, in float64, from dense logits."""
    logp_NV = log_softmax(logits_NV.astype(np.float64))
    order_NV = np.argsort(-logp_NV, axis=1, kind="stable")
    ids_NK = order_NV[:, :k].astype(np.int32)
    row_N = np.arange(len(next_N))
    actual_N = logp_NV[row_N, next_N]

    def log_tail(logp: np.ndarray) -> np.ndarray:
        rest = np.take_along_axis(logp, order_NV[:, k:], axis=1)
        with np.errstate(divide="ignore"):
            return np.log(np.exp(rest).sum(axis=1)).astype(np.float32)

    return TargetRows(
        ids_NK=ids_NK,
        logprobs_NK=np.take_along_axis(logp_NV, ids_NK.astype(np.int64), axis=1).astype(np.float32),
        log_tail_N=log_tail(logp_NV),
        actual_logprob_N=actual_N.astype(np.float32),
        actual_rank_N=(1 + (logp_NV > actual_N[:, None]).sum(axis=1)).astype(np.int32),
        entropy_N=-(np.exp(logp_NV) * logp_NV).sum(axis=1).astype(np.float32) if entropy else None,
        log_tail_at={t: log_tail(log_softmax(logits_NV / t)) for t in temperatures},
    )


def captured(
    of: CaptureIdentity, lengths: tuple[int, ...] = (12, 2, 30, 1, 7), seed: int = 0, entropy: bool = True
) -> tuple[list[Sequence], list[TargetRows]]:
    """Random sequences and their exact rows."""
    rng = np.random.default_rng(seed)
    sequences, rows = [], []
    for n in lengths:
        tokens = rng.integers(0, of.vocab_size, n).astype(np.int32)
        mask = rng.random(n) < 0.7
        mask[0] = False
        sequences.append(Sequence(tokens, mask, int(rng.integers(0, 2**64, dtype=np.uint64))))
        logits = rng.normal(0, 3, (n - 1, of.vocab_size))
        logits[np.arange(n - 1), tokens[1:]] += rng.choice([0.0, 6.0], n - 1)
        rows.append(exact_rows(logits, tokens[1:], of.top_k, of.extra_temperatures, entropy))
    return sequences, rows
