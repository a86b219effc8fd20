"""The recipe: one TOML file, parsed into a frozen model and checked before anything starts.

Imports neither torch nor ray; `load_recipe` answers in milliseconds.
"""

from distill_ray.config.kinds import (
    Identity,
    Kind,
    Placement,
    Section,
    canonical_json,
    fingerprint,
    identity_of,
    kind_of,
)
from distill_ray.config.recipe import Recipe, iso_week, load_recipe, parse_recipe

__all__ = [
    "Identity",
    "Kind",
    "Placement",
    "Recipe",
    "Section",
    "canonical_json",
    "fingerprint",
    "identity_of",
    "iso_week",
    "kind_of",
    "load_recipe",
    "parse_recipe",
]
