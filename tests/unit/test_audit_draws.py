"""The audit of drawn tokens: honest draws pass, wrong ones and draws of another distribution are found."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distill_ray import targets
from distill_ray.audit import unit as audited
from distill_ray.audit.drawn import check_draws_fall
from distill_ray.audit.outcome import limits
from distill_ray.audit.rows import RowFigures, compare_rows
from distill_ray.audit.tolerance import tolerance_of
from distill_ray.config import parse_recipe
from distill_ray.schema import COUNT_SHIFT, Draws, Sequence, TargetRows
from distill_ray.targets import CaptureIdentity, RunManifest, StoredDraws, StoredSequence
from distill_ray.teacher.dense import rows_from_dense
from distill_ray.teacher.draws import DrawSpec, draw_from_logits
from distill_ray.teacher.seeds import row_keys, sequence_hash
from distill_ray.teacher.wire import draws_from_words
from tests.unit.targets_fakes import identity, log_softmax, unit

V, K, R, N, DRAWS = 997, 16, 80, 60, 50
ROW = 27
FLOAT32 = tolerance_of("float32", None)
Taught = tuple[Sequence, np.ndarray, TargetRows]


def drawing(draws_from: str = "all", temperature: float = 1.0, token_ids: int = V) -> CaptureIdentity:
    of = replace(identity(V, K, (1.0, 2.0)), token_ids=token_ids)
    return replace(of, draws=DRAWS, draws_from=draws_from, draws_temperature=temperature)


def taught(of: CaptureIdentity, seed: int = 1, drawn_as: CaptureIdentity | None = None, scale: float = 2.0) -> Taught:
    """A sequence, its logits and its rows; drawn as another capture would draw, where one is given."""
    rng = np.random.default_rng(seed)
    logits_NV, tokens = rng.normal(0, scale, (N, V)), rng.integers(0, V, N + 1).astype(np.int32)
    if of.token_ids is not None:
        tokens %= of.token_ids
        logits_NV[:, of.token_ids :] += 4  # likely, and never kept
    mask = np.arange(N + 1) > 0
    rows = rows_from_dense(log_softmax(logits_NV), tokens, K, of.extra_temperatures, of.token_ids)
    spec_of = drawn_as or of
    spec = DrawSpec(spec_of.draws, spec_of.draws_from == "tail", spec_of.draws_temperature)
    z = torch.from_numpy(log_softmax(logits_NV).astype(np.float32))
    keys = torch.from_numpy(row_keys(sequence_hash(tokens), 0, N))
    words = draw_from_logits(spec, z, K, keys, torch.from_numpy(rows.logprobs_NK[:, 0]), of.token_ids)
    return Sequence(tokens, mask, seed), logits_NV, replace(rows, draws=draws_from_words(words.numpy()))


def unit_of(of: CaptureIdentity, many: list[Taught]) -> targets.UnitTargets:
    data, _ = targets.encode_unit(of, unit(), [s for s, _, _ in many], [r for _, _, r in many], [], 0.0)
    return targets.UnitTargets(data, of.fingerprint, unit().hash, "memory")


def figures(of: CaptureIdentity, stored: StoredSequence, logits_NV: np.ndarray) -> RowFigures:
    again = rows_from_dense(log_softmax(logits_NV).astype(np.float32), stored.tokens, R, (2.0,), of.token_ids)
    return compare_rows(of, stored, targets.decode_rows(of, stored), again, FLOAT32)


@pytest.mark.parametrize("token_ids", [V, V - 20])
@pytest.mark.parametrize(("draws_from", "temperature"), [("all", 1.0), ("all", 2.0), ("tail", 1.0), ("tail", 2.0)])
def test_honest_draws_pass(draws_from: str, temperature: float, token_ids: int) -> None:
    of = drawing(draws_from, temperature, token_ids)
    many = [taught(of, seed) for seed in range(1, 9)]
    whole = unit_of(of, many)
    assert check_draws_fall(of, whole) is None
    for i, (_, logits_NV, _) in enumerate(many):
        assert figures(of, whole.sequence(i), logits_NV).difference is None


def test_copies_of_one_sequence_draw_alike_and_count_once() -> None:
    """Taken for independent, 1,500 copies would accuse each sequence whose sum lies a quarter of a deviation off."""
    of = drawing()
    for seed in range(1, 5):
        assert check_draws_fall(of, unit_of(of, [taught(of, seed)] * 1500)) is None


def test_a_capture_without_draws_has_none_to_check() -> None:
    of = identity(V, K, (1.0, 2.0))
    sequence, _, rows = taught(drawing())
    assert check_draws_fall(of, unit_of(of, [(sequence, np.zeros(0), replace(rows, draws=None))])) is None


def _changed(stored: StoredSequence, which: str, logits_NV: np.ndarray) -> StoredSequence:
    """The likeliest draw of row `ROW` is wrong."""
    assert stored.draws is not None
    at = int(stored.draws.distinct_N[:ROW].sum(dtype=int))
    at += int(np.argmax(stored.draws.logprobs_M[at : at + stored.draws.distinct_N[ROW]]))
    words, logprobs = stored.draws.words_M.copy(), stored.draws.logprobs_M.copy()
    if which == "log-probability":
        logprobs[at] -= 0.3
    else:
        rare = int(np.argsort(-logits_NV[ROW])[-1])
        words[at] = np.uint32(rare) | (words[at] >> COUNT_SHIFT << COUNT_SHIFT)
    return replace(stored, draws=StoredDraws(words, logprobs, stored.draws.distinct_N))


@pytest.mark.parametrize("draws_from", ["all", "tail"])
@pytest.mark.parametrize("which", ["log-probability", "id"])
def test_one_wrong_draw_is_found_at_its_row(which: str, draws_from: str) -> None:
    of = drawing(draws_from)
    one = taught(of)
    changed = _changed(unit_of(of, [one]).sequence(0), which, one[1])
    difference = figures(of, changed, one[1]).difference
    assert difference is not None
    assert difference.position == ROW
    assert "was drawn with log-probability" in difference.what


def _from_the_kept_alone(one: Taught) -> Taught:
    """Every draw outside the kept ids goes to rank 1: what drawing from a truncated distribution gives."""
    sequence, logits_NV, rows = one
    assert rows.draws is not None
    row_M = np.repeat(np.arange(N), rows.draws.distinct_N)
    parts = []
    for t in range(N):
        mine = row_M == t
        counts = dict.fromkeys([int(rows.ids_NK[t, 0])], 0)
        for id_, count in zip(rows.draws.ids_M[mine].tolist(), rows.draws.counts_M[mine].tolist(), strict=True):
            kept = id_ if id_ in rows.ids_NK[t] else int(rows.ids_NK[t, 0])
            counts[kept] = counts.get(kept, 0) + count
        ids = sorted(i for i in counts if counts[i])
        logprobs = [float(rows.logprobs_NK[t, np.flatnonzero(rows.ids_NK[t] == i)[0]]) for i in ids]
        kinds = (np.int32, np.int32, np.float32, np.uint16)
        columns = (ids, [counts[i] for i in ids], logprobs, [len(ids)])
        parts.append(Draws(*(np.array(c, k) for c, k in zip(columns, kinds, strict=True))))
    return sequence, logits_NV, replace(rows, draws=Draws.joined(parts))


def test_draws_from_the_kept_ids_alone_are_found() -> None:
    of = drawing()
    found = check_draws_fall(of, unit_of(of, [_from_the_kept_alone(taught(of, seed)) for seed in (1, 2)]))
    assert found is not None
    assert "0 draws fell outside the kept ids" in found[1].what


def test_draws_at_another_temperature_are_found() -> None:
    of = drawing()
    many = [taught(of, seed, drawn_as=drawing(temperature=2.0)) for seed in (1, 2)]
    found = check_draws_fall(of, unit_of(of, many))
    assert found is not None
    assert "they are not drawn from this distribution" in found[1].what


def test_a_kept_id_drawn_from_the_tail_is_found() -> None:
    of = drawing("tail")
    one = unit_of(of, [taught(of)]).sequence(0)
    assert one.draws is not None
    words = one.draws.words_M.copy()
    at = int(one.draws.distinct_N[:ROW].sum(dtype=int))
    kept = targets.decode_rows(of, one).ids_NK[ROW, 3]
    words[at] = np.uint32(kept) | (words[at] >> COUNT_SHIFT << COUNT_SHIFT)
    changed = replace(one, draws=StoredDraws(words, one.draws.logprobs_M, one.draws.distinct_N))

    class Whole:
        def __len__(self) -> int:
            return 1

        def sequence(self, i: int) -> StoredSequence:
            return changed

    found = check_draws_fall(of, Whole())  # type: ignore[arg-type]
    assert found is not None
    assert (found[0], found[1].position) == (0, ROW)
    assert "draws from the tail are kept ids" in found[1].what


@pytest.mark.parametrize("draws_from", ["all", "tail"])
def test_the_teacher_that_scores_again_draws_nothing(draws_from: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for draws, vLLM's public path refuses, and a tail beyond all R re-scored ids may be empty."""
    of = drawing(draws_from, 2.0)
    capture = {"top_k": K, "temperatures": [2.0], "draws": 5, "draws_from": draws_from, "draws_temperature": 2.0}
    recipe = parse_recipe(
        {
            "name": "tiny",
            "storage": {"root": "/root"},
            "corpus": {"sources": ["/data/*.jsonl"]},
            "teacher": {"model": "/teacher"},
            "capture": capture,
            "student": {"teacher_layers": [0]},
        }
    )
    asked = []
    opened = SimpleNamespace(score_again=lambda sequences: [])
    monkeypatch.setattr(audited.teacher, "open_engine", lambda *given, **_: asked.append(given) or opened)
    audited.open_scorer(recipe, of, "vllm")
    ((_, section, _),) = asked
    assert section.top_k == K
    assert DrawSpec.of(section) is None
    assert type(section).model_validate(section.model_dump()) == section


def test_what_the_audit_cannot_see_of_draws_is_said() -> None:
    said = [
        list(limits(RunManifest(of, ()), "transformers", FLOAT32, loaded=True)) for of in (identity(V, K), drawing())
    ]
    assert said[0] == []
    assert any("drawn tokens are held to" in text for text in said[1])
