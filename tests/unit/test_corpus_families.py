"""Random chats under the families of templates: every assistant turn stands behind its own prompt, and stops."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray.corpus import load_tokenizer
from distill_ray.corpus.chat import encode_chat, encode_chat_prompt
from distill_ray.corpus.messages import Chat
from distill_ray.corpus.refused import RefusedDocument
from tests.assets import tiny_tokenizer_folder
from tests.chat_templates import FAMILIES

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
TEXT = st.text("ab 0\n'\"\\é", min_size=1, max_size=12).filter(str.strip)


@pytest.fixture(scope="module")
def tokenizers():
    """The tiny tokenizer as each family's."""
    found = {}
    for name, family in FAMILIES.items():
        tokenizer = copy.deepcopy(load_tokenizer(tiny_tokenizer_folder()))
        tokenizer.add_tokens([*family.special], special_tokens=True)
        tokenizer.bos_token, tokenizer.eos_token = family.special[0], family.stops[0]
        tokenizer.chat_template = family.template
        tokenizer.__dict__["distill_ray_stop_ids"] = tuple(tokenizer.convert_tokens_to_ids([*family.stops]))
        found[name] = tokenizer
    return found


def called(arguments):
    """A call of the tool."""
    return {"type": "function", "function": {"name": "look", "arguments": arguments}}


@st.composite
def conversations(draw, family):
    """Messages of 1 to 6 turns, and the tools that are offered."""
    with_tools = family.tools and draw(st.booleans())
    found = [{"role": "system", "content": draw(TEXT)}] if family.system and draw(st.booleans()) else []

    def assistant(**message):
        thought = {family.reasoning: draw(TEXT)} if family.reasoning and draw(st.booleans()) else {}
        found.append({"role": "assistant", **message, **thought})

    for _ in range(draw(st.integers(1, 6))):
        found.append({"role": "user", "content": draw(TEXT)})
        for _ in range(draw(st.integers(0, 2)) if with_tools else 0):
            arguments = draw(st.dictionaries(st.sampled_from(("city", "n")), TEXT | st.integers(0, 99), max_size=2))
            content = draw(TEXT) if family.says_and_calls and draw(st.booleans()) else ""
            assistant(content=content, tool_calls=[called(arguments)])
            found.append({"role": "tool", "content": draw(TEXT)})
        assistant(content=draw(TEXT))
    return found, TOOLS if with_tools else None


def supervised_spans(encoded):
    """Ids before each supervised span, and its own."""
    for ids, supervised in encoded:
        edges = np.flatnonzero(np.diff([False, *supervised, False]))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            yield ids[:start].tolist(), ids[start:stop].tolist()


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_every_turn_stands_behind_the_prompt_that_a_server_gives_for_it_and_ends_once(name, tokenizers, data):
    family, tokenizer = FAMILIES[name], tokenizers[name]
    messages, tools = data.draw(conversations(family))
    given = {} if tools is None else {"tools": tools}
    encoded = encode_chat(tokenizer, Chat(messages, given), {})
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    spans = list(supervised_spans(encoded))
    stops = {tokenizer.convert_tokens_to_ids(stop) for stop in family.stops}
    assert len(spans) == len(turns)
    for number, (before, said) in zip(turns, spans, strict=True):
        asked = tokenizer.apply_chat_template(
            messages[:number], tools=tools, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert before == asked if name != "parts" else True  # which apply_chat_template gives texts
        assert before == encode_chat_prompt(tokenizer, Chat(messages[:number], given), {})
        assert said[-1] in stops
        assert not stops & set(said[:-1])
        for key in ("content", family.reasoning):
            text = messages[number].get(key) or ""
            assert "".join(text.split()) in "".join(tokenizer.decode(said).split())
    assert all(supervised[-1] for _, supervised in encoded), "nothing stands after the last turn that is learned"


def test_a_templates_own_switch_is_the_recipes(tokenizers):
    tokenizer = tokenizers["qwen3"]
    chat = Chat([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    ((before, said),) = supervised_spans(encode_chat(tokenizer, chat, {"enable_thinking": False}))
    assert before == encode_chat_prompt(tokenizer, Chat(chat.messages[:1]), {"enable_thinking": False})
    assert tokenizer.decode(before).endswith("assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(said) == "a<|im_end|>"
    ((before, said),) = supervised_spans(encode_chat(tokenizer, chat, {}))
    assert tokenizer.decode(before).endswith("assistant\n")
    assert tokenizer.decode(said) == "<think>\n\n</think>\n\na<|im_end|>"


def test_turns_that_a_template_rewrites_have_sequences_of_their_own_and_others_share_one(tokenizers):
    turns = [("user", "q"), ("assistant", "a")] * 3
    plain = Chat([{"role": role, "content": text} for role, text in turns])
    thoughtful = Chat(
        [m | ({"thinking": "t", "reasoning_content": "t"} if m["role"] == "assistant" else {}) for m in plain.messages]
    )
    shared = {name: len(encode_chat(tokenizers[name], plain, {})) == 1 for name in FAMILIES}
    rewriting = {"qwen3", "harmony", "r1"}
    assert shared == {name: name not in rewriting for name in FAMILIES}
    assert [len(encode_chat(tokenizers[name], thoughtful, {})) for name in ("qwen3", "harmony")] == [3, 3]


def spoken(tokenizer, *messages, given=None):
    """Prompt and turn of the last message of a chat, as texts."""
    found = list(supervised_spans(encode_chat(tokenizer, Chat([*messages], given or {}), {})))
    return tuple(tokenizer.decode(ids) for ids in found[-1])


ASKED = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("<think>\nhm\n</think>\n\n<b>a", "hm\n</think>\n\n<b>a</s>"),
        ("hm</think>a", "hm</think>a</s>"),
        ("<table>", "<table></s>"),
    ],
)
def test_reasoning_that_a_prompt_opens_and_every_turn_loses_is_what_the_model_said(tokenizers, content, said):
    before, turn = spoken(tokenizers["r1"], ASKED, {"role": "assistant", "content": content})
    assert before.endswith("<|Assistant|><think>\n")
    assert turn == said
    told = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    assert spoken(tokenizers["r1"], ASKED, told)[1] == "hm\n</think>\n\na</s>"


def test_a_call_where_the_prompt_opens_reasoning_keeps_its_first_letters(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    tokenizer.chat_template = FAMILIES["chatml"].template.replace(
        "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"
    )
    call = called({})
    before, turn = spoken(tokenizer, ASKED, {"role": "assistant", "content": "", "tool_calls": [call]})
    assert before.endswith("<think>\n")
    assert turn.strip() == '<tool_call>{"name": "look", "arguments": {}}</tool_call><|im_end|>'


def test_reasoning_behind_a_prompt_that_ends_it_is_refused(tokenizers):
    told = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    with pytest.raises(RefusedDocument, match="message 1: the prompt ends the reasoning, and the turn has some"):
        encode_chat(tokenizers["qwen3"], Chat([ASKED, told]), {"enable_thinking": False})


def test_a_system_message_that_only_the_last_user_turn_has_is_in_the_prompt(tokenizers):
    system = {"role": "system", "content": "s"}
    before, turn = spoken(tokenizers["mistral"], system, ASKED, {"role": "assistant", "content": "a"})
    assert (before, turn) == ("<s>[INST] s\n\nq[/INST]", " a</s>")


def test_a_turn_behind_a_question_that_an_earlier_one_ends_with_is_the_last(tokenizers):
    system, asked = {"role": "system", "content": "s"}, {"role": "user", "content": "\nq"}
    said = {"role": "assistant", "content": "a"}
    found = list(supervised_spans(encode_chat(tokenizers["mistral"], Chat([system, asked, said, ASKED, said]), {})))
    assert [tokenizers["mistral"].decode(before) for before, _ in found] == [
        "<s>[INST] s\n\n\nq[/INST]",
        "<s>[INST] \nq[/INST] a</s>[INST] s\n\nq[/INST]",
    ]
    assert [tokenizers["mistral"].decode(turn) for _, turn in found] == [" a</s>"] * 2


def test_consecutive_turns_of_the_assistant_are_two(tokenizers):
    said = [{"role": "assistant", "content": text} for text in "ab"]
    found = list(supervised_spans(encode_chat(tokenizers["qwen3"], Chat([ASKED, *said]), {})))
    assert [tokenizers["qwen3"].decode(turn)[-11:] for _, turn in found] == ["a<|im_end|>", "b<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "harmony",
            {"content": "", "tool_calls": [called({"n": n}) for n in (1, 2)]},
        ),
        ("chatml", {"content": "The answer is 4", "reasoning_content": "4"}),
        ("llama3", {"content": "I look", "tool_calls": [called({})]}),
    ],
    ids=["the second call", "reasoning that the content repeats", "text beside a call"],
)
def test_what_a_template_leaves_out_is_refused_though_the_like_of_it_stands_there(tokenizers, name, message):
    with pytest.raises(RefusedDocument, match="message 1: the chat template drops what the assistant said"):
        encode_chat(tokenizers[name], Chat([ASKED, {"role": "assistant", **message}]), {})


def test_a_stop_that_marks_the_next_turn_is_the_one_to_end_with(tokenizers):
    before, turn = spoken(tokenizers["glm4"], ASKED, {"role": "assistant", "content": "a"})
    assert (before, turn) == ("[gMASK]<sop><|user|>\nq<|assistant|>", "\na<|user|>")


def test_a_greeting_before_any_question_is_read_where_no_template_asks_for_it(tokenizers):
    chat = Chat([{"role": "assistant", "content": "hello"}, ASKED, {"role": "assistant", "content": "a"}])
    (only,) = supervised_spans(encode_chat(tokenizers["qwen3"], chat, {}))
    before, turn = (tokenizers["qwen3"].decode(ids) for ids in only)
    assert before.startswith("<|im_start|>assistant\nhello<|im_end|>")
    assert turn.endswith("a<|im_end|>")
    first, _ = supervised_spans(encode_chat(tokenizers["chatml"], chat, {}))
    assert tokenizers["chatml"].decode(first[1]).strip() == "hello<|im_end|>"
    with pytest.raises(RefusedDocument, match="no assistant turn that is learned"):
        encode_chat(tokenizers["qwen3"], Chat(chat.messages[:1]), {})


def test_words_in_arguments_are_told_from_those_that_are_lost(tokenizers):
    arguments = {"a": True, "b": None, "c": 1.5, "d": [{"e": 'é"\n'}]}
    call = called(arguments)
    for template in (
        FAMILIES["chatml"].template,
        FAMILIES["chatml"].template.replace("tojson", "tojson(ensure_ascii=true)"),
    ):
        tokenizer = copy.deepcopy(tokenizers["chatml"])
        tokenizer.chat_template = template
        assert "look" in spoken(tokenizer, ASKED, {"role": "assistant", "content": "", "tool_calls": [call]})[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chatml", {"content": "00", "tool_calls": [called({"city": "0  "})]}),
        ("chatml", {"content": "", "tool_calls": [called({"city": '"0', "n": '"\\"'})]}),
        ("chatml", {"content": "\\n", "tool_calls": [called({"city": "\n"})]}),
        ("harmony", {"content": "0\n", "thinking": "00"}),
        ("harmony", {"content": "\\\\", "thinking": "\\"}),
    ],
)
def test_one_word_in_another_is_no_word_that_is_lost(tokenizers, name, message):
    said = spoken(tokenizers[name], ASKED, {"role": "assistant", **message})[1]
    assert message["content"].strip() in said


def test_a_developers_message_is_a_system_message_where_the_template_knows_none(tokenizers):
    chat = ({"role": "developer", "content": "d"}, ASKED, {"role": "assistant", "content": "a"})
    assert spoken(tokenizers["qwen3"], *chat)[0].startswith("<|im_start|>system\nd<|im_end|>")


def test_a_long_chat_is_tokenised_about_once(tokenizers, monkeypatch):
    seen = []
    from distill_ray.corpus import turns

    whole = turns.plain_ids
    monkeypatch.setattr(
        turns, "plain_ids", lambda tokenizer, texts: seen.extend(map(len, texts)) or whole(tokenizer, texts)
    )
    messages = [{"role": role, "content": f"{i} " * 20} for i in range(60) for role in ("user", "assistant")]
    ((ids, _),) = encode_chat(tokenizers["chatml"], Chat(messages), {})
    text = tokenizers["chatml"].decode(ids)
    assert sum(seen) < 4 * len(text)
    assert ids.tolist() == whole(tokenizers["chatml"], [text])[0]
