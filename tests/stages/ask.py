"""A program that has vLLM answer prompts in several ways and ends: vLLM wants a process of its own.

python -m tests.stages.ask REQUEST.pickle RESULT.pickle
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from distill_ray import teacher
from distill_ray.config.generate import GenerateSection
from distill_ray.config.sections import CaptureSection, TeacherSection
from distill_ray.schema import TargetRows
from distill_ray.teacher import Answer
from distill_ray.teacher.generation import Writing
from distill_ray.teacher.vllm_engine import VllmEngine


@dataclass(frozen=True)
class Question:
    """Prompts, and how they are to be answered."""

    generate: GenerateSection
    prompts: list[np.ndarray]


def ask(
    section: TeacherSection, capture: CaptureSection, window: int, questions: list[Question], folder: Path
) -> tuple[list[list[list[Answer | str]]], list[list[TargetRows | str]]]:
    """For each question its answers, and the rows of their tokens when merely scored; all by one engine."""
    request, result = folder / "request.pickle", folder / "result.pickle"
    request.write_bytes(pickle.dumps((section, capture, window, questions)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.stages.ask", str(request), str(result)],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the process ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return pickle.loads(result.read_bytes())


def main(request: str, result: str) -> None:
    section, capture, window, questions = pickle.loads(Path(request).read_bytes())
    engine = teacher.open_engine(section, capture, window)
    assert isinstance(engine, VllmEngine)
    assert isinstance(engine._writing, Writing)
    answers, scored = [], []
    for question in questions:
        # Loading an engine takes a hundred times as long as its answers; how it writes is no part of the loading.
        engine._writing = replace(engine._writing, generate=question.generate)
        answers.append(engine.answer(question.prompts))
        scored.append(engine.score([a.tokens for found in answers[-1] for a in found if isinstance(a, Answer)]))
    engine.close()
    Path(result).write_bytes(pickle.dumps((answers, scored)))


if __name__ == "__main__":
    from tests.stages.ask import main as run  # so that the pickled class is not __main__'s

    run(*sys.argv[1:])
