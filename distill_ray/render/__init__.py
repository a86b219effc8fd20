"""Kubernetes manifests from a recipe: a pure function from recipe to plain dicts, and their YAML."""

from distill_ray.render.create import ApiServer, create
from distill_ray.render.document import KINDS, manifests, to_yaml
from distill_ray.render.names import run_name
from distill_ray.render.week import version_of

__all__ = ["KINDS", "ApiServer", "create", "manifests", "run_name", "to_yaml", "version_of"]
