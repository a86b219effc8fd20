"""Completions of prompts: what every engine shares."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill_ray.config.generate import GenerateSection
from distill_ray.config.sections import CaptureSection
from distill_ray.corpus import id_count, load_tokenizer, stop_ids
from distill_ray.errors import UserError
from distill_ray.schema import TargetRows

_SEED_BITS = 63
"""vLLM takes a signed 64-bit seed."""


@dataclass(frozen=True)
class Writing:
    """How an engine writes completions."""

    generate: GenerateSection
    ends: tuple[int, ...]
    """Ids at which the model stops by itself, ascending."""
    tokenizer: Any
    token_ids: int
    """Ids below it are the tokenizer's."""

    def refusal(self, prompt: int, sample: int, written: Completion) -> str | None:
        """Why a completion is dropped, or None."""
        which, ids = f"prompt {prompt}, completion {sample}", self.token_ids
        if written.finish == "length" and self.generate.unfinished == "drop":
            return (
                f"{which}: not finished after capture.generate.max_tokens={self.generate.max_tokens}, and "
                'unfinished = "drop"; raise max_tokens'
            )
        if (strange := written.tokens[written.tokens >= ids]).size:
            return f"{which}: the teacher wrote id {strange[0]}, its tokenizer has ids below {ids:,} only"
        return None

    def to_json(self) -> dict[str, Any]:
        """What decides which completions come out, as plain values."""
        return self.generate.model_dump(mode="json") | {"end_tokens": list(self.ends)}


def writing_of(capture: CaptureSection, folder: Path, trust_remote_code: bool) -> Writing | None:
    """How the capture wants prompts answered by the model in a folder; None where it has none answered.

    Raises:
        UserError: the model has no end token.
    """
    if capture.generate is None:
        return None
    tokenizer = load_tokenizer(folder, trust_remote_code)
    if not (ends := stop_ids(tokenizer)):
        raise UserError(
            f'capture.mode = "generate", but neither the tokenizer nor generation_config.json nor config.json in '
            f"{folder} states an eos token, so no completion would end; state eos_token_id there"
        )
    return Writing(capture.generate, tuple(sorted(ends)), tokenizer, id_count(tokenizer))


@dataclass(frozen=True)
class Completion:
    """What the teacher wrote after a prompt."""

    tokens: np.ndarray
    """[m] int32, m ≥ 1: as they were drawn, the end token or stop text among them. Never through text, so markers of
    reasoning stay what they are."""
    finish: str
    """One of `schema.FINISHES`."""


@dataclass(frozen=True)
class Answer:
    """A prompt with one completion, scored."""

    tokens: np.ndarray
    """[n + m] int32: the prompt's n, then the completion's m."""
    finish: str
    rows: TargetRows
    """Of all n + m − 1 positions."""


def sample_seed(generate: GenerateSection, prompt: np.ndarray, sample: int) -> int:
    """The number that seeds one completion: of the recipe's seed, the prompt's tokens and its place among theirs.

    So a unit that is done again draws the same completions where the engine's arithmetic repeats itself, whatever the
    batch. On a GPU the batch moves low bits, and now and then a token; what is stored by then stays.
    """
    h = hashlib.blake2b(prompt.astype("<i4").tobytes(), digest_size=8)
    h.update(f"/{generate.seed}/{sample}".encode())
    return int.from_bytes(h.digest(), "big") >> (64 - _SEED_BITS)


def joined(prompt: np.ndarray, completion: Completion) -> np.ndarray:
    """[n + m] int32 prompt and completion as one sequence."""
    return np.concatenate([prompt, completion.tokens]).astype(np.int32)


def answers(
    prompts: Sequence[np.ndarray], completions: Sequence[list[Completion | str]], scored: list[TargetRows | str]
) -> list[list[Answer | str]]:
    """Put together what was written and how it was scored; a string is why there is no answer.

    Args:
        prompts: [n] each.
        completions: of each prompt.
        scored: rows of `joined`, for the completions that are no strings, in order.
    """
    rows = iter(scored)
    found: list[list[Answer | str]] = []
    for number, (prompt, written) in enumerate(zip(prompts, completions, strict=True)):
        found.append([])
        for sample, completion in enumerate(written):
            if isinstance(completion, str):
                found[-1].append(completion)
                continue
            of = next(rows)
            if isinstance(of, str):
                found[-1].append(f"prompt {number}, completion {sample}: {of}")
            else:
                found[-1].append(Answer(joined(prompt, completion), completion.finish, of))
    return found
