"""How vLLM is set up for capture: its arguments, and what it reads from the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distill_ray.config.sections import CaptureSection, TeacherSection
from distill_ray.teacher.engine import ids_again

HEAD_BYTES = 2**29
"""Most bytes of one request's float32 logits in one step."""


def engine_arguments(
    section: TeacherSection,
    capture: CaptureSection,
    window_tokens: int,
    folder: Path,
    vocab_size: int,
    token_ids: int,
    in_worker: bool = False,
) -> dict[str, Any]:
    """Arguments of `vllm.EngineArgs` for capture, `in_worker` or by the public path."""
    # vLLM's CPU workers can bind their threads only in a process of their own, even a single one.
    apart = section.tensor_parallel * section.pipeline_parallel > 1 or not section.use_gpu
    on_gpu = {"gpu_memory_utilization": section.gpu_memory_share} if section.use_gpu else {}
    if in_worker:
        of_path: dict[str, Any] = {"worker_extension_cls": "distill_ray.teacher.hook.CaptureWorker"}
    else:
        # Of one request, so many rows meet the head at once as [rows, V] float32, outside vLLM's memory profile.
        chunk = min(window_tokens, max(64, HEAD_BYTES // (4 * vocab_size)))
        of_path = {"long_prefill_token_threshold": chunk}
    if capture.generate is not None and not section.use_gpu:
        # vLLM 0.32 takes back what a request's own generator drew for a prompt's chunk, which CPU generators refuse.
        of_path.pop("long_prefill_token_threshold", None)
        of_path["enable_chunked_prefill"] = False
        most = max(section.batch_tokens, window_tokens + 1)
    else:
        most = section.batch_tokens
    return (
        on_gpu
        | of_path
        | {
            "model": str(folder),
            # Token ids go in and come out; only a stop text has to be looked for in text.
            "skip_tokenizer_init": capture.generate is None or not capture.generate.stop,
            "dtype": section.dtype,
            "quantization": section.quantization,
            "trust_remote_code": section.trust_remote_code,
            "tensor_parallel_size": section.tensor_parallel,
            "pipeline_parallel_size": section.pipeline_parallel,
            "distributed_executor_backend": "mp" if apart else None,
            # A prompt of exactly max_model_len is rejected: there must be room for the one token that is generated.
            "max_model_len": window_tokens + 1,
            "max_num_batched_tokens": most,
            "max_num_seqs": min(256, section.batch_tokens),
            "max_logprobs": ids_again(capture.top_k, token_ids) + vocab_size - token_ids,
            # With it, the rows of a shared prefix would be skipped.
            "enable_prefix_caching": False,
            "enforce_eager": not section.use_gpu,
            "disable_log_stats": True,
            "seed": 0,
        }
    )


def set_process_environment(section: TeacherSection) -> None:
    """What vLLM reads from the environment when it is imported; called in the actor's own process, before that.

    The scheduler (EngineCore) gets a process of its own, on CPUs too: what is tested is what runs on GPUs.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if section.use_gpu:
        return
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
