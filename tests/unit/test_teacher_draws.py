"""Tokens drawn in the teacher's process: whether they are distributed as the teacher's own probabilities, and fixed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill_ray.config.sections import CaptureSection
from distill_ray.errors import IntegrityError
from distill_ray.schema import Draws, TargetRows
from distill_ray.targets.draws import check_draws
from distill_ray.teacher.draws import DrawSpec, _search, draw_from_logits, search_by_torch
from distill_ray.teacher.engine import finite_or_reason
from distill_ray.teacher.head import Columns
from distill_ray.teacher.seeds import (
    _outputs,
    hash_in_name,
    named_for_draws,
    row_keys,
    sequence_hash,
    uniforms,
)
from distill_ray.teacher.wire import draws_from_words, row_words, rows_from_words
from tests.assets import REPO
from tests.unit.draws_fakes import FakeHead, draws_of, keys, p_value, padded, probabilities, reduced
from tests.unit.targets_fakes import identity

V, K, N, ROWS = 300, 12, 50, 400
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUNDS = [(0, 100), (100, 295), (295, 300)]
"""The last shard has fewer columns than are kept."""


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors of a few thousand numbers: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _logits(kind: str = "plain", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    z = torch.randn(V, generator=torch.Generator().manual_seed(3)) * 2
    if kind == "ties":
        z = z.round()
    if kind == "peaked":  # the kept mass rounds to 1 in float64 too
        z[torch.topk(z, K).indices] += 80
    if kind == "masked":
        z[40:260] = -torch.inf
    if kind == "uniform":
        z = torch.zeros(V)
    return z.to(dtype)


def _whole(table: torch.Tensor) -> list[FakeHead]:
    return [FakeHead(table, [Columns(0, table.shape[1], 0)])]


def _parts(table: torch.Tensor) -> list[FakeHead]:
    """Three shards on one rank, with padding between them."""
    columns = [Columns(a + 7 * i, b + 7 * i, a) for i, (a, b) in enumerate(BOUNDS)]
    return [FakeHead(padded(table, columns, V + 21), columns)]


def _ranks(table: torch.Tensor) -> list[FakeHead]:
    """Three ranks, each padded to one width, with an empty part for added ids."""
    shards = [[Columns(0, b - a, a), Columns(200, 200, V)] for a, b in BOUNDS]
    return [FakeHead(padded(table, columns, 210), columns, tp_size=3) for columns in shards]


SHARDING = {"whole": _whole, "parts": _parts, "ranks": _ranks}


def _temperatures(spec: DrawSpec) -> tuple[float, ...]:
    return () if spec.temperature == 1 else (spec.temperature,)


def _drawn(logits_V: torch.Tensor, spec: DrawSpec, sharding: str = "whole") -> Draws:
    """Draws at rows that all have the same logits."""
    heads = SHARDING[sharding](logits_V.expand(ROWS, -1))
    return draws_of(reduced(heads, K, _temperatures(spec), spec, keys(ROWS)), K, _temperatures(spec))


@pytest.mark.parametrize("sharding", SHARDING)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail_only", [False, True], ids=["all", "tail"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_have_the_teachers_distribution(
    dtype: torch.dtype, tail_only: bool, temperature: float, sharding: str
) -> None:
    """20,000 draws against the dense probabilities. 36 tests of a right program fall below 1e-4 once in 280 seeds."""
    z, spec = _logits(dtype=dtype), DrawSpec(N, tail_only, temperature)
    draws = _drawn(z, spec, sharding)
    assert p_value(draws, probabilities(z, K, spec)) > 1e-4
    logprobs = z.double().log_softmax(0).numpy()
    np.testing.assert_allclose(draws.logprobs_M, logprobs[draws.ids_M], atol=1e-5)


@pytest.mark.parametrize("tail_only", [False, True], ids=["all", "tail"])
@pytest.mark.parametrize("kind", ["ties", "peaked", "masked", "uniform"])
def test_unusual_rows_too(kind: str, tail_only: bool) -> None:
    dtype = torch.bfloat16 if kind == "ties" else torch.float32
    spec = DrawSpec(N, tail_only, 1.0)
    z = _logits(kind, dtype)
    p = probabilities(z, K, spec)
    draws = _drawn(z, spec, "parts")
    if kind == "peaked" and not tail_only:
        assert np.isin(draws.ids_M, np.flatnonzero(p > 1e-12)).all()
    else:
        assert p_value(draws, p) > 1e-4


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail_only", [False, True], ids=["all", "tail"])
def test_ids_that_no_token_has_are_drawn_from_the_tail(tail_only: bool, temperature: float) -> None:
    """On two ranks, of which the second has them, and from whole rows."""
    z, spec, tokens = _logits(), DrawSpec(N, tail_only, temperature), 280
    z[tokens:] += 6
    shards = [
        [Columns(0, 150, 0), Columns(150, 150, 150, kept=False)],
        [Columns(0, tokens - 150, 150), Columns(tokens - 150, 150, tokens, kept=False)],
    ]
    table = z.expand(ROWS, -1)
    heads = [FakeHead(padded(table, columns, 160), columns, tp_size=2) for columns in shards]
    words = reduced(heads, K, _temperatures(spec), spec, keys(ROWS))
    draws = draws_of(words, K, _temperatures(spec))
    assert p_value(draws, probabilities(z, K, spec, tokens)) > 1e-4
    assert (draws.ids_M >= tokens).any()
    top = torch.from_numpy(words[:, K].view(np.float32).copy())
    whole = draw_from_logits(spec, table.clone(), K, torch.from_numpy(keys(ROWS)), top, tokens)
    np.testing.assert_array_equal(draws_from_words(whole.numpy()).ids_M, draws.ids_M)


@pytest.mark.parametrize("tail_only", [False, True], ids=["all", "tail"])
def test_a_real_vocabulary(tail_only: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    z = -1.2 * torch.log(1 + torch.rand(49_152, generator=generator).argsort().float())
    spec, top_k, rows = DrawSpec(N, tail_only, 1.0), 64, 100  # 85 rows are one tile
    words = reduced(_whole(z.expand(rows, -1)), top_k, (), spec, keys(rows))
    p = probabilities(z, top_k, spec)
    draws = draws_of(words, top_k, ())
    order = np.argsort(-p)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    edges = np.unique(np.geomspace(1, len(p), 40).astype(int)) - 1  # classes of ids by rank
    by_class = replace(draws, ids_M=np.searchsorted(edges, rank[draws.ids_M], side="right") - 1)
    assert p_value(by_class, np.add.reduceat(p[order], edges)) > 1e-4


@pytest.mark.parametrize("tail_only", [False, True], ids=["all", "tail"])
def test_draws_from_the_top_k_alone_are_seen(tail_only: bool) -> None:
    """The planted fault: what lies outside the top 128 of 300 tokens, 2.5 % of the mass, is never drawn."""
    z, spec = _logits(), DrawSpec(N, tail_only, 1.0)
    cut = torch.where(z >= z.topk(128).values[-1], z, -torch.inf)
    p = probabilities(z, K, spec)
    assert 1 - z.softmax(0)[torch.isfinite(cut)].sum() == pytest.approx(0.025, abs=0.005)
    assert p_value(_drawn(z, spec), p) > 1e-4
    assert p_value(_drawn(cut, spec), p) < 1e-9


@pytest.mark.parametrize("dtype", DTYPES)
def test_how_the_vocabulary_is_split_changes_no_draw(dtype: torch.dtype) -> None:
    for spec in (DrawSpec(N, False, 2.0), DrawSpec(N, True, 1.0)):
        found = [_drawn(_logits(dtype=dtype), spec, sharding) for sharding in SHARDING]
        first, *others = [np.repeat(d.ids_M, d.counts_M).reshape(ROWS, N) for d in found]
        # Sums of shards round otherwise: of 20,000 draws one or two may fall on the other side of a boundary.
        assert all((other != first).mean() < 1e-3 for other in others)


def test_batch_chunks_and_tiles_change_no_draw() -> None:
    n, spec = 60, DrawSpec(N, False, 1.0)
    table = torch.randn(n, V, generator=torch.Generator().manual_seed(1)) * 3
    whole = reduced(_whole(table), K, (), spec, keys(n))
    order = np.random.default_rng(0).permutation(n)
    mixed = reduced(_whole(table), K, (), spec, keys(n)[order], order)
    np.testing.assert_array_equal(mixed, whole[order])
    chunks = [reduced(_whole(table), K, (), spec, row_keys(1, a, 7), np.arange(a, a + 7)) for a in (0, 7, 14)]
    np.testing.assert_array_equal(np.concatenate(chunks), whole[:21])
    other = reduced(_whole(table), K, (), spec, keys(n, sequence=2))
    drawn = row_words(K, ())
    np.testing.assert_array_equal(other[:, :drawn], whole[:, :drawn])
    assert (other[:, drawn:] != whole[:, drawn:]).any(1).all()


def fingerprint() -> str:
    """Of all words that fixed logits and fixed tokens give."""
    spec = DrawSpec(N, False, 2.0)
    key = row_keys(sequence_hash(np.arange(9, dtype=np.int32)), 0, 40)
    table = torch.randn(40, V, generator=torch.Generator().manual_seed(5)) * 3
    return hashlib.sha256(reduced(_whole(table), K, (2.0,), spec, key).tobytes()).hexdigest()


def test_another_process_draws_the_same() -> None:
    code = "import torch; torch.set_num_threads(1); from tests.unit.test_teacher_draws import *; print(fingerprint())"
    env = os.environ | {"PYTHONPATH": str(REPO), "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout.strip() == fingerprint()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_the_compiled_search_is_torchs(dtype: torch.dtype, temperature: float) -> None:
    generator = torch.Generator().manual_seed(2)
    z = (torch.randn(64, 3001, generator=generator) * 5).to(dtype)
    z[:, 1000:1700] = -torch.inf
    z[5], z[6, :3000] = -torch.inf, -torch.inf
    tile = z[:, 1:3000]  # rows are not adjacent
    greatest = tile.float().amax(1).nan_to_num(neginf=0.0)
    mass = ((tile.double() - greatest[:, None]) / temperature).exp().sum(1, keepdim=True)
    wanted = torch.rand(64, N, generator=generator, dtype=torch.float64) * mass
    wanted[:, ::5], wanted[:, 1] = -1.0, mass[:, 0] * 1.01  # not wanted here; beyond the sum by rounding
    compiled = _search("cpu", dtype)
    assert compiled is not search_by_torch
    got, want = (f(tile, greatest, temperature, wanted) for f in (compiled, search_by_torch))
    beyond = torch.arange(N) == 1
    assert (got != want)[:, ~beyond].sum() <= 2  # at a boundary the two sums round differently
    assert (got[:, ::5] == -1).all()
    assert (got[5] == -1).all()
    found = got >= 0
    assert torch.isfinite(tile.gather(1, got.clamp_min(0)))[found].all()
    upto = ((tile.double() - greatest[:, None]) / temperature).exp().cumsum(1)
    exact = torch.searchsorted(upto, wanted, right=True).clamp(max=tile.shape[1] - 1)
    assert (got != exact)[found & ~beyond].sum() <= 2
    heavy = (tile.double() - greatest[:, None]) / temperature > -87  # e^-87 is the least normal float32
    last = torch.where(heavy, torch.arange(tile.shape[1]), -1).amax(1)
    assert (got[:, 1] == last).all()


def test_rows_pass_the_stores_own_checks() -> None:
    z = torch.randn(ROWS, V, generator=torch.Generator().manual_seed(8)).mul(3).round()
    for spec in (DrawSpec(N, False, 1.0), DrawSpec(7, True, 2.0)):
        of = replace(
            identity(V, K),
            draws=spec.count,
            draws_from="tail" if spec.tail_only else "all",
            draws_temperature=spec.temperature,
        )
        rows = rows_from_words(reduced(_ranks(z), K, (2.0,), spec, keys(ROWS)), K, (2.0,), spec.count)
        assert isinstance(finite_or_reason(rows), TargetRows)
        check_draws(of, rows)


def test_a_tail_of_nothing_gives_no_draw_and_a_nan_refuses_its_row() -> None:
    z = torch.randn(9, V, generator=torch.Generator().manual_seed(8))
    z[2, K:] = -torch.inf
    z[4, 100] = torch.nan
    rows = rows_from_words(reduced(_parts(z), K, (), DrawSpec(N, True, 1.0), keys(9)), K, (), N)
    assert rows.draws is not None
    assert (rows.draws.distinct_N == 0).tolist() == [t == 2 for t in range(9)]
    assert "at 1 of 9 positions, first 4" in str(finite_or_reason(rows))
    everything = draws_of(reduced(_parts(z[2:3]), K, (), DrawSpec(N, False, 1.0), keys(1)), K, ())
    assert everything.counts_M.sum() == N
    assert everything.ids_M.max() < K


def test_numbers_are_splitmix64s() -> None:
    """Its published outputs for the seed 1234567, and 53 bits of them as a uniform."""
    seed = torch.tensor([1234567])
    got = _outputs(seed, torch.arange(3))[0].numpy().view(np.uint64)
    assert got.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    want = [x // 2**11 / 2**53 for x in got[[0, 2]].tolist()]
    assert uniforms(seed, 2, lane=0)[0].tolist() == want
    assert uniforms(seed, 1, lane=1)[0].tolist() == [3203168211198807973 // 2**11 / 2**53]


def test_uniforms_are_uniform_and_independent() -> None:
    key = torch.from_numpy(np.concatenate([row_keys(s, 0, 50) for s in range(100)]))
    u, v = (uniforms(key, 40, lane).numpy() for lane in (0, 1))
    for a, b in ((u, v), (u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u[50:], u[:-50])):  # lanes, draws, rows, sequences
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)
    seen = np.histogram(u, bins=1000, range=(0, 1))[0]
    assert abs(((seen - 200) ** 2 / 200).sum() - 999) < 4 * np.sqrt(2 * 999)
    assert 0 <= u.min() < u.max() < 1


def test_a_requests_name_carries_its_tokens_hash() -> None:
    tokens = np.array([3, 1, 2], np.int32)
    name = named_for_draws("s12", tokens)
    assert name == f"s12-{sequence_hash(tokens):016x}"
    assert hash_in_name(name) == hash_in_name(f"{name}-1f2e3d4c") == sequence_hash(tokens.astype(np.int64))
    assert sequence_hash(tokens[::-1]) != sequence_hash(tokens)
    for other in ("s12", "s12-abc", "cmpl-0-00c0ffee00c0ffee", f"{name}x"):
        with pytest.raises(IntegrityError, match="cannot be seeded"):
            hash_in_name(other)


def test_what_a_capture_draws() -> None:
    assert DrawSpec.of(CaptureSection()) is None
    section = CaptureSection(draws=20, draws_from="tail", draws_temperature=2.0, temperatures=(2.0,))
    assert DrawSpec.of(section) == DrawSpec(20, True, 2.0)
