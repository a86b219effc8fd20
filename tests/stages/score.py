"""A program that scores sequences with one engine and ends: vLLM wants a process of its own.

python -m tests.stages.score REQUEST.pickle RESULT.pickle
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from distill_ray import teacher
from distill_ray.config.sections import CaptureSection, TeacherSection
from distill_ray.schema import TargetRows
from distill_ray.teacher import CapturePath
from distill_ray.teacher.vllm_engine import VllmEngine
from tests.assets import prose_topics


@dataclass(frozen=True)
class Scored:
    rows: list[TargetRows | str]
    start_s: float
    score_s: float
    path: str = ""
    """The path that vLLM's rows took."""
    recomputed_rows: int = 0
    """Rows that vLLM computed more than once, after a preemption."""
    again: list[TargetRows | str] | None = None
    """Scored again by the engine's other path."""
    after: list[TargetRows | str] | None = None
    """Scored a third time, as at first."""
    output: str = ""
    """What the process printed."""


@dataclass(frozen=True)
class How:
    """How to open vLLM, beyond its section."""

    path: CapturePath = "auto"
    more: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.EngineArgs`."""
    vocab_size: int | None = None
    """V instead of the model's own."""
    thrice: bool = False
    """Score again by the other path, too, and after that as at first."""


def vllm_section(folder: Path, **changes: object) -> TeacherSection:
    """`[teacher]` for `folder` on vLLM in float32 on CPUs, unless changed."""
    base = {"model": str(folder), "engine": "vllm", "dtype": "float32", "use_gpu": False, "batch_tokens": 256}
    return TeacherSection.model_validate(base | changes)


def prose_sequences(folder: Path, lengths: tuple[int, ...]) -> list[np.ndarray]:
    """Consecutive pieces of real text of these many tokens each, by the folder's tokenizer."""
    text = max(prose_topics().values(), key=len)
    ids = np.array(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids, np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return [ids[a : a + n] for a, n in zip(starts, lengths, strict=False)]


def score(
    section: TeacherSection,
    top_k: int,
    sequences: list[np.ndarray],
    folder: Path,
    temperatures: tuple[float, ...] = (1.0,),
    how: How | None = None,
    **draws: Any,
) -> Scored:
    """Score in a fresh process; `folder` takes the exchanged files, `draws` are fields of `[capture]`."""
    request, result = folder / "request.pickle", folder / "result.pickle"
    capture = CaptureSection(top_k=top_k, temperatures=temperatures, **draws)
    request.write_bytes(pickle.dumps((section, capture, sequences, how)))
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
    return replace(pickle.loads(result.read_bytes()), output=done.stdout)


def main(request: str, result: str) -> None:
    section, capture, sequences, how = pickle.loads(Path(request).read_bytes())
    window = max(map(len, sequences))
    started = time.monotonic()
    if how is None:
        engine = teacher.open_engine(section, capture, window)
    else:
        model = Path(section.model)
        vocab = how.vocab_size or teacher.vocabulary_size(model)
        ids = min(vocab, teacher.token_ids(model, section.trust_remote_code))
        engine = VllmEngine(section, capture, window, model, vocab, how.path, how.more, ids)
    opened = time.monotonic()
    rows = engine.score(sequences)
    scored = Scored(rows, opened - started, time.monotonic() - opened)
    if isinstance(engine, VllmEngine):
        scored = replace(scored, path=engine.path, recomputed_rows=engine.recomputed_rows)
    if how is not None and how.thrice:
        scored = replace(scored, again=engine.score_again(sequences), after=engine.score(sequences))
    engine.close()
    Path(result).write_bytes(pickle.dumps(scored))


if __name__ == "__main__":
    from tests.stages.score import main as run  # so that the pickled class is not __main__'s

    run(*sys.argv[1:])
