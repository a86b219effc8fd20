"""What runs inside vLLM's workers: `worker_extension_cls="distill_ray.teacher.hook.CaptureWorker"`.

vLLM adds the methods below to its worker class, and the front end calls them by `collective_rpc`. `capture_install`
replaces the method by which that worker's model runner computes prompt log-probabilities. The runner goes on calling it
once a step, on every tensor-parallel rank of the last pipeline stage, for the requests that ask for prompt
log-probabilities; it returns nothing, so the front end has nothing to build.

Nothing raised here leaves a worker as an exception: from an EngineCore in a process of its own it would arrive as a
bare `Exception`, as does a call that a dead worker can no longer answer. Each method gives [what went wrong, result].

Written from the source of vLLM 0.32: `v1/worker/gpu_model_runner.py` (V1, also the CPU's) and
`v1/worker/gpu/model_runner.py` with `gpu/sample/prompt_logprob.py` (V2). The V1 hook is run by the tests, on CPUs. The
V2 hook was not run on a GPU; its tests give it the runner's data structures. Pipeline stages other than the last only
answer the calls; an eager CPU build of vLLM 0.32 cannot run a second stage at all, so no test does.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch

from distill_ray.teacher.draws import DrawSpec
from distill_ray.teacher.head import ShardHead, UnknownEngineError
from distill_ray.teacher.spans import Span, actual_v1, actual_v2, keys_of, rows_of, spans_v1, spans_v2
from distill_ray.teacher.store import RowStore
from distill_ray.teacher.tiles import TileReducer
from distill_ray.teacher.vllm_setup import HEAD_BYTES

Take = Callable[[list[Span], torch.Tensor, torch.Tensor], None]
"""(spans, hidden states of the step, actual next tokens) → rows kept."""

_V1 = ["hidden_states", "num_scheduled_tokens"]
_V2 = ["logits_fn", "hidden_states", "input_batch", "all_token_ids", "num_computed_tokens", "prompt_lens"]


def _as_value(method: Callable[..., Any]) -> Callable[..., list[Any]]:
    """["", result] of the method, or [traceback, None]."""

    @wraps(method)
    def call(*args: Any) -> list[Any]:
        try:
            return ["", method(*args)]
        except Exception:  # noqa: BLE001 - the front end raises it
            return [traceback.format_exc(), None]

    return call


class CaptureWorker:
    """Methods added to a vLLM worker."""

    @_as_value
    @torch.inference_mode()
    def capture_install(
        self, top_k: int, temperatures: list[float], vocab_size: int, token_ids: int, draws: list[Any] | None = None
    ) -> str:
        """Make this worker's model runner capture target rows.

        Args:
            top_k: K.
            temperatures: the T ≠ 1.
            vocab_size: V of the model's config.
            token_ids: ids below it may be kept.
            draws: the fields of `DrawSpec`, or None.

        Returns:
            An empty text, or why this engine is not one that capture knows.
        """
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        # Set here and not in the class: vLLM refuses an extension with a name that its worker has already.
        self._capture_store: RowStore | None = None
        self._capture_hook: Hook | None = None
        if not get_pp_group().is_last_rank:
            return ""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        group = get_tp_group()
        keep, store = group.is_first_rank, RowStore()
        try:
            config = runner.model_config
            size = config.get_hidden_size()
            head = ShardHead(runner.model, vocab_size, token_ids, size, config.dtype, runner.device)
            drawn = None if draws is None else DrawSpec(*draws)
            reducer = TileReducer(head, group, top_k, tuple(temperatures), drawn)
            # A rank that gave up its step would leave the others waiting for its part: there the engine has to end.
            fail = store.fail if group.world_size == 1 else None
            self._capture_hook = install(runner, _taker(reducer, store if keep else None, drawn is not None), fail)
        except (UnknownEngineError, AttributeError, ImportError) as error:
            if not _is_engines(error):
                raise
            return f"{type(error).__name__}: {error}"
        self._capture_store = store if keep else None
        return ""

    @_as_value
    def capture_fetch(self, requests: list[str]) -> bytes:
        """Words of finished requests, in the order of the names; nothing from a worker that keeps none."""
        return b"" if self._capture_store is None else self._capture_store.pop(requests)

    @_as_value
    def capture_aside(self, aside: bool) -> str:
        """Let prompt log-probabilities leave by vLLM's own way, or by the hook again; no request may be in flight.

        Returns:
            An empty text, or why not: the hook stays.
        """
        hook = self._capture_hook
        if hook is None:
            return ""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        if aside and hook.owner is runner:
            # V2 shows the head 1,024 rows at a time; V1 those of a request's whole chunk, outside vLLM's profile.
            rows = min(runner.max_num_tokens, runner.max_model_len)
            size = 4 * rows * runner.model_config.get_vocab_size()
            if size > HEAD_BYTES:
                return f"{size:,} bytes of logits at once in vLLM's V1 model runner, {HEAD_BYTES:,} may be"
        hook.step(aside)
        return ""

    @_as_value
    def capture_recomputed(self) -> int:
        """Fetched rows that vLLM computed more than once, because it had preempted their prompts."""
        return 0 if self._capture_store is None else self._capture_store.recomputed


def _is_engines(error: UnknownEngineError | AttributeError | ImportError) -> bool:
    """Whether it is the engine that lacks a name: a mistake of ours must not pass for an engine that we do not know."""
    if isinstance(error, UnknownEngineError):
        return True
    if isinstance(error, ImportError):
        return (error.name or "").partition(".")[0] == "vllm"
    owner = error.obj.__name__ if inspect.ismodule(error.obj) else type(error.obj).__module__
    return owner.partition(".")[0] == "vllm"


@dataclass(frozen=True)
class Hook:
    """What stands in for a method of vLLM's, and that method."""

    owner: Any
    name: str
    capture: Callable[..., dict[str, Any]]
    vllms: Callable[..., dict[str, Any]]

    def step(self, aside: bool) -> None:
        """From the next step on vLLM's own method answers, or the hook."""
        setattr(self.owner, self.name, self.vllms if aside else self.capture)


def install(runner: Any, take: Take, fail: Callable[[str], None] | None = None) -> Hook:
    """Hook into a V1 or V2 model runner.

    Args:
        runner: the worker's.
        take: keeps a step's rows.
        fail: told what the hook raised in a step, and the engine goes on; None: it ends with that.

    Raises:
        UnknownEngineError: neither, or its method takes other arguments.
    """
    worker = getattr(runner, "prompt_logprobs_worker", None)
    if worker is not None:
        _expect(worker, "compute_prompt_logprobs", _V2)
        _expect_attributes(worker, ("uses_prompt_logprobs",))
        owner, name, capture = worker, "compute_prompt_logprobs", _hook_v2(worker, take)
    else:
        _expect(runner, "_get_prompt_logprobs_dict", _V1)
        _expect_attributes(runner, ("num_prompt_logprobs", "requests", "query_start_loc", "input_batch"))
        owner, name, capture = runner, "_get_prompt_logprobs_dict", _hook_v1(runner, take)
    hook = Hook(owner, name, _telling(capture, fail), getattr(owner, name))
    hook.step(aside=False)
    return hook


def _expect(owner: Any, method: str, parameters: list[str]) -> None:
    found = getattr(owner, method, None)
    if found is None:
        raise UnknownEngineError(f"{type(owner).__name__} has no {method}")
    if list(inspect.signature(found).parameters) != parameters:
        raise UnknownEngineError(f"{type(owner).__name__}.{method} takes {inspect.signature(found)}, not {parameters}")


def _expect_attributes(owner: Any, names: tuple[str, ...]) -> None:
    if missing := [n for n in names if not hasattr(owner, n)]:
        raise UnknownEngineError(f"{type(owner).__name__} has no {', '.join(missing)}")


def _taker(reducer: TileReducer, store: RowStore | None, draws: bool) -> Take:
    def take(spans: list[Span], hidden_ND: torch.Tensor, actual_R: torch.Tensor) -> None:
        words = reducer.reduce(hidden_ND, rows_of(spans), actual_R, keys_of(spans) if draws else None)
        if store is not None:
            store.add(spans, words)

    return take


def _telling(hook: Callable[..., dict[str, Any]], fail: Callable[[str], None] | None) -> Callable[..., dict[str, Any]]:
    def capture(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return hook(*args, **kwargs)
        except Exception:
            if fail is None:
                raise
            fail(traceback.format_exc())
            return {}

    return capture


def _hook_v1(runner: Any, take: Take) -> Callable[..., dict[str, Any]]:
    def capture(hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        if runner.num_prompt_logprobs and (spans := spans_v1(runner, num_scheduled_tokens)):
            take(spans, hidden_states, actual_v1(runner, spans))
        return {}

    return capture


def _hook_v2(worker: Any, take: Take) -> Callable[..., dict[str, Any]]:
    def capture(
        logits_fn: Any,
        hidden_states: torch.Tensor,
        input_batch: Any,
        all_token_ids: torch.Tensor,
        num_computed_tokens: torch.Tensor,
        prompt_lens: np.ndarray,
    ) -> dict[str, Any]:
        del logits_fn, num_computed_tokens
        if spans := spans_v2(worker.uses_prompt_logprobs, input_batch, prompt_lens):
            take(spans, hidden_states, actual_v2(spans, input_batch, all_token_ids))
        return {}

    return capture
