"""Chats under the real SmolLM2 tokenizer: supervision on what the assistant writes, and on nothing else."""

import copy

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill_ray.corpus import chat as chats
from distill_ray.corpus import load_tokenizer
from distill_ray.corpus.messages import Chat
from distill_ray.corpus.refused import RefusedDocument
from tests.assets import smollm2_folder

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Write <b>two</b> lines.\nPlease."},
    {"role": "assistant", "content": "One: naïve 日本語\n\nTwo:  x = 10**3 👩‍👩‍👧"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "42\n"},
    {"role": "user", "content": "unanswered"},
]
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(smollm2_folder())


def encode_chat(tokenizer, messages):
    return chats.encode_chat(tokenizer, Chat(messages), {})


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def turns(tokenizer, encoded):
    """The supervised stretches of all sequences as text; each stands behind the tokens of its own prompt."""
    found = []
    for ids, supervised in encoded:
        edges = np.flatnonzero(np.diff([False, *supervised, False]))
        found += [tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return found


def prompts(encoded):
    """The ids before each supervised stretch."""
    return [ids[:a].tolist() for ids, on in encoded for a in np.flatnonzero(np.diff([False, *on]) & on)]


def asked(tokenizer, messages):
    """What a server gives the model for each assistant turn."""
    return [
        tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=True)["input_ids"]
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


EXPECTED = [CHAT[2]["content"] + "<|im_end|>", CHAT[4]["content"] + "<|im_end|>"]


def test_a_chat_that_the_template_only_continues_is_one_sequence_up_to_its_last_answer(smollm2):
    ((ids, supervised),) = found = encode_chat(smollm2, CHAT)
    whole = smollm2.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert ids.tolist() == whole[: len(ids)]
    assert supervised[-1]
    assert turns(smollm2, found) == EXPECTED
    assert prompts(found) == asked(smollm2, CHAT)


def test_supervision_by_generation_blocks_is_the_same(smollm2):
    marked = with_template(smollm2, GENERATION)
    ((ids, supervised),) = found = encode_chat(marked, CHAT)
    assert turns(marked, found) == EXPECTED
    reference = marked.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert ids.tolist() == reference["input_ids"][: len(ids)]
    assert supervised.astype(int).tolist() == reference["assistant_masks"][: len(ids)]


def test_a_stop_inside_the_content_is_refused(smollm2):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "say <|im_end|> twice <|im_end|>!"}]
    with pytest.raises(RefusedDocument, match=r"says '<\|im_end\|>', at which the teacher stops"):
        encode_chat(smollm2, chat)


def test_a_template_without_an_end_of_turn_token(smollm2):
    bare = with_template(
        smollm2,
        "{% for m in messages %}{{ '### ' + m.role + ':' + ' ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}### assistant: {% endif %}",
    )
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}]
    found = encode_chat(bare, [*chat, *chat])
    assert turns(bare, found) == ["answer\n<|im_end|>"] * 2
    assert prompts(found) == asked(bare, [*chat, *chat])


REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content.split('</think>')[-1] if m.role == "
    "'assistant' and not loop.last else m.content) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_drops_earlier_reasoning_gives_each_turn_its_own_sequence(smollm2):
    thinking = with_template(smollm2, REWRITING)
    said = [f"<think>it is {i}</think>{i}" for i in range(3)]
    chat = [m for text in said for m in ({"role": "user", "content": "q"}, {"role": "assistant", "content": text})]
    found = encode_chat(thinking, chat)
    assert len(found) == 3
    assert turns(thinking, found) == [f"{text}<|im_end|>" for text in said]
    assert prompts(found) == asked(thinking, chat)


def test_an_eos_that_ends_every_chat_is_of_no_turn(smollm2):
    ended = with_template(smollm2, smollm2.chat_template + "{{ '' if add_generation_prompt else '<|endoftext|>' }}")
    found = encode_chat(ended, CHAT)
    assert turns(ended, found) == EXPECTED
    assert prompts(found) == asked(ended, CHAT)


def test_a_marker_of_the_next_turn_that_ends_one_is_learned(smollm2):
    """The template closes no turn; the teacher stops where the next one begins."""
    marking = with_template(
        smollm2,
        "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '<|im_end|>' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|>{% endif %}",
    )
    marking.__dict__["distill_ray_stop_ids"] = (marking.convert_tokens_to_ids("<|im_start|>"),)
    chat = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a")) * 2]
    (one,) = encode_chat(marking, chat)
    assert turns(marking, [one]) == ["a<|im_start|>"] * 2
    assert prompts([one]) == asked(marking, chat)


def test_reasoning_that_the_prompt_opens_is_not_said_again(smollm2):
    opened = smollm2.chat_template + "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    opening = with_template(smollm2, opened)
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}]
    assert asked(opening, chat)[0][-3:] != asked(smollm2, chat)[0][-3:]
    found = encode_chat(opening, chat)
    assert turns(opening, found) == ["hm\n</think>\n\na<|im_end|>"]
    assert prompts(found) == asked(opening, chat)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses it: roles must alternate"),
        ("{{ messages[0].missing.deeper }}", "refuses it"),
        ("{{ 'a' + 1 }}", "refuses it"),
        ("{{ messages | length }}", "message 2: the chat template drops what the assistant said: 'One: naïve 日本語"),
        (
            "{% for m in messages %}{{ m.role + m.content[:9] + '\n' }}{% endfor %}",
            "message 2: the chat template drops what the assistant said: 'One: naïve 日本語",
        ),
    ],
    ids=["raises", "undefined", "type error", "no prefix", "shortens"],
)
def test_a_chat_that_the_template_refuses_fails_alone(smollm2, template, reason):
    with pytest.raises(RefusedDocument, match=reason):
        encode_chat(with_template(smollm2, template), CHAT)


def test_a_chat_without_an_assistant_turn_is_refused(smollm2):
    with pytest.raises(RefusedDocument, match="nothing is supervised"):
        encode_chat(smollm2, CHAT[:2])


def test_a_template_that_writes_the_date_gives_the_same_ids_every_day(smollm2):
    dated = with_template(smollm2, "{{ strftime_now('%d %B %Y') }}" + smollm2.chat_template)
    ((ids, _),) = encode_chat(dated, CHAT)
    assert dated.decode(ids).startswith("26 July 2024")


@pytest.fixture(scope="module", params=["first", "always"])
def spaced(request):
    """A tokenizer of SentencePiece's kind, which puts a space before every text: of words, each with its space."""
    backend = Tokenizer(models.BPE({chr(c): i for i, c in enumerate((0x2581, *range(33, 127)))}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=request.param)
    backend.decoder = decoders.Metaspace(prepend_scheme=request.param)
    found = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    found.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    found.__dict__["distill_ray_stop_ids"] = (found.eos_token_id,)
    return found


def test_an_answer_goes_on_from_its_prompt_as_one_text(spaced):
    """Alone, the tokenizer would put a space before the answer, which no model is served."""
    chat = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a")) * 2]
    ((ids, supervised),) = encode_chat(spaced, chat)
    whole = "<s>[INST] q [/INST]a</s>[INST] q [/INST]a</s>"
    assert ids.tolist() == spaced(whole, add_special_tokens=False)["input_ids"]
    assert spaced.convert_ids_to_tokens(ids[supervised].tolist()) == ["a", "</s>"] * 2
    assert spaced.convert_ids_to_tokens(spaced("a", add_special_tokens=False)["input_ids"]) == ["▁", "a"]
