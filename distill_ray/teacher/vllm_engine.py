"""The teacher on vLLM: rows are captured inside its workers, or read by its public path.

The worker path (`hook.py`) gives everything a row can hold. The public path, prompt log-probabilities in flat lists,
stands in on an engine that the hook does not know, and says so. Checked in vLLM 0.32's source: prompt log-probabilities
are the log-softmax, in float32, of the model's own logits (soft-cap and scale applied, rows padded beyond
config.vocab_size cut off); no temperature, penalty or other sampling processor touches them. It gives no temperatures
other than 1 and no draws, which are refused, and no entropy.
"""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import astuple
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from distill_ray.config.sections import CaptureSection, TeacherSection
from distill_ray.errors import DistillError, IntegrityError
from distill_ray.schema import TargetRows
from distill_ray.teacher.draws import DrawSpec
from distill_ray.teacher.engine import CapturePath, finite_or_reason, ids_again, refusal
from distill_ray.teacher.flat import rows_from_flat
from distill_ray.teacher.generation import Answer, Completion, answers, joined, writing_of
from distill_ray.teacher.seeds import hash_in_name, named_for_draws
from distill_ray.teacher.vllm_generation import write_completions
from distill_ray.teacher.vllm_paths import may_fall_back, unknown_version
from distill_ray.teacher.vllm_setup import engine_arguments, set_process_environment
from distill_ray.teacher.wire import row_words, rows_from_words

T = TypeVar("T")
_SHORT = "ids that the tokenizer lacks took the places of others"
_REFUSALS = (DistillError, ValueError)
_WAVES_IN_FLIGHT = 4
"""Scheduler steps' worth of tokens queued at once: enough to keep the engine busy, and it bounds the Python lists of
the finished requests, which take over 100 bytes an entry."""


class VllmEngine:
    """`Engine` over `vllm.LLMEngine`; the process of the actor becomes the engine's front end.

    Args:
        section: which model, how split.
        capture: what a row holds.
        window_tokens: most tokens of one sequence.
        folder: the model, on this machine.
        vocab_size: V.
        path: "worker" or "flat" for that path and no other; "auto" for the worker path where it can be had.
        more: further arguments of `vllm.EngineArgs`; they win.
        token_ids: ids below it may be kept; None: any.

    Raises:
        CannotCaptureError: rows hold what the path cannot give, or the path cannot be had.
    """

    def __init__(
        self,
        section: TeacherSection,
        capture: CaptureSection,
        window_tokens: int,
        folder: Path,
        vocab_size: int,
        path: CapturePath = "auto",
        more: Mapping[str, Any] = MappingProxyType({}),
        token_ids: int | None = None,
    ) -> None:
        self.notes: tuple[str, ...] = ()
        self._wanted = path
        if path == "flat":
            may_fall_back(path, None, section, capture)
        set_process_environment(section)
        self._top_k, self._window = capture.top_k, window_tokens
        self._vocab, self._token_ids = vocab_size, token_ids or vocab_size
        self._temperatures, self._draws = capture.extra_temperatures, DrawSpec.of(capture)
        self._writing = writing_of(capture, folder, section.trust_remote_code)
        self._in_flight = _WAVES_IN_FLIGHT * max(section.batch_tokens, window_tokens)
        self._request = itertools.count()
        self._engine: Any = None
        arguments = partial(engine_arguments, section, capture, window_tokens, folder, vocab_size, self._token_ids)
        unknown = unknown_version()
        if path != "flat" and not unknown:
            self._open(arguments(in_worker=True) | dict(more))
            unknown = self._install()
            if not unknown:
                self.path: CapturePath = "worker"
                return
            # Opened anew: the public path bounds the rows of a prompt's chunk, which the worker path need not.
            self.close()
        self.notes = may_fall_back(path, unknown, section, capture)
        self._open(arguments(in_worker=False) | dict(more))
        self.path = "flat"

    @property
    def version(self) -> str:
        import vllm

        return f"vllm {vllm.__version__}, {'inside its workers' if self.path == 'worker' else 'public path'}"

    @property
    def vocab_size(self) -> int:
        return self._vocab

    @property
    def recomputed_rows(self) -> int:
        """Rows that vLLM computed more than once after preemptions; many of them ask for a greater KV cache."""
        return sum(self._ask("capture_recomputed")) if self.path == "worker" else 0

    def _open(self, arguments: dict[str, Any]) -> None:
        from vllm import EngineArgs, LLMEngine

        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))

    def _install(self) -> str | None:
        draws = None if self._draws is None else list(astuple(self._draws))
        form = (self._top_k, list(self._temperatures), self._vocab, self._token_ids, draws)
        return next(filter(None, self._ask("capture_install", *form)), None)

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        """What a method of `CaptureWorker` gives in each worker.

        Raises DistillError: it failed in one. The engine lives, and would fail again.
        """
        answers = self._or_die(partial(self._engine.collective_rpc, method, args=arguments))
        if failure := next((failure for failure, _ in answers if failure), None):
            print(failure, file=sys.stderr, flush=True)
            raise DistillError(
                f"{method} failed inside vLLM's worker: {failure.strip().splitlines()[-1]}. Use the vLLM version of "
                "the project's lock file; where memory ran out, lower teacher.batch_tokens or "
                "teacher.gpu_memory_share. The traceback is in the log of the teacher's process"
            )
        return [result for _, result in answers]

    def score(self, sequences: list[np.ndarray]) -> list[TargetRows | str]:
        return self._scored(sequences, None) if self.path == "worker" else self._listed(sequences, self._top_k)

    def score_again(self, sequences: list[np.ndarray]) -> list[TargetRows | str] | None:
        """By vLLM's public path, in the worker path past the hook."""
        kept = ids_again(self._top_k, self._token_ids)
        if self.path == "flat":  # where capture fell back to it, it is no other path
            return self._listed(sequences, kept) if self._wanted == "flat" else None
        try:
            if reason := next(filter(None, self._ask("capture_aside", True)), None):
                self.notes = (f"the audit will load the teacher once more: {reason}",)
                return None
            return self._listed(sequences, kept)
        finally:
            self._ask("capture_aside", False)

    def _listed(self, sequences: list[np.ndarray], kept: int) -> list[TargetRows | str]:
        """Rows with so many ids from vLLM's flat lists."""
        found = self._scored(sequences, kept)
        for i in (i for i, rows in enumerate(found) if rows is _SHORT):
            # One by one: the lists may be many times as long, and hardly any teacher gives such ids a place.
            found[i] = self._scored([sequences[i]], kept, self._vocab - self._token_ids)[0]
        return found

    def _scored(self, sequences: list[np.ndarray], kept: int | None, more: int = 0) -> list[TargetRows | str]:
        """Rows with `kept` ids, of `more` listed ones, or `_SHORT`; None: what the hook keeps, which knows K itself."""
        params = _params((kept or 0) + more)
        results: list[TargetRows | str | None] = [refusal(s, self._vocab, self._window) for s in sequences]
        waiting = iter([i for i, reason in enumerate(results) if reason is None])
        running: dict[str, tuple[int, str]] = {}
        finished: list[tuple[int, str]] = []
        queued = ready = 0  # tokens; those whose rows wait in the worker count as queued, so its memory is bounded
        while True:
            while queued < self._in_flight and (i := next(waiting, None)) is not None:
                name, inside = self._submit(sequences[i], params)
                running[name] = i, inside
                queued += len(sequences[i])
            if not running:
                break
            for output in self._or_die(self._engine.step):
                i, inside = running.pop(output.request_id)
                finished.append((i, inside))
                ready += len(sequences[i])
                if kept is not None:
                    results[i] = self._flat_rows(output.prompt_logprobs, sequences[i], kept)
            if kept is not None or not running or 2 * ready >= self._in_flight:
                if kept is None:
                    for i, rows in self._fetch(finished, sequences):
                        results[i] = rows
                queued, ready, finished = queued - ready, 0, []
        return [r for r in results if r is not None]

    def answer(self, prompts: list[np.ndarray]) -> list[list[Answer | str]]:
        if self._writing is None:
            raise ValueError("the capture scores what there is; answers need capture.mode='generate'")
        room = self._window - self._writing.generate.max_tokens
        refused = [refusal(p, self._vocab, room, least=1) for p in prompts]
        written = write_completions(self._engine, self._or_die, self._writing, prompts, refused)
        pairs = zip(prompts, written, strict=True)
        scored = self.score([joined(p, c) for p, found in pairs for c in found if isinstance(c, Completion)])
        return answers(prompts, written, scored)

    def _submit(self, tokens: np.ndarray, params: Any) -> tuple[str, str]:
        """Queue one sequence; its name outside and inside the engine, which makes names unique."""
        from vllm.inputs.engine import tokens_input

        name = f"s{next(self._request)}"
        if self._draws is not None:
            name = named_for_draws(name, tokens)
        add = partial(self._engine.add_request, name, tokens_input(tokens.tolist()), params)
        inside = self._or_die(add, _REFUSALS)
        if self._draws is not None:
            hash_in_name(inside)  # refused here, where it is an error, and not in the worker, whose errors end it
        return name, inside

    def _fetch(
        self, finished: list[tuple[int, str]], sequences: list[np.ndarray]
    ) -> list[tuple[int, TargetRows | str]]:
        """All their rows in one call, as bytes."""
        names = [name for _, name in finished]
        data = b"".join(self._ask("capture_fetch", names))
        counts = [len(sequences[i]) - 1 for i, _ in finished]
        form = (self._top_k, self._temperatures, 0 if self._draws is None else self._draws.count)
        words = row_words(*form)
        if len(data) != 4 * words * sum(counts):
            raise IntegrityError(
                f"vLLM's workers gave {len(data)} bytes for {sum(counts)} rows of {4 * words}; rows are missing or "
                "double. Use the vLLM version of the project's lock file"
            )
        parts = np.split(np.frombuffer(data, np.int32).reshape(-1, words), np.cumsum(counts)[:-1])
        return [
            (i, finite_or_reason(rows_from_words(part, *form))) for (i, _), part in zip(finished, parts, strict=True)
        ]

    def _or_die(self, call: Callable[[], T], refusals: tuple[type[Exception], ...] = ()) -> T:
        try:
            return call()
        except refusals:
            raise  # a guard of ours or vLLM's refused this very request; the engine lives, and would refuse it again
        except Exception:  # noqa: BLE001
            # EngineDeadError, or a bare Exception where only a worker is gone yet: its state is lost. An exception
            # would fail the run for one unit; a dead process is replaced by the pool, which gives the unit to the next.
            traceback.print_exc()
            print("teacher: vLLM's engine failed, so this process ends", file=sys.stderr, flush=True)
            os._exit(1)

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def _flat_rows(self, flat: Any, tokens: np.ndarray, kept: int) -> TargetRows | str:
        # Never iterate FlatLogprobs: that builds a dict for each position.
        ids, values, ranks = (np.asarray(entries) for entries in (flat.token_ids, flat.logprobs, flat.ranks))
        rows = rows_from_flat(ids, values, ranks, tokens, kept, self._vocab, self._token_ids)
        return _SHORT if rows is None else finite_or_reason(rows)


def _params(prompt_logprobs: int) -> Any:
    """To read a prompt, with so many of its log-probabilities; with any number the runner calls the hook, too."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=prompt_logprobs,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
