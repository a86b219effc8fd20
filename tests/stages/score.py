"""A program that scores sequences with one engine and ends: vLLM wants a process of its own.

python -m tests.stages.score REQUEST.pickle RESULT.pickle
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill_ray import teacher
from distill_ray.config.sections import CaptureSection, TeacherSection
from distill_ray.schema import TargetRows


@dataclass(frozen=True)
class Scored:
    rows: list[TargetRows | str]
    start_s: float
    score_s: float


def score(section: TeacherSection, top_k: int, sequences: list[np.ndarray], folder: Path) -> Scored:
    """Score in a fresh process; `folder` takes the exchanged files."""
    request, result = folder / "request.pickle", folder / "result.pickle"
    request.write_bytes(pickle.dumps((section, CaptureSection(top_k=top_k), sequences)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.stages.score", str(request), str(result)],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the scoring process ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return pickle.loads(result.read_bytes())


def main(request: str, result: str) -> None:
    section, capture, sequences = pickle.loads(Path(request).read_bytes())
    started = time.monotonic()
    engine = teacher.open_engine(section, capture, max(map(len, sequences)))
    opened = time.monotonic()
    rows = engine.score(sequences)
    scored = Scored(rows, opened - started, time.monotonic() - opened)
    engine.close()
    Path(result).write_bytes(pickle.dumps(scored))


if __name__ == "__main__":
    from tests.stages.score import main as run  # so that the pickled class is not __main__'s

    run(*sys.argv[1:])
