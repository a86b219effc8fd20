"""Chats: rendered with the tokenizer's template, supervised on assistant turns only."""

from __future__ import annotations

import datetime as dt
import re
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from distill_ray.corpus.documents import RefusedDocument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATE_DATE = dt.datetime(2024, 7, 26)


def _fixed_date(form: str) -> str:
    # Some templates write today's date into the system turn: the same unit would hold other tokens tomorrow.
    return _TEMPLATE_DATE.strftime(form)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, prompt: bool = False, spans: bool = False
) -> tuple[str, list[Span]]:
    """The chat as text and, with `spans`, the character spans of its `{% generation %}` blocks."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    special = cast(dict[str, Any], tokenizer.special_tokens_map)
    try:
        texts, found = render_jinja_template(
            conversations=[messages],
            chat_template=tokenizer.get_chat_template(),
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=spans,
            strftime_now=_fixed_date,
            **special,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise RefusedDocument(f"the chat template refuses it: {error}") from None
    return texts[0], [(int(start), int(end)) for start, end in found[0]] if spans else []


def _turn_spans(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], text: str) -> list[Span]:
    """Span of each assistant turn: what the template adds to the chat so far with its generation prompt.

    Raises:
        RefusedDocument: a shorter chat does not render to a prefix of a longer one (say, the template drops the
            reasoning of earlier turns), so that what the assistant said cannot be told apart.
    """
    found = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, _ = _render(tokenizer, messages[:number], prompt=True)
        through, _ = _render(tokenizer, messages[: number + 1])
        if not (text.startswith(through) and through.startswith(before)):
            raise RefusedDocument(
                f"message {number}: the chat template does not render the chat up to here as a prefix of the whole; "
                "use a template with {% generation %}"
            )
        found.append((len(before), len(through)))
    return found


def _tokens_in(offsets: np.ndarray, span: Span) -> np.ndarray:
    """Numbers of the tokens that hold a character of the span; `offsets` is [n, 2]."""
    start, end = span
    # A tokenizer that trims offsets gives a token of pure white space no width: its start decides.
    return np.flatnonzero((offsets[:, 0] < end) & ((offsets[:, 1] > start) | (offsets[:, 0] >= start)))


def _up_to_end_of_turn(inside: np.ndarray, ids: np.ndarray, added: set[int], offsets: np.ndarray, text: str) -> int:
    """How many of the tokens `inside` a turn the assistant writes: up to its end-of-turn token.

    The line end that follows is the template's own, and no model is ever asked for it.
    """
    ends = [i for i, number in enumerate(inside) if int(ids[number]) in added]
    if not ends:
        return len(inside)
    rest = text[offsets[inside[ends[-1]], 1] : offsets[inside[-1], 1]]
    return len(inside) if rest.strip() else ends[-1] + 1


def encode_chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[int]:
    """Token ids of a chat whose next turn is the assistant's, up to where that turn begins.

    Raises:
        RefusedDocument: the template refuses the chat.
    """
    text, _ = _render(tokenizer, messages, prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n] int32 of a chat and its supervision [n] bool: assistant content and the end-of-turn token.

    Taken from the template's `{% generation %}` blocks where it has them, else from the difference between the
    rendered chat before and after each assistant turn.

    Raises:
        RefusedDocument: the template refuses the chat, or no assistant turn can be told apart in it.
    """
    marked = bool(_GENERATION.search(tokenizer.get_chat_template()))
    text, spans = _render(tokenizer, messages, spans=marked)
    if not marked:
        spans = _turn_spans(tokenizer, messages, text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(encoded["input_ids"], dtype=np.int32)
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    supervised = np.zeros(len(ids), dtype=bool)
    added = set(tokenizer.added_tokens_decoder)
    for span in spans:
        inside = _tokens_in(offsets, span)
        if not marked:
            inside = inside[: _up_to_end_of_turn(inside, ids, added, offsets, text)]
        supervised[inside] = True
    if not supervised[1:].any():
        raise RefusedDocument("no assistant turn: nothing is supervised")
    return ids, supervised
