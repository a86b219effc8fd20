"""The teacher without vLLM: sorting out its entries, the reference's arithmetic, identity of weights."""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill_ray import teacher
from distill_ray.capture import capture_identity
from distill_ray.config import parse_recipe
from distill_ray.config.sections import CaptureSection, TeacherSection
from distill_ray.errors import CannotCaptureError, IntegrityError, UserError
from distill_ray.schema import TargetRows
from distill_ray.storage import open_storage
from distill_ray.targets import CaptureIdentity
from distill_ray.teacher.dense import rows_from_dense
from distill_ray.teacher.draws import DrawSpec
from distill_ray.teacher.engine import finite_or_reason, refusal
from distill_ray.teacher.flat import log_tail, rows_from_flat
from distill_ray.teacher.head import Columns
from distill_ray.teacher.hook import CaptureWorker
from distill_ray.teacher.seeds import row_keys, sequence_hash
from distill_ray.teacher.transformers_engine import TransformersEngine, rows_from_logits
from distill_ray.teacher.vllm_setup import engine_arguments, set_process_environment, threads_bind
from tests.assets import tiny_teacher_folder
from tests.unit.draws_fakes import FakeHead, draws_of, reduced

V, K = 50, 4


def _section(**changes: object) -> TeacherSection:
    base = {"model": str(tiny_teacher_folder()), "engine": "transformers", "dtype": "float32", "use_gpu": False}
    return TeacherSection.model_validate(base | changes)


def _flat(logits_NV: np.ndarray, tokens: np.ndarray, listed: int = K) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What vLLM's gather_logprobs and append_fast give: actual token first, its rank by counting ≥."""
    logprobs = torch.from_numpy(logits_NV).log_softmax(-1)
    top, ids = logprobs.topk(listed, -1)
    actual = torch.from_numpy(tokens[1:].astype(np.int64))[:, None]
    own = logprobs.gather(-1, actual)
    ranks = [[int(r), *range(1, listed + 1)] for r in (logprobs >= own).sum(-1)]
    return (
        torch.cat([actual, ids], 1).numpy().ravel(),
        torch.cat([own, top], 1).numpy().ravel(),
        np.array(ranks).ravel(),
    )


def _logits(n: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, (n - 1, V)).astype(np.float32), rng.integers(0, V, n).astype(np.int32)


def test_flat_drops_the_duplicate_and_the_extra() -> None:
    logits, tokens = _logits(3)
    best = np.argsort(-logits, axis=1)
    tokens[1], tokens[2] = best[0, 2], best[1, 20]  # row 0: among the k best; row 1: outside
    rows = rows_from_flat(*_flat(logits, tokens), tokens, K, V)
    np.testing.assert_array_equal(rows.ids_NK, best[:, :K])
    assert rows.actual_rank_N.tolist() == [3, 21]
    np.testing.assert_allclose(rows.actual_logprob_N[0], rows.logprobs_NK[0, 2])
    assert rows.actual_logprob_N[1] < rows.logprobs_NK[1, -1]
    assert all(len(set(row)) == K for row in rows.ids_NK.tolist())


def test_flat_equals_the_dense_reference() -> None:
    logits, tokens = _logits(40, seed=1)
    got = rows_from_flat(*_flat(logits, tokens), tokens, K, V)
    exact = rows_from_logits(torch.from_numpy(logits), torch.from_numpy(tokens[1:].astype(np.int64)), K, ())
    np.testing.assert_array_equal(got.ids_NK, exact.ids_NK)
    np.testing.assert_array_equal(got.actual_rank_N, exact.actual_rank_N)
    for name in ("logprobs_NK", "actual_logprob_N"):
        np.testing.assert_allclose(getattr(got, name), getattr(exact, name), atol=1e-5)
    np.testing.assert_allclose(np.exp(got.log_tail_N), np.exp(exact.log_tail_N), atol=2e-6)


def test_flat_passes_over_ids_that_no_token_has() -> None:
    logits, tokens = _logits(40, seed=2)
    beyond = 5
    token_ids = V - beyond
    logits[::2, token_ids:] += 12
    tokens[1:] %= token_ids
    assert rows_from_flat(*_flat(logits, tokens), tokens, K, V, token_ids) is None
    got = rows_from_flat(*_flat(logits, tokens, K + beyond), tokens, K, V, token_ids)
    actual = torch.from_numpy(tokens[1:].astype(np.int64))
    exact = rows_from_logits(torch.from_numpy(logits), actual, K, (), token_ids)
    dense = rows_from_dense(torch.from_numpy(logits).log_softmax(-1).numpy(), tokens, K, (), token_ids)
    assert got is not None
    assert exact.ids_NK.max() < token_ids
    np.testing.assert_array_equal(dense.actual_rank_N, exact.actual_rank_N)
    # Of ids that are not listed vLLM's rank cannot leave out any.
    assert ((got.actual_rank_N - exact.actual_rank_N >= 0) & (got.actual_rank_N - exact.actual_rank_N <= beyond)).all()
    listed = exact.actual_rank_N <= K
    np.testing.assert_array_equal(got.actual_rank_N[listed], exact.actual_rank_N[listed])
    for rows in (got, dense):
        np.testing.assert_array_equal(rows.ids_NK, exact.ids_NK)
        for name in ("logprobs_NK", "actual_logprob_N"):
            np.testing.assert_allclose(getattr(rows, name), getattr(exact, name), atol=1e-5)
        np.testing.assert_allclose(np.exp(rows.log_tail_N), np.exp(exact.log_tail_N), atol=2e-6)


def test_flat_ties_do_not_push_a_kept_token_out_of_its_rank() -> None:
    logits, tokens = np.zeros((1, V), np.float32), np.array([0, 0], np.int32)
    logits[0, :3] = 5.0
    ids, logprobs, ranks = _flat(logits, tokens)
    assert ranks[0] == 3  # vLLM counts ≥
    rows = rows_from_flat(ids, logprobs, ranks, tokens, K, V)
    assert rows.actual_rank_N.tolist() == [1]
    assert rows.ids_NK[0, :3].tolist() == [0, 1, 2]


def test_flat_refuses_another_layout() -> None:
    logits, tokens = _logits(5)
    ids, logprobs, ranks = _flat(logits, tokens)
    with pytest.raises(IntegrityError, match="expected 20"):
        rows_from_flat(ids[:-1], logprobs[:-1], ranks[:-1], tokens, K, V)
    with pytest.raises(IntegrityError, match="laid out"):
        rows_from_flat(np.roll(ids, 1), logprobs, ranks, tokens, K, V)
    with pytest.raises(IntegrityError, match="laid out"):
        rows_from_flat(ids, logprobs, ranks, np.roll(tokens, 1), K, V)


@pytest.mark.parametrize("top", [0.0, 1e-6, -1e-9])
def test_log_tail_stays_finite_and_below_its_bound(top: float) -> None:
    kept = np.array([[top, -40.0, -45.0]])
    got = log_tail(kept, 100)
    assert np.isfinite(got).all()
    assert got[0] <= np.log(97) - 45.0 + 1e-4
    # An ordinary row is plainly 1 − Σp.
    np.testing.assert_allclose(np.exp(log_tail(np.log([[0.5, 0.2]]), 100)), [0.3], rtol=1e-6)
    assert np.isneginf(log_tail(np.log([[0.7, 0.3]]), 2)).all()


def test_reference_rows_against_plain_float64() -> None:
    logits, tokens = _logits(30, seed=2)
    rows = rows_from_logits(torch.from_numpy(logits), torch.from_numpy(tokens[1:].astype(np.int64)), K, (0.5, 2.0))
    z = logits.astype(np.float64)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    order = np.argsort(-z, axis=1, kind="stable")
    np.testing.assert_array_equal(rows.ids_NK, order[:, :K])
    np.testing.assert_allclose(rows.log_tail_N, np.log(1 - np.take_along_axis(p, order[:, :K], 1).sum(1)), atol=1e-5)
    np.testing.assert_allclose(rows.entropy_N, -(p * np.log(p)).sum(1), atol=1e-5)
    for t, tail in rows.log_tail_at.items():
        q = np.exp(z / t) / np.exp(z / t).sum(-1, keepdims=True)
        np.testing.assert_allclose(np.exp(tail), 1 - np.take_along_axis(q, order[:, :K], 1).sum(1), atol=1e-5)
    at = np.arange(len(z))
    np.testing.assert_array_equal(rows.actual_rank_N, 1 + (z > z[at, tokens[1:]][:, None]).sum(1))
    np.testing.assert_allclose(rows.actual_logprob_N, np.log(p[at, tokens[1:]]), atol=1e-5)


def test_reference_tail_does_not_cancel_and_ties_take_the_lowest_ids() -> None:
    logits = torch.zeros(2, V)
    logits[0, 7] = 60.0
    logits[1, 30:] = 1.0
    rows = rows_from_logits(logits, torch.tensor([7, 0]), K, ())
    assert rows.ids_NK.tolist() == [[7, 0, 1, 2], [30, 31, 32, 33]]
    np.testing.assert_allclose(rows.log_tail_N[0], np.log(V - K) - 60.0, atol=1e-4)
    assert rows.actual_rank_N.tolist() == [1, 21]


def test_everything_kept_leaves_no_tail() -> None:
    rows = rows_from_logits(torch.randn(3, K), torch.tensor([0, 1, 2]), K, (2.0,))
    assert np.isneginf(rows.log_tail_N).all()
    assert np.isneginf(rows.log_tail_at[2.0]).all()
    assert isinstance(finite_or_reason(rows), TargetRows)


def test_non_finite_rows_are_a_reason() -> None:
    logits, tokens = _logits()
    good = rows_from_flat(*_flat(logits, tokens), tokens, K, V)
    assert finite_or_reason(good) is good
    bad = good.logprobs_NK.copy()
    bad[3, 1] = np.nan
    reason = finite_or_reason(replace(good, logprobs_NK=bad))
    assert reason == "the teacher gave a non-finite kept log-probabilities at 1 of 8 positions, first 3"
    assert isinstance(finite_or_reason(replace(good, actual_logprob_N=np.full(8, -np.inf, np.float32))), str)
    assert isinstance(finite_or_reason(replace(good, entropy_N=np.full(8, np.nan, np.float32))), str)


def test_sequences_that_cannot_be_scored() -> None:
    assert refusal(np.array([1, 2]), V, 8) is None
    assert "at least 2" in str(refusal(np.array([1]), V, 8))
    assert "window of 8" in str(refusal(np.zeros(9, np.int32), V, 8))
    assert "id 50 " in str(refusal(np.array([0, V]), V, 8))
    assert "id -1 " in str(refusal(np.array([0, -1]), V, 8))


def test_reference_engine_end_to_end() -> None:
    engine = teacher.open_engine(_section(), CaptureSection(top_k=8, temperatures=(2.0,)), 64)
    assert isinstance(engine, TransformersEngine)
    rng = np.random.default_rng(0)
    long, short = rng.integers(0, 512, 60).astype(np.int32), rng.integers(0, 512, 5).astype(np.int32)
    first, refused, second = engine.score([long, np.array([3], np.int32), short])
    assert isinstance(refused, str)
    assert isinstance(first, TargetRows)
    assert isinstance(second, TargetRows)
    dense = engine.dense_logprobs(long)
    assert dense.shape == (59, 512)
    np.testing.assert_allclose(np.exp(dense).sum(1), 1, atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(dense, first.ids_NK, 1), first.logprobs_NK, atol=1e-4)
    np.testing.assert_allclose(np.exp(first.logprobs_NK).sum(1) + np.exp(first.log_tail_N), 1, atol=1e-5)
    # Row t speaks of token t + 1 given tokens ≤ t: a prefix gives the same rows.
    np.testing.assert_allclose(engine.dense_logprobs(long[:20]), dense[:19], atol=1e-4)
    # Blocks of rows change nothing.
    whole = torch.cat(list(engine._logits(long, 2**30)))
    pieces = list(engine._logits(long, 4 * 512 * 7))
    assert len(pieces) == 9
    np.testing.assert_allclose(torch.cat(pieces).detach(), whole.detach(), atol=1e-4)
    with pytest.raises(ValueError, match="at least 2"):
        engine.dense_logprobs(np.array([1]))
    engine.close()


@pytest.mark.parametrize("draws_from", ["all", "tail"])
def test_reference_engine_draws_as_a_worker_does(draws_from: str) -> None:
    """Equal logits give equal draws, whatever else is scored; a changed token changes all of a sequence's draws."""
    section = CaptureSection.model_validate(
        {"top_k": 8, "temperatures": (2.0,), "draws": 30, "draws_from": draws_from, "draws_temperature": 2.0}
    )
    engine = teacher.open_engine(_section(), section, 64)
    assert isinstance(engine, TransformersEngine)
    rng = np.random.default_rng(0)
    tokens, other = rng.integers(0, 512, 40).astype(np.int32), rng.integers(0, 512, 9).astype(np.int32)
    changed = np.append(tokens[:-1], 511 - tokens[-1]).astype(np.int32)
    first, _, second = [r for r in engine.score([tokens, other, changed]) if isinstance(r, TargetRows)]
    (again,) = engine.score([tokens])
    assert isinstance(again, TargetRows)
    assert first.draws is not None
    assert again.draws is not None
    assert second.draws is not None
    np.testing.assert_array_equal(first.draws.words(), again.draws.words())
    with torch.inference_mode():
        table = torch.cat(list(engine._logits(tokens, 2**30)))
    spec = DrawSpec(30, draws_from == "tail", 2.0)
    keys = row_keys(sequence_hash(tokens), 0, 39)
    words = reduced([FakeHead(table, [Columns(0, 512, 0)])], 8, (2.0,), spec, keys)
    np.testing.assert_array_equal(draws_of(words, 8, (2.0,)).words(), first.draws.words())
    np.testing.assert_array_equal(first.ids_NK, second.ids_NK)  # the last token is in no row's context
    parts = [np.split(d.words(), np.cumsum(d.distinct_N)[:-1]) for d in (first.draws, second.draws)]
    assert all(len(a) != len(b) or (a != b).any() for a, b in zip(*parts, strict=True))
    row_M = np.repeat(np.arange(39), first.draws.distinct_N)
    np.testing.assert_array_equal(np.bincount(row_M, first.draws.counts_M), 30)
    engine.close()


def _gemma2(folder: Path, **caps: float | None) -> Path:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=1, **caps,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=2.0)
    model.save_pretrained(folder)
    return folder


def test_soft_cap_is_honoured(tmp_path: Path) -> None:
    folder = _gemma2(tmp_path, final_logit_softcapping=2.0)
    engine = TransformersEngine(_section(), CaptureSection(top_k=4), 32, folder, 64)
    dense = engine.dense_logprobs(np.arange(10, dtype=np.int32))
    assert np.ptp(dense, axis=1).max() <= 4.0 + 1e-4  # logits within ±2


def test_soft_cap_inside_attention_is_honoured(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = _gemma2(tmp_path, attn_logit_softcapping=0.5, final_logit_softcapping=None)
    tokens = np.random.default_rng(0).integers(0, 64, 24).astype(np.int32)
    engine = TransformersEngine(_section(), CaptureSection(top_k=4), 32, folder, 64)
    expected = {}
    for kind in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=kind)
        with torch.inference_mode():
            logits = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0, :-1]
        expected[kind] = logits.log_softmax(-1).numpy()
    # The cap must matter on this model, or the comparison would show nothing.
    assert np.abs(expected["eager"] - expected["sdpa"]).max() > 1.0
    np.testing.assert_allclose(engine.dense_logprobs(tokens), expected["eager"], atol=1e-4)


def test_open_engine_refuses_what_cannot_be_given(tmp_path: Path) -> None:
    with pytest.raises(CannotCaptureError, match="T ≠ 1"):
        teacher.open_engine(_section(engine="vllm"), CaptureSection(temperatures=(2.0,)), 64, "flat")
    with pytest.raises(CannotCaptureError, match=r"capture\.draws=5: vLLM's public path shows the top 64 alone"):
        teacher.open_engine(_section(engine="vllm"), CaptureSection(draws=5), 64, "flat")
    with pytest.raises(UserError, match="keeps all 512 tokens of the teacher and leaves nothing to draw from"):
        teacher.open_engine(_section(), CaptureSection(top_k=512, draws=5, draws_from="tail"), 64)
    with pytest.raises(UserError, match="use at most 512"):
        teacher.open_engine(_section(), CaptureSection(top_k=512).model_copy(update={"top_k": 513}), 64)
    with pytest.raises(UserError, match=r"no config\.json"):
        teacher.open_engine(_section(model=str(tmp_path)), CaptureSection(), 64)
    with pytest.raises(UserError, match="quantization"):
        teacher.open_engine(_section(quantization="fp8"), CaptureSection(), 64)


def test_vocabulary_is_the_configs(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"text_config": {"vocab_size": 152_064}}))
    assert teacher.vocabulary_size(tmp_path) == 152_064
    path.write_text("{}")
    with pytest.raises(UserError, match="vocab_size"):
        teacher.vocabulary_size(tmp_path)


def test_weights_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"vocab_size": 9, "soft_cap": 30, "transformers_version": "5.1"}')
    with pytest.raises(UserError, match="no weight files"):
        teacher.weights_identity(str(folder), None)
    weights = folder / "model.safetensors"
    weights.write_bytes(b"abc")
    first = teacher.weights_identity(str(folder), None)
    assert teacher.weights_identity(str(folder), None) == first
    assert [p.name for p in folder.iterdir() if p.name not in ("config.json", weights.name)] == []

    copy = tmp_path / "elsewhere"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes(b"abc")
    (copy / "config.json").write_text('{"transformers_version": "5.9", "soft_cap": 30, "vocab_size": 9}')
    assert teacher.weights_identity(str(copy), None) == first  # neither path nor layout counts

    weights.write_bytes(b"abd")  # same size: the modification time gives it away
    os.utime(weights, ns=(1, 1))
    changed = teacher.weights_identity(str(folder), None)
    assert changed["sha256"] != first["sha256"]
    assert changed["config"] == first["config"]


def test_a_revision_does_not_stand_for_the_content(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    def identity(folder: Path, revision: str = "v1") -> dict[str, str]:
        return teacher.weights_identity(str(folder), revision)

    base, copy = tmp_path / "base", tmp_path / "copy"
    base.mkdir()
    (base / "config.json").write_text('{"vocab_size": 9}')
    with pytest.raises(UserError, match="no weight files"):
        identity(base)
    values = np.arange(400_000, dtype=np.float32)
    save_file({"w": values}, base / "model.safetensors")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model.safetensors"}}')
    (base / "modeling.py").write_text("SCALE = 1")
    first = identity(base)
    assert identity(base, "v2") != first
    shutil.copytree(base, copy)
    os.utime(copy / "model.safetensors", ns=(1, 1))
    assert identity(copy) == first  # neither path nor time counts

    changes = {
        "another model of the same shape": lambda: save_file({"w": values + 1}, copy / "model.safetensors"),
        "other names": lambda: save_file({"v": values}, copy / "model.safetensors"),
        "another size": lambda: save_file({"w": values[1:]}, copy / "model.safetensors"),
        "one more file": lambda: save_file({"x": values}, copy / "model-2.safetensors"),
        "the index": lambda: (copy / "model.safetensors.index.json").write_text("{}"),
        "the code": lambda: (copy / "modeling.py").write_text("SCALE = 2"),
        "the config": lambda: (copy / "config.json").write_text('{"vocab_size": 9, "cap": 1}'),
    }
    for name, change in changes.items():
        change()
        assert identity(copy) != first, name
        shutil.rmtree(copy)
        shutil.copytree(base, copy)


def test_with_a_revision_the_weights_of_a_model_on_s3_stay_there(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tiny_teacher_folder()
    storage = open_storage(s3_uri)
    for path in folder.iterdir():
        storage.upload(path, path.name)
    assert teacher.weights_identity(s3_uri, "v1") == teacher.weights_identity(str(folder), "v1")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert teacher.weights_identity(s3_uri, None) == teacher.weights_identity(str(folder), None)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1


def test_a_weights_cache_that_cannot_be_kept_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert teacher.weights_identity(str(tiny_teacher_folder()), None)["sha256"]
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"text_config": {"torch_dtype": "float32"}}, "float32"),
        ({"dtype": None, "torch_dtype": "torch.bfloat16"}, "bfloat16"),
    ],
)
def test_auto_is_the_dtype_that_the_config_states(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert teacher.resolve_dtype(_section(dtype="auto"), tmp_path).dtype == expected
    assert teacher.resolve_dtype(_section(dtype="float16"), tmp_path).dtype == "float16"


@pytest.mark.parametrize("config", [{}, {"dtype": "float8_e4m3fn"}])
def test_auto_without_a_stated_dtype_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"set teacher\.dtype to one of float32"):
        teacher.resolve_dtype(_section(dtype="auto"), tmp_path)


def test_engine_and_capture_identity_hold_the_resolved_dtype(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_teacher_folder(), folder)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    engine = teacher.open_engine(_section(model=str(folder), dtype="auto"), CaptureSection(top_k=4), 32)
    assert isinstance(engine, TransformersEngine)
    assert engine._model.dtype == torch.bfloat16

    def identity(dtype: str) -> CaptureIdentity:
        sections = {
            "storage": {"root": str(tmp_path)},
            "corpus": {"sources": ["x"]},
            "student": {"teacher_layers": [0]},
            "teacher": {"model": str(folder), "dtype": dtype},
        }
        return capture_identity(parse_recipe({"name": "t", **sections}))

    assert identity("auto").teacher["dtype"] == "bfloat16"
    assert identity("auto").fingerprint == identity("bfloat16").fingerprint != identity("float32").fingerprint


def test_cores_of_the_ranks() -> None:
    assert threads_bind([0, 1], 2) == "0|1"
    assert threads_bind([0, 1], 3) == "0|1|0"
    assert threads_bind([2, 3, 5, 7, 8], 2) == "2,3|5,7"


def test_engine_arguments_for_capture() -> None:
    capture = CaptureSection(top_k=128)
    on_cpu = engine_arguments(_section(engine="vllm"), capture, 100, Path("m"), 512, 512)
    assert on_cpu["max_model_len"] == 101
    assert on_cpu["enable_prefix_caching"] is False
    assert on_cpu["max_logprobs"] == 256
    assert (on_cpu["enforce_eager"], on_cpu["distributed_executor_backend"]) == (True, "mp")
    on_gpu = engine_arguments(_section(use_gpu=True, tensor_parallel=2), capture, 4096, Path("m"), 128_256, 128_000)
    assert (on_gpu["gpu_memory_utilization"], on_gpu["distributed_executor_backend"]) == (0.9, "mp")
    assert on_gpu["long_prefill_token_threshold"] * 4 * 128_256 <= 2**29
    inside = engine_arguments(_section(use_gpu=True), capture, 4096, Path("m"), 128_256, 128_000, in_worker=True)
    assert "long_prefill_token_threshold" not in inside
    assert pkgutil.resolve_name(inside["worker_extension_cls"]) is CaptureWorker
    assert inside["max_logprobs"] == 256 + 256  # the most ids that no token has may come before the kept ones
    one = engine_arguments(_section(use_gpu=True), capture, 4096, Path("m"), 128_256, 128_000)
    assert one["distributed_executor_backend"] is None


def test_environment_is_left_alone_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_USAGE_STATS", "CPU_OMP_THREADS_BIND", "CPU_KVCACHE_SPACE", "ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(f"VLLM_{name}", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    set_process_environment(_section(use_gpu=True))
    assert os.environ["OMP_NUM_THREADS"] == "1"
    set_process_environment(_section())
    assert "OMP_NUM_THREADS" not in os.environ
    assert "VLLM_CPU_OMP_THREADS_BIND" not in os.environ
    set_process_environment(_section(tensor_parallel=3))
    assert len(os.environ["VLLM_CPU_OMP_THREADS_BIND"].split("|")) == 3


def test_importing_the_package_loads_neither_torch_nor_vllm() -> None:
    code = "import sys, distill_ray.teacher; print([m for m in ('torch', 'vllm', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "[]"
