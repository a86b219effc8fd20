"""Chats as the model meets them when it is served: each assistant turn behind the very tokens of its own prompt.

A turn is what the template adds to the chat so far when the assistant's message follows its generation prompt. Turns
share a sequence as long as the tokens of the next prompt go on from it; a template that rewrites history (reasoning
dropped from earlier turns) gives a sequence to each.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from distill_ray.corpus.documents import RefusedDocument
from distill_ray.corpus.tokenizers import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE_DATE = dt.datetime(2024, 7, 26)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINK = re.compile(r"</?think>")
_SHOWN = 60

Encoded = tuple[np.ndarray, np.ndarray]
"""Token ids [n] int32 and supervision [n] bool."""


def _fixed_date(form: str) -> str:
    # Some templates write today's date into the system turn: the same unit would hold other tokens tomorrow.
    return _TEMPLATE_DATE.strftime(form)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, prompt: bool = False, spans: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The chat as text and, with `spans`, the character spans of its `{% generation %}` blocks."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, found = render_jinja_template(
            conversations=[messages],
            chat_template=tokenizer.get_chat_template(),
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=spans,
            strftime_now=_fixed_date,
            **cast(dict[str, Any], tokenizer.special_tokens_map),
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise RefusedDocument(f"the chat template refuses it: {error}") from None
    return texts[0], [(int(start), int(end)) for start, end in found[0]] if spans else []


def _turns(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Prompt of each assistant turn, and what the template makes of the turn behind it."""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, said = _marked(tokenizer, messages[: number + 1]) or _served(tokenizer, messages[: number + 1])
        if left_out := _left_out(message, said):
            raise RefusedDocument(
                f"message {number}: the chat template drops what the assistant said: {left_out[:_SHOWN]!r}"
            )
        yield prompt, said


def _marked(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[str, str] | None:
    """Prompt and text of the last message by the template's `{% generation %}` blocks; None where it has none."""
    if not _GENERATION.search(tokenizer.get_chat_template()):
        return None
    text, spans = _render(tokenizer, messages, spans=True)
    return (text[: spans[-1][0]], text[slice(*spans[-1])]) if spans else None


def _served(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[str, str]:
    """The same by the prompt with which the message is asked for."""
    prompt, _ = _render(tokenizer, messages[:-1], prompt=True)
    before, _ = _render(tokenizer, messages[:-1])
    text, _ = _render(tokenizer, messages)
    # A generation prompt may open the reasoning, which a turn without any does not have.
    common = _shared(prompt, text)
    if common < len(prompt) and common < len(before):
        raise RefusedDocument(
            f"message {len(messages) - 1}: the chat template changes what stands before the turn once the turn is there"
        )
    return prompt, text[common : _end_of_turn(tokenizer, messages, text)]


def _shared(a: str, b: str) -> int:
    """Characters with which both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], text: str) -> int:
    """Where the last turn of this text ends: some templates end every chat with eos, and no turn to come has it."""
    try:
        longer, _ = _render(tokenizer, [*messages, {"role": "user", "content": "x"}])
    except RefusedDocument:
        return len(text)
    shared, end = _shared(text, longer), len(text)
    while end > shared:
        token = next((t for t in (*tokenizer.all_special_tokens, " ", "\n") if text.endswith(t, 0, end)), None)
        if token is None:
            return len(text)  # not only eos: the template writes this turn otherwise once another follows
        end -= len(token)
    return end


def _left_out(message: dict[str, Any], said: str) -> str | None:
    """The first thing of the message that does not stand in its turn, white space aside."""
    squeezed = _squeezed(said)
    pieces = [piece for key in ("reasoning_content", "content") for piece in _THINK.split(message.get(key) or "")]
    for call in message.get("tool_calls") or ():
        function = call.get("function") or call
        pieces += [function.get("name") or "", *_leaves(function.get("arguments"))]
    return next((p for p in pieces if _squeezed(p) not in squeezed and _squeezed(_escaped(p)) not in squeezed), None)


def _leaves(value: Any) -> Iterator[str]:
    """Texts of a tool's arguments, which may be a JSON text themselves."""
    if isinstance(value, str):
        try:
            inner = json.loads(value)
        except ValueError:
            inner = value
        yield from [value] if isinstance(inner, str | int | float | None) else _leaves(inner)
    elif isinstance(value, dict):
        for name, each in value.items():
            yield name
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def encode_chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[int]:
    """Token ids of a chat whose next turn is the assistant's, up to where that turn begins.

    Raises:
        RefusedDocument: the template refuses the chat.
    """
    text, _ = _render(tokenizer, messages, prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[Encoded]:
    """One sequence or several, in which every assistant turn is supervised once, up to the first id that ends it.

    A turn that neither an id at which the teacher stops nor a special token of the template's ends gets the former:
    without, a student would never stop.

    Raises:
        RefusedDocument: the template refuses the chat or drops what was said, a turn says a stop, or there is none.
    """
    texts = [text for turn in _turns(tokenizer, messages) for text in turn]
    if not texts:
        raise RefusedDocument("no assistant turn: nothing is supervised")
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    found: list[tuple[list[int], list[bool]]] = []
    for prompt, said in zip(ids[::2], ids[1::2], strict=True):
        turn = _ended(tokenizer, said)
        if not (found and prompt[: len(found[-1][0])] == found[-1][0]):
            found.append(([], []))
        tokens, supervised = found[-1]
        supervised += [False] * (len(prompt) - len(tokens)) + [True] * len(turn)
        tokens += [*prompt[len(tokens) :], *turn]
    return [(np.array(tokens, np.int32), np.array(supervised, bool)) for tokens, supervised in found]


def _ended(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Up to the token that closes the turn; with one at which the teacher stops where none does.

    The line end that follows is the template's own, and no model is ever asked for it.
    """
    stops, end = stop_ids(tokenizer), len(ids)
    while end and not cast(str, tokenizer.decode(ids[end - 1])).strip():
        end -= 1
    closed = end > 0 and ids[end - 1] in {*stops, *tokenizer.added_tokens_decoder}
    if inside := set(ids[: end - closed]) & set(stops):
        raise RefusedDocument(f"the assistant says {tokenizer.decode([*inside][:1])}, at which the teacher stops")
    return ids[:end] if closed else [*ids, *stops[:1]]
