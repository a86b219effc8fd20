"""The audit's comparison: planted errors are found at their position, honest rounding and ties never fail."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray import corpus, targets
from distill_ray.audit.rows import RowFigures, compare_rows
from distill_ray.audit.sample import UnitSample, choose, whole
from distill_ray.audit.source import check_alignment, compare_source
from distill_ray.audit.tolerance import tolerance_of
from distill_ray.audit.verb import _sources, _tolerance
from distill_ray.codec import encode, unrounded, unrounded_half, unrounded_log
from distill_ray.config import parse_recipe
from distill_ray.config.sections import TeacherSection
from distill_ray.errors import UserError
from distill_ray.schema import UNKNOWN_RECORD, DeadLetter, Sequence, TargetRows, UnitSummary
from distill_ray.storage import open_storage
from distill_ray.targets import ManifestUnit, RunManifest, StoredSequence
from distill_ray.teacher.dense import rows_from_dense
from distill_ray.teacher.flat import log_tail
from tests.unit.targets_fakes import exact_rows, identity, log_softmax, unit

V, K, R, N = 997, 16, 80, 40
OF = identity(V, K, (1.0, 2.0))
FLOAT32, BFLOAT16 = tolerance_of("float32", None), tolerance_of("bfloat16", None)
ROW = 27


def stored_from(sequence: Sequence, rows: TargetRows, of: targets.CaptureIdentity = OF) -> StoredSequence:
    """Through the real codec and container, without the writer's checks on alignment: plants must reach the audit."""
    half = {"dtype": np.float16}
    return StoredSequence(
        tokens=sequence.tokens,
        loss_mask=sequence.loss_mask,
        doc_key=sequence.doc_key,
        packed_NB=encode(rows.ids_NK, rows.logprobs_NK, rows.log_tail_N, of.vocab_size),
        actual_logprob_N=np.clip(rows.actual_logprob_N, -80, 0).astype(**half),
        actual_rank_N=rows.actual_rank_N,
        entropy_N=None if rows.entropy_N is None else rows.entropy_N.astype(**half),
        log_tail_at={t: np.clip(v, -80, 0).astype(**half) for t, v in rows.log_tail_at.items()},
    )


@cache
def logits_of(seed: int, n: int = N, vocab: int = V) -> tuple[Sequence, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (n, vocab))
    tokens = rng.integers(0, vocab, n + 1).astype(np.int32)
    often = rng.random(n) < 0.8  # as in prose: most tokens are likely ones
    tokens[1:][often] = np.argsort(-logits, axis=1)[np.arange(n), rng.integers(0, 5, n)][often]
    mask = rng.random(n + 1) < 0.7
    mask[0] = False
    return Sequence(tokens, mask, 77), logits


@cache
def rows_of(seed: int) -> tuple[TargetRows, TargetRows]:
    """K ids as captured, R ids as scored again."""
    sequence, logits = logits_of(seed)
    captured = exact_rows(logits, sequence.tokens[1:], K, (2.0,))
    again = rows_from_dense(log_softmax(logits).astype(np.float32), sequence.tokens, R, (2.0,))
    return captured, again


def test_rows_of_a_teacher_with_ids_that_no_token_has_pass() -> None:
    sequence, logits = logits_of(5)
    token_ids = V - 40
    of = replace(OF, token_ids=token_ids)
    logits, tokens = logits.copy(), sequence.tokens % token_ids
    logits[::2, token_ids:] += 12
    log_p = log_softmax(logits).astype(np.float32)
    captured, again = (rows_from_dense(log_p, tokens, k, (2.0,), token_ids) for k in (K, R))
    stored = stored_from(replace(sequence, tokens=tokens), captured, of)
    assert compare_rows(of, stored, targets.decode_rows(of, stored), again, FLOAT32).difference is None
    public = replace(stored, entropy_N=None, actual_rank_N=stored.actual_rank_N + np.where(log_p[:, -1] > -3, 40, 0))
    assert compare_rows(of, public, targets.decode_rows(of, public), again, FLOAT32).difference is None
    # With those ids looked for among the likeliest, every other row would be wrong.
    unlike = rows_from_dense(log_p, tokens, R, (2.0,))
    assert compare_rows(of, stored, targets.decode_rows(of, stored), unlike, FLOAT32).difference is not None


def audited(rows: TargetRows, tolerance=FLOAT32, seed: int = 1) -> RowFigures:
    """`rows` stored in the place of those that seed 1 gives."""
    sequence, _ = logits_of(seed)
    stored = stored_from(sequence, rows)
    return compare_rows(OF, stored, targets.decode_rows(OF, stored), rows_of(seed)[1], tolerance)


def captured_rows(seed: int = 1) -> TargetRows:
    return rows_of(seed)[0]


def put(rows: TargetRows, row: int = ROW, **columns: object) -> TargetRows:
    """A copy with one row of some columns replaced."""
    changed = {}
    for name, value in columns.items():
        array = getattr(rows, name).copy()
        array[row] = value
        changed[name] = array
    return replace(rows, **changed)


def one_row_shift(rows: TargetRows) -> TargetRows:
    """Row `ROW` holds what the row after it holds."""
    names = ("ids_NK", "logprobs_NK", "log_tail_N", "actual_logprob_N", "actual_rank_N", "entropy_N")
    shifted = put(rows, **{name: getattr(rows, name)[ROW + 1] for name in names})
    tails = rows.log_tail_at[2.0].copy()
    tails[ROW] = tails[ROW + 1]
    return replace(shifted, log_tail_at={2.0: tails})


def swapped_id(rank: int) -> Callable[[TargetRows], TargetRows]:
    """The id at `rank` gives its place to an unlikely one."""

    def plant(rows: TargetRows) -> TargetRows:
        _, logits = logits_of(1)
        ids = rows.ids_NK[ROW].copy()
        ids[rank - 1] = np.argsort(-logits[ROW])[R + 200]
        return put(rows, ids_NK=ids)

    return plant


def left_out(rows: TargetRows) -> TargetRows:
    """The id at rank 3 is missing: the next ones moved up, and one more follows, each with its own numbers."""
    again = rows_of(1)[1]
    kept = np.delete(np.arange(K + 1), 2)
    outside = np.exp(again.log_tail_N[ROW]) + np.exp(again.logprobs_NK[ROW, K + 1 :]).sum()
    return put(
        rows,
        ids_NK=again.ids_NK[ROW, kept],
        logprobs_NK=again.logprobs_NK[ROW, kept],
        log_tail_N=np.log(outside + np.exp(again.logprobs_NK[ROW, 2])),
    )


def exchanged(rows: TargetRows) -> TargetRows:
    """The ids at ranks 3 and 4 change places."""
    ids = rows.ids_NK[ROW].copy()
    ids[[2, 3]] = ids[[3, 2]]
    return put(rows, ids_NK=ids)


def off_by(nats: float, rank: int, row: int = ROW) -> Callable[[TargetRows], TargetRows]:
    """One kept log-probability is wrong; the row stays in rank order."""

    def plant(rows: TargetRows) -> TargetRows:
        logprobs = rows.logprobs_NK[row].copy()
        logprobs[rank - 1] += nats
        order = np.argsort(-logprobs, kind="stable")
        return put(rows, row, ids_NK=rows.ids_NK[row][order], logprobs_NK=logprobs[order])

    return plant


PLANTS: dict[str, tuple[Callable[[TargetRows], TargetRows], str]] = {
    "one-row shift": (one_row_shift, "is stored at rank"),
    "swapped id at rank 1": (swapped_id(1), "it is not among the first 80"),
    "swapped id at rank 9": (swapped_id(9), "it is not among the first 80"),
    "swapped id at the last rank": (swapped_id(K), "it is not among the first 80"),
    "an id left out": (left_out, "is not stored, scored again it has rank 3"),
    "two ids exchanged": (exchanged, "of an id stored before it"),
    "+0.3 nats at rank 2": (off_by(0.3, 2), "nats apart; its gap to rank 1"),
    "-0.3 nats at rank 2": (off_by(-0.3, 2), "of an id stored before it"),
    "+0.3 nats at the last rank": (off_by(0.3, K), "of an id stored before it"),
    "-0.3 nats at the last rank": (off_by(-0.3, K), "nats apart; its gap to rank 1"),
    "-0.3 nats at rank 1": (off_by(-0.3, 1), "nats apart; the stored bytes"),
    "tail": (lambda rows: put(rows, log_tail_N=rows.log_tail_N[ROW] - 0.3), "tail mass at T = 1 is"),
    "actual log-probability": (
        lambda rows: put(rows, actual_logprob_N=rows.actual_logprob_N[ROW] - 0.3), "the actual next token",
    ),
    "actual rank": (lambda rows: put(rows, actual_rank_N=rows.actual_rank_N[ROW] + 1), "has rank 2 stored"),
    "entropy": (lambda rows: put(rows, entropy_N=rows.entropy_N[ROW] + 0.3), "the entropy is"),
    "tail at T = 2": (
        lambda rows: replace(rows, log_tail_at={2.0: rows.log_tail_at[2.0] - 0.3 * (np.arange(N) == ROW)}),
        "tail mass at T = 2 is",
    ),
}  # fmt: skip


def test_the_planted_row_can_show_every_plant() -> None:
    rows = captured_rows()
    assert rows.actual_rank_N[ROW] < 5
    assert -3 < rows.log_tail_N[ROW] < -0.5
    assert (np.diff(rows.logprobs_NK[ROW]) < -0.005).all()


def test_untouched_rows_pass() -> None:
    figures = audited(captured_rows())
    assert figures.difference is None
    assert figures.rows == N
    assert figures.worst < 1e-5
    assert figures.moved_mass / N < 0.005


@pytest.mark.parametrize("name", PLANTS)
def test_a_plant_in_one_row_is_found_there_and_said_to_be_what_it_is(name: str) -> None:
    plant, said = PLANTS[name]
    figures = audited(plant(captured_rows()))
    assert figures.difference is not None
    assert figures.difference.position == ROW
    assert said in figures.difference.what


@pytest.mark.parametrize(("nats", "ranks"), [(0.1, slice(None)), (0.2, slice(5, 6))])
def test_a_decoder_that_gives_something_else_than_the_bytes_is_found(nats: float, ranks: slice) -> None:
    sequence, _ = logits_of(1)
    stored = stored_from(sequence, captured_rows())
    decoded = targets.decode_rows(OF, stored)
    decoded.logprobs_NK[ROW, ranks] -= np.float32(nats)
    found = compare_rows(OF, stored, decoded, rows_of(1)[1], FLOAT32).difference
    assert found is not None
    assert found.position == ROW
    assert "which is not what the bytes say" in found.what


@pytest.mark.parametrize("nats", [0.3, -0.3])
@pytest.mark.parametrize("rank", range(1, K + 1))
def test_an_error_of_a_third_of_a_nat_is_found_at_every_rank(rank: int, nats: float) -> None:
    if (rank, nats) == (1, 0.3):
        return  # beyond a probability of 1 in some rows; the writer refuses it
    for row in (0, ROW, 30, N - 1):
        figures = audited(off_by(nats, rank, row)(captured_rows()))
        assert figures.difference is not None
        assert figures.difference.position == row


@pytest.mark.parametrize(("mass", "passes"), [(0.0, True), (3e-5, True), (-3e-5, True), (3e-4, False), (-3e-4, False)])
def test_a_tail_by_subtraction_is_allowed_the_noise_of_its_normaliser_and_no_more(mass: float, passes: bool) -> None:
    """vLLM's public path: one float32 sum over all V shifts a whole row's log-probabilities, and so 1 − Σp."""
    vocab = 49_152
    of = identity(vocab, K, (1.0,))
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 1, (8, vocab))
    logits[:, :40] += 6
    logits[:, 0] = 17  # a tail of half a hundredth
    tokens = np.zeros(9, np.int32)
    rows = exact_rows(logits, tokens[1:], K, ())
    exact = rows_from_dense(log_softmax(logits), tokens, R, ())
    shifted = exact.logprobs_NK.astype(np.float64) + mass
    again = replace(exact, entropy_N=None, logprobs_NK=shifted.astype(np.float32), log_tail_N=log_tail(shifted, vocab))
    stored = stored_from(Sequence(tokens, np.arange(9) > 0, 1), replace(rows, log_tail_at={}), of)
    found = compare_rows(of, stored, targets.decode_rows(of, stored), again, FLOAT32).difference
    assert (found is None) == passes
    if found is not None:
        assert "tail mass at T = 1" in found.what


def test_the_first_of_several_differences_is_named_with_its_numbers() -> None:
    planted = off_by(0.3, 2)(captured_rows())
    rows = put(planted, ROW + 5, actual_rank_N=planted.actual_rank_N[ROW + 5] + 7)
    found = audited(rows).difference
    assert found is not None
    assert found.position == ROW
    value = captured_rows().logprobs_NK[ROW, 1]
    assert f"{value:.4f} scored again" in found.what
    assert "allow" in found.what


@pytest.mark.parametrize("plant", ["one-row shift", "swapped id at rank 1"])
def test_bfloat16_still_finds_what_moves_mass_in_one_row(plant: str) -> None:
    figures = audited(PLANTS[plant][0](captured_rows()), BFLOAT16)
    assert figures.difference is not None
    assert figures.difference.position == ROW


def test_bfloat16_lets_pass_what_its_arithmetic_cannot_tell_in_a_row_and_counts_it_over_the_sample() -> None:
    """The limit that tolerance.py states: 0.3 nats in one number pass, 0.3 nats on the top of every row do not."""
    assert audited(off_by(0.3, 8)(captured_rows()), BFLOAT16).difference is None
    sequence, logits = logits_of(1)
    wrong = logits.copy()
    wrong[np.arange(N), logits.argmax(axis=1)] += 0.3
    figures = audited(exact_rows(wrong, sequence.tokens[1:], K, (2.0,)), BFLOAT16)
    assert figures.difference is None
    assert figures.moved_mass / figures.rows > BFLOAT16.mean_mass


@st.composite
def _twice(draw: st.DrawFn) -> tuple[TargetRows, TargetRows, Sequence, targets.CaptureIdentity]:
    """The same rows by two float32 engines: each log-probability off by up to half the tolerance, ties and all."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vocab = draw(st.sampled_from([2, 17, 300, 2000]))
    k = draw(st.integers(1, min(vocab, 64)))
    n = draw(st.integers(1, 6))
    scale = draw(st.sampled_from([0.0, 0.01, 1.0, 4.0, 20.0]))
    step = draw(st.sampled_from([0.0, 0.125, 1.0]))  # logits on a grid tie as those of a bfloat16 head
    logits = rng.normal(0, scale, (n, vocab))
    logits = np.round(logits / step) * step if step else logits
    tokens = rng.integers(0, vocab, n + 1).astype(np.int32)
    of = identity(vocab, k, (0.5, 1.0, 4.0))
    noisy = logits + rng.uniform(-1, 1, logits.shape) * draw(st.sampled_from([0.0, 1e-4, FLOAT32.logprob / 2]))
    captured = exact_rows(noisy, tokens[1:], k, of.extra_temperatures, entropy=draw(st.booleans()))
    again = rows_from_dense(
        log_softmax(logits).astype(np.float32), tokens, min(vocab, max(2 * k, k + 5)), of.extra_temperatures
    )
    return captured, again, Sequence(tokens, np.arange(n + 1) > 0, 1), of


@settings(max_examples=300, deadline=None)
@given(_twice())
def test_rounding_ties_and_the_engines_own_noise_never_fail(twice) -> None:
    captured, again, sequence, of = twice
    stored = stored_from(sequence, captured, of)
    figures = compare_rows(of, stored, targets.decode_rows(of, stored), again, FLOAT32)
    assert figures.difference is None
    assert check_alignment(of, stored) is None


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.01, 1.0, 6.0]))
def test_what_was_packed_lies_in_the_bounds_of_its_bytes(seed: int, scale: float) -> None:
    logits = np.random.default_rng(seed).normal(0, scale, (5, 300))
    rows = exact_rows(logits, np.zeros(5, int), 40)
    bounds = unrounded(encode(rows.ids_NK, rows.logprobs_NK, rows.log_tail_N, 300), 40, 300)
    gaps = rows.logprobs_NK[:, :1].astype(np.float64) - rows.logprobs_NK
    assert bounds.gap_NK.distance(gaps).max() < 1e-5  # the root is taken in float32
    assert bounds.top_N.distance(rows.logprobs_NK[:, 0]).max() == 0
    assert bounds.log_tail_N.distance(rows.log_tail_N).max() == 0
    assert (bounds.gap_NK.high - bounds.gap_NK.low)[gaps < 23.8].max() < 0.19


def test_bounds_of_float16_are_half_a_step_and_open_where_values_were_clipped() -> None:
    stored = np.array([-1.0, -80.0, 0.0], np.float16)
    plain, log = unrounded_half(stored), unrounded_log(stored)
    assert (plain.low[0], plain.high[0]) == (-1 - 2**-11, -1 + 2**-12)
    assert log.low[1] == -np.inf
    assert log.high[2] == np.inf
    assert log.distance(np.array([-1.0, -500.0, 1e-4])).max() == 0
    assert log.distance(np.array([-1.01, -79.0, -0.1])).min() > 0


def _unit_of(sequences: list[Sequence], dead: list[DeadLetter]) -> targets.UnitTargets:
    rows = [exact_rows(logits_of(9, len(s.tokens) - 1)[1], s.tokens[1:], K, (2.0,)) for s in sequences]
    data, _ = targets.encode_unit(OF, unit(), sequences, rows, dead, 0.0)
    return targets.UnitTargets(data, OF.fingerprint, unit().hash, "memory")


def _sequences() -> list[Sequence]:
    return [logits_of(seed, 12)[0] for seed in (1, 2, 3)]


def test_sequences_of_the_corpus_pass_also_where_the_teacher_refused_some() -> None:
    corpus = _sequences()
    refused = DeadLetter(unit().hash, "a", UNKNOWN_RECORD, "sequence 1: too long")
    empty = DeadLetter(unit().hash, "a", 4, "empty")
    assert compare_source(_unit_of(corpus, [empty]), corpus) is None
    for missing in range(3):
        kept = [s for i, s in enumerate(corpus) if i != missing]
        assert compare_source(_unit_of(kept, [refused]), corpus) is None
        found = compare_source(_unit_of(kept, []), corpus)
        assert found is not None
        assert "2 sequences are stored and 0 were refused, the corpus gives 3" in found[1].what


def _with(sequence: Sequence, **changes: object) -> Sequence:
    return replace(sequence, **changes)


def _mask_flipped(s: Sequence) -> Sequence:
    return _with(s, loss_mask=s.loss_mask ^ (np.arange(13) == 7))


def _mask_shifted(s: Sequence) -> Sequence:
    mask = np.arange(13) > 6
    return _with(s, loss_mask=mask)


SOURCE_PLANTS = {
    "flipped mask": (_mask_flipped, 7, "token 7 is"),
    "shifted mask": (lambda s: _with(s, loss_mask=np.arange(13) >= 6), 5, "token 5 is not supervised as stored"),
    "swapped token": (lambda s: _with(s, tokens=np.where(np.arange(13) == 4, 996, s.tokens)), 4, "token 4 is 996"),
    "cut short": (lambda s: _with(s, tokens=s.tokens[:9], loss_mask=s.loss_mask[:9]), 9, "9 tokens are stored"),
    "another document": (lambda s: _with(s, doc_key=78), 0, "which decides what is held out"),
}


@pytest.mark.parametrize("refused", [0, 1])
@pytest.mark.parametrize("name", SOURCE_PLANTS)
def test_a_sequence_that_is_not_the_corpuss_is_found_at_its_first_token(name: str, refused: int) -> None:
    plant, position, said = SOURCE_PLANTS[name]
    corpus = [replace(s, loss_mask=np.arange(13) > 4) for s in _sequences()]
    stored = [corpus[0], plant(corpus[1]), corpus[2]]
    dead = [DeadLetter(unit().hash, "a", UNKNOWN_RECORD, "sequence 3: too long")] * refused
    corpus += [logits_of(4, 5)[0]] * refused
    found = compare_source(_unit_of(stored, dead), corpus)
    assert found is not None
    assert (found[0], found[1].position) == (1, position)
    assert said in found[1].what


def test_a_row_that_stands_at_another_tokens_place_shows_without_the_teacher() -> None:
    sequence, _ = logits_of(1)
    rows = captured_rows()
    assert check_alignment(OF, stored_from(sequence, rows)) is None
    moved = put(rows, **{n: getattr(rows, n)[ROW + 1] for n in ("ids_NK", "logprobs_NK", "log_tail_N")})
    found = check_alignment(OF, stored_from(sequence, moved))
    assert found is not None
    assert found.position == ROW
    assert "shifted against each other" in found.what


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, "float16"),
        ({"quantization_config": {"quant_method": "fp8"}}, "bfloat16"),
        ({"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}}, "bfloat16"),
    ],
)
def test_a_checkpoint_that_states_its_quantisation_is_judged_as_quantised(
    stated: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float16", **stated}))
    of = replace(OF, teacher={"dtype": "float16", "quantization": None})
    recipe: Any = SimpleNamespace(teacher=TeacherSection(model=str(tmp_path)))
    assert _tolerance(recipe, RunManifest(of, ())) == tolerance_of(expected, None)


def _manifest(counts: list[int]) -> RunManifest:
    units = []
    for i, count in enumerate(counts):
        ones = np.ones(count, np.int32)
        summary = UnitSummary(f"{i:032x}", 9 * ones, ones, ones.astype(np.uint64), 1, "0" * 64, 0.0, 0, 0.0)
        units.append(ManifestUnit(summary, 1, f"{i}.jsonl"))
    return RunManifest(OF, tuple(units))


def test_a_sample_is_spread_over_units_and_is_the_same_for_the_same_seed() -> None:
    manifest = _manifest([5, 0, 1, 40, 3])
    first = choose(manifest, "seed", 8)
    chosen = {s.unit.unit: s.sequences for s in first}
    assert {s.unit.unit: s.sequences for s in choose(manifest, "seed", 8)} == chosen
    assert {s.unit.unit: s.sequences for s in choose(manifest, "another", 8)} != chosen
    counts = {unit: len(sequences) for unit, sequences in chosen.items()}
    assert sum(counts.values()) == 8
    assert len(counts) == 4
    assert max(counts.values()) <= 3
    for sample in first:
        assert list(sample.sequences) == sorted(set(sample.sequences))
        assert max(sample.sequences) < len(sample.unit.lengths)
    assert len(choose(manifest, "seed", 2)) == 2


def test_more_than_there_are_is_all_of_them_and_named_units_are_taken_whole() -> None:
    manifest = _manifest([5, 0, 1])
    assert sum(len(s.sequences) for s in choose(manifest, "seed", 1000)) == 6
    name = manifest.units[0].unit
    assert whole(manifest, [name, name])[0].sequences == (0, 1, 2, 3, 4)
    assert len(whole(manifest, [name, name])) == 1
    with pytest.raises(UserError, match="uses no unit abc"):
        whole(manifest, [name, "abc"])


def test_a_sample_of_very_many_units_makes_objects_of_the_sampled_alone() -> None:
    manifest = _manifest([2] * 5000)
    name = manifest.units[4999].unit
    tracemalloc.start()
    assert len(choose(manifest, "seed", 8)) == 8
    assert whole(manifest, [name])[0].unit.unit == name
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 * len(manifest.units), "objects of all units take over a kilobyte each"


def test_the_sources_of_sampled_units_are_found_in_the_plan_and_lost_ones_named(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text(f'{{"text": "{i}"}}\n')
    storage = open_storage(str(tmp_path / "root"))
    recipe = parse_recipe(
        {
            "name": "tiny",
            "storage": {"root": storage.uri},
            "corpus": {"sources": [f"{tmp_path}/*.jsonl"]},
            "teacher": {"model": "/teacher"},
            "student": {"teacher_layers": [0]},
        }
    )
    planned = list(corpus.plan_units(recipe.corpus, OF.tokenizer, None))
    one = np.ones(1, np.int32)
    samples = [
        UnitSample(
            ManifestUnit(UnitSummary(u.hash, one, one, one.astype(np.uint64), 1, "", 0.0, 0, 0.0), 1, u.source.uri),
            (0,),
        )
        for u in (planned[2], planned[0])
    ]
    manifest = RunManifest(OF, tuple(s.unit for s in samples))
    found = _sources(recipe, storage, manifest, samples)
    assert found == {u.hash: u for u in (planned[0], planned[2])}
    Path(planned[2].source.uri).unlink()
    with pytest.raises(UserError, match=rf"1 of the 2 units .* \(one: of {planned[2].source.uri}\)"):
        _sources(recipe, storage, manifest, samples)
