"""Tokenizers: loading, identity, and whether two give the same ids."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from distill_ray.config import fingerprint
from distill_ray.errors import UserError
from distill_ray.model_config import read_config

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

PROBES = (
    "The quick brown fox, 1234567890 times; don't stop.",
    " leading and trailing  \n\n\ttabs\r\nand   runs of    spaces ",
    "CamelCase snake_case x=10**-3; if (a[i] != b) { return ~0x7f; } // 2026-11-22",
    "naïve café, e\u0301 and é, ﬁ ligature, Ⅳ, ½, ＦＵＬＬ width, İstanbul ẞ",
    "Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย, 日本語の文、한국어",
    "👩‍👩‍👧 flags 🇫🇷, zero\u200bwidth, nbsp\u00a0, \u2028 line, \ufffd",
    "x",
    "<s> </s> <|endoftext|> <|im_start|>user\nhi<|im_end|> [INST] <pad>",
)
"""Texts on which normalisers, pre-tokenizers and added special tokens are known to differ."""

_SHOWN = 5
_STOPS = "distill_ray_stop_ids"


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder on this machine; nothing is fetched.

    Raises:
        UserError: the folder is missing, holds no tokenizer, or none that gives character offsets.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"tokenizer folder {folder} does not exist; give a Hugging Face folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError) as error:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"no tokenizer could be loaded from {folder} (it holds {held}): {first}; add tokenizer.json"
        ) from None
    if not getattr(tokenizer, "is_fast", False):  # Mistral's own has no such attribute
        raise UserError(
            f"the tokenizer of {folder} is a {type(tokenizer).__name__} without tokenizer.json; "
            "convert it to a fast one"
        )
    tokenizer.__dict__[_STOPS] = end_tokens(folder, cast("int | None", tokenizer.eos_token_id))
    return tokenizer


def end_tokens(folder: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """Ids at which the model of a folder stops by itself: the tokenizer's eos first, then ascending those that
    generation_config.json and config.json state."""
    stated: set[int | None] = set()
    for name in ("generation_config.json", "config.json"):
        config = read_config(folder, name) if (folder / name).exists() else {}
        for section in (config, config.get("text_config") or {}):
            ends = section.get("eos_token_id")
            stated |= set(ends) if isinstance(ends, list) else {ends}
    first = [] if tokenizer_eos is None else [tokenizer_eos]
    return (*first, *sorted(int(i) for i in stated - {None, tokenizer_eos} if i is not None))


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """`end_tokens` of the folder that `load_tokenizer` took it from; they travel with it."""
    return tokenizer.__dict__[_STOPS]


def opening_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text: BOS, or nothing."""
    encoded = tokenizer("x", return_special_tokens_mask=True, verbose=False)
    marked = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [number for number, _ in takewhile(lambda pair: pair[1], marked)]


def opens_with(ids: list[int] | np.ndarray, opening: list[int]) -> bool:
    """Whether these tokens stand at the beginning; not where there are none."""
    return bool(opening) and list(ids[: len(opening)]) == opening


def opened(ids: list[int], opening: list[int]) -> list[int]:
    """A text behind what opens one, which it may already begin with."""
    return ids if opens_with(ids, opening) else opening + ids


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with no special token but those that it writes itself."""
    if not texts:  # on which the tokenizer breaks
        return []
    return cast(list[list[int]], tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def id_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest id that the tokenizer knows. Its length is less where ids were left out."""
    return 1 + max(tokenizer.get_vocab().values())


def tokens_without_row(tokenizer: PreTrainedTokenizerBase, rows: int, whose: str) -> list[str]:
    """Tokens that an embedding of so many rows has none for, and that no text needs: special ones which neither open,
    end nor pad a text nor stand in the chat template, such as Gemma 3's <image_soft_token> in its text models.

    Args:
        tokenizer: of the teacher.
        rows: of the embedding.
        whose: for the message, such as "the teacher's".

    Raises:
        UserError: there are others: embedding and tokenizer do not belong together.
    """
    beyond = {id_: token for token, id_ in tokenizer.get_vocab().items() if id_ >= rows}
    if not beyond:
        return []
    roles = (tokenizer.bos_token_id, tokenizer.pad_token_id, *stop_ids(tokenizer))
    template, added = str(tokenizer.chat_template or ""), tokenizer.added_tokens_decoder
    for id_, token in sorted(beyond.items()):
        if id_ not in added or not added[id_].special or id_ in roles or token in template:
            raise UserError(
                f"the teacher's tokenizer has ids below {1 + max(beyond):,}, {whose} embedding {rows:,} rows: there is "
                f"none for {len(beyond):,} id(s), the first in use {id_} ({token!r}); take models of one family, or "
                "give the embedding these rows"
            )
    return [beyond[id_] for id_ in sorted(beyond)]


def _backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What of the backend's JSON decides ids, in one canonical form.

    Left out: truncation and padding, which are state of the last call, and the decoder, which makes text of ids.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    model = parts["model"]
    if "merges" in model:
        # Older files write "a b", newer ones ["a", "b"].
        model["merges"] = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    return {
        "model": model,
        "added": sorted(parts["added_tokens"], key=lambda token: token["id"]),
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": parts["post_processor"],
    }


def _probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [list(tokenizer(text)["input_ids"]) for text in PROBES]


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """32 hex digits over all that decides token ids: vocabulary, merges, normaliser, special tokens, chat template.

    Independent of file names, of the order of keys, of the process, and of how many rows a model's embedding has.
    """
    return fingerprint(
        {
            **_backend(tokenizer),
            "special": {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id},
            "template": tokenizer.chat_template,
            # What Python code around the backend adds or changes shows only in what comes out.
            "probes": _probe_ids(tokenizer),
        }
        # Units from before every window was opened still stand where nothing opens any.
        | ({"opens": "every window"} if opening_of(tokenizer) else {})
        # Where turns end matters to chats alone.
        | ({"stops": stop_ids(tokenizer)} if tokenizer.chat_template and len(stop_ids(tokenizer)) > 1 else {})
    )


def _vocab_problem(ours: dict[str, int], theirs: dict[str, int]) -> str | None:
    differing = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    if not differing:
        return None
    high = len(ours) + len(theirs)
    differing.sort(key=lambda t: (min(ours.get(t, high), theirs.get(t, high)), t))
    shown = ", ".join(
        f"{token!r} {ours.get(token, 'none')} against {theirs.get(token, 'none')}" for token in differing[:_SHOWN]
    )
    return (
        f"{len(ours):,} tokens against {len(theirs):,}; {len(differing):,} have another id or are on one side only, "
        f"the first: {shown}"
    )


def _behaviour_problem(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    ours, theirs = _backend(a), _backend(b)
    merges, others = ours["model"].get("merges", []), theirs["model"].get("merges", [])
    if merges != others:
        at = next((i for i, (x, y) in enumerate(zip(merges, others, strict=False)) if x != y), None)
        at = min(len(merges), len(others)) if at is None else at
        return f"{len(merges):,} merges against {len(others):,}, the first difference at merge {at:,}"
    # Files may state one behaviour in two ways (a digit splitter where no merge joins digits): what counts is ids.
    for text, x, y in zip(PROBES, _probe_ids(a), _probe_ids(b), strict=True):
        if x != y:
            at = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))
            window = slice(max(0, at - 1), at + 4)
            return f"the text {text[:40]!r} gives other ids from token {at} on: {x[window]} against {y[window]}"
    return None


def same_tokenizer(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Check that both give the same ids; chat template, special tokens' roles and embedding rows may differ.

    What ends a text is the teacher's: the student is exported with its tokenizer, and learns to stop where it does.

    Raises:
        UserError: what differs first (teacher's against student's), with the numbers.
    """
    problem = _vocab_problem(teacher.get_vocab(), student.get_vocab()) or _behaviour_problem(teacher, student)
    if problem:
        raise UserError(
            "teacher and student have different tokenizers, so the teacher's token ids mean something else to the "
            f"student: {problem}; take a student of the teacher's family, student.teacher_layers, or give the student "
            "folder the teacher's tokenizer files if only these differ"
        )
