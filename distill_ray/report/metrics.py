"""Held-out metrics as running sums of per-row figures, in float64; teacher and students go through the same code."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distill_ray.errors import UserError

DEFINITIONS = {
    "perplexity": "exp of the mean negative log-probability of the actual next token, supervised rows only",
    "kl_t1": "mean over supervised rows of the bucket KL(p‖q) at T = 1 in nats: kept tokens plus one bucket for the "
    "tail; a lower bound of the full KL",
    "top1_agreement": "share of supervised rows where the model's most likely token is the teacher's",
    "ece": "expected calibration error: equal-width bins of the top-1 probability against the share of rows where "
    "the actual next token is the top-1",
    "acceptance": "expected speculative acceptance Σ min(p, q) on kept + bucket; an upper bound of the full sum",
}


@dataclass(frozen=True)
class ScoredRows:
    """Figures of one model on N rows, [N] each."""

    actual_logprob_N: np.ndarray
    """Log-probability of the actual next token."""
    kl_t1_N: np.ndarray
    """Bucket KL(teacher ‖ model) at T = 1, nats."""
    acceptance_N: np.ndarray
    """Σ min(p, q) on kept + bucket."""
    agree_N: np.ndarray
    """bool: the model's most likely token is the teacher's."""
    confidence_N: np.ndarray
    """Probability of the model's most likely token."""
    correct_N: np.ndarray
    """bool: the model's most likely token is the actual next one."""


class MetricSums:
    """Running sums over any number of row batches; memory does not grow with rows.

    Args:
        bins: equal-width confidence bins of the calibration error.
    """

    def __init__(self, bins: int) -> None:
        self.rows = 0
        self._bins = bins
        self._nll = self._kl = self._acceptance = self._agree = 0.0
        self._bin_rows = np.zeros(bins)
        self._bin_confidence = np.zeros(bins)
        self._bin_correct = np.zeros(bins)

    def add(self, scored: ScoredRows) -> None:
        self.rows += len(scored.kl_t1_N)
        self._nll -= float(scored.actual_logprob_N.sum(dtype=np.float64))
        self._kl += float(scored.kl_t1_N.sum(dtype=np.float64))
        self._acceptance += float(scored.acceptance_N.sum(dtype=np.float64))
        self._agree += float(scored.agree_N.sum())
        # A NaN confidence would index a bin at random; it is kept out of the bins and reported through the sums.
        confidence_N = np.nan_to_num(scored.confidence_N.astype(np.float64), nan=0.0)
        where_N = np.clip((confidence_N * self._bins).astype(np.int64), 0, self._bins - 1)
        self._bin_rows += np.bincount(where_N, minlength=self._bins)
        self._bin_confidence += np.bincount(where_N, weights=scored.confidence_N, minlength=self._bins)
        self._bin_correct += np.bincount(where_N, weights=scored.correct_N, minlength=self._bins)

    def metrics(self, model: str) -> dict[str, float]:
        """Means over all rows, by the names of `DEFINITIONS`, and `rows`.

        Raises:
            UserError: no rows, or a metric that is not finite.
        """
        if not self.rows:
            raise UserError(f"{model}: no supervised held-out row was scored; raise corpus.holdout or add documents")
        mean_nll = self._nll / self.rows
        values = {
            # exp overflows past 709 nats; that model is as broken as one that gives NaN, and is refused below.
            "perplexity": math.exp(mean_nll) if mean_nll < 700 else math.inf,
            "kl_t1": self._kl / self.rows,
            "top1_agreement": self._agree / self.rows,
            "ece": float(np.abs(self._bin_confidence - self._bin_correct).sum()) / self.rows,
            "acceptance": self._acceptance / self.rows,
        }
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if bad:
            found = ", ".join(f"{name}={value}" for name, value in bad.items())
            raise UserError(
                f"{model}: {found} over {self.rows} held-out rows; the model's outputs are not finite, so no report is "
                "written. If training diverged, lower train.learning_rate or train.clip_norm and run a new version"
            )
        return {**values, "rows": self.rows}

    def calibration(self) -> dict[str, list[float]]:
        """Reliability diagram: mean confidence, accuracy and row count of the bins that hold rows."""
        full = self._bin_rows > 0
        rows = self._bin_rows[full]
        return {
            "confidence": (self._bin_confidence[full] / rows).tolist(),
            "accuracy": (self._bin_correct[full] / rows).tolist(),
            "rows": rows.tolist(),
        }


class KeptMassHistogram:
    """Rows by kept mass P, in `bins` equal-width bins of 0 … 1."""

    def __init__(self, bins: int = 50) -> None:
        self.counts = np.zeros(bins, dtype=np.int64)

    def add(self, log_tail_N: np.ndarray) -> None:
        bins = len(self.counts)
        kept_N = -np.expm1(np.minimum(log_tail_N.astype(np.float64), 0.0))
        self.counts += np.bincount(np.clip((kept_N * bins).astype(np.int64), 0, bins - 1), minlength=bins)

    def to_json(self) -> dict[str, list[float]]:
        """`edges` (bins + 1) and `counts` (bins)."""
        return {"edges": np.linspace(0, 1, len(self.counts) + 1).tolist(), "counts": self.counts.astype(float).tolist()}
