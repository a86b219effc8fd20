"""Names: of a run at Ray's Jobs API, and of the models that a run is made from."""

from __future__ import annotations

import hashlib

from distill_ray.config.recipe import Recipe

_READABLE = 80
"""Characters of the readable part, which goes into URLs and into names of log files."""


def submission_id(recipe: Recipe) -> str:
    """`<name>-<version>-<8 hex digits>`, at most 89 of `a-z A-Z 0-9 . _ -`; the API takes each id once.

    Of name and version alone, so that everybody who submits the run means the same job.
    The digits tell apart what reads alike: `a-b`, version `c`, and `a`, version `b-c`.
    """
    digits = hashlib.sha256(f"{recipe.name}\0{recipe.version}".encode()).hexdigest()[:8]
    return f"{recipe.name}-{recipe.version}"[:_READABLE] + f"-{digits}"


def model_name(uri: str) -> str:
    """A model without its location, which may be private."""
    return uri.rstrip("/").rpartition("/")[2]
