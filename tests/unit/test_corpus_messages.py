"""Chats as people write them: one chat in every form of writing it, and what is refused by name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_ray.config import parse_recipe
from distill_ray.config.sections import CorpusSection
from distill_ray.corpus import load_tokenizer, plan_units, read_unit_sequences
from distill_ray.corpus.documents import checked
from distill_ray.corpus.messages import Chat
from distill_ray.errors import UserError
from tests.assets import tiny_tokenizer_folder
from tests.chat_templates import FAMILIES

CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "c"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CHAT = Chat(
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "a"},
    ],
    {"tools": [TOOL]},
)


def section(**changes):
    return CorpusSection(sources=("a.jsonl",), format="messages", **changes)


def documents(records, *, prompts=False, **changes):
    return list(checked(records, section(**changes), prompts))


def one(record, **changes):
    (found,) = documents([record], **changes)
    return found


def reason(record, **changes):
    return str(one(record, **changes)[1])


def said(number, **changes):
    """The messages of `CHAT` with one of them changed; None: without that key."""
    messages = [dict(message) for message in CHAT.messages]
    messages[number].update(changes)
    return {"tools": [TOOL], "messages": [{k: v for k, v in m.items() if v is not None} for m in messages]}


def called(**function):
    return {"id": "1", "type": "function", "function": {"name": "look", **function}}


@pytest.mark.parametrize(
    "record",
    [
        said(0),
        said(2, content=None),
        {
            **said(2, content=None, tool_calls=None),
            "messages": [
                *said(0)["messages"][:2],
                {"role": "assistant", "function_call": {"name": "look", "arguments": '{"city": "c"}'}},
                {"role": "function", "content": "rain"},
                *said(0)["messages"][4:],
            ],
        },
        said(2, tool_calls=[{"type": "function", "function": {"name": "look", "arguments": '{"city": "c"}'}}]),
        said(2, tool_calls=[{"name": "look", "arguments": {"city": "c"}}]),
        said(2, tool_calls=json.dumps([CALL])),
        said(1, content=[{"type": "text", "text": "q"}]),
        said(4, content=["a"]),
        said(4, weight=1, train=True),
        said(1, weight=0),
        {**said(0), "tools": json.dumps([TOOL])},
        {**said(0), "tools": [TOOL["function"]], "documents": []},
        {"messages": json.dumps(said(0)["messages"]), "tools": [TOOL]},
        {"conversations": said(0)["messages"], "tools": [TOOL]},
        {
            "tools": json.dumps([TOOL["function"]]),
            "system": "s",
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "look", "arguments": {"city": "c"}}'},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "a"},
            ],
        },
    ],
    ids=[
        "as it is",
        "null content",
        "function_call",
        "arguments as text",
        "bare call",
        "calls as text",
        "part",
        "bare part",
        "flags of one",
        "a user's weight",
        "tools as text",
        "bare tool",
        "messages as text",
        "conversations",
        "ShareGPT",
    ],
)
def test_one_chat_however_it_is_written_is_one_document(record):
    found, as_it_is = one(record), one(said(0))
    assert found.content == CHAT
    assert found.key == as_it_is.key


def test_the_same_chats_in_jsonl_and_parquet_are_the_same_sequences_where_nulls_fill_every_depth(tmp_path):
    other = {"type": "function", "function": {"name": "add", "arguments": {"x": 1, "deep": [{"y": {"z": "w"}}]}}}
    records = [
        said(0),
        {"messages": [*said(0)["messages"][:2], {"role": "assistant", "content": "a", "weight": 1}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b", "tool_calls": [other]}]},
        {**said(4, weight=0, name="n"), "documents": [{"title": "t", "text": "x"}]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(
        pa.Table.from_pylist(records, schema=pa.Table.from_pylist(records[::-1]).schema), tmp_path / "a.parquet"
    )
    filled = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert filled[0]["documents"] is None
    assert filled[0]["messages"][2]["tool_calls"][0]["function"]["arguments"].keys() == {"city", "x", "deep"}
    lines, rows = documents(records), documents(filled)
    assert lines == rows
    assert len({document.key for document in lines}) == len(records)
    tokenizer = load_tokenizer(tiny_tokenizer_folder())
    tokenizer.chat_template = "{{ documents }}" + FAMILIES["chatml"].template
    read = []
    for name in ("a.jsonl", "a.parquet"):
        (unit,) = plan_units(section().model_copy(update={"sources": (str(tmp_path / name),)}), "tok", None)
        sequences, dead = read_unit_sequences(unit, section(), tokenizer)
        assert not dead
        read.append([(s.tokens.tolist(), s.loss_mask.tolist(), s.doc_key) for s in sequences])
    assert read[0] == read[1]
    assert '<tool_call>{"name": "look", "arguments": {"city": "c"}}</tool_call>' in tokenizer.decode(read[0][0][0])


def test_a_turn_that_weighs_nothing_is_read_and_not_learned():
    (first, last) = documents([said(2, weight=0), said(4, train=False)])
    assert first.content.messages == last.content.messages == CHAT.messages
    assert (first.content.unlearned, last.content.unlearned) == ((2,), (4,))
    assert len({first.key, last.key, one(said(0)).key}) == 3


def test_reasoning_has_every_name_that_templates_read():
    for name in ("reasoning", "reasoning_content", "thinking"):
        message = one(
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", name: "r"}]}
        ).content.messages[1]
        assert message == {
            "role": "assistant",
            "content": "",
            "reasoning": "r",
            "reasoning_content": "r",
            "thinking": "r",
        }


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (said(4, content=None), "message 4: 'content' is NoneType, not text"),
        (said(1, content=[{"type": "image_url", "image_url": "u"}]), "message 1: .* part of type 'image_url'"),
        (said(1, content=[{"type": "text"}]), "message 1: .* part of type 'text'"),
        (said(2, tool_calls=[called(arguments="{city")]), "message 2: the arguments of 'look' are not a JSON object"),
        (said(2, tool_calls=[called(arguments="[1]")]), "message 2: the arguments of 'look' are not a JSON object"),
        (said(2, tool_calls=[called(arguments="0")]), "message 2: the arguments of 'look' are not a JSON object"),
        (said(2, tool_calls=[called(arguments=json.loads('{"a":' * 600 + "1" + "}" * 600))]), "nested too deeply"),
        (said(2, tool_calls=["look"]), "message 2: a tool call is not {function: {name, arguments}}"),
        (said(4, weight=0.5), "message 4: 'weight' is 0.5; known are 0"),
        ({**said(0), "tools": "look"}, "'tools' is not a list of objects"),
        ({"messages": "q"}, "'messages' is not a list"),
        ({"conversations": [{"from": "narrator", "value": "v"}]}, "message 0: 'from' is 'narrator'; known are human"),
        ({"text": "q"}, r"key 'messages' is missing; the record has \['text'\]"),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_refused_by_name(record, why):
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(reason(record))


def test_columns_are_mapped_in_the_recipe():
    record = {"turns": said(0)["messages"], "functions": [TOOL], "tools": "of another trade"}
    assert one(record, columns={"messages": "turns", "tools": "functions"}).content == CHAT
    pairs = CorpusSection(
        sources=("a.jsonl",), format="prompt_completion", columns={"prompt": "question", "completion": "answer"}
    )
    (found,) = checked([{"question": "q", "answer": "a"}], pairs)
    assert found.content == ("q", "a")


@pytest.mark.parametrize(
    ("corpus", "why"),
    [
        ({"format": "text", "columns": {"messages": "m"}}, r"columns = \['messages'\] have no effect"),
        ({"format": "messages", "columns": {"prompt": "p"}}, r"columns = \['prompt'\] have no effect"),
        ({"format": "text", "chat_template_kwargs": {"x": True}}, "chat_template_kwargs have no effect"),
        ({"format": "messages", "chat_template_kwargs": {"tools": "x"}}, r"\['tools'\] are given by each chat"),
    ],
)
def test_options_of_another_format_are_refused(corpus, why):
    recipe = {
        "name": "n",
        "storage": {"root": "/tmp/none"},
        "teacher": {"model": "/tmp/none"},
        "student": {"teacher_layers": [0]},
    }
    with pytest.raises(UserError, match=why):
        parse_recipe({**recipe, "corpus": {"sources": ["/tmp/none/*.jsonl"], **corpus}})


def test_options_of_chats_are_of_the_units_identity(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(said(0)) + "\n")
    hashes = set()
    for changes in ({}, {"columns": {"tools": "functions"}}, {"chat_template_kwargs": {"enable_thinking": False}}):
        for prompts in (False, True):
            here = section(**changes).model_copy(update={"sources": (str(tmp_path / "a.jsonl"),)})
            (unit,) = plan_units(here, "tok", None, prompts=prompts)
            hashes.add(unit.hash)
    assert len(hashes) == 6


def test_a_prompt_without_a_question_is_refused():
    (system, opened, asked) = documents(
        [
            {"messages": [{"role": "system", "content": "s"}]},
            {"messages": [{"role": "assistant", "content": "a"}]},
            said(0),
        ],
        prompts=True,
    )
    assert str(system[1]) == str(opened[1]) == "no turn to answer: no message is the user's"
    assert asked.content == Chat(CHAT.messages[:4], CHAT.given)
