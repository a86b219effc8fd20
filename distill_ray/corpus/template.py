"""A tokenizer's chat template: what it gives a model that is asked for a turn, and what it makes of the turn."""

from __future__ import annotations

import bisect
import datetime as dt
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from distill_ray.corpus.messages import REASONING, Message
from distill_ray.corpus.refused import RefusedDocument
from distill_ray.corpus.turns import shared, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE_DATE = dt.datetime(2024, 7, 26)
_BLOCKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PARTS = re.compile(r"\{%-?\s*for\s+\w+\s+in\s+(\w+\.content|\w+\[['\"]content['\"]\]|content)\b")
"""A template that goes through a message's parts; vLLM's server then gives it parts and not text."""
_NO_WORDS = "\0"


def _fixed_date(form: str) -> str:
    # Some templates write today's date into the system turn: the same unit would hold other tokens tomorrow.
    return _TEMPLATE_DATE.strftime(form)


@dataclass(frozen=True)
class Turn:
    """One turn of the assistant."""

    prompt: str
    """Exactly what the model is given when it is asked for the turn."""
    said: str
    """What the template makes of the turn behind it."""
    follows: str
    """With what the chat goes on once another turn follows."""


@dataclass(frozen=True)
class Template:
    """The template with what one chat and the recipe give it beside messages."""

    tokenizer: PreTrainedTokenizerBase
    given: Mapping[str, Any]

    @property
    def _text(self) -> str:
        return self.tokenizer.get_chat_template(tools=self.given.get("tools"))

    @property
    def _special(self) -> tuple[str, ...]:
        return tuple(special_tokens(self.tokenizer).values())

    def render(self, messages: list[Message], *, prompt: bool = False) -> str:
        """The chat as text.

        Raises:
            RefusedDocument: the template refuses it.
        """
        return self._rendered(messages, prompt, spans=False)[0]

    def _rendered(self, messages: list[Message], prompt: bool, spans: bool) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        text = self._text
        try:
            texts, found = render_jinja_template(
                conversations=[[_as_served(message, text) for message in messages]],
                chat_template=text,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=spans,
                strftime_now=_fixed_date,
                **{**cast(dict[str, Any], self.tokenizer.special_tokens_map), **self.given},
            )
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            raise RefusedDocument(f"the chat template refuses it: {error}") from None
        return texts[0], [(int(start), int(end)) for start, end in found[0]] if spans else []

    def turn(self, messages: list[Message]) -> Turn:
        """The last message, which is the assistant's.

        Raises:
            RefusedDocument: the template refuses the chat, or closes the reasoning that the turn has.
        """
        *before, message = messages
        prompt, text = self.render(before, prompt=True), self.render(messages)
        begin = len(prompt)
        if not text.startswith(prompt):
            begin, unsaid = self._border(messages, prompt, text)
            if "</think>" in unsaid and "</think>" in text[begin:]:
                raise RefusedDocument(f"message {len(before)}: the prompt ends the reasoning, and the turn has some")
        elif marked := self._marked(messages, prompt):
            begin, end = marked
            prompt, text = text[:begin], text[:end]
        end, follows = self._end_of_turn(messages, text)
        return Turn(prompt, _with_thought(message, prompt, text[begin:end]), follows)

    def _marked(self, messages: list[Message], prompt: str) -> tuple[int, int] | None:
        """Where a template that opens no turn itself marks the last one with `{% generation %}`."""
        if not _BLOCKS.search(self._text) or self.render(messages[:-1]) != prompt:
            return None
        spans = [span for span in self._rendered(messages, False, spans=True)[1] if span[0] >= len(prompt)]
        return (spans[0][0], spans[-1][1]) if spans else None

    def _border(self, messages: list[Message], prompt: str, text: str) -> tuple[int, str]:
        """Where the turn begins in a text that does not begin with its prompt, and what of the prompt it has not.

        History that is written otherwise once the turn is there, or reasoning that the prompt opens and the turn does
        not have. Sought is the longest head of what opens the turn, before what the turn's own words decide.
        """
        opening = prompt[shared(prompt, self.render(messages[:-1])) :]
        try:
            limit = shared(text, self.render([*messages[:-1], _wordless(messages[-1])]))
        except RefusedDocument:
            limit = len(text)
        for n in range(len(opening), 0, -1):
            head = opening[:n]
            if (n == len(opening) or head.endswith(("\n", *self._special))) and (at := text.rfind(head, 0, limit)) >= 0:
                return at + n, opening[n:]
        if opening:
            raise RefusedDocument(
                f"message {len(messages) - 1}: the turn does not begin with what the prompt ends with: {opening!r}"
            )
        # No opening of its own: behind what the prompt ends with, from its last special token on; where that does not
        # stand there, the longest tail that does. So do all shorter ones, perhaps in an earlier turn of the like.
        last = max((prompt.rfind(token) for token in self._special), default=-1)
        if last >= 0 and (at := text.rfind(prompt[last:], 0, limit)) >= 0:
            return at + len(prompt) - last, ""
        n = bisect.bisect_left(range(1, len(prompt) + 1), True, key=lambda n: text.rfind(prompt[-n:], 0, limit) < 0)
        return (text.rfind(prompt[-n:], 0, limit) + n if n else limit), ""

    def _end_of_turn(self, messages: list[Message], text: str) -> tuple[int, str]:
        """Where the last turn of this text ends, and with what a chat goes on from there.

        Some templates end every chat with eos, and no turn that another follows has it.
        """
        try:
            longer = self.render([*messages, {"role": "user", "content": "x"}])
        except RefusedDocument:
            return len(text), ""
        common, end = shared(text, longer), len(text)
        while end > common:
            token = next((t for t in (*self._special, " ", "\n") if text.endswith(t, 0, end)), None)
            if token is None:
                return len(text), ""  # not only eos: this turn is written otherwise once another follows
            end -= len(token)
        return end, longer[end:]


def _as_served(message: Message, template: str) -> Message:
    """A message as vLLM's server hands it to such a template."""
    found = message
    if message["role"] == "developer" and not re.search(r"['\"]developer['\"]", template):
        found = {**found, "role": "system"}
    if message["role"] != "tool" and _PARTS.search(template):
        found = {**found, "content": [{"type": "text", "text": message["content"]}]}
    return found


def _wordless(message: Message) -> Message:
    """The message with other words."""
    calls = [{**call, "function": {"name": _NO_WORDS, "arguments": {}}} for call in message.get("tool_calls", ())]
    words = {key: _NO_WORDS for key in (*REASONING, "content") if message.get(key)}
    if calls:
        return {**message, **words, "tool_calls": calls}
    return {**message, **(words or {"content": _NO_WORDS})}


def _with_thought(message: Message, prompt: str, said: str) -> str:
    """What was said, with the reasoning that the prompt opens and the template strips from every turn.

    Templates of DeepSeek-R1's kind: a server's answer goes on from `<think>`, so that is what the model said.
    """
    if not prompt.rstrip().endswith("<think>") or "</think>" in said:
        return said
    if reasoning := next((message[key] for key in REASONING if message.get(key)), None):
        return f"{reasoning}\n</think>\n\n{said.lstrip()}"
    thought, closed, rest = message["content"].rpartition("</think>")
    if not closed:
        return said
    space = rest[: len(rest) - len(rest.lstrip())]
    return thought.lstrip().removeprefix("<think>").lstrip("\n") + closed + space + said.lstrip()
