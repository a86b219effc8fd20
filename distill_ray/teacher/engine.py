"""The engine interface, and the checks that every engine makes before and after it scores a sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from distill_ray.config.sections import CaptureSection, TeacherSection
from distill_ray.corpus import id_count, load_tokenizer
from distill_ray.errors import UserError
from distill_ray.model_config import read_config, stated_dtype
from distill_ray.schema import TargetRows
from distill_ray.teacher.generation import Answer

CONCRETE_DTYPES = ("float32", "bfloat16", "float16")
CapturePath = Literal["auto", "worker", "flat"]
"""How rows leave vLLM: from inside its workers, by its public path, or the first where it can be had. The rows are the
same within the engine's arithmetic, so the path is no part of what targets are; only entropy is missing in "flat"."""
_MORE_RANKS = 64
"""Least number of ids scored again beyond the K stored ones: a swap at the last place then meets a value of its own."""


def ids_again(top_k: int, vocab_size: int) -> int:
    """R ≥ K, the ids of a row that is scored again."""
    return min(vocab_size, max(2 * top_k, top_k + _MORE_RANKS))


class Engine(Protocol):
    """Scores token sequences by teacher forcing. One engine lives in one process."""

    notes: tuple[str, ...]
    """What the user should know of how it works here, such as a slower path than wanted."""

    @property
    def version(self) -> str:
        """What computes the rows, as it is recorded with them: `vllm 0.32.0, inside its workers`."""
        ...

    @property
    def vocab_size(self) -> int:
        """V, the number of ids the softmax runs over."""
        ...

    def score(self, sequences: list[np.ndarray]) -> list[TargetRows | str]:
        """Target rows of each sequence, in the given order.

        Args:
            sequences: [n] int32 token ids each, ragged.

        Returns:
            For each sequence its N = n − 1 rows, or the reason why this one sequence cannot be scored.
        """
        ...

    def score_again(self, sequences: list[np.ndarray]) -> list[TargetRows | str] | None:
        """Rows of `ids_again` ids each and without draws, by a path that shares nothing with `score` but the model.

        Returns:
            As `score`; None where this engine has no such path while it captures.
        """
        ...

    def answer(self, prompts: list[np.ndarray]) -> list[list[Answer | str]]:
        """Complete each prompt as `capture.generate` says, and score what comes out.

        Args:
            prompts: [n] int32 token ids each, ragged.

        Returns:
            For each prompt its completions, in order, or why there is none in that place.
        """
        ...

    def close(self) -> None:
        """Give the memory and the processes back. The engine cannot be used again."""
        ...


def open_engine(
    section: TeacherSection, capture: CaptureSection, window_tokens: int, path: CapturePath = "auto"
) -> Engine:
    """Load the recipe's teacher in this process (a model in `s3://` is staged to this machine first).

    Args:
        section: which model, by which engine, how split.
        capture: what a row holds.
        window_tokens: most tokens of one sequence.
        path: how rows leave vLLM; no other engine minds.

    Raises:
        CannotCaptureError: the engine cannot give what `capture` asks for.
        UserError: the folder is missing or is no model; k exceeds the vocabulary.
    """
    from distill_ray.storage import stage_folder

    folder = stage_folder(section.model)
    section = resolve_dtype(section, folder)
    vocab, ids = vocabulary_size(folder), token_ids(folder, section.trust_remote_code)
    require_ids(capture, ids, section.model)
    if section.engine == "vllm":
        from distill_ray.teacher.vllm_engine import VllmEngine

        return VllmEngine(section, capture, window_tokens, folder, vocab, path, token_ids=ids)
    from distill_ray.teacher.transformers_engine import TransformersEngine

    return TransformersEngine(section, capture, window_tokens, folder, vocab, ids)


def require_ids(capture: CaptureSection, ids: int, model: str) -> None:
    """Raises UserError where the teacher has too few `token_ids` for what a row is to hold."""
    if capture.top_k > ids:
        raise UserError(
            f"capture.top_k={capture.top_k} exceeds the teacher's vocabulary of {ids:,} tokens ({model}); use at most "
            f"{ids}"
        )
    if capture.draws_from == "tail" and capture.top_k == ids:
        raise UserError(
            f'capture.draws_from="tail", but capture.top_k={capture.top_k} keeps all {ids:,} tokens of the teacher and '
            "leaves nothing to draw from; lower capture.top_k or remove the draws"
        )


def resolve_dtype(section: TeacherSection, folder: Path) -> TeacherSection:
    """The section with a concrete `dtype`: for `auto`, the one that the model's `config.json` states.

    What an engine makes of `auto` depends on the machine (vLLM: float16 where a GPU has no bfloat16), so it is no
    identity: two kinds of nodes would mix their arithmetic in one capture.

    Raises:
        UserError: `auto`, and the config states none of float32, bfloat16, float16.
    """
    if section.dtype != "auto":
        return section
    found = stated_dtype(folder)
    if found not in CONCRETE_DTYPES:
        raise UserError(
            f'teacher.dtype = "auto", but {folder}/config.json states '
            f"{'no dtype' if found is None else f'dtype {found!r}'}; set teacher.dtype to one of "
            f"{', '.join(CONCRETE_DTYPES)}"
        )
    return section.model_copy(update={"dtype": found})


def vocabulary_size(folder: Path) -> int:
    """V of a Hugging Face model folder: `vocab_size` of its config (of the text model in a composite one).

    This is what the model's softmax runs over. A config may state more rows than the tokenizer has entries (Qwen2.5:
    151,665 entries, 151,936 or 152,064 rows): those rows are trained like the others and the model does give them
    probability, so they stay in the softmax, and their mass lies in the tail (`token_ids`). Rows that an engine adds
    beyond the config, to round up a shard, are not of the model and must never be seen.

    Raises:
        UserError: no `config.json`, or it states no vocabulary.
    """
    config = read_config(folder)
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(size, int) or size < 2:
        raise UserError(
            f"{folder}/config.json states no usable vocab_size (got {size!r}); it must be a causal language model"
        )
    return size


def token_ids(folder: Path, trust_remote_code: bool) -> int:
    """Ids below it are the tokenizer's, at most V; those alone are kept.

    What an embedding has beyond them was never trained, or down to nothing. Where it was left random, it does get among
    the likeliest, and a student whose embedding ends earlier could not be taught by such a row.

    Raises:
        UserError: as `vocabulary_size`; the folder has no tokenizer.
    """
    return min(vocabulary_size(folder), id_count(load_tokenizer(folder, trust_remote_code)))


def refusal(tokens: np.ndarray, vocab_size: int, window_tokens: int, least: int = 2) -> str | None:
    """Why this sequence of at least `least` tokens cannot be scored, or None."""
    n = len(tokens)
    if n < least:
        return f"{n} token(s): there is no next token to score; at least {least} are needed"
    if n > window_tokens:
        return f"{n} tokens exceed the teacher's window of {window_tokens}; split it (corpus.window_tokens)"
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        return f"token id {low if low < 0 else high} lies outside the teacher's vocabulary of {vocab_size}"
    return None


def finite_or_reason(rows: TargetRows) -> TargetRows | str:
    """The rows, or a reason: a NaN or infinity from the engine must never reach the store.

    Only a tail may be −inf: it is the logarithm of a mass that is exactly zero when all V tokens are kept.
    """
    checks = {
        "kept log-probabilities": np.isfinite(rows.logprobs_NK).all(axis=1),
        "actual log-probability": np.isfinite(rows.actual_logprob_N),
        "entropy": np.ones(0, bool) if rows.entropy_N is None else np.isfinite(rows.entropy_N),
        "log-probability of a drawn token": _drawn_are_finite(rows),
    }
    tails = {"log tail": rows.log_tail_N} | {f"log tail at T={t}": a for t, a in rows.log_tail_at.items()}
    checks |= {name: ~(np.isnan(a) | np.isposinf(a)) for name, a in tails.items()}
    for name, good in checks.items():
        if not good.all():
            bad = np.flatnonzero(~good)
            return f"the teacher gave a non-finite {name} at {len(bad)} of {len(good)} positions, first {bad[0]}"
    return rows


def _drawn_are_finite(rows: TargetRows) -> np.ndarray:
    if rows.draws is None:
        return np.ones(0, bool)
    good_N = np.ones(len(rows.log_tail_N), bool)
    row_M = np.repeat(np.arange(len(good_N)), rows.draws.distinct_N)
    good_N[row_M[~np.isfinite(rows.draws.logprobs_M)]] = False
    return good_N
