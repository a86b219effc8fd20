"""What `distill-ray preview` prints: every sequence as a capture takes it, and refused documents with their reasons."""

import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_ray import cli
from distill_ray.config import load_recipe
from distill_ray.corpus import load_tokenizer, plan_units, read_unit_sequences
from tests.assets import tiny_teacher_folder

RECIPE = """
name = "seen"
version = "v1"
[storage]
root = "{folder}/root"
[corpus]
sources = ["{folder}/data/*"]
format = "{format}"
holdout = 0.5
window_tokens = 64
[teacher]
model = "{teacher}"
[student]
teacher_layers = [0]
"""
CHATS = [
    [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "answer " * (i + 1)}] for i in range(5)
]


@pytest.fixture
def recipe(tmp_path):
    def make(form, files):
        (tmp_path / "data").mkdir()
        for name, records in files.items():
            lines = "".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records)
            if name.endswith(".parquet"):
                pq.write_table(pa.Table.from_pylist(records), tmp_path / "data" / name, row_group_size=2)
            else:
                (tmp_path / "data" / name).write_bytes(
                    gzip.compress(lines.encode()) if ".gz" in name else lines.encode()
                )
        path = tmp_path / "recipe.toml"
        path.write_text(RECIPE.format(folder=tmp_path, format=form, teacher=tiny_teacher_folder()))
        return path

    return make


def shown(capsys, recipe, *options):
    assert cli.main(["preview", str(recipe), *options]) == 0
    return capsys.readouterr().out


def objects(capsys, recipe, documents):
    return [json.loads(line) for line in shown(capsys, recipe, "--json", "--documents", str(documents)).splitlines()]


def test_json_is_what_a_capture_reads_of_every_container(capsys, recipe):
    chats = [{"messages": chat} for chat in CHATS]
    path = recipe("messages", {"a.jsonl": [*chats, "not json\n"], "b.json.gz": chats[:3], "c.parquet": chats})
    found = objects(capsys, path, 50)
    section = load_recipe(path).corpus
    tokenizer = load_tokenizer(tiny_teacher_folder())
    expected = []
    for unit in sorted(plan_units(section, "tok", None), key=lambda unit: unit.source.uri):
        sequences, dead = read_unit_sequences(unit, section, tokenizer)
        expected += [(unit.source.uri, s.tokens.tolist(), s.loss_mask.tolist()) for s in sequences]
        expected += [(unit.source.uri, letter.record, letter.reason) for letter in dead]
    assert [
        (each["source"], each["record"], each["refused"])
        if "refused" in each
        else (each["source"], each["ids"], each["supervised"])
        for each in found
    ] == expected
    assert [each["record"] for each in found] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2, 3, 4]
    whole = [each for each in found if "ids" in each]
    assert all(each["text"] == tokenizer.decode(each["ids"]) for each in whole)
    assert {each["held_out"] for each in whole} == {True, False}
    for each in objects(capsys, path, 50):
        assert each.get("held_out") in (None, *(seen["held_out"] for seen in whole if seen["text"] == each.get("text")))


def test_documents_come_from_all_sources_in_turn(capsys, recipe):
    path = recipe(
        "text",
        {
            "a.jsonl": [{"text": f"a{i}"} for i in range(9)],
            "b.txt": ["one document"],
            "c.jsonl": [{"text": f"c{i}"} for i in range(9)],
        },
    )
    found = [(each["source"].rpartition("/")[2], each["record"]) for each in objects(capsys, path, 6)]
    assert found == [("a.jsonl", 0), ("a.jsonl", 1), ("a.jsonl", 2), ("b.txt", 0), ("c.jsonl", 0), ("c.jsonl", 1)]
    assert len(objects(capsys, path, 2)) == 2
    assert len(objects(capsys, path, 100)) == 19


def test_a_reader_sees_what_is_learned_and_how_much_there_is(capsys, recipe):
    path = recipe("messages", {"a.jsonl": [{"messages": CHATS[0]}, {"messages": CHATS[1][:1]}]})
    out = shown(capsys, path)
    assert "record 0\n  sequence 1 of 1, " in out
    assert "<|im_start|>assistant\n⟦answer <|im_end|>⟧\n" in out
    assert "record 1: refused: no assistant turn that is learned: nothing is supervised\n" in out
    assert "1 of 2 documents (50.00%) are refused: 1 × no assistant turn" in out.splitlines()[-1]
    assert out.splitlines()[-1].startswith("in all: 1 sequences, ")
    assert "capture.max_refused=0.01" in out


def test_a_prompt_is_shown_with_nothing_learned(capsys, recipe):
    path = recipe("messages", {"a.jsonl": [{"messages": CHATS[0]}]})
    path.write_text(path.read_text() + '[capture]\nmode = "generate"\n[capture.generate]\nmax_tokens = 16\n')
    (found,) = objects(capsys, path, 5)
    assert found["text"].endswith("<|im_start|>assistant\n")
    assert not any(found["supervised"])


def test_what_is_wrong_is_said_as_check_says_it(capsys, recipe):
    path = recipe("text", {"a.json": ['[{"text": "a"}, {"text": "b"}]']})
    assert cli.main(["preview", str(path)]) == 2
    assert "a.json begins with '[': it is a JSON array" in capsys.readouterr().err
    assert cli.main(["preview", str(path), "--documents", "0"]) == 2


@pytest.mark.parametrize("own_code", [False, True])
def test_neither_ray_nor_an_engine_is_loaded_nor_torch_unless_a_models_own_code_may_want_it(capsys, recipe, own_code):
    path = recipe("messages", {"a.jsonl": [{"messages": chat} for chat in CHATS]})
    if own_code:
        path.write_text(path.read_text().replace("[teacher]\n", "[teacher]\ntrust_remote_code = true\n"))
    code = (
        "import sys; from distill_ray.cli import main; main()\n"
        "print(sorted(name for name in ('ray', 'vllm', 'deepspeed', 'torch') if sys.modules.get(name)))"
    )
    done = subprocess.run([sys.executable, "-c", code, "preview", str(path)], capture_output=True, text=True)
    *lines, loaded = done.stdout.splitlines()
    assert loaded == ("['torch']" if own_code else "[]")
    assert done.stderr == ""
    assert lines == shown(capsys, path).splitlines()
