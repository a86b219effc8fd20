"""Which capture targets belong to, and where its objects lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distill_ray.config import fingerprint
from distill_ray.errors import IntegrityError


@dataclass(frozen=True)
class CaptureIdentity:
    """Everything that changes what the teacher's stored numbers are; nothing that changes only where or how fast."""

    teacher: Mapping[str, Any]
    """Weights identity, dtype, quantisation, engine: plain JSON values."""
    tokenizer: str
    """Hash over the tokenizer's ids, rules and chat template."""
    vocab_size: int
    """V, the ids that the softmax runs over."""
    top_k: int
    """Kept tokens per row, K."""
    temperatures: tuple[float, ...]
    """Ascending; 1.0 is always among them."""
    codec: int
    """Version of the packed row format."""
    draws: int = 0
    """Tokens drawn per row; 0: none are kept."""
    draws_from: str = "all"
    """`all`: the whole distribution; `tail`: everything outside the kept tokens."""
    draws_temperature: float = 1.0
    """Drawn at; one of `temperatures`."""
    generate: Mapping[str, Any] | None = None
    """How the teacher answered prompts, with its end tokens: plain JSON values. None where it read the corpus."""
    token_ids: int | None = None
    """Ids from it on are the teacher's and not its tokenizer's, and are never kept; None, and V: there are none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "teacher", dict(self.teacher))
        if self.generate is not None:
            object.__setattr__(self, "generate", dict(self.generate))
        if self.token_ids == self.vocab_size:
            object.__setattr__(self, "token_ids", None)
        object.__setattr__(self, "temperatures", tuple(sorted({1.0, *map(float, self.temperatures)})))

    @property
    def extra_temperatures(self) -> tuple[float, ...]:
        """The temperatures other than 1, ascending; each has its own log-tail column."""
        return tuple(t for t in self.temperatures if t != 1.0)

    @property
    def kept_below(self) -> int:
        """Ids from it on are never kept; V where all may be."""
        return self.vocab_size if self.token_ids is None else self.token_ids

    @property
    def fingerprint(self) -> str:
        """32 hex digits; the folder of this capture's objects."""
        return fingerprint(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives the same identity back."""
        found = asdict(self) | {"temperatures": list(self.temperatures)}
        # What a capture has none of is left out, so that fingerprints from before there was such a thing still stand.
        kept = found if self.draws else {k: v for k, v in found.items() if not k.startswith("draws")}
        return {k: v for k, v in kept.items() if v is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CaptureIdentity:
        """Raises IntegrityError when fields are missing or unknown (written by another version)."""
        try:
            return cls(**data)
        except TypeError as error:
            raise IntegrityError(
                f"capture identity has fields {sorted(data)} ({error}); it was written by another version of "
                "distill_ray: use that version, or capture again"
            ) from None


def fingerprint_of(capture: CaptureIdentity | str) -> str:
    """The capture fingerprint, given either form."""
    return capture if isinstance(capture, str) else capture.fingerprint


def capture_prefix(capture: CaptureIdentity | str) -> str:
    """Key prefix of a capture's objects, with its trailing slash."""
    return f"targets/{fingerprint_of(capture)}/"


def unit_key(capture: CaptureIdentity | str, unit: str) -> str:
    """Key of one unit's object: `targets/<fingerprint>/<unit hash>.parquet`."""
    return f"{capture_prefix(capture)}{unit}.parquet"
