"""What follows a prompt: its tokens as the model would go on with them, and where it ends."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from distill_ray.corpus.refused import RefusedDocument
from distill_ray.corpus.tokenizers import plain_ids, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEHIND = ("x", " x", "\nx")
"""Texts that show whether what follows a special token is tokenised as if it stood alone."""


@lru_cache(maxsize=8)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """All special tokens by id, the longest first; `all_special_tokens` has only those with a role."""
    added = tokenizer.added_tokens_decoder.items()
    found = {number: str(token) for number, token in added if token.special and str(token)}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


@lru_cache(maxsize=4096)
def _is_border(tokenizer: PreTrainedTokenizerBase, number: int) -> bool:
    texts = [f"{special_tokens(tokenizer)[number]}{behind}" for behind in _BEHIND]
    alone, together = plain_ids(tokenizer, [*_BEHIND]), plain_ids(tokenizer, texts)
    return all([number, *a] == b for a, b in zip(alone, together, strict=True))


class Continued:
    """Token ids of texts that mostly go on from each other, as the prompts of a chat do.

    Of a text that shares its beginning with the one before, only what lies behind the last special token of that
    beginning is tokenised again; all of it, where what follows a special token depends on it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._special = tokenizer, special_tokens(tokenizer)
        self._pattern = re.compile("|".join(map(re.escape, self._special.values())) or "(?!)")
        self._text, self._ids = "", list[int]()
        self._borders = [(0, 0)]
        """(characters, ids) of the last text up to the end of each border."""

    def ids(self, text: str) -> list[int]:
        """Of the whole text, with no special token but those that it writes itself."""
        common = shared(self._text, text)
        self._borders = [border for border in self._borders if border[0] <= common]
        characters, count = self._borders[-1]
        rest = text[characters:]
        (found,) = plain_ids(self._tokenizer, [rest])
        places = [match.end() for match in self._pattern.finditer(rest)]
        special = [i for i, number in enumerate(found) if number in self._special]
        if len(places) == len(special):
            self._borders += [
                (characters + place, count + i + 1)
                for place, i in zip(places, special, strict=True)
                if _is_border(self._tokenizer, found[i])
            ]
        self._text, self._ids = text, self._ids[:count] + found
        return self._ids

    def split(self, prompt: str, said: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt, exactly as it is served, and of what follows it.

        The latter as both are tokenised together, where that goes on from the prompt's ids: alone, tokenizers of
        SentencePiece's kind put a space before it. Else, where a token would reach over the border, as behind a special
        token.
        """
        head = self.ids(prompt)
        whole = self.ids(prompt + said)
        if whole[: len(head)] == head:
            return head, whole[len(head) :]
        before = next(iter(self._special.values()), "")
        ahead, both = plain_ids(self._tokenizer, [before, before + said])
        return head, both[len(ahead) :]


def shared(a: str, b: str) -> int:
    """Characters with which both begin."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def ended(tokenizer: PreTrainedTokenizerBase, ids: list[int], *, special: bool = False, follows: str = "") -> list[int]:
    """Up to the first token that closes them; with one at which the teacher stops where none does.

    The line end that follows is the template's own, and no model is ever asked for it.

    Args:
        ids: what was said.
        special: whether another special token closes it, too, as a template's own end of a turn.
        follows: the text with which the chat goes on; where it begins with a token at which the teacher stops (the mark
            of the next turn), that is the one to end with.

    Raises:
        RefusedDocument: the teacher would stop before.
    """
    stops, end = stop_ids(tokenizer), len(ids)
    while end and (ids[end - 1] in stops or not _text(tokenizer, ids[end - 1]).strip()):
        end -= 1
    if inside := set(ids[:end]) & set(stops):
        raise RefusedDocument(f"the answer says {_text(tokenizer, min(inside))!r}, at which the teacher stops")
    if (closing := next((i for i in range(end, len(ids)) if ids[i] in stops), None)) is not None:
        return ids[: closing + 1]
    if special and end and ids[end - 1] in special_tokens(tokenizer):
        return ids[:end]
    marks = [number for number in stops if (text := _text(tokenizer, number)) and follows.startswith(text)]
    return [*ids, *(marks or stops)[:1]]


def _text(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    return cast(str, tokenizer.decode([number]))
