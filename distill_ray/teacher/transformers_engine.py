"""The exact reference: dense log-softmax in float32 over the real vocabulary, with the model's own head.

Legend: N rows, K kept, V vocabulary, R rows of one block.
"""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill_ray.causal_lm import load_causal_lm
from distill_ray.config.sections import CaptureSection, TeacherSection
from distill_ray.errors import UserError
from distill_ray.schema import Draws, TargetRows
from distill_ray.teacher.dense import rows_from_dense
from distill_ray.teacher.draws import DrawSpec, draw_from_logits
from distill_ray.teacher.engine import finite_or_reason, ids_again, refusal
from distill_ray.teacher.generation import Answer, Completion, answers, joined, writing_of
from distill_ray.teacher.seeds import row_keys, sequence_hash
from distill_ray.teacher.transformers_generation import write_completion
from distill_ray.teacher.wire import draws_from_words

_LOGIT_BYTES = 2**30
"""Most bytes of logits that one forward pass may give; longer sequences take several passes."""
_BLOCK_BYTES = 2**26
"""Bytes of float32 logits that are reduced at once."""


class TransformersEngine:
    """`Engine` over a transformers causal language model; one sequence a forward pass, no padding."""

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        section: TeacherSection,
        capture: CaptureSection,
        window_tokens: int,
        folder: Path,
        vocab_size: int,
        token_ids: int | None = None,
    ) -> None:
        from transformers import __version__

        self.version = f"transformers {__version__}"
        if section.quantization is not None:
            raise UserError(
                f'teacher.quantization={section.quantization!r} is vLLM\'s; use teacher.engine = "vllm" or drop it'
            )
        self._top_k, self._temperatures = capture.top_k, capture.extra_temperatures
        self._draws = DrawSpec.of(capture)
        self._writing = writing_of(capture, folder, section.trust_remote_code)
        self._window, self._vocab, self._token_ids = window_tokens, vocab_size, token_ids or vocab_size
        self._device = torch.device("cuda" if section.use_gpu else "cpu")
        if not section.use_gpu:
            # Ray sets OMP_NUM_THREADS from num_cpus, a share that serves placement only.
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        model: Any = load_causal_lm(folder, section.dtype, section.trust_remote_code)
        self._model = model.to(self._device).eval()

    @property
    def vocab_size(self) -> int:
        return self._vocab

    def score(self, sequences: list[np.ndarray]) -> list[TargetRows | str]:
        return [refusal(s, self._vocab, self._window) or finite_or_reason(self._score_one(s)) for s in sequences]

    def score_again(self, sequences: list[np.ndarray]) -> list[TargetRows | str]:
        return [refusal(s, self._vocab, self._window) or finite_or_reason(self._dense_rows(s)) for s in sequences]

    def _dense_rows(self, tokens: np.ndarray) -> TargetRows:
        kept = ids_again(self._top_k, self._token_ids)
        return rows_from_dense(self.dense_logprobs(tokens), tokens, kept, self._temperatures, self._token_ids)

    def answer(self, prompts: list[np.ndarray]) -> list[list[Answer | str]]:
        if self._writing is None:
            raise ValueError("the capture scores what there is; answers need capture.mode='generate'")
        written = [self._written(i, prompt) for i, prompt in enumerate(prompts)]
        pairs = zip(prompts, written, strict=True)
        scored = self.score([joined(p, c) for p, found in pairs for c in found if isinstance(c, Completion)])
        return answers(prompts, written, scored)

    def _written(self, number: int, prompt: np.ndarray) -> list[Completion | str]:
        assert self._writing is not None
        generate = self._writing.generate
        if reason := refusal(prompt, self._vocab, self._window - generate.max_tokens, least=1):
            return [reason] * generate.samples
        found: list[Completion | str] = []
        for sample in range(generate.samples):
            one = write_completion(self._model, self._vocab, self._writing, prompt, sample, self._device)
            found.append(self._writing.refusal(number, sample, one) or one)
        return found

    def dense_logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """[n] token ids → [N, V] float32 log-probabilities; N·V·4 bytes.

        Raises:
            ValueError: the sequence cannot be scored.
        """
        if reason := refusal(tokens, self._vocab, self._window):
            raise ValueError(reason)
        with torch.inference_mode():
            blocks = [torch.log_softmax(b.float(), dim=-1).cpu() for b in self._logits(tokens, _LOGIT_BYTES)]
        return torch.cat(blocks).numpy()

    def close(self) -> None:
        del self._model
        gc.collect()

    def _score_one(self, tokens: np.ndarray) -> TargetRows:
        actual = torch.tensor(tokens[1:], dtype=torch.long, device=self._device)
        done, parts = 0, list[TargetRows]()
        step = max(1, _BLOCK_BYTES // (4 * self._vocab))
        with torch.inference_mode():
            for logits in self._logits(tokens, _LOGIT_BYTES):
                for block in logits.split(step):
                    z_RV = block.float()
                    actual_R = actual[done : done + len(z_RV)]
                    rows = rows_from_logits(z_RV, actual_R, self._top_k, self._temperatures, self._token_ids)
                    if self._draws is not None:
                        keys_R = row_keys(sequence_hash(tokens), done, len(z_RV))
                        rows = replace(rows, draws=self._drawn(self._draws, z_RV, keys_R, rows.logprobs_NK[:, 0]))
                    parts.append(rows)
                    done += len(z_RV)
        return TargetRows.joined(parts)

    def _drawn(self, spec: DrawSpec, z_RV: torch.Tensor, keys_R: np.ndarray, top_logprob_R: np.ndarray) -> Draws:
        """By the same code as in vLLM's workers: equal logits give equal draws. `z_RV` is overwritten."""
        on_device = (torch.from_numpy(x).to(self._device) for x in (keys_R, top_logprob_R))
        words = draw_from_logits(spec, z_RV, self._top_k, *on_device, token_ids=self._token_ids)
        return draws_from_words(words.cpu().numpy())

    def _logits(self, tokens: np.ndarray, most_bytes: int):
        """Yield [R, V] logits in the model's dtype, in order, from the model's own forward pass.

        The head is never applied outside the model, so a soft-cap or logit scale cannot be forgotten. When all rows at
        once would exceed `most_bytes`, the body runs again for every block of rows: slower, but exact and bounded.
        """
        ids = torch.tensor(tokens, dtype=torch.long, device=self._device)[None]
        n_rows = len(tokens) - 1
        step = max(1, most_bytes // (4 * self._vocab))
        for start in range(0, n_rows, step):
            keep = torch.arange(start, min(start + step, n_rows), device=self._device)
            out = self._model(input_ids=ids, use_cache=False, logits_to_keep=keep)
            # A head padded beyond the config gives rows that are not of the model.
            yield out.logits[0, :, : self._vocab]


def rows_from_logits(
    logits_RV: torch.Tensor,
    actual_R: torch.Tensor,
    top_k: int,
    temperatures: tuple[float, ...],
    token_ids: int | None = None,
) -> TargetRows:
    """Everything a row holds, from its dense logits.

    The tail is the log-sum-exp of the tokens that are not kept, so nothing cancels: log tail_T = LSE_{j∉K}(z_j/T) −
    LSE(z/T), for T = 1 and each of `temperatures` over the same ids.

    Args:
        logits_RV: [R, V] float32.
        actual_R: [R] int64 next tokens.
        top_k: K.
        temperatures: the T ≠ 1.
        token_ids: only ids below it are kept, and ranked; None: any.
    """
    lse_R = torch.logsumexp(logits_RV, dim=-1)
    logprobs_RV = logits_RV - lse_R[:, None]
    ids_RK = _top_ids(logits_RV[:, :token_ids], top_k)
    actual_z = logits_RV.gather(1, actual_R[:, None])
    rest_RV = logits_RV.scatter(1, ids_RK, float("-inf"))
    weighted = torch.where(torch.isneginf(logprobs_RV), 0.0, logprobs_RV.exp() * logprobs_RV)
    return TargetRows(
        ids_NK=ids_RK.int().cpu().numpy(),
        logprobs_NK=logprobs_RV.gather(1, ids_RK).cpu().numpy(),
        log_tail_N=(torch.logsumexp(rest_RV, dim=-1) - lse_R).cpu().numpy(),
        actual_logprob_N=(actual_z[:, 0] - lse_R).cpu().numpy(),
        actual_rank_N=(1 + (logits_RV[:, :token_ids] > actual_z).sum(-1)).int().cpu().numpy(),
        entropy_N=(-weighted.sum(-1)).cpu().numpy(),
        log_tail_at={
            t: (torch.logsumexp(rest_RV / t, dim=-1) - torch.logsumexp(logits_RV / t, dim=-1)).cpu().numpy()
            for t in temperatures
        },
    )


def _top_ids(logits_RV: torch.Tensor, top_k: int) -> torch.Tensor:
    """[R, K] ids in rank order, equal logits by ascending id.

    `torch.topk` may keep any of the tokens that tie at the K-th place; which one would then differ between machines.
    """
    values, ids = torch.topk(logits_RV, top_k, dim=-1)
    threshold = values[:, -1:]
    tied = ((logits_RV >= threshold).sum(-1) > top_k).nonzero()[:, 0]
    for row in tied.tolist():
        above = (logits_RV[row] > threshold[row]).nonzero()[:, 0]
        equal = (logits_RV[row] == threshold[row]).nonzero()[:, 0]
        ids[row] = torch.cat([above, equal[: top_k - len(above)]])
    ids = ids.sort(dim=-1).values
    order = logits_RV.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)
