"""Seconds until the command line answers where nothing is computed: `--help`, a wrong recipe, a store that is down.

Each is the median of five runs, taken in turns, in a fresh process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.bench.measure import medians

RECIPE = """
name = "x"
version = "v1"
[storage]
root = "{root}"
{more}
[corpus]
sources = ["*.jsonl"]
[teacher]
model = "."
[student]
model = "."
"""
DOWN = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """`answers.NAME_s` of each."""
    with tempfile.TemporaryDirectory() as folder:
        wrong, down = Path(folder, "wrong.toml"), Path(folder, "down.toml")
        wrong.write_text(RECIPE.format(root="r", more="rooot = 1"))
        down.write_text(RECIPE.format(root="s3://bucket/root", more=""))
        asked: dict[str, Callable[[], None]] = {
            "help": partial(_answer, 0, "", "--help"),
            "wrong_recipe": partial(_answer, 2, "rooot: unknown key", "check", str(wrong)),
            "store_down": partial(_answer, 2, "127.0.0.1:9", "check", str(down)),
        }
        return {f"answers.{name}_s": seconds for name, seconds in medians(asked).items()}


def _answer(code: int, words: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "distill_ray", *arguments]
    done = subprocess.run(command, env={**os.environ, **DOWN}, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert words in done.stderr, done.stderr
