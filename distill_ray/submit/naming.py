"""Submission ids: of a run's name and version alone, so that everybody who submits it means the same job."""

from __future__ import annotations

import re
from collections.abc import Iterable

from distill_ray.config import Recipe
from distill_ray.config.naming import submission_id


def base_id(recipe: Recipe) -> str:
    """Id of the run's first job."""
    return submission_id(recipe)


def attempt_id(base: str, attempt: int) -> str:
    """Id of the run's n-th job: `base`, `base-r2`, `base-r3` … Ray takes each id once, also after its job ended."""
    return base if attempt == 1 else f"{base}-r{attempt}"


def attempt_of(submission_id: str | None, base: str) -> int | None:
    """Which job of the run the id is of; None for another run's."""
    if submission_id == base:
        return 1
    found = re.fullmatch(re.escape(base) + r"-r([1-9][0-9]*)", submission_id or "")
    return int(found[1]) if found and int(found[1]) > 1 else None


def attempts(submission_ids: Iterable[str | None], base: str) -> list[int]:
    """Numbers of the run's jobs among those ids, ascending."""
    found = (attempt_of(each, base) for each in submission_ids)
    return sorted(number for number in found if number is not None)
