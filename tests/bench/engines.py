"""vLLM engines, each in a process of its own that is told what to time. vLLM is imported there only."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from distill_ray.config.sections import CaptureSection, TeacherSection
from distill_ray.schema import TargetRows
from distill_ray.teacher.scratch import Scratch
from tests.bench.measure import resident_mib

K = 64
WINDOW = 512
SEQUENCES = 4
BATCH_TOKENS = 512
IDLE_S = 1.5
"""vLLM's workers spin for a second after their last call, on cores that the next engine needs."""
_TILE_BYTES = 2**24, 2**27
"""A cache's worth of logits, and as many as capture makes at once."""
_LOG_TAIL = 4000


class EngineProcess:
    """One engine. `kind` is "worker" or "flat", our engine on that path, or "dict", vLLM's own `LLM`.

    Args:
        kind: what it is.
        folder: of the model.
        log: takes what it prints.

    Raises:
        RuntimeError: it failed, here or when it is asked; shows the end of the log.
    """

    tokens = SEQUENCES * WINDOW
    """Tokens of one pass."""

    def __init__(self, kind: str, folder: Path, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._log = log
        self._pipe, its = context.Pipe()
        self._process = context.Process(target=_serve, args=(its, kind, folder, log))
        self._process.start()
        its.close()
        self._answer()

    def ask(self, what: str) -> float:
        """Seconds of one pass: "capture", and of "worker" also "bare" (without capture) and "head" (head alone)."""
        time.sleep(IDLE_S)
        self._pipe.send(what)
        return self._answer()

    def peak_mib(self) -> float:
        """The most that each of its processes ever held, added up."""
        process = psutil.Process(self._process.pid)
        return sum(resident_mib(p.pid)[1] for p in (process, *process.children(recursive=True)))

    def close(self) -> None:
        """End it."""
        self._pipe.close()
        self._process.join()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"an engine's process failed:\n{self._log.read_text()[-_LOG_TAIL:]}") from None


def _serve(pipe: Connection, kind: str, folder: Path, log: Path) -> None:
    with log.open("wb") as out:
        for descriptor in (1, 2):
            os.dup2(out.fileno(), descriptor)
    passes = {"worker": worker, "flat": flat, "dict": dicts}[kind](folder, sequences(folder))
    pipe.send(None)
    while True:
        try:
            what = pipe.recv()
        except EOFError:
            passes["close"]()
            return
        gc.collect()
        started = time.perf_counter()
        # A pass may know its time better, where only a part of it counts.
        taken = passes[what]()
        pipe.send(time.perf_counter() - started if taken is None else taken)


def sequences(folder: Path) -> list[np.ndarray]:
    """Random ids: what the arithmetic costs does not depend on them."""
    from distill_ray import teacher

    rng = np.random.default_rng(0)
    return list(rng.integers(0, teacher.vocabulary_size(folder), (SEQUENCES, WINDOW)).astype(np.int32))


def section(folder: Path) -> TeacherSection:
    """`[teacher]` of all engines."""
    given = {"model": str(folder), "dtype": "float32", "use_gpu": False, "batch_tokens": BATCH_TOKENS}
    return TeacherSection.model_validate(given)


def flat(folder: Path, tokens: list[np.ndarray], path: Any = "flat") -> dict[str, Callable[[], float | None]]:
    """Our engine."""
    from distill_ray import teacher

    engine = teacher.open_engine(section(folder), CaptureSection(top_k=K), WINDOW, path)

    def capture() -> None:
        if not all(isinstance(rows, TargetRows) for rows in engine.score(tokens)):
            raise AssertionError("a sequence was refused")

    return {"capture": capture, "close": engine.close, "engine": engine}  # type: ignore[dict-item]


def worker(folder: Path, tokens: list[np.ndarray]) -> dict[str, Callable[[], float | None]]:
    """Our engine with capture in vLLM's workers; the same engine without capture, and its head alone."""
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    passes = flat(folder, tokens, "worker")
    inside: Any = passes["engine"]._engine  # type: ignore[attr-defined]
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
    ways: list[int] = []

    def bare() -> None:
        for i, each in enumerate(tokens):
            inside.add_request(f"bare-{i}", tokens_input(each.tolist()), params)
        ended = 0
        while ended < len(tokens):
            ended += len(inside.step())

    def head() -> float:
        if not ways:
            ways.extend(inside.collective_rpc(fastest_way))
        return inside.collective_rpc(head_seconds, args=(ways[0], len(tokens) * WINDOW))[0]

    return passes | {"bare": bare, "head": head}


def _logits_by(way: int, vllm_worker: Any) -> tuple[Callable[[torch.Tensor], torch.Tensor], int, int]:
    """One way of making logits, the rows it takes at a time, and the model's width.

    Ways 0 … 2 are vLLM's own head, 3 … 5 torch's matmul into kept memory, 6 … 8 vLLM's head into capture's kept memory;
    each in tiles of a cache's size, of capture's size, and a whole step.
    """
    runner = vllm_worker.model_runner
    vocab, width = runner.model_config.get_vocab_size(), runner.model_config.get_hidden_size()
    rows = (*(min(BATCH_TOKENS, most // (4 * vocab)) for most in _TILE_BYTES), BATCH_TOKENS)[way % 3]
    if way < 3:
        return runner.model.compute_logits, rows, width
    if way < 6:
        weight_DV = torch.randn(vocab, width, generator=torch.Generator().manual_seed(0)).T
        out = torch.empty(rows, vocab)
        return (lambda hidden: torch.mm(hidden, weight_DV, out=out[: len(hidden)])), rows, width
    memory = Scratch(rows, vocab, torch.float32)

    def kept(hidden: torch.Tensor) -> torch.Tensor:
        with memory:
            return runner.model.compute_logits(hidden)

    return kept, rows, width


def head_seconds(vllm_worker: Any, way: int, rows: int) -> float:
    """Seconds for the logits of so many rows and one look at each; runs in vLLM's worker."""
    with torch.inference_mode():
        logits_of, step, width = _logits_by(way, vllm_worker)
        hidden = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
        logits_of(hidden[:step]).sum()
        started = time.perf_counter()
        for tile in hidden.split(step):
            logits_of(tile).sum()
        return time.perf_counter() - started


def fastest_way(vllm_worker: Any) -> int:
    """The way that takes least for one step's rows; runs in vLLM's worker."""
    return min(range(9), key=lambda way: min(head_seconds(vllm_worker, way, BATCH_TOKENS) for _ in range(2)))


def dicts(folder: Path, tokens: list[np.ndarray]) -> dict[str, Callable[[], float | None]]:
    """vLLM's `LLM` with its default prompt log-probabilities, read into rows."""
    from distill_ray import teacher
    from distill_ray.teacher.vllm_setup import engine_arguments, set_process_environment
    from tests.bench.rivals import rows_from_dicts

    of, vocab = section(folder), teacher.vocabulary_size(folder)
    set_process_environment(of)
    from vllm import LLM, SamplingParams

    arguments = engine_arguments(of, CaptureSection(top_k=K), WINDOW, folder, vocab, vocab)
    del arguments["long_prefill_token_threshold"]
    llm = LLM(**arguments)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=K, detokenize=False)
    prompts: Any = [{"prompt_token_ids": each.tolist()} for each in tokens]

    def capture() -> None:
        for each, output in zip(tokens, llm.generate(prompts, params, use_tqdm=False), strict=True):
            assert output.prompt_logprobs is not None
            rows_from_dicts(output.prompt_logprobs, each, K, vocab)

    return {"capture": capture, "close": llm.llm_engine.engine_core.shutdown}
