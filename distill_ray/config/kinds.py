"""Identity and placement, told apart in the type of every recipe field.

*Identity* changes what is computed and goes into fingerprints; *placement* changes only where and how fast.
"""

from __future__ import annotations

import hashlib
import json
from enum import Enum
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")


class Kind(Enum):
    IDENTITY = "identity"
    PLACEMENT = "placement"


class _Silent:
    """Marks a field that its fingerprint leaves out at the default."""


Identity = Annotated[T, Kind.IDENTITY]
AddedIdentity = Annotated[T, Kind.IDENTITY, _Silent()]
"""Identity that came later: left out at its default, so that the fingerprints from before it still stand."""
Placement = Annotated[T, Kind.PLACEMENT]
Listed = Annotated[T, Field(strict=False)]
"""A tuple, for which TOML has lists; what it holds stays strict."""


class Section(BaseModel):
    """A frozen part of the recipe; unknown keys are errors, and nothing is converted but integers to floats."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def kind_of(model: type[BaseModel], field: str) -> Kind | None:
    """The kind a field states, or None for a nested section, whose own fields state theirs."""
    return next((m for m in model.model_fields[field].metadata if isinstance(m, Kind)), None)


def _is_silent(section: BaseModel, field: str) -> bool:
    info = type(section).model_fields[field]
    return getattr(section, field) == info.default and any(isinstance(m, _Silent) for m in info.metadata)


def identity_of(section: BaseModel) -> dict[str, Any]:
    """The identity fields of a section as plain JSON values, nested sections included."""
    found: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section) and kind_of(type(section), name) is None:
            found[name] = identity_of(value)
        elif kind_of(type(section), name) is Kind.IDENTITY and not _is_silent(section, name):
            found[name] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return found


def fingerprint(identity: dict[str, Any]) -> str:
    """32 hex digits of SHA-256 over canonical JSON: key order and whitespace do not count.

    Defaults count by value: a field left out and a field stated at its default give the same fingerprint.
    """
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:32]


def canonical_json(identity: dict[str, Any]) -> str:
    """The ASCII text whose SHA-256 a fingerprint is."""
    return json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
