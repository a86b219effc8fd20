"""Chats under the real SmolLM2 tokenizer: supervision on what the assistant writes, and on nothing else."""

import copy

import pytest

from distill_ray.corpus import load_tokenizer
from distill_ray.corpus.chat import encode_chat
from distill_ray.corpus.documents import RefusedDocument
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


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def turns(tokenizer, ids, supervised):
    """The supervised stretches as text."""
    found, current = [], []
    for token, on in zip([*ids, 0], [*supervised, False], strict=True):
        if on:
            current.append(int(token))
        elif current:
            found.append(tokenizer.decode(current))
            current = []
    return found


EXPECTED = [CHAT[2]["content"] + "<|im_end|>", CHAT[4]["content"] + "<|im_end|>"]


def test_ids_are_those_of_the_chat_template(smollm2):
    ids, _ = encode_chat(smollm2, CHAT)
    assert ids.tolist() == smollm2.apply_chat_template(CHAT, return_dict=True)["input_ids"]


def test_supervision_by_prefix_is_content_and_end_of_turn(smollm2):
    assert turns(smollm2, *encode_chat(smollm2, CHAT)) == EXPECTED


def test_supervision_by_generation_blocks_is_the_same(smollm2):
    marked = with_template(smollm2, GENERATION)
    ids, supervised = encode_chat(marked, CHAT)
    assert turns(marked, ids, supervised) == EXPECTED
    reference = marked.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert ids.tolist() == reference["input_ids"]
    assert supervised.astype(int).tolist() == reference["assistant_masks"]


def test_an_end_of_turn_inside_the_content_does_not_end_the_supervision(smollm2):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "say <|im_end|> twice <|im_end|>!"}]
    assert turns(smollm2, *encode_chat(smollm2, chat)) == ["say <|im_end|> twice <|im_end|>!<|im_end|>"]


def test_a_template_without_an_end_of_turn_token(smollm2):
    bare = with_template(
        smollm2,
        "{% for m in messages %}{{ '### ' + m.role + ':' + ' ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}### assistant: {% endif %}",
    )
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}]
    # The space of the prompt and the answer's first word are one token: it holds what the assistant wrote.
    assert turns(bare, *encode_chat(bare, chat)) == [" answer\n"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses it: roles must alternate"),
        ("{{ messages[0].missing.deeper }}", "refuses it"),
        ("{{ 'a' + 1 }}", "refuses it"),
        # Drops what the assistant said before the last turn, as reasoning templates do.
        (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ('' if m.role == 'assistant' and not loop.last "
            "else m.content) + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "message 2: the chat template does not render",
        ),
    ],
    ids=["raises", "undefined", "type error", "no prefix"],
)
def test_a_chat_that_the_template_refuses_fails_alone(smollm2, template, reason):
    with pytest.raises(RefusedDocument, match=reason):
        encode_chat(with_template(smollm2, template), CHAT)


def test_a_chat_without_an_assistant_turn_is_refused(smollm2):
    with pytest.raises(RefusedDocument, match="nothing is supervised"):
        encode_chat(smollm2, CHAT[:2])


def test_a_template_that_writes_the_date_gives_the_same_ids_every_day(smollm2):
    dated = with_template(smollm2, "{{ strftime_now('%d %B %Y') }}" + smollm2.chat_template)
    with pytest.raises(RefusedDocument):
        # An assistant turn right at the start: SmolLM2's template puts its own system turn before it.
        encode_chat(dated, CHAT[2:3])
    ids, _ = encode_chat(dated, CHAT)
    assert dated.decode(ids).startswith("26 July 2024")
