"""Units as columns: the same units, the same hashes, an order, and nothing lost on the way to Ray Data."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest

from distill_ray.capture import dataset
from distill_ray.config import fingerprint
from distill_ray.config.sections import CorpusSection
from distill_ray.corpus import plan_units
from distill_ray.corpus.units import CHUNKING_VERSION
from distill_ray.schema import SourceSlice, Unit
from distill_ray.units import HASH, Units, hashes_of, in_sorted, places_in, texts, unit_of


def unit(i: int, kind: str = "lines", multiplicity: int = 1) -> Unit:
    source = SourceSlice(f"s3://b/{i % 3}.jsonl", f"{i % 3:064x}", kind, 2**40 + i, 2**40 + i + 7, f"v{i % 3}")
    return Unit(f"{i * 0x9E3779B97F4A7C15 % 2**128:032x}", source, 2**33 + i, multiplicity)


OBJECTS = [unit(0), unit(1, "rows"), unit(2, "file", 5), unit(3, "row_groups"), unit(4)]


def test_units_come_back_in_the_order_of_their_hashes():
    ordered = sorted(OBJECTS, key=lambda u: u.hash)
    units = Units.of(OBJECTS)
    assert list(units) == ordered
    assert (units[0], units[-1], units[1:3]) == (ordered[0], ordered[-1], Units.of(ordered[1:3]))
    assert [unit_of(units.table().slice(i, 1)) for i in range(5)] == ordered
    assert list(units.where(np.array([True, False, False, True, False]))) == [ordered[0], ordered[3]]
    assert texts(units.hashes) == [u.hash for u in ordered]
    assert units == Units.of(reversed(ordered)) != Units.of(ordered[:4])
    with pytest.raises(IndexError):
        units[5]
    assert list(Units.of([])) == []


def test_equal_hashes_become_one_unit():
    twice = Units.merged(np.concatenate([Units.of(OBJECTS).rows] * 2), Units.of(OBJECTS).sources)
    assert [u.multiplicity for u in twice] == [2 * u.multiplicity for u in Units.of(OBJECTS)]


def test_other_multiplicities():
    units = Units.of(OBJECTS)
    assert [u.multiplicity for u in units.counted(np.arange(5, 10))] == [5, 6, 7, 8, 9]
    assert units == Units.of(OBJECTS)


def test_hashes_are_found_among_ascending_ones():
    some = np.array([b"1" * 32, b"3" * 32, b"5" * 32], HASH)
    wanted = np.array([b"0" * 32, b"1" * 32, b"4" * 32, b"5" * 32, b"6" * 32], HASH)
    place, found = places_in(some, wanted)
    assert found.tolist() == [False, True, False, True, False]
    assert place[found].tolist() == [0, 2]
    assert not in_sorted(some[:0], wanted).any()
    assert not len(in_sorted(some, wanted[:0]))


def test_hashes_of_a_column_in_pieces():
    strings = [f"{i:032x}" for i in range(5)]
    column = pa.chunked_array([pa.array(strings[:3])[1:], pa.array(strings[3:])])
    assert texts(hashes_of(column)) == strings[1:]
    assert not len(hashes_of(pa.chunked_array([], pa.string())))


def test_blocks_for_ray_data_hold_every_unit_once_and_are_few(monkeypatch):
    monkeypatch.setattr(dataset, "_MOST_BLOCKS", 2)
    blocks = list(dataset.blocks(Units.of(OBJECTS)))
    assert [b.num_rows for b in blocks] == [3, 2]
    assert [unit_of(b.slice(i, 1)) for b in blocks for i in range(b.num_rows)] == list(Units.of(OBJECTS))
    assert [b.num_rows for b in dataset.blocks(Units.of(OBJECTS[:1]))] == [1]


def test_a_hundred_thousand_units_travel_as_the_array_they_are():
    rows = np.repeat(Units.of(OBJECTS).rows, 20_000)
    rows["hash"] = [f"{i:032x}".encode() for i in range(len(rows))]
    units = Units(rows, Units.of(OBJECTS).sources)
    buffers: list[pickle.PickleBuffer] = []
    sent = pickle.dumps(units, protocol=5, buffer_callback=buffers.append)
    assert len(sent) < 5_000
    assert sum(b.raw().nbytes for b in buffers) == 65 * len(units)
    got = pickle.loads(sent, buffers=[b.raw().toreadonly() for b in buffers])  # as Ray gives them
    assert got == units
    chosen = got.where(np.arange(len(got)) % 2 == 0)
    assert [b.num_rows for b in dataset.blocks(chosen)] == [5] * 10_000


def test_a_units_hash_is_the_fingerprint_of_what_decides_its_sequences(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"\\u0000é": "x"}\n')
    section = CorpusSection(sources=(f"{tmp_path}/a.jsonl",), text_column="\0é")
    (found,) = plan_units(section, "tok\u00e9", None)
    identity = {
        "chunking": CHUNKING_VERSION,
        "container": "jsonl",
        "content": found.source.content,
        "slice": [found.source.kind, found.source.start, found.source.stop],
        "tokenizer": "toké",
        "format": "text",
        "text_column": "\0é",
        "window_tokens": section.window_tokens,
        "window_overlap": section.window_overlap,
        "unit_bytes": section.unit_bytes,
    }
    assert found.hash == fingerprint(identity | {"eos": True})
    (found,) = plan_units(section.model_copy(update={"text_eos": False}), "tok\u00e9", None)
    assert found.hash == fingerprint(identity), "as before documents ended"
