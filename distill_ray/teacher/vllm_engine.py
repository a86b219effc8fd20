"""The teacher on vLLM, by its public path: prompt log-probabilities in flat lists.

Checked in vLLM 0.32's source: prompt log-probabilities are the log-softmax, in float32, of the model's own logits
(soft-cap and scale applied, rows padded beyond config.vocab_size cut off); no temperature, penalty or other sampling
processor touches them. Temperatures other than 1 can therefore not be had here, and are refused by `open_engine`.
"""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from distill_ray.config.sections import CaptureSection, TeacherSection
from distill_ray.schema import TargetRows
from distill_ray.teacher.engine import finite_or_reason, refusal
from distill_ray.teacher.flat import rows_from_flat

_WAVES_IN_FLIGHT = 4
"""Scheduler steps' worth of tokens queued at once: enough to keep the engine busy, and it bounds the Python lists of
the finished requests, which take over 100 bytes an entry."""

_HEAD_BYTES = 2**29
"""Most bytes of one request's float32 logits in one step."""


class VllmEngine:
    """`Engine` over `vllm.LLMEngine`; the process of the actor becomes the engine's front end."""

    def __init__(
        self, section: TeacherSection, capture: CaptureSection, window_tokens: int, folder: Path, vocab_size: int
    ) -> None:
        set_process_environment(section)
        from vllm import EngineArgs, LLMEngine, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._top_k, self._window, self._vocab = capture.top_k, window_tokens, vocab_size
        self._in_flight = _WAVES_IN_FLIGHT * max(section.batch_tokens, window_tokens)
        self._engine: Any = LLMEngine.from_engine_args(
            EngineArgs(**engine_arguments(section, capture, window_tokens, folder, vocab_size))
        )
        self._params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=capture.top_k,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._request = itertools.count()

    @property
    def vocab_size(self) -> int:
        return self._vocab

    def score(self, sequences: list[np.ndarray]) -> list[TargetRows | str]:
        from vllm.inputs.engine import tokens_input

        results: list[TargetRows | str | None] = [refusal(s, self._vocab, self._window) for s in sequences]
        waiting = iter([i for i, reason in enumerate(results) if reason is None])
        running: dict[str, int] = {}
        queued = 0
        while True:
            while queued < self._in_flight and (i := next(waiting, None)) is not None:
                name = f"s{next(self._request)}"
                self._engine.add_request(name, tokens_input(sequences[i].tolist()), self._params)
                running[name] = i
                queued += len(sequences[i])
            if not running:
                break
            for output in self._step():
                i = running.pop(output.request_id)
                queued -= len(sequences[i])
                results[i] = self._rows(output.prompt_logprobs, sequences[i])
        return [r for r in results if r is not None]

    def _step(self) -> list[Any]:
        try:
            return self._engine.step()
        except Exception:  # noqa: BLE001
            # EngineDeadError when the engine is a process of its own; RuntimeError("cancelled") and others when a
            # worker of an engine in this process is gone. Either way its state is lost. An exception would fail the
            # run for one unit; a dead process is replaced by the pool, which gives the unit to the next one.
            traceback.print_exc()
            print("teacher: vLLM's engine failed, so this process ends", file=sys.stderr, flush=True)
            os._exit(1)

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def _rows(self, flat: Any, tokens: np.ndarray) -> TargetRows | str:
        # Never iterate FlatLogprobs: that builds a dict for each position.
        rows = rows_from_flat(
            np.asarray(flat.token_ids),
            np.asarray(flat.logprobs),
            np.asarray(flat.ranks),
            tokens,
            self._top_k,
            self._vocab,
        )
        return finite_or_reason(rows)


def engine_arguments(
    section: TeacherSection, capture: CaptureSection, window_tokens: int, folder: Path, vocab_size: int
) -> dict[str, Any]:
    """Arguments of `vllm.EngineArgs` for capture."""
    # vLLM's CPU workers can bind their threads only in a process of their own, even a single one.
    apart = section.tensor_parallel * section.pipeline_parallel > 1 or not section.use_gpu
    on_gpu = {"gpu_memory_utilization": section.gpu_memory_share} if section.use_gpu else {}
    return on_gpu | {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "dtype": section.dtype,
        "quantization": section.quantization,
        "trust_remote_code": section.trust_remote_code,
        "tensor_parallel_size": section.tensor_parallel,
        "pipeline_parallel_size": section.pipeline_parallel,
        "distributed_executor_backend": "mp" if apart else None,
        # A prompt of exactly max_model_len is rejected: there must be room for the one token that is generated.
        "max_model_len": window_tokens + 1,
        "max_num_batched_tokens": section.batch_tokens,
        "max_num_seqs": min(256, section.batch_tokens),
        # Of one request, so many rows meet the head at once as [rows, V] float32, outside vLLM's memory profile.
        "long_prefill_token_threshold": min(window_tokens, max(64, _HEAD_BYTES // (4 * vocab_size))),
        "max_logprobs": capture.top_k,
        # With it, the rows of a shared prefix would be skipped.
        "enable_prefix_caching": False,
        "enforce_eager": not section.use_gpu,
        "disable_log_stats": True,
        "seed": 0,
    }


def set_process_environment(section: TeacherSection) -> None:
    """What vLLM reads from the environment when it is imported; called in the actor's own process, before that."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if section.use_gpu:
        return
    # The scheduler then runs in this process beside the workers' own: one process and one import of vLLM less, and on
    # CPUs the front end is never what the workers wait for.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(section.cpu_cache_gib)
    # Ray sets this from num_cpus, a share that serves placement only; vLLM binds its threads itself.
    os.environ.pop("OMP_NUM_THREADS", None)
    ranks = section.tensor_parallel * section.pipeline_parallel
    if ranks > 1:
        # The automatic binding gives rank r the r-th NUMA node and fails where there are fewer nodes than ranks.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = threads_bind(sorted(os.sched_getaffinity(0)), ranks)
    else:
        os.environ.pop("VLLM_CPU_OMP_THREADS_BIND", None)


def threads_bind(cores: list[int], ranks: int) -> str:
    """Cores of each rank, `0,1|2,3`; with more ranks than cores they share, `0|1|0`."""
    if ranks >= len(cores):
        return "|".join(str(cores[r % len(cores)]) for r in range(ranks))
    share = len(cores) // ranks
    return "|".join(",".join(map(str, cores[r * share : (r + 1) * share])) for r in range(ranks))
