"""A version's units are settled when its manifest is first published, even where that manifest is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill_ray import targets
from distill_ray.capture.verb import _of_this_version
from distill_ray.config import Recipe, parse_recipe
from distill_ray.errors import UserError
from distill_ray.lease import Lease, publish
from distill_ray.storage import Storage, open_storage
from distill_ray.units import Units
from tests.unit.targets_fakes import captured, identity, unit

OF = identity(temperatures=(1.0,))
ADDED = unit("added since")
ALONE = Units.of([ADDED])


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return parse_recipe(
        {
            "name": "tiny",
            "version": "v1",
            "storage": {"root": str(tmp_path)},
            "corpus": {"sources": ["a.jsonl"]},
            "teacher": {"model": "/teacher"},
            "student": {"teacher_layers": [0]},
        }
    )


def _publish(storage: Storage, recipe: Recipe) -> tuple[Units, str]:
    """The version's units, and the key of its manifest."""
    units = Units.of(unit(name) for name in "abc")
    summaries = {u.hash: targets.encode_unit(OF, u, *captured(OF), [], 1.0)[1] for u in units}
    targets.append_index(storage, OF, summaries.values())
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        entry = targets.write_run_manifest(storage, lease.token, OF, units, summaries)
        publish(storage, lease.token, "targets", entry)
    return units, entry["key"]


@pytest.mark.parametrize("manifest", ["whole", "gone", "cut short"])
def test_what_came_into_the_corpus_since_is_another_versions(recipe: Recipe, manifest: str):
    storage = open_storage(recipe.storage.root)
    assert _of_this_version(recipe, storage, OF, ALONE) == ALONE, "nothing is published yet"
    units, key = _publish(storage, recipe)
    if manifest == "gone":
        storage.delete(key)
    elif manifest == "cut short":
        storage.put(key, storage.get(key)[:-9])
    assert _of_this_version(recipe, storage, OF, Units.of([ADDED, *units])) == units


def test_units_of_a_lost_manifest_that_cannot_be_told_are_refused_with_the_remedy(recipe: Recipe):
    storage = open_storage(recipe.storage.root)
    units, key = _publish(storage, recipe)
    storage.delete(key)
    with pytest.raises(
        UserError, match=r"missing or damaged, and which 3 units .* v1 has .* has 2 now; .* new --version"
    ):
        _of_this_version(recipe, storage, OF, Units.of([units[0], ADDED]))


def test_a_manifest_of_another_capture_settles_nothing(recipe: Recipe):
    storage = open_storage(recipe.storage.root)
    units, _ = _publish(storage, recipe)
    grown = Units.of([ADDED, *units])
    assert _of_this_version(recipe, storage, identity(teacher="other"), grown) == grown
