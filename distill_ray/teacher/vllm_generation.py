"""Completions by vLLM's own sampler; scored afterwards like any other sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distill_ray.errors import IntegrityError
from distill_ray.schema import FINISHES
from distill_ray.teacher.generation import Completion, Writing, sample_seed

_IN_FLIGHT = 512
"""Requests queued at once: twice what vLLM runs together, and it bounds the Python lists of the finished ones."""


def write_completions(
    engine: Any,
    or_die: Callable[..., Any],
    writing: Writing,
    prompts: Sequence[np.ndarray],
    refused: Sequence[str | None],
) -> list[list[Completion | str]]:
    """All completions of each prompt, in order, or in their place why there is none.

    Each is a request of its own with its own seed, so that what comes out depends on nothing else in the batch.

    Args:
        engine: `vllm.LLMEngine`.
        or_die: calls it; ends the process where the engine is lost.
        writing: how.
        prompts: [n] int32 each.
        refused: why a prompt cannot be answered, or None.
    """
    generate = writing.generate
    written: list[list[Completion | str]] = [["" if why is None else why] * generate.samples for why in refused]
    open_ = (i for i, why in enumerate(refused) if why is None)
    waiting = iter([(i, j) for i in open_ for j in range(generate.samples)])
    running: dict[str, tuple[int, int]] = {}
    while True:
        for i, j in itertools.islice(waiting, _IN_FLIGHT - len(running)):
            name = f"g{i}-{j}"
            or_die(lambda: _submit(engine, name, writing, prompts[i], j), (ValueError,))  # noqa: B023 - called here
            running[name] = i, j
        if not running:
            return written
        for output in or_die(engine.step):
            i, j = running.pop(output.request_id)
            found = _completion(output.outputs[0])
            written[i][j] = writing.refusal(i, j, found) or found


def _submit(engine: Any, name: str, writing: Writing, prompt: np.ndarray, sample: int) -> None:
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    generate = writing.generate
    params = SamplingParams(
        temperature=generate.temperature,
        top_p=generate.top_p,
        max_tokens=generate.max_tokens,
        seed=sample_seed(generate, prompt, sample),
        stop=list(generate.stop) or None,
        stop_token_ids=list(writing.ends),
        detokenize=bool(generate.stop),
        # Markers of reasoning are special tokens in many models, and may be what a stop text names.
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    engine.add_request(name, tokens_input(prompt.tolist()), params)


def _completion(output: Any) -> Completion:
    if output.finish_reason not in FINISHES or not len(output.token_ids):
        raise IntegrityError(
            f"vLLM ended a completion of {len(output.token_ids)} tokens by {output.finish_reason!r}; expected "
            f"{' or '.join(FINISHES)}. Use the vLLM version of the project's lock file"
        )
    return Completion(np.asarray(output.token_ids, np.int32), output.finish_reason)
