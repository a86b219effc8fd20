"""How many documents are refused, why, and whether the recipe allows so many."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_VARYING = re.compile(r"\d[\d,]*|'[^']*'|\"[^\"]*\"")
"""What differs between documents that are refused for the same reason."""
_SHOWN = 3
_BY_CHANCE = 1e-3


@dataclass(frozen=True)
class Refusals:
    """Of the documents that were looked at."""

    documents: int
    """Those refused included."""
    reasons: tuple[tuple[str, int], ...]
    """The first of each kind of reason, and how many are of that kind; the commonest kind first."""

    @classmethod
    def of(cls, taken: int, reasons: Iterable[str]) -> Refusals:
        """Of `taken` documents that are used and those refused for these reasons."""
        kinds, first = Counter[str](), dict[str, str]()
        for reason in reasons:
            kind = _VARYING.sub("…", reason)
            kinds[kind] += 1
            first.setdefault(kind, reason)
        return cls(taken + kinds.total(), tuple((first[kind], count) for kind, count in kinds.most_common()))

    @property
    def refused(self) -> int:
        return sum(count for _, count in self.reasons)

    @property
    def why(self) -> str:
        """The commonest reasons."""
        shown = [f"{count:,} × {reason}" for reason, count in self.reasons[:_SHOWN]]
        more = len(self.reasons) - len(shown)
        return "; ".join(shown) + (f"; and {more} other reason(s)" if more else "")

    def __str__(self) -> str:
        share = self.refused / max(self.documents, 1)
        told = f"{self.refused:,} of {self.documents:,} documents ({share:.2%}) are refused"
        return f"{told}: {self.why}" if self.reasons else told

    def beyond(self, bound: float, *, of_all: bool) -> bool:
        """Whether more than this share of all documents is refused.

        Of a sample (not `of_all`): whether so many would be met in it by chance less than once in 1,000 times if no
        more were; the upper tail of the binomial distribution.
        """
        if of_all or bound == 0:
            return self.refused > bound * self.documents
        return self.refused > 0 and _upper_tail(self.refused, self.documents, bound) < _BY_CHANCE


def _upper_tail(least: int, n: int, p: float) -> float:
    """Chance of at least so many of n where each has chance p, 0 < p ≤ 1."""
    if p == 1:
        return 1.0
    log_chance = n * math.log1p(-p)
    below = 0.0
    for k in range(least):
        below += math.exp(log_chance)
        log_chance += math.log((n - k) / (k + 1)) + math.log(p) - math.log1p(-p)
    return max(0.0, 1 - below)
