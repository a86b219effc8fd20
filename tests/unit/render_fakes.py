"""Recipes to render."""

from __future__ import annotations

from typing import Any

from distill_ray import render
from distill_ray.config import Recipe, parse_recipe

TEXT = 'name = "demo"\n# the text itself is not read again here\n'


def images(*roles: str, tag: int = 1) -> dict[str, Any]:
    """Of `[cluster]`: what states the images of these roles; of all without one."""
    return {role: {"image": f"{role}:{tag}"} for role in roles or ("head", "teacher", "student")}


def recipe_of(version: str | None = "2026-W48", **sections: dict[str, Any]) -> Recipe:
    """A recipe with images and pinned roles, unless its sections say otherwise."""
    stated: dict[str, Any] = {
        "storage": {"root": "s3://bucket/root"},
        "corpus": {"sources": ["s3://bucket/data/*.parquet"]},
        "teacher": {"model": "s3://bucket/teacher", "tensor_parallel": 2, "replicas": {"min": 1, "max": 6}},
        "student": {"model": "s3://bucket/student"},
        "train": {"workers": {"min": 16, "max": 16}},
        "cluster": {"pin_by_label": True} | images(),
    }
    merged = {name: stated.get(name, {}) | sections.get(name, {}) for name in stated | sections}
    name = merged.pop("name", {}).get("is", "demo")
    return parse_recipe({"name": name, **merged}, version=version)


def rendered(kind: str, recipe: Recipe, *options: str) -> list[dict[str, Any]]:
    """All documents of a kind."""
    return render.manifests(recipe, TEXT, kind, options)


def of_kind(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The one document of that kind."""
    (found,) = (document for document in documents if document["kind"] == kind)
    return found
