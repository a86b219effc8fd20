"""vLLM against a dense reference, before the codec: real model, real text, real worker processes.

Every engine starts in a process of its own; the sequences are few and ragged.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distill_ray import capture, targets
from distill_ray.config import Recipe
from distill_ray.config.sections import CaptureSection
from distill_ray.ingest.loader import PackLoader
from distill_ray.lease import Lease
from distill_ray.losses import head_metrics
from distill_ray.schema import Sequence, SourceSlice, TargetRows, Unit
from distill_ray.storage import open_storage
from distill_ray.student.build import build_initial
from distill_ray.student.module import DistillModule, loss_spec
from distill_ray.teacher import vocabulary_size
from distill_ray.teacher.transformers_engine import TransformersEngine
from distill_ray.train.worker import make_plan
from tests.assets import SMOLLM2_VOCAB, TINY_VOCAB, smollm2_folder, tiny_llama_folder
from tests.stages.score import Scored, prose_sequences, score, vllm_section
from tests.stages.train_assets import tiny_recipe

K = 64
LENGTHS = (200, 57, 2, 133, 90, 17)


def _dense(folder: Path, dtype: str, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """[N, V] float32 for each sequence, by transformers."""
    section = vllm_section(folder, engine="transformers", dtype=dtype)
    engine = TransformersEngine(section, CaptureSection(top_k=K), max(LENGTHS), folder, vocabulary_size(folder))
    return [engine.dense_logprobs(s) for s in sequences]


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    return prose_sequences(smollm2_folder(), LENGTHS)


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


@pytest.fixture(scope="module")
def float32_rows(tmp_path_factory: pytest.TempPathFactory, sequences: list[np.ndarray]) -> Scored:
    """SmolLM2's rows by vLLM in float32."""
    return score(vllm_section(smollm2_folder()), K, sequences, tmp_path_factory.mktemp("float32"))


@pytest.mark.long
def test_vllm_float32_is_the_dense_reference(
    float32_rows: Scored, sequences: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    _assert_exact(float32_rows, reference, sequences)


@pytest.mark.long
def test_a_student_equal_to_its_vllm_teacher_has_kl_below_1e_3_at_every_position(
    float32_rows: Scored, sequences: list[np.ndarray], tmp_path: Path
) -> None:
    """Capture by vLLM, codec, store, plan, packs, student and loss: nothing on the way may move a token or a row."""
    folder = smollm2_folder()
    recipe = tiny_recipe(
        tmp_path,
        teacher={"model": str(folder), "engine": "vllm", "dtype": "float32", "use_gpu": False},
        capture={"top_k": K, "temperatures": [1.0]},
        corpus={"sources": ["unused.jsonl"], "window_tokens": max(LENGTHS), "holdout": 0.0},
        student={"model": str(folder)},
        loss={"temperature": 1.0},
        train={"pack_tokens": max(LENGTHS), "global_batch_tokens": 3 * max(LENGTHS), "epochs": 1},
    )
    storage, manifest = open_storage(str(tmp_path)), store(recipe, sequences, _rows(float32_rows))
    plan = make_plan(recipe, manifest)
    model, config = build_initial(recipe, folder)
    module = DistillModule(model, loss_spec(config, SMOLLM2_VOCAB, recipe.loss))
    worst, rows = 0.0, 0
    with PackLoader(storage, manifest.identity, plan) as batches, torch.no_grad():
        for batch in batches:
            hidden_ND = module.hidden_rows(batch)
            figures = head_metrics(hidden_ND, module.head.weight, None, batch.targets, vocab_size=SMOLLM2_VOCAB)
            worst, rows = max(worst, float(figures.kl_N.max())), rows + len(figures.kl_N)
    print(f"{rows} positions, largest KL {worst:.2e}")
    assert rows == sum(len(s) - 1 for s in sequences)
    assert worst < 1e-3


def store(recipe: Recipe, sequences: list[np.ndarray], rows: list[TargetRows]) -> targets.RunManifest:
    """One unit of fully supervised sequences, and the run's manifest over it."""
    storage = open_storage(recipe.storage.root)
    identity = capture.capture_identity(recipe)
    unit = Unit("0" * 32, SourceSlice("file.jsonl", "0" * 64, "file", 0, 1), 1)
    made = [Sequence(s, np.arange(len(s)) > 0, doc_key=i) for i, s in enumerate(sequences)]
    data, summary = targets.encode_unit(identity, unit, made, rows, [], 0.0)
    storage.put(targets.unit_key(identity, unit.hash), data)
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        entry = targets.write_run_manifest(storage, lease.token, identity, [unit], {unit.hash: summary})
    return targets.read_run_manifest(storage, entry)


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
    got = _rows(score(vllm_section(smollm2_folder(), dtype="bfloat16"), K, sequences, tmp_path))
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
    section = vllm_section(smollm2_folder(), tensor_parallel=3)  # 9 heads; on two cores the ranks run on 0|1|0
    _assert_exact(score(section, K, sequences, tmp_path), reference, sequences)


@pytest.mark.slow
def test_tensor_parallel_2_is_the_dense_reference(tmp_path: Path) -> None:
    folder = tiny_llama_folder(vocab=TINY_VOCAB, hidden=128, heads=4)
    sequences = prose_sequences(folder, LENGTHS)
    section = vllm_section(folder, tensor_parallel=2)
    _assert_exact(score(section, K, sequences, tmp_path), _dense(folder, "float32", sequences), sequences)
