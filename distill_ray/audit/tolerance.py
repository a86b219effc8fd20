"""How far two runs of one teacher may lie apart, by the teacher's arithmetic.

float32. Two engines order their sums differently and nothing else: vLLM against a dense reference measures 1.2e-4 nats
at most (tests/stages/test_exactness.py). Every stored number must lie within the codec's own rounding of the re-scored
one, widened by 2e-3. A shifted row, a swapped id or an error of 0.3 nats in a single number cannot pass.

bfloat16, float16. Logits between 16 and 32 are 0.125 (0.016) apart, hidden states are rounded in every layer, and which
way depends on the batch they were computed in: honest rows differ by more than 0.3 nats here and there. So single
numbers are held to a coarse bound, and rows are judged by the probability mass that lies elsewhere (total variation
distance), where rare tokens weigh little. That finds a shifted row, other weights, a wrong scale, a swapped id that
holds mass, and 0.3 nats on every row; it does not find 0.3 nats in one number of one row, or a swap among ids without
mass. The audit's document and `distill-ray status` state the bounds that were used.

SmolLM2 by transformers against float32, 198 rows of prose: bfloat16 moves 0.017 of the mass in the mean, 0.050 in the
worst row, and one kept log-probability by 0.40 nats; float16 0.0022, 0.0072 and 0.05. Rows of adjacent positions are
0.25 apart at least, and 0.3 nats on every top-1 move 0.052 in the mean.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the difference between stored and re-scored rows."""

    logprob: float
    """Nats on each log-probability, beyond the codec's rounding."""
    row_mass: float
    """Total variation distance of one row, 0 to 1; the codec's rounding, below 0.01, is within."""
    mean_mass: float
    """Mean of that over all re-scored rows, where there are at least `MEAN_ROWS`."""

    @property
    def judges_every_number(self) -> bool:
        """Whether an error of 0.3 nats in a single number is sure to be found."""
        return self.logprob < 0.01


MEAN_ROWS = 64

_BY_DTYPE = {
    "float32": Tolerance(logprob=2e-3, row_mass=0.05, mean_mass=0.02),
    "float16": Tolerance(logprob=0.25, row_mass=0.05, mean_mass=0.015),
    "bfloat16": Tolerance(logprob=2.0, row_mass=0.2, mean_mass=0.04),
}


def tolerance_of(dtype: str, quantization: str | None) -> Tolerance:
    """The bounds for a teacher's concrete dtype; quantised arithmetic is no finer than bfloat16."""
    return _BY_DTYPE["bfloat16" if quantization else dtype]
