"""Tokenizer identity and equality: equal ids are what counts."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest

from distill_ray.corpus import load_tokenizer, same_tokenizer, stop_ids, tokenizer_identity
from distill_ray.errors import UserError
from tests.assets import TINY_VOCAB, tiny_llama_folder, tiny_tokenizer_folder


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(tiny_tokenizer_folder(), tmp_path / "copy")


@pytest.fixture(scope="module")
def original():
    return load_tokenizer(tiny_tokenizer_folder())


def edit(folder, change, name="tokenizer.json"):
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    return load_tokenizer(folder)


def swap_last_two(data):
    vocab = data["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.__getitem__)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def test_embedding_rows_do_not_count(original):
    """Qwen2.5 pads one vocabulary to 151,936 or 152,064 rows, by size of the model."""
    small = load_tokenizer(tiny_llama_folder(vocab=TINY_VOCAB, rows=TINY_VOCAB + 64))
    large = load_tokenizer(tiny_llama_folder(vocab=TINY_VOCAB, rows=TINY_VOCAB + 128))
    same_tokenizer(small, large)
    same_tokenizer(small, original)
    assert tokenizer_identity(small) == tokenizer_identity(large) == tokenizer_identity(original)


def test_identity_ignores_key_order_paths_and_state_of_the_last_call(folder, original):
    def reorder(data):
        data["model"]["vocab"] = dict(reversed(data["model"]["vocab"].items()))
        data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
        data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}

    changed = edit(folder, reorder)
    changed(["a b c d e f g", "x"], padding=True, truncation=True, max_length=5)
    assert tokenizer_identity(changed) == tokenizer_identity(original)
    same_tokenizer(original, changed)


def test_identity_is_the_same_in_another_process(original):
    code = (
        "from distill_ray.corpus import load_tokenizer, tokenizer_identity; import sys;"
        "print(tokenizer_identity(load_tokenizer(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tiny_tokenizer_folder())]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1]
    assert found == tokenizer_identity(original)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_last_two, r"512 tokens against 512; 2 have another id .*51[01] against 51[01]"),
        (lambda d: d["model"]["merges"].pop(3), r"the first difference at merge 3"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), r"gives other ids from token"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), r"gives other ids from token 0"),
    ],
    ids=["vocabulary", "merges", "normaliser", "pre-tokenizer"],
)
def test_what_changes_ids_is_another_tokenizer(folder, original, change, message):
    changed = edit(folder, change)
    assert tokenizer_identity(changed) != tokenizer_identity(original)
    with pytest.raises(UserError, match=message):
        same_tokenizer(original, changed)


def test_a_larger_vocabulary_shows_numbers_and_first_differences(original):
    other = load_tokenizer(tiny_tokenizer_folder(600))
    with pytest.raises(UserError, match=r"512 tokens against 600; 88 have another id .* none against 512,"):
        same_tokenizer(original, other)


def test_another_eos_changes_the_units_but_not_the_ids(folder, original):
    def change(data):
        data["eos_token"] = "<|endoftext|>"

    changed = edit(folder, change, "tokenizer_config.json")
    assert tokenizer_identity(changed) != tokenizer_identity(original)
    same_tokenizer(original, changed)


def test_a_chat_template_changes_the_units_but_not_the_ids(folder, original):
    changed = load_tokenizer(folder)
    changed.chat_template = "{{ messages[0].content }}"
    same_tokenizer(original, changed)
    assert tokenizer_identity(changed) != tokenizer_identity(original)


def test_folders_without_a_tokenizer_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(UserError, match=r"it holds weights\.bin"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({"generation_config.json": {"eos_token_id": [9, 0, 2]}, "config.json": {"eos_token_id": 7}}, (2, 0, 7, 9)),
        ({"config.json": {"text_config": {"eos_token_id": 3}}}, (2, 3)),
        ({"config.json": {"eos_token_id": None}}, (2,)),
    ],
)
def test_a_turn_ends_with_the_tokenizers_eos_or_what_else_the_model_stops_at(folder, original, files, want):
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    found = load_tokenizer(folder)
    assert stop_ids(found) == want
    assert stop_ids(pickle.loads(pickle.dumps(found))) == want, "on its way to a worker"
    # Chats are cut where the teacher stops, so it is of their targets' identity.
    assert (tokenizer_identity(found) == tokenizer_identity(original)) == (want == (2,))
