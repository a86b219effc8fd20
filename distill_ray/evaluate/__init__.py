"""Evaluation: how good the student is against its teacher, on held-out targets.

verb.py      what is held out, the run over it, and whether a published report still stands
scoring.py   figures of teacher, student before and student after, in one Ray task
figures.py   the report's other figures: identity, tokens, rates, targets
"""

from distill_ray.evaluate.verb import only_bounds_changed, outdated, rejudge, require_held_out, run

__all__ = [
    "only_bounds_changed",
    "outdated",
    "rejudge",
    "require_held_out",
    "run",
]
