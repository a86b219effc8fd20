"""Chats as the model meets them when it is served: each assistant turn behind the very tokens of its own prompt.

Turns share a sequence as long as the tokens of the next prompt go on from it; a template that rewrites history
(reasoning dropped from earlier turns) gives a sequence to each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_ray.corpus.messages import REASONING, Chat, Message
from distill_ray.corpus.refused import RefusedDocument
from distill_ray.corpus.template import Template, Turn
from distill_ray.corpus.turns import Continued, ended

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THINK = re.compile(r"</?think>")
_SHOWN = 60

Encoded = tuple[np.ndarray, np.ndarray]
"""Token ids [n] int32 and supervision [n] bool."""


def encode_chat_prompt(tokenizer: PreTrainedTokenizerBase, chat: Chat, kwargs: Mapping[str, Any]) -> list[int]:
    """Token ids of a chat whose next turn is the assistant's, up to where that turn begins.

    Args:
        kwargs: what the recipe gives the template (`corpus.chat_template_kwargs`).

    Raises:
        RefusedDocument: the template refuses the chat.
    """
    text = Template(tokenizer, {**kwargs, **chat.given}).render(chat.messages, prompt=True)
    return Continued(tokenizer).ids(text)


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat, kwargs: Mapping[str, Any]) -> list[Encoded]:
    """One sequence or several, in which every assistant turn is supervised once, up to the first id that ends it.

    A turn that neither an id at which the teacher stops nor a special token of the template's ends gets the former:
    without, a student would never stop.

    Args:
        kwargs: what the recipe gives the template (`corpus.chat_template_kwargs`).

    Raises:
        RefusedDocument: the template refuses the chat or drops what was said, a turn says a stop, or there is none.
    """
    found: list[tuple[list[int], list[bool]]] = []
    texts = Continued(tokenizer)
    for turn in _turns(Template(tokenizer, {**kwargs, **chat.given}), chat):
        prompt, said = texts.split(turn.prompt, turn.said)
        said = ended(tokenizer, said, special=True, follows=turn.follows)
        if not (found and prompt[: len(found[-1][0])] == found[-1][0]):
            found.append(([], []))
        tokens, supervised = found[-1]
        supervised += [False] * (len(prompt) - len(tokens)) + [True] * len(said)
        tokens += [*prompt[len(tokens) :], *said]
    if not found:
        raise RefusedDocument("no assistant turn that is learned: nothing is supervised")
    return [(np.array(tokens, np.int32), np.array(supervised, bool)) for tokens, supervised in found]


def _turns(template: Template, chat: Chat) -> Iterator[Turn]:
    """Each assistant turn that is learned."""
    for number, message in enumerate(chat.messages):
        if message["role"] != "assistant" or number in chat.unlearned:
            continue
        try:
            turn = template.turn(chat.messages[: number + 1])
        except RefusedDocument:
            if number == 0:
                continue  # No server asks for a turn of an empty chat; what follows is read behind it.
            raise
        if left_out := _left_out(message, turn.said):
            raise RefusedDocument(
                f"message {number}: the chat template drops what the assistant said: {left_out[:_SHOWN]!r}"
            )
        yield turn


def _left_out(message: Message, said: str) -> str | None:
    """A thing of the message that does not stand in its turn, white space aside; each has a place of its own."""
    thoughts = dict.fromkeys(str(message[key]) for key in REASONING if message.get(key))
    pieces = [_written(piece) for text in (*thoughts, message["content"]) for piece in _THINK.split(text)]
    for call in message.get("tool_calls", ()):
        pieces += [_written(call["function"]["name"]), *_leaves(call["function"]["arguments"])]
    rest = _squeezed(said)
    found = [([form for form in map(_squeezed, forms) if form in rest], min(forms, key=len)) for forms in pieces]
    # The longest first: what is short may stand in what is long.
    for forms, text in sorted(found, key=lambda each: -len(each[0][0]) if each[0] else 0):
        if (form := next((form for form in forms if form in rest), None)) is None:
            return text
        rest = rest.replace(form, "\0", 1) if form else rest
    return None


def _leaves(value: Any) -> Iterator[list[str]]:
    """Names and values of a tool's arguments, each in the ways in which templates write it, the likeliest first."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield _written(name)[::-1]
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    else:
        yield _written(value)[::-1] if isinstance(value, str) else [json.dumps(value), str(value)]


def _written(text: str) -> list[str]:
    """As it is, and as JSON has it."""
    return [text, *(json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))]


def _squeezed(text: str) -> str:
    return "".join(text.split())
