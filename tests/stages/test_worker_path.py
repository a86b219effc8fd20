"""Rows captured inside vLLM's workers against those of its public path, row by row, on the same sequences.

Every engine starts in a process of its own. The engines here mix the chunks of several prompts in one step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill_ray import teacher
from distill_ray.config.sections import CaptureSection
from distill_ray.schema import TargetRows
from tests.assets import TINY_VOCAB, smollm2_folder, tiny_llama_folder
from tests.stages.score import How, Scored, prose_sequences, score, vllm_section

K = 64
LENGTHS = (200, 57, 2, 133, 90, 17, 64, 65, 128, 200, 31)
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
CHUNKED = {"long_prefill_token_threshold": 64}
"""vLLM takes at most 64 tokens of a prompt in one step."""
TIGHT = {
    "long_prefill_token_threshold": 16,
    "scheduler_reserve_full_isl": False,
    "num_gpu_blocks_override": 9,
    "block_size": 32,
}
"""Room in the KV cache for less than two of the longest prompts, given to as many prompts as a step takes."""


def _rows(scored: Scored, path: str) -> list[TargetRows]:
    assert scored.path == path
    print(f"{path}: start {scored.start_s:.1f} s, {sum(LENGTHS)} tokens in {scored.score_s:.1f} s")
    rows = [r for r in scored.rows if isinstance(r, TargetRows)]
    assert [len(r.log_tail_N) for r in rows] == [n - 1 for n in LENGTHS]
    return rows


def _assert_same(worker: Scored, flat: Scored, tolerance: float = 1e-3) -> None:
    """ids equal but for ties within the tolerance, |Δ log p| ≤ tolerance, ranks and tails to match."""
    worst, swapped, rows_seen = 0.0, 0, 0
    for got, want in zip(_rows(worker, "worker"), _rows(flat, "flat"), strict=True):
        rows_seen += len(got.log_tail_N)
        worst = max(worst, float(np.abs(got.logprobs_NK - want.logprobs_NK).max()))
        worst = max(worst, float(np.abs(got.actual_logprob_N - want.actual_logprob_N).max()))
        np.testing.assert_allclose(np.exp(got.log_tail_N), np.exp(want.log_tail_N), atol=tolerance)
        different = got.ids_NK != want.ids_NK
        swapped += int(different.sum())
        for t, place in zip(*np.nonzero(different), strict=True):
            # Such an id stands elsewhere in the other row, or outside it, at a value that close.
            at = np.flatnonzero(want.ids_NK[t] == got.ids_NK[t, place])
            other = want.logprobs_NK[t, at[0]] if len(at) else want.logprobs_NK[t, -1]
            assert abs(other - got.logprobs_NK[t, place]) <= 2 * tolerance
        clear = np.abs(np.diff(want.logprobs_NK)).min(1) > 2 * tolerance
        kept = (got.ids_NK[:, :, None] == got.ids_NK[:, None, :]).sum((1, 2)) == K  # no id twice
        assert kept.all()
        inside = (want.actual_rank_N <= K) & clear
        np.testing.assert_array_equal(got.actual_rank_N[inside], want.actual_rank_N[inside])
        assert got.entropy_N is not None
        assert (got.entropy_N > 0).all()
    print(f"{rows_seen} rows: largest |Δ log p| {worst:.2e}, {swapped} ids in another place")
    assert worst <= tolerance


def _both(folder: Path, tmp_path: Path, more: dict[str, Any], **changes: object) -> tuple[Scored, Scored]:
    section, sequences = vllm_section(folder, **changes), prose_sequences(folder, LENGTHS)
    worker = score(section, K, sequences, tmp_path, TEMPERATURES, How("worker", more))
    return worker, score(section, K, sequences, tmp_path, (1.0,), How("flat", CHUNKED))


@pytest.mark.long
def test_worker_path_is_the_public_path_of_another_engine_and_of_its_own(tmp_path: Path) -> None:
    folder = smollm2_folder()
    section, sequences = vllm_section(folder), prose_sequences(folder, LENGTHS)
    worker = score(section, K, sequences, tmp_path, TEMPERATURES, How("worker", CHUNKED, thrice=True))
    _assert_same(worker, score(section, K, sequences, tmp_path, (1.0,), How("flat", CHUNKED)))
    own = [_best(rows, K) for rows in worker.again or []]
    _assert_same(worker, replace(worker, path="flat", rows=own))
    assert worker.after is not None
    _assert_same(replace(worker, rows=worker.after), replace(worker, path="flat", rows=own))


def _best(rows: TargetRows | str, kept: int) -> TargetRows:
    """The first `kept` ids of rows with 2 K, and the tail beyond them."""
    assert isinstance(rows, TargetRows)
    assert rows.ids_NK.shape[1] == 2 * K
    tail_N = np.exp(rows.log_tail_N) + np.exp(rows.logprobs_NK[:, kept:]).sum(1)
    ids_NK, logprobs_NK = rows.ids_NK[:, :kept], rows.logprobs_NK[:, :kept]
    return replace(rows, ids_NK=ids_NK, logprobs_NK=logprobs_NK, log_tail_N=np.log(tail_N))


def _whole(folder: Path, sequences: list[np.ndarray], tmp_path: Path, **changes: object) -> list[np.ndarray]:
    """[N, V] float64 log-probabilities of all V ids, by the engine itself."""
    scored = score(vllm_section(folder, **changes), TINY_VOCAB, sequences, tmp_path, (1.0,), How("flat", CHUNKED))
    dense = []
    for rows in _rows(scored, "flat"):
        out = np.empty(rows.logprobs_NK.shape)
        np.put_along_axis(out, rows.ids_NK, rows.logprobs_NK.astype(np.float64), 1)
        dense.append(out)
    return dense


def _assert_exact(rows: TargetRows, logprobs: np.ndarray) -> None:
    """Entropy, and the tail and the normaliser at every temperature, against float64; relative 1e-3."""
    assert list(rows.log_tail_at) == [0.5, 2.0, 4.0]
    p = np.exp(logprobs)
    np.testing.assert_allclose(rows.entropy_N, -(p * logprobs).sum(1), rtol=1e-3)
    outside = np.ones(p.shape, bool)
    np.put_along_axis(outside, rows.ids_NK, False, 1)
    for t, log_tail in {1.0: rows.log_tail_N, **rows.log_tail_at}.items():
        q = np.exp(logprobs / t)
        np.testing.assert_allclose(np.exp(log_tail), (q * outside).sum(1) / q.sum(1), rtol=1e-3)
        # a_T = log Σ p^{1/T}, as a decoder has it: the kept ids and the tail at T.
        kept = np.log(np.exp(rows.logprobs_NK.astype(np.float64) / t).sum(1))
        np.testing.assert_allclose(np.exp(kept - np.log1p(-np.exp(log_tail.astype(np.float64)))), q.sum(1), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, 500, 576], ids=["whole", "padded", "more-than-tokens"])
def test_tensor_parallel_2(tmp_path: Path, rows: int | None) -> None:
    # 500 rows are padded by vLLM to 512: 256 on the first rank, 244 and padding on the second. Of 576 the second rank
    # has all 64 that no token has, random ones, which are likely everywhere.
    folder = tiny_llama_folder(vocab=TINY_VOCAB, rows=rows, hidden=128, heads=4)
    sequences = [np.minimum(s, (rows or TINY_VOCAB) - 1) for s in prose_sequences(folder, LENGTHS)]
    section = vllm_section(folder, tensor_parallel=2)
    worker = score(section, K, sequences, tmp_path, TEMPERATURES, How("worker", CHUNKED))
    _assert_same(worker, score(section, K, sequences, tmp_path, (1.0,), How("flat", CHUNKED)))
    if rows == 576:
        assert all(r.ids_NK.max() < TINY_VOCAB for r in _rows(worker, "worker"))
    if rows is None:
        for got, dense in zip(_rows(worker, "worker"), _whole(folder, sequences, tmp_path), strict=True):
            _assert_exact(got, dense)


@pytest.mark.slow
def test_an_engine_forced_to_preempt(tmp_path: Path) -> None:
    folder = tiny_llama_folder(vocab=TINY_VOCAB, hidden=128, heads=4)
    worker, flat = _both(folder, tmp_path, TIGHT)
    assert worker.recomputed_rows > 0  # so there was preemption
    _assert_same(worker, flat)


def _drawn(rows: list[TargetRows], draws: int) -> np.ndarray:
    """[N, draws] ids of all rows, ascending within a row."""
    found = [r.draws for r in rows if r.draws is not None]
    assert len(found) == len(rows)
    return np.concatenate([np.repeat(d.ids_M, d.counts_M) for d in found]).reshape(-1, draws)


TAIL = {"draws": 50, "draws_from": "tail", "draws_temperature": 2.0}


@pytest.mark.parametrize(
    ("ranks", "how", "draws"),
    [
        pytest.param(1, TIGHT, {"draws": 50}, id="all-preempted", marks=pytest.mark.long),
        pytest.param(2, CHUNKED, TAIL, id="tail-tp2", marks=pytest.mark.slow),
    ],
)
def test_draws_are_the_reference_engines(
    tmp_path: Path, ranks: int, how: dict[str, Any], draws: dict[str, Any]
) -> None:
    folder = tiny_llama_folder(vocab=TINY_VOCAB, hidden=128, heads=4)
    section, sequences = vllm_section(folder, tensor_parallel=ranks), prose_sequences(folder, LENGTHS)
    worker = score(section, K, sequences, tmp_path, (1.0, 2.0), How("worker", how), **draws)
    assert (worker.recomputed_rows > 0) == (how is TIGHT)
    reference = section.model_copy(update={"engine": "transformers", "tensor_parallel": 1})
    capture = CaptureSection(top_k=K, temperatures=(1.0, 2.0), **draws)
    exact = teacher.open_engine(reference, capture, max(LENGTHS)).score(sequences)
    want = _drawn([r for r in exact if isinstance(r, TargetRows)], 50)
    got = _drawn(_rows(worker, "worker"), 50)
    same = (got == want).mean()
    print(f"{got.size} draws, {same:.4%} the same; {len(np.unique(got))} of {TINY_VOCAB} ids were drawn")
    assert same >= 0.99
    assert len(np.unique(got)) > K


@pytest.mark.slow
def test_bfloat16(tmp_path: Path) -> None:
    # Both paths run the same bf16 forward; logits tie often.
    _assert_same(*_both(smollm2_folder(), tmp_path, CHUNKED, dtype="bfloat16"))


@pytest.mark.slow
def test_an_unknown_engine_falls_back_and_says_so(tmp_path: Path) -> None:
    folder = tiny_llama_folder(vocab=TINY_VOCAB, hidden=128, heads=4)
    sequences = prose_sequences(folder, LENGTHS)
    # A head of 512 ids where 600 are expected is none that capture knows; the engine is opened anew.
    scored = score(vllm_section(folder), K, sequences, tmp_path, (1.0,), How("auto", CHUNKED, 600))
    assert len(_rows(scored, "flat")) == len(LENGTHS)
    assert scored.output.count("vLLM's public path is used (UnknownEngineError: the head gives 512 ids") == 1
    with pytest.raises(RuntimeError, match=r"CannotCaptureError.*no tail mass at T ≠ 1"):
        score(vllm_section(folder), K, sequences, tmp_path, (1.0, 2.0), How("auto", CHUNKED, 600))


def _scaled_folder(folder: Path, family: str) -> Path:
    """A random model that soft-caps (Gemma 2) or scales (Granite) its logits, with 500 ids."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512, "dtype": "float32",
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "gemma2":
        model: Any = Gemma2ForCausalLM(
            Gemma2Config(**sizes, head_dim=32, final_logit_softcapping=3.0, attn_logit_softcapping=None)
        )
    else:
        model = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=4.0))
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=2.0)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_soft_cap_and_scale(tmp_path: Path, family: str) -> None:
    folder = _scaled_folder(tmp_path / "model", family)
    sequences = [np.minimum(s, 499) for s in prose_sequences(tiny_llama_folder(vocab=TINY_VOCAB), LENGTHS)]
    section = vllm_section(folder, tensor_parallel=2)
    worker = score(section, K, sequences, tmp_path, TEMPERATURES, How("worker", CHUNKED))
    _assert_same(worker, score(section, K, sequences, tmp_path, (1.0,), How("flat", CHUNKED)))
