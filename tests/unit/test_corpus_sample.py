"""Tokens of whole sources, from records drawn across them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_ray import corpus
from distill_ray.config import Recipe, parse_recipe
from distill_ray.corpus import Sample, held_out, load_tokenizer, sample_sources
from distill_ray.errors import UserError
from distill_ray.forecast.amounts import corpus_amounts
from distill_ray.schema import Amounts
from distill_ray.storage import find_sources, open_storage
from tests.assets import tiny_tokenizer_folder
from tests.unit.run_fakes import OF, capture, planned, recipe_in, source

FEW, MANY = "A short line of text. ", "A short line of text. " * 10


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(tiny_tokenizer_folder(), False)


def _recipe(pattern: Path | str, **sections: dict[str, Any]) -> Recipe:
    stated: dict[str, Any] = {
        "storage": {"root": "/root"},
        "corpus": {"sources": [str(pattern)], "holdout": 0.25, "window_tokens": 64},
        "teacher": {"model": "/teacher"},
        "student": {"teacher_layers": [0]},
    }
    return parse_recipe({"name": "tiny", **{n: stated.get(n, {}) | sections.get(n, {}) for n in stated | sections}})


def _sample(recipe: Recipe, tokenizer: Any) -> Sample:
    return sample_sources(recipe, find_sources(recipe.corpus.sources), tokenizer)


def _write(path: Path, records: list[dict[str, str]]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".parquet":
        table = pa.table({name: [record[name] for record in records] for name in records[0]})
        pq.write_table(table, path, row_group_size=1000, use_dictionary=False)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_source_whose_second_half_is_ten_times_denser_is_found_from_a_part_of_it(
    name: str, tmp_path: Path, tokenizer: Any
):
    # Both halves have as many bytes: what is no text fills up the first.
    halves = [{"text": FEW, "about": "x" * 1980}] * 3000 + [{"text": MANY, "about": "x" * 1782}] * 3000
    _write(tmp_path / name, halves)
    # As one window each.
    recipe = _recipe(tmp_path / name, corpus={"window_tokens": 1024})
    truth = 3000 * sum(len(tokenizer(text)["input_ids"]) for text in (FEW, MANY))
    found = _sample(recipe, tokenizer)
    (amounts,) = found.of_source.values()
    assert amounts.tokens == pytest.approx(truth, rel=0.2)
    assert amounts.train_tokens == pytest.approx(0.75 * amounts.tokens)
    assert found.bytes < 0.3 * 6000 * 2000
    assert _sample(recipe, tokenizer) == found


def _captured(recipe: Recipe, tokenizer: Any) -> Amounts:
    """What a capture would make of the corpus."""
    units = corpus.plan_units(recipe.corpus, "tok", None)
    found = [s for unit in units for s in corpus.read_unit_sequences(unit, recipe.corpus, tokenizer)[0]]
    counts = np.array([(len(s.tokens), s.loss_mask.sum()) for s in found])
    kept = ~held_out(np.array([s.doc_key for s in found]), recipe.corpus.holdout)
    tokens, supervised = counts.sum(axis=0).tolist()
    return Amounts(tokens, len(found), supervised, *counts[kept].sum(axis=0).tolist())


def test_small_sources_are_counted_whole_as_a_capture_counts_them(tmp_path: Path, tokenizer: Any):
    records = [{"text": f"{i} " * (5 + i)} for i in range(40)]
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        _write(tmp_path / name, [{"text": f"{name} {record['text']}"} for record in records])
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "no line end"}).encode())
    (tmp_path / "e.jsonl").write_bytes(b'not json\n\n{"text": 3}\n{"text": "good one"}\n')
    (tmp_path / "f.txt").write_text("One document. " * 300)
    (tmp_path / "g.jsonl").write_bytes(b"")
    recipe = _recipe(tmp_path / "*")
    found = _sample(recipe, tokenizer)
    assert sum(found.of_source.values(), Amounts()) == _captured(recipe, tokenizer)
    assert found.sources == 6


def test_chats_count_by_their_template_and_their_assistants_turns(tmp_path: Path, tokenizer: Any):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good morning to you"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": turns * (i + 1)}) + "\n" for i in range(9)))
    recipe = _recipe(tmp_path / "a.jsonl", corpus={"format": "messages"})
    (found,) = _sample(recipe, tokenizer).of_source.values()
    assert found == _captured(recipe, tokenizer)
    assert 0 < found.supervised < found.rows


def test_lines_longer_than_every_window_and_text_files_are_reckoned_too(tmp_path: Path, tokenizer: Any):
    _write(tmp_path / "a.jsonl", [{"text": MANY * 6000}] * 4)
    (tmp_path / "a.txt").write_text("é" + MANY * 24000)
    whole = len(tokenizer(MANY * 6000)["input_ids"]) * 4
    for name in ("a.jsonl", "a.txt"):
        found = _sample(_recipe(tmp_path / name, corpus={"window_tokens": 1024}), tokenizer)
        (amounts,) = found.of_source.values()
        assert amounts.tokens == pytest.approx(whole, rel=0.2), name


def test_of_very_many_sources_some_speak_for_all(tmp_path: Path, tokenizer: Any):
    for i in range(130):
        _write(tmp_path / f"{i:03}.jsonl", [{"text": f"{i} {FEW}"}] * 10)
    recipe = _recipe(tmp_path / "*.jsonl")
    found = _sample(recipe, tokenizer)
    assert (found.sources, len(found.of_source)) == (44, 130)
    total = sum(found.of_source.values(), Amounts())
    assert total.tokens == pytest.approx(_captured(recipe, tokenizer).tokens, rel=0.02)


def test_completions_count_as_long_as_they_may_be(tmp_path: Path, tokenizer: Any):
    _write(tmp_path / "a.jsonl", [{"text": FEW}] * 10)
    recipe = _recipe(tmp_path / "a.jsonl", capture={"mode": "generate", "generate": {"samples": 3, "max_tokens": 30}})
    (found,) = _sample(recipe, tokenizer).of_source.values()
    prompt = len(tokenizer(FEW)["input_ids"])
    assert (found.tokens, found.sequences, found.supervised) == (30 * (prompt + 30), 30, 900)


# --- what is captured already


def test_captured_units_cost_no_teacher_and_are_trained_on_by_their_exact_counts(tmp_path: Path, tokenizer: Any):
    recipe = recipe_in(tmp_path)
    storage = open_storage(recipe.storage.root)
    fresh = corpus_amounts(recipe, storage, tokenizer, OF)
    assert (fresh.captured_tokens, fresh.new.train_tokens) == (0, fresh.epoch.train_tokens)
    units = planned(recipe, storage)
    capture(storage, units)
    done = corpus_amounts(recipe, storage, tokenizer, OF)
    # Each unit of the fakes has sequences of 12, 2, 30, 1 and 7 tokens.
    assert (done.new, done.captured_tokens) == (Amounts(), 52 * len(units))
    assert 0 < done.epoch.train_tokens < done.captured_tokens
    assert done.sample.sources == 0
    # Next week: a new source alone is looked into, and it is all that costs the teacher.
    source(tmp_path / "data" / "c.jsonl", "c")
    weekly = corpus_amounts(recipe, storage, tokenizer, OF)
    assert weekly.captured_tokens == done.captured_tokens
    assert weekly.sample.sources == 1
    assert weekly.new.tokens == pytest.approx(fresh.new.tokens / 2, rel=0.01)
    assert weekly.epoch.train_tokens == done.epoch.train_tokens + weekly.new.train_tokens
    assert weekly.notes == ("1 source(s) were never read: units that repeat in them count each time",)
    # Without the capture's identity nothing counts as captured.
    unknown = corpus_amounts(recipe, storage, tokenizer, None)
    assert unknown.new.tokens == pytest.approx(1.5 * fresh.new.tokens, rel=0.01)
    assert "is not known" in unknown.notes[0]


def test_mix_and_repeated_content_count_for_training_alone(tmp_path: Path, tokenizer: Any):
    recipe = recipe_in(tmp_path)
    storage = open_storage(recipe.storage.root)
    plain = corpus_amounts(recipe, storage, tokenizer, OF)
    data = tmp_path / "data"
    mixed = recipe_in(tmp_path, train={"mix": {str(data / "a.jsonl"): 3.0, str(data / "b.jsonl"): 0.0}})
    found = corpus_amounts(mixed, storage, tokenizer, OF)
    assert found.new == plain.new
    assert found.epoch == plain.sample.of_source[str(data / "a.jsonl")].times(3.0)
    # The same bytes under another name, once they are known, are captured once and trained on twice.
    (data / "b.jsonl").write_bytes((data / "a.jsonl").read_bytes())
    planned(recipe, storage)
    twice = corpus_amounts(recipe, storage, tokenizer, OF)
    assert twice.epoch.train_tokens == pytest.approx(2 * twice.new.train_tokens)
    assert twice.new.tokens == pytest.approx(twice.sample.of_source[str(data / "a.jsonl")].tokens)


def test_too_many_refused_documents_are_found_before_anything_is_captured(tmp_path: Path, tokenizer: Any):
    storage = open_storage(str(tmp_path / "root"))
    texts = [{"text": FEW}] * 9_700
    recipe = _recipe(tmp_path / "a.jsonl")
    _write(tmp_path / "a.jsonl", [*texts, *[{"text": " "}] * 300])
    with pytest.raises(
        UserError, match=r"the corpus: 300 of 10,000 documents \(3.00%\) are refused: 300 × empty: no text"
    ):
        corpus_amounts(recipe, storage, tokenizer, OF)
    _write(tmp_path / "a.jsonl", [*texts, *[{"text": " "}] * 90])
    found = corpus_amounts(recipe, storage, tokenizer, OF)
    assert "the corpus: 90 of 9,790 documents (0.92%) are refused: 90 × empty: no text" in found.notes


def test_refused_documents_of_a_sample_are_judged_by_what_chance_allows(tmp_path: Path, tokenizer: Any):
    storage = open_storage(str(tmp_path / "root"))
    recipe = _recipe(tmp_path / "a.jsonl")
    for step, beyond in ((20, True), (200, False)):
        lines = [{"text": f"{FEW} {i} " + "x" * 400 if i % step else " " * 400} for i in range(8_000)]
        _write(tmp_path / "a.jsonl", lines)
        if beyond:
            with pytest.raises(
                UserError, match=r"a sample of 1 source\(s\): .* × empty.*capture.max_refused=0.01 allows"
            ):
                corpus_amounts(recipe, storage, tokenizer, OF)
        else:
            (note,) = (note for note in corpus_amounts(recipe, storage, tokenizer, OF).notes if "refused" in note)
            assert note.startswith("a sample of 1 source(s): ")
