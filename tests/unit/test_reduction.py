"""Rows from logits inside a worker: one shard or many, against float64 arithmetic on the whole distribution."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distill_ray.schema import TargetRows
from distill_ray.teacher.head import Columns, shard_columns
from distill_ray.teacher.reduction import ShardRows, from_words, merge, reduce_by_torch, reduce_tile, to_words
from distill_ray.teacher.wire import row_words, rows_from_words

V, K = 1000, 16
TEMPERATURES = (0.5, 2.0, 4.0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _logits(kind: str, dtype: torch.dtype, n_rows: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kind))
    z = torch.randn(n_rows, V, generator=generator) * 4
    if kind == "peaked":
        z[:, 7] += 60  # the kept mass rounds to 1 in float32
    if kind == "zipf":
        z = -1.5 * torch.log(1 + torch.rand(n_rows, V, generator=generator).argsort(-1).float())
    if kind == "ties":
        z = z.round()
    if kind == "uniform":
        z = torch.zeros(n_rows, V)
    if kind == "masked":
        z[:, 100:900] = -torch.inf
    return z.to(dtype)


def _shards(
    logits: torch.Tensor, actual: torch.Tensor, columns: list[Columns], top_k: int = K, reduce: Any = reduce_tile
) -> tuple[list[ShardRows], torch.Tensor]:
    actual_z = logits.gather(1, actual[:, None])[:, 0].float()
    tile = logits.clone()
    parts = [
        reduce(tile[:, c.start : c.stop], c.first_id, actual_z, top_k if c.kept else 0, TEMPERATURES) for c in columns
    ]
    return parts, actual_z


def _rows(
    logits: torch.Tensor, actual: torch.Tensor, columns: list[Columns], top_k: int = K, reduce: Any = reduce_tile
) -> TargetRows:
    parts, actual_z = _shards(logits, actual, columns, top_k, reduce)
    again = [from_words(to_words(p), top_k if c.kept else 0) for p, c in zip(parts, columns, strict=True)]
    words = merge(again, actual_z, TEMPERATURES)
    assert words.shape == (len(logits), row_words(top_k, TEMPERATURES))
    return rows_from_words(words.numpy(), top_k, TEMPERATURES)


def _log_sum(z: np.ndarray) -> np.ndarray:
    top = z.max(1, keepdims=True)
    with np.errstate(divide="ignore"):
        return top[:, 0] + np.log(np.exp(z - top).sum(1))


def _assert_exact(
    rows: TargetRows, logits: torch.Tensor, actual: torch.Tensor, top_k: int = K, token_ids: int = V
) -> None:
    z = logits.double().numpy()
    ids = np.broadcast_to(np.arange(z.shape[1]), z.shape)
    order = np.lexsort((ids, -z, ids >= token_ids), axis=1)
    np.testing.assert_array_equal(rows.ids_NK, order[:, :top_k])
    logprobs = z - _log_sum(z)[:, None]
    kept = np.take_along_axis(logprobs, order[:, :top_k], 1)
    np.testing.assert_allclose(rows.logprobs_NK, kept, rtol=1e-5, atol=1e-5)
    own = z[np.arange(len(z)), actual.numpy()]
    np.testing.assert_array_equal(rows.actual_rank_N, 1 + (z > own[:, None])[:, :token_ids].sum(1))
    np.testing.assert_allclose(rows.actual_logprob_N, own - _log_sum(z), rtol=1e-5, atol=1e-5)
    with np.errstate(invalid="ignore"):
        entropy = -np.where(np.isneginf(logprobs), 0, np.exp(logprobs) * logprobs).sum(1)
    assert rows.entropy_N is not None
    np.testing.assert_allclose(rows.entropy_N, entropy, rtol=1e-4, atol=1e-30)
    assert list(rows.log_tail_at) == list(TEMPERATURES)
    for t, tail in {1.0: rows.log_tail_N, **rows.log_tail_at}.items():
        rest = np.take_along_axis(z, order[:, top_k:], 1) / t
        exact = _log_sum(rest) - _log_sum(z / t) if rest.shape[1] else np.full(len(z), -np.inf)
        np.testing.assert_allclose(tail, exact, rtol=1e-5, atol=1e-4)


WHOLE = [Columns(0, V, 0)]
SHARDED = [Columns(0, 400, 0), Columns(400, 992, 400), Columns(992, V, 992), Columns(V, V, V)]


@pytest.mark.parametrize("columns", [WHOLE, SHARDED], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "peaked", "zipf", "ties", "uniform", "masked"])
def test_rows_equal_float64_arithmetic(kind: str, dtype: torch.dtype, columns: list[Columns]) -> None:
    logits = _logits(kind, dtype)
    actual = torch.randint(0, 100, (len(logits),), generator=torch.Generator().manual_seed(1))
    _assert_exact(_rows(logits, actual, columns), logits, actual)
    if len(columns) == 1:  # the same without a compiled kernel
        _assert_exact(_rows(logits, actual, columns, reduce=reduce_by_torch), logits, actual)


TOKENS = 900
BEYOND = [Columns(TOKENS, 930, TOKENS, kept=False), Columns(930, V, 930, kept=False)]
UNKEPT = [[Columns(0, TOKENS, 0), *BEYOND], [Columns(0, 400, 0), Columns(400, TOKENS, 400), *BEYOND]]


@pytest.mark.parametrize("columns", UNKEPT, ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "zipf", "ties", "uniform", "masked"])
def test_ids_that_no_token_has_are_never_kept_and_lie_in_every_tail(
    kind: str, dtype: torch.dtype, columns: list[Columns]
) -> None:
    logits = _logits(kind, dtype)
    logits[::2, TOKENS:] += 9  # where they would be the likeliest of all, too
    logits[1::4, TOKENS:] += 60  # and all but all there is
    actual = torch.randint(0, 100, (len(logits),), generator=torch.Generator().manual_seed(1))
    actual[0] = V - 1
    for reduce in (reduce_tile, reduce_by_torch):
        _assert_exact(_rows(logits, actual, columns, reduce=reduce), logits, actual, token_ids=TOKENS)


def test_rows_of_a_real_vocabulary() -> None:
    logits = torch.randn(9, 151_936, generator=torch.Generator().manual_seed(0)) * 3
    actual = torch.arange(9) * 16_000
    for dtype in DTYPES:
        z = logits.to(dtype)
        _assert_exact(_rows(z, actual, [Columns(0, 151_936, 0)], 64), z, actual, 64, 151_936)


@pytest.mark.parametrize("columns", [[Columns(0, 12, 0)], [Columns(0, 5, 0), Columns(5, 12, 5)]])
def test_everything_kept_leaves_no_tail(columns: list[Columns]) -> None:
    logits = _logits("plain", torch.float32)[:, :12].contiguous()
    actual = torch.full((len(logits),), 3)
    rows = _rows(logits, actual, columns, 12)
    assert np.isneginf(rows.log_tail_N).all()
    assert np.isneginf(rows.log_tail_at[0.5]).all()
    _assert_exact(rows, logits, actual, 12)


def test_nan_never_looks_like_a_row() -> None:
    logits = _logits("plain", torch.float32)
    logits[3, 500] = torch.nan
    rows = _rows(logits, torch.zeros(len(logits), dtype=torch.long), WHOLE)
    bad = ~np.isfinite(rows.logprobs_NK).all(1) | np.isnan(rows.log_tail_N)
    assert bad.tolist() == [i == 3 for i in range(len(logits))]


def test_words_carry_every_bit() -> None:
    logits = _logits("ties", torch.float32)
    (part,), _ = _shards(logits, torch.zeros(len(logits), dtype=torch.long), WHOLE)
    again = from_words(to_words(part), K)
    for name in ("values_RK", "ids_RK", "greater_R", "rest_max_R", "rest_sum_RS", "rest_entropy_R"):
        assert torch.equal(getattr(part, name), getattr(again, name)), name


def _vllm_shard(org: tuple[int, int, int, int], added: tuple[int, int, int, int]) -> SimpleNamespace:
    """What vLLM's shard indices hold: (padded start, padded end, start, end) of the base and the added vocabulary."""
    return SimpleNamespace(
        org_vocab_start_index=org[2],
        org_vocab_end_index=org[3],
        num_org_elements_padded=org[1] - org[0],
        added_vocab_start_index=added[2],
        added_vocab_end_index=added[3],
    )


def test_columns_of_a_padded_shard() -> None:
    # The example in vLLM's VocabParallelEmbedding: 1,010 ids and 16 added ones, each padded to a multiple of 64.
    whole = _vllm_shard((0, 1024, 0, 1010), (1010, 1074, 1010, 1026))
    assert shard_columns(whole, 1010, 1010) == [Columns(0, 1010, 0), Columns(1024, 1024, 1010)]
    assert shard_columns(whole, 1026, 1026) == [Columns(0, 1010, 0), Columns(1024, 1040, 1010)]
    second = _vllm_shard((512, 1024, 512, 1010), (1042, 1074, 1026, 1026))
    assert shard_columns(second, 1026, 1026) == [Columns(0, 498, 512), Columns(512, 512, 1026)]
    # Rows that the config does not know are cut even where vLLM counts them as ids.
    assert shard_columns(second, 600, 600)[0] == Columns(0, 88, 512)
    assert shard_columns(second, 500, 500)[0] == Columns(0, 0, 512)
    # What the tokenizer lacks follows, as often on a rank that has none of it.
    base, added, base_beyond, added_beyond = shard_columns(whole, 1020, 1005)
    assert (base, base_beyond) == (Columns(0, 1005, 0), Columns(1005, 1010, 1005, kept=False))
    assert (added, added_beyond) == (Columns(1024, 1024, 1010), Columns(1024, 1034, 1010, kept=False))
    base, _, beyond, _ = shard_columns(second, 600, 500)
    assert (base, beyond) == (Columns(0, 0, 512), Columns(0, 88, 512, kept=False))
    base, _, beyond, _ = shard_columns(second, 600, 550)
    assert (base, beyond) == (Columns(0, 38, 512), Columns(38, 88, 550, kept=False))
    base, _, beyond, _ = shard_columns(_vllm_shard((0, 512, 0, 512), (0, 0, 0, 0)), 600, 550)
    assert (base, beyond) == (Columns(0, 512, 0), Columns(512, 512, 512, kept=False))
