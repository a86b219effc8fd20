"""The driver with a teacher slow enough to be killed at a chosen unit: `python -m tests.cluster.chaos.slowly …`.

The teacher asks for a GPU, which the nodes of a test cluster only declare, and computes on the CPU: it is placed as a
real one would be. Once capture is published, the process becomes the command line itself, which does all the rest.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill_ray import capture, load_recipe, teacher
from distill_ray.config import Recipe
from distill_ray.errors import DistillError
from distill_ray.lease import Lease, read_published
from distill_ray.schema import TargetRows
from distill_ray.session import ray_session
from distill_ray.storage import open_storage
from distill_ray.teacher.engine import Engine
from distill_ray.telemetry import Progress


@dataclass(frozen=True)
class Open:
    """Opens the recipe's engine on the CPU; says under `folder` which process it is in and what it is given."""

    recipe: Recipe
    folder: Path
    seconds: float

    def __call__(self) -> SlowEngine:
        section = self.recipe.teacher.model_copy(update={"use_gpu": False})
        engine = teacher.open_engine(section, self.recipe.capture, self.recipe.corpus.window_tokens)
        with (self.folder / "teachers").open("a") as log:
            log.write(f"{os.getpid()}\n")
        return SlowEngine(engine, self.seconds)


class SlowEngine:
    """The engine itself, `seconds` later."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self._engine, self._seconds = engine, seconds
        self.vocab_size, self.version, self.notes = engine.vocab_size, engine.version, engine.notes

    def score(self, sequences: list[np.ndarray]) -> list[TargetRows | str]:
        time.sleep(self._seconds)
        return self._engine.score(sequences)

    def score_again(self, sequences: list[np.ndarray]) -> list[TargetRows | str] | None:
        return self._engine.score_again(sequences)

    def close(self) -> None:
        self._engine.close()


def main(recipe_path: str, address: str, folder: str, seconds: str) -> None:
    """Capture what is missing on declared GPUs, then `distill-ray run`."""
    recipe = load_recipe(recipe_path)
    storage = open_storage(recipe.storage.root)
    if "targets" not in read_published(storage, recipe.run_prefix):
        section = recipe.teacher.model_copy(update={"use_gpu": True})
        placed = recipe.model_copy(update={"teacher": section})
        factory = Open(recipe, Path(folder), float(seconds))
        try:
            with ray_session(address), Lease.acquire(storage, recipe.run_prefix) as lease:
                capture.run(placed, storage, lease.token, threading.Event(), Progress, engine_factory=factory)
        except DistillError as error:  # as the command line ends
            print(f"distill-ray: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        print(json.dumps({"captured": True}), file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "distill_ray", "run", recipe_path, "--address", address]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    from tests.cluster.chaos import slowly  # so that the pickled classes are not __main__'s

    slowly.main(*sys.argv[1:])
