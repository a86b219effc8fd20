"""vLLM against a dense reference, before the codec: real model, real text, real worker processes.

Every engine starts in a process of its own; the sequences are few and ragged.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from distill_ray.config.sections import CaptureSection, TeacherSection
from distill_ray.schema import TargetRows
from distill_ray.teacher import vocabulary_size
from distill_ray.teacher.transformers_engine import TransformersEngine
from tests.assets import TINY_VOCAB, prose_topics, smollm2_folder, tiny_llama_folder
from tests.stages.score import Scored, score

K = 64
LENGTHS = (200, 57, 2, 133, 90, 17)


def _section(folder: Path, **changes: object) -> TeacherSection:
    base = {"model": str(folder), "engine": "vllm", "dtype": "float32", "use_gpu": False, "batch_tokens": 256}
    return TeacherSection.model_validate(base | changes)


def _sequences(folder: Path) -> list[np.ndarray]:
    text = max(prose_topics().values(), key=len)
    ids = np.array(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids, np.int32)
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    return [ids[a : a + n] for a, n in zip(starts, LENGTHS, strict=False)]


def _dense(folder: Path, dtype: str, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """[N, V] float32 for each sequence, by transformers."""
    section = _section(folder, engine="transformers", dtype=dtype)
    engine = TransformersEngine(section, CaptureSection(top_k=K), max(LENGTHS), folder, vocabulary_size(folder))
    return [engine.dense_logprobs(s) for s in sequences]


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    return _sequences(smollm2_folder())


@pytest.fixture(scope="module")
def reference(sequences: list[np.ndarray]) -> list[np.ndarray]:
    """SmolLM2 in float32."""
    return _dense(smollm2_folder(), "float32", sequences)


def _rows(scored: Scored) -> list[TargetRows]:
    tokens = sum(LENGTHS)
    print(f"start {scored.start_s:.1f} s, scored {tokens} tokens in {scored.score_s:.1f} s")
    assert not [r for r in scored.rows if isinstance(r, str)]
    return [r for r in scored.rows if isinstance(r, TargetRows)]


def _assert_exact(scored: Scored, reference: list[np.ndarray], sequences: list[np.ndarray]) -> None:
    """|Δ log p| ≤ 2e-3 at every position, kept + tail = 1 within 1e-3, ids and ranks equal but for near-ties."""
    worst = 0.0
    for rows, dense, tokens in zip(_rows(scored), reference, sequences, strict=True):
        assert rows.ids_NK.shape == (len(tokens) - 1, K)
        worst = max(worst, float(np.abs(np.take_along_axis(dense, rows.ids_NK, 1) - rows.logprobs_NK).max()))
        own = np.take_along_axis(dense, tokens[1:, None], 1)
        worst = max(worst, float(np.abs(own[:, 0] - rows.actual_logprob_N).max()))
        np.testing.assert_allclose(np.exp(rows.logprobs_NK).sum(1) + np.exp(rows.log_tail_N), 1, atol=1e-3)
        # At each rank the reference's value is the same: an id may differ only where two values are that close.
        np.testing.assert_allclose(-np.sort(-dense, axis=1)[:, :K], rows.logprobs_NK, atol=2e-3)
        assert all(len(set(ids)) == K for ids in rows.ids_NK.tolist())
        lowest = 1 + (dense > own + 2e-3).sum(1)
        highest = (dense >= own - 2e-3).sum(1)
        assert ((lowest <= rows.actual_rank_N) & (rows.actual_rank_N <= highest)).all()
    print(f"largest |Δ log p| {worst:.2e}")
    assert worst <= 2e-3


def test_vllm_float32_is_the_dense_reference(
    tmp_path: Path, sequences: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    _assert_exact(score(_section(smollm2_folder()), K, sequences, tmp_path), reference, sequences)


def _bucket_kl(dense: np.ndarray, rows: TargetRows) -> np.ndarray:
    """[N] KL of the float32 reference to the engine's row, on the engine's kept ids and one bucket for the tail."""
    p = np.take_along_axis(dense, rows.ids_NK, 1).astype(np.float64)
    tail = np.maximum(1 - np.exp(p).sum(1), 1e-9)
    kept = (np.exp(p) * (p - rows.logprobs_NK)).sum(1)
    return kept + tail * (np.log(tail) - np.maximum(rows.log_tail_N, np.log(1e-9)))


@pytest.mark.slow  # a CPU without bfloat16 instructions multiplies it a hundred times slower
def test_vllm_bfloat16_errs_no_more_than_transformers(
    tmp_path: Path, sequences: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    got = _rows(score(_section(smollm2_folder(), dtype="bfloat16"), K, sequences, tmp_path))
    peers = _dense(smollm2_folder(), "bfloat16", sequences)
    ours, theirs, kl = [], [], []
    for rows, dense, peer in zip(got, reference, peers, strict=True):
        exact = np.take_along_axis(dense, rows.ids_NK, 1)
        ours.append(np.abs(rows.logprobs_NK - exact).max(1))
        theirs.append(np.abs(np.take_along_axis(peer, rows.ids_NK, 1) - exact).max(1))
        kl.append(_bucket_kl(dense, rows))
        np.testing.assert_allclose(np.exp(rows.logprobs_NK).sum(1) + np.exp(rows.log_tail_N), 1, atol=1e-3)
    mine, other = np.concatenate(ours), np.concatenate(theirs)
    print(
        f"bf16: mean KL {np.concatenate(kl).mean():.2e}; row maximum of |Δ log p|, median / largest: "
        f"vLLM {np.median(mine):.3f} / {mine.max():.3f}, transformers {np.median(other):.3f} / {other.max():.3f}"
    )
    assert np.concatenate(kl).mean() <= 3e-3
    assert mine.max() <= other.max()


@pytest.mark.slow
def test_tensor_parallel_3_is_the_dense_reference(
    tmp_path: Path, sequences: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    section = _section(smollm2_folder(), tensor_parallel=3)  # 9 heads; on two cores the ranks run on 0|1|0
    _assert_exact(score(section, K, sequences, tmp_path), reference, sequences)


@pytest.mark.slow
def test_tensor_parallel_2_is_the_dense_reference(tmp_path: Path) -> None:
    folder = tiny_llama_folder(vocab=TINY_VOCAB, hidden=128, heads=4)
    sequences = _sequences(folder)
    section = _section(folder, tensor_parallel=2)
    _assert_exact(score(section, K, sequences, tmp_path), _dense(folder, "float32", sequences), sequences)
