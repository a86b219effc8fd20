"""Documents to sequences: every container gives the same, and a bad document fails alone."""

import copy
import gzip
import hashlib
import json
from unittest.mock import ANY

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers.processors import TemplateProcessing

from distill_ray.config.sections import CorpusSection
from distill_ray.corpus import held_out, load_tokenizer, plan_units, read_unit_sequences
from distill_ray.corpus.tokenizers import opening_of
from distill_ray.errors import UserError
from distill_ray.schema import DeadLetter
from distill_ray.storage import open_storage
from distill_ray.storage.local import LocalStorage
from tests.assets import tiny_tokenizer_folder

TEXTS = [f"Paragraph {i}: the import statement «ünïcode» " + "and so on " * (i % 7) for i in range(30)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny_tokenizer_folder())


def section(*sources, **changes):
    return CorpusSection(sources=tuple(map(str, sources)), **{"unit_bytes": 1024, "window_tokens": 64, **changes})


def read(section, tokenizer):
    """All units in source order: sequences, dead letters."""
    units = sorted(plan_units(section, "tok", None), key=lambda u: (u.source.uri, u.source.start))
    parts = [read_unit_sequences(unit, section, tokenizer) for unit in units]
    return [s for part in parts for s in part[0]], [d for part in parts for d in part[1]]


def plain(sequences):
    return [(s.tokens.tolist(), s.loss_mask.tolist(), s.doc_key) for s in sequences]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_all(folder, records):
    """The same records in every container of records."""
    data = lines(records)
    (folder / "a.jsonl").write_bytes(data)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(data))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(data))
    pq.write_table(pa.Table.from_pylist(records), folder / "a.parquet", row_group_size=4)


CHATS = [
    [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "answer " * (i + 1)}] for i in range(9)
]


@pytest.mark.parametrize(
    ("form", "records"),
    [
        ("text", [{"text": text, "id": i} for i, text in enumerate(TEXTS)]),
        ("prompt_completion", [{"prompt": text[:9], "completion": text[9:]} for text in TEXTS]),
        # One message has a key that the others lack: Parquet fills it with nulls.
        ("messages", [{"messages": [{**c[0], "name": "n"}, c[1]] if i == 3 else c} for i, c in enumerate(CHATS)]),
    ],
)
def test_every_container_gives_the_same_sequences(tmp_path, tokenizer, form, records):
    write_all(tmp_path, records)
    expected, dead = read(section(tmp_path / "a.jsonl", format=form), tokenizer)
    assert not dead
    assert len({s.doc_key for s in expected}) == len(records)
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        found, dead = read(section(tmp_path / name, format=form), tokenizer)
        assert not dead
        assert plain(found) == plain(expected)


def test_sources_on_s3_give_the_same_units_and_sequences(tmp_path, tokenizer, s3_uri):
    write_all(tmp_path, [{"text": text} for text in TEXTS])
    store = open_storage(s3_uri)
    for path in tmp_path.iterdir():
        store.upload(path, f"in/{path.name}")
    here, there = section(tmp_path / "a.*"), section(f"{s3_uri}/in/a.*")
    local, remote = plan_units(here, "tok", None), plan_units(there, "tok", store)
    assert [u.hash for u in local] == [u.hash for u in remote]
    assert plan_units(there, "tok", store) == remote
    for a, b in zip(local, remote, strict=True):
        assert plain(read_unit_sequences(a, here, tokenizer)[0]) == plain(read_unit_sequences(b, there, tokenizer)[0])


def test_text_is_tokenised_as_the_tokenizer_does_by_default_and_ends_once(tmp_path, tokenizer):
    texts = [*TEXTS, "it ends by itself<|im_end|>"]
    (tmp_path / "a.jsonl").write_bytes(lines({"text": text} for text in texts))
    found, _ = read(section(tmp_path / "a.jsonl", window_tokens=4096), tokenizer)
    for sequence, text in zip(found, texts, strict=True):
        assert sequence.tokens.tolist() == tokenizer(text.removesuffix("<|im_end|>") + "<|im_end|>")["input_ids"]
        assert sequence.loss_mask.tolist() == [False] + [True] * (len(sequence.tokens) - 1)
    found, _ = read(section(tmp_path / "a.jsonl", window_tokens=4096, text_eos=False), tokenizer)
    assert [s.tokens.tolist() for s in found] == [tokenizer(text)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def opener():
    """The same tokenizer, putting <|endoftext|> before every text."""
    found = load_tokenizer(tiny_tokenizer_folder())
    bos = "<|endoftext|>"
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, found.convert_tokens_to_ids(bos))]
    )
    assert opening_of(found) == [found.convert_tokens_to_ids(bos)]
    return found


@pytest.mark.parametrize("own", ["", "<|endoftext|>"])
@pytest.mark.parametrize("form", ["text", "prompt_completion"])
def test_what_opens_a_text_opens_every_window_once(tmp_path, opener, own, form):
    (bos,) = opening_of(opener)
    record = {"text": own + TEXTS[3] * 20, "prompt": own + TEXTS[3][:9], "completion": TEXTS[4][:9]}
    (tmp_path / "a.jsonl").write_bytes(lines([record]))
    found, _ = read(section(tmp_path / "a.jsonl", format=form, window_overlap=4), opener)
    assert len(found) > 3 if form == "text" else len(found) == 1
    for sequence in found:
        assert (sequence.tokens == bos).tolist() == [True] + [False] * (len(sequence.tokens) - 1)
        assert not sequence.loss_mask[0]
    assert found[-1].tokens[-1] == opener.eos_token_id
    assert found[-1].loss_mask[-1]


def test_a_chat_is_opened_as_its_template_does_it(tmp_path, opener):
    (bos,) = opening_of(opener)
    opened = copy.deepcopy(opener)
    opened.chat_template = "<|endoftext|>" + opener.chat_template
    (tmp_path / "a.jsonl").write_bytes(lines([{"messages": CHATS[1]}]))
    for tokenizer, starts in ((opener, False), (opened, True)):
        ((sequence,), _) = read(section(tmp_path / "a.jsonl", format="messages"), tokenizer)
        assert (sequence.tokens == bos).tolist() == [starts] + [False] * (len(sequence.tokens) - 1)


@pytest.mark.parametrize("form", ["prompt_completion", "messages"])
def test_an_answer_beyond_the_window_is_refused_rather_than_learned_without_its_question(tmp_path, tokenizer, form):
    asked, said = TEXTS[3] * 2, TEXTS[4] * 2
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    (tmp_path / "a.jsonl").write_bytes(lines([{"prompt": asked, "completion": said, "messages": turns}]))
    ((whole,), _) = read(section(tmp_path / "a.jsonl", format=form, window_tokens=4096), tokenizer)
    n = len(whole.tokens)
    assert plain(read(section(tmp_path / "a.jsonl", format=form, window_tokens=n), tokenizer)[0]) == plain([whole])
    found, (dead,) = read(section(tmp_path / "a.jsonl", format=form, window_tokens=n - 1), tokenizer)
    assert not found
    assert dead.reason.startswith(f"{n} tokens with its prompt, more than corpus.window_tokens={n - 1}: ")


def test_a_completion_ends_once_where_the_teacher_stops(tmp_path, tokenizer):
    said = ["x", "x<|im_end|>", "x<|im_end|>\n", "x<|im_end|>y"]
    (tmp_path / "a.jsonl").write_bytes(lines({"prompt": f"{i}: ", "completion": text} for i, text in enumerate(said)))
    found, (dead,) = read(section(tmp_path / "a.jsonl", format="prompt_completion"), tokenizer)
    assert [tokenizer.decode(s.tokens[s.loss_mask]) for s in found] == ["x<|im_end|>"] * 3
    assert (dead.record, dead.reason) == (3, "the answer says '<|im_end|>', at which the teacher stops")


def test_a_window_that_its_opening_fills_is_refused(tmp_path, opener):
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": TEXTS[0]}]))
    with pytest.raises(UserError, match=r"window_tokens=4 leaves nothing beside the 1 token\(s\) .* window_overlap=3"):
        read(section(tmp_path / "a.jsonl", window_tokens=4, window_overlap=3), opener)
    assert read(section(tmp_path / "a.jsonl", window_tokens=4, window_overlap=2), opener)[0]


def test_unit_size_does_not_move_a_document(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": text} for text in TEXTS))
    small, _ = read(section(tmp_path / "a.jsonl"), tokenizer)
    large, _ = read(section(tmp_path / "a.jsonl", unit_bytes=2**20), tokenizer)
    assert plain(small) == plain(large)


def test_supervision_is_on_completion_and_eos(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines([{"prompt": "The import ", "completion": "statement"}]))
    (only,), _ = read(section(tmp_path / "a.jsonl", format="prompt_completion"), tokenizer)
    head, tail = tokenizer("The import ")["input_ids"], tokenizer("statement")["input_ids"]
    assert only.tokens.tolist() == [*head, *tail, tokenizer.eos_token_id]
    assert only.loss_mask.tolist() == [False] * len(head) + [True] * (len(tail) + 1)


def test_an_empty_prompt_leaves_the_first_token_of_the_completion_unsupervised(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines([{"prompt": "", "completion": "statement"}]))
    (only,), _ = read(section(tmp_path / "a.jsonl", format="prompt_completion"), tokenizer)
    assert only.loss_mask.tolist() == [False] + [True] * (len(only.tokens) - 1)


def test_bad_documents_become_dead_letters_and_the_rest_is_kept(tmp_path, tokenizer):
    good = lines([{"text": TEXTS[0]}])
    bad = {
        b'{"text": "caf\xe9"}': "not UTF-8: byte 0xe9",
        b'{"text": "half a rec': "bad JSON",
        b"": "blank",
        b'{"text": ""}': "empty",
        b'{"text": "  \\n"}': "empty",
        b'{"body": "x"}': "'text' is missing",
        b'{"text": 7}': "int, not text",
        b'["text"]': "a list",
        b'{"text": "\\ud800 alone"}': "lone surrogate",
        b"[" * 200_000: "bad JSON",
        b'{"text": "x", "id": ' + b"9" * 5000 + b"}": "bad JSON: Exceeds the limit",
    }
    (tmp_path / "a.jsonl").write_bytes(good + b"".join(line + b"\n" + good for line in bad))
    corpus = section(tmp_path / "a.jsonl", unit_bytes=2**20)
    (unit,) = plan_units(corpus, "tok", None)
    sequences, dead = read_unit_sequences(unit, corpus, tokenizer)
    assert len(sequences) == len(bad) + 1
    assert [letter.record for letter in dead] == list(range(1, 2 * len(bad), 2))
    for letter, reason in zip(dead, bad.values(), strict=True):
        assert reason in letter.reason
        assert (letter.unit, letter.source) == (unit.hash, str(tmp_path / "a.jsonl"))


def test_bad_rows_of_parquet_are_dead_letters(tmp_path, tokenizer):
    raw = pa.array([TEXTS[0].encode(), b"caf\xe9", None, TEXTS[1].encode()], pa.binary())
    # Not checked on the way in: other writers do put such bytes into string columns.
    column = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    sequences, dead = read(section(tmp_path / "a.parquet", window_tokens=4096), tokenizer)
    assert len(sequences) == 2
    assert [(d.record, d.reason.split(":")[0]) for d in dead] == [(1, "not UTF-8"), (2, "'text' is NoneType, not text")]


def test_text_files(tmp_path, tokenizer):
    (tmp_path / "good.txt").write_bytes(b"\xef\xbb\xbf" + TEXTS[0].encode())
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "void.txt").write_bytes(b"")
    sequences, dead = read(section(tmp_path / "*.txt", window_tokens=4096), tokenizer)
    assert [s.tokens.tolist() for s in sequences] == [[*tokenizer(TEXTS[0])["input_ids"], tokenizer.eos_token_id]]
    assert [d.reason.split(":")[0] for d in dead] == ["not UTF-8", "empty"]


def test_the_same_document_has_the_same_key_wherever_it_lies(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": TEXTS[2]}, {"text": TEXTS[3]}]))
    (tmp_path / "b.txt").write_text(TEXTS[2])
    sequences, _ = read(section(tmp_path / "*", window_tokens=4096), tokenizer)
    assert sequences[0].doc_key == sequences[2].doc_key != sequences[1].doc_key
    # A literal, so that a salted or changed hash shows: all held-out splits would move with it.
    canonical = json.dumps(["text", TEXTS[2]], ensure_ascii=False, separators=(",", ":")).encode()
    assert sequences[0].doc_key == int.from_bytes(hashlib.blake2b(canonical, digest_size=8).digest(), "big")


def test_windows_of_one_document_fall_on_one_side(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": f"{i} " + "over and over " * 60} for i in range(20)))
    sequences, _ = read(section(tmp_path / "a.jsonl", window_overlap=8), tokenizer)
    keys = np.array([s.doc_key for s in sequences], dtype=np.uint64)
    assert len(keys) > 5 * len(np.unique(keys))
    sides = held_out(keys, 0.4)
    assert 0 < sides.sum() < len(sides)
    assert len(np.unique(np.stack([keys, sides.astype(np.uint64)]), axis=1).T) == len(np.unique(keys))


def test_a_source_that_changed_since_planning_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": TEXTS[0]}]))
    corpus = section(tmp_path / "a.jsonl")
    (unit,) = plan_units(corpus, "tok", None)
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": TEXTS[1]}]))
    with pytest.raises(UserError, match="changed since"):
        read_unit_sequences(unit, corpus, tokenizer)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match="gone"):
        read_unit_sequences(unit, corpus, tokenizer)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"])
def test_a_source_replaced_while_it_is_read_is_refused(tmp_path, tokenizer, monkeypatch, name):
    write_all(tmp_path, [{"text": text} for text in TEXTS])
    (tmp_path / "a.txt").write_text(TEXTS[0])
    corpus = section(tmp_path / name, unit_bytes=2**20)
    (unit,) = plan_units(corpus, "tok", None)
    head = LocalStorage.head

    def replaced_after(self, key):
        info = head(self, key)
        monkeypatch.setattr(LocalStorage, "head", head)
        (tmp_path / "new").write_bytes((tmp_path / name).read_bytes())
        (tmp_path / "new").rename(tmp_path / name)
        return info

    monkeypatch.setattr(LocalStorage, "head", replaced_after)
    with pytest.raises(UserError, match=r"changed since .*run again"):
        read_unit_sequences(unit, corpus, tokenizer)


@pytest.mark.parametrize("line", [b'{"a":' * 200_000, b'{"id": ' + b"9" * 5000 + b"}"])
def test_a_first_line_that_json_cannot_take_stops_no_planning(tmp_path, tokenizer, line):
    (tmp_path / "a.jsonl").write_bytes(line + b"\n" + lines([{"text": TEXTS[0]}]))
    sequences, dead = read(section(tmp_path / "a.jsonl", unit_bytes=2**20), tokenizer)
    assert (len(sequences), [d.record for d in dead]) == (1, [0])


def test_more_tokens_than_one_object_may_hold_are_refused(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": text} for text in TEXTS))
    corpus = section(tmp_path / "a.jsonl", unit_bytes=2**20)
    (unit,) = plan_units(corpus, "tok", None)
    tokens = sum(len(s.tokens) for s in read_unit_sequences(unit, corpus, tokenizer)[0])
    assert read_unit_sequences(unit, corpus, tokenizer, most_tokens=tokens)[0]
    with pytest.raises(UserError, match=f"more than {tokens - 1:,} tokens in one unit"):
        read_unit_sequences(unit, corpus, tokenizer, most_tokens=tokens - 1)


def test_a_damaged_parquet_source_is_named(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet is damaged"):
        read(section(path), tokenizer)


def test_a_tokenizer_that_lacks_what_the_format_needs_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines([{"messages": CHATS[0], "prompt": "p", "completion": "c"}]))
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = bare.eos_token = None
    bare.__dict__["distill_ray_stop_ids"] = ()
    asked = {
        "messages": "eos",
        "prompt_completion": "eos",
        "text": r"eos.* corpus.text_eos = false",
    }
    for form, message in asked.items():
        with pytest.raises(UserError, match=message):
            read(section(tmp_path / "a.jsonl", format=form, text_column="prompt"), bare)
    for form in ("text", "prompt_completion"):
        bare.__dict__["distill_ray_stop_ids"] = (2,)
        found, _ = read(section(tmp_path / "a.jsonl", format=form, text_column="prompt"), bare)
        assert found[0].tokens[-1] == 2, "the model's own, though the tokenizer states none"
    with pytest.raises(UserError, match="no usable chat template"):
        read(section(tmp_path / "a.jsonl", format="messages"), bare)
    short = section(tmp_path / "a.jsonl", text_eos=False, text_column="prompt")
    assert read(short, bare) == ([], [DeadLetter(ANY, ANY, 0, "1 token(s): nothing to predict")])
