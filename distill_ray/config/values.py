"""Values that several sections hold."""

from __future__ import annotations

import os.path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from distill_ray.config.kinds import Placement, Section

Fraction = Annotated[float, Field(ge=0, le=1)]


def _absolute(uri: str) -> str:
    # Ray's workers need not share the driver's working folder.
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


Uri = Annotated[str, Field(min_length=1), AfterValidator(_absolute)]
"""Local path (made absolute) or `s3://bucket/key`."""


class Range(Section):
    """An elastic count, `{ min = …, max = … }`."""

    min: Placement[int] = Field(default=1, ge=0)
    """Least number kept while there is work; 0 to 4,096."""
    max: Placement[int] = Field(default=1, ge=1, le=4096)
    """Greatest number; 1 to 4,096."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is greater than max={self.max}; lower min or raise max")
        return self
