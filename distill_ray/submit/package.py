"""What travels with a job: this installation's code and the recipe as it was understood here. No environment variable.

The code is a package of its own, whose place on the nodes follows from its content: machine code that a node compiled
for it stands as long as the code does, whatever the recipe.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_ray.config import Recipe, parse_recipe
from distill_ray.errors import DistillError

RECIPE_NAME = "recipe.toml"
STOP_WAIT_S = 360
"""Seconds that a stopped driver gets before Ray kills it: training saves a checkpoint for up to 300 s of them."""


def lay_out(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Copy code and recipe under `folder`; returns the job's runtime_env, which names them there."""
    code = Path(__file__).resolve().parent.parent
    shutil.copytree(code, folder / code.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
    job = folder / "job"
    job.mkdir()
    (job / RECIPE_NAME).write_text(recipe_toml(recipe), encoding="utf-8")
    return {
        "working_dir": str(job),
        "py_modules": [str(folder / code.name)],
        # Read by Ray's supervisor of the job. Its own 3 s would kill a driver that is saving.
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
    }


def recipe_toml(recipe: Recipe) -> str:
    """The recipe as TOML: what was stated, with root, version and absolute paths as they were understood here."""
    stated = recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True) | {"version": recipe.version}
    lines = [f"{_key(name)} = {_value(value)}" for name, value in stated.items() if not isinstance(value, dict)]
    for name, section in stated.items():
        if isinstance(section, dict):
            lines += ["", f"[{_key(name)}]", *(f"{_key(key)} = {_value(value)}" for key, value in section.items())]
    text = "\n".join(lines) + "\n"
    if parse_recipe(tomllib.loads(text)) != recipe:
        raise DistillError("this recipe cannot be written down so that it reads back the same; please report it")
    return text


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    # JSON and TOML write strings, numbers and booleans alike, but for one control character.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007F")


def _key(name: str) -> str:
    return _value(name)
