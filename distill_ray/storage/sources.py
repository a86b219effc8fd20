"""Source objects named by globs, with one meaning locally and on S3."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import replace
from pathlib import Path

from distill_ray.errors import UserError
from distill_ray.storage.base import ObjectInfo
from distill_ray.storage.local import LocalStorage
from distill_ray.storage.uris import is_s3, open_storage, split_s3, split_uri

_MAGIC = re.compile(r"[*?\[]")


def glob_sources(pattern: str) -> list[tuple[str, ObjectInfo]]:
    """Objects that match `pattern`, sorted by URI; each info's key is the URI's last name (see `split_uri`).

    `*`, `?` and `[…]` stay within one path component and match no leading dot; a component `**` stands for any
    number of folders. On S3 only the pattern's literal prefix is listed.

    Raises UserError where nothing matches, StorageError where the store cannot be asked.
    """
    found = _on_s3(pattern) if is_s3(pattern) else _on_disk(pattern)
    if not found:
        raise UserError(f"{pattern}: no file matches; correct the path or glob, or add the files")
    return sorted(found, key=lambda pair: pair[0])


def _on_disk(pattern: str) -> list[tuple[str, ObjectInfo]]:
    # Absolute: workers of a cluster start in folders of their own.
    pattern = os.path.abspath(os.path.expanduser(pattern))
    # A name may itself hold brackets.
    paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    found = []
    for path in dict.fromkeys(paths):
        folder, name = str(Path(path).parent), Path(path).name
        info = LocalStorage(folder).head(name) if name and os.path.isfile(path) else None
        if info is not None:
            found.append((path, info))
    return found


def _on_s3(pattern: str) -> list[tuple[str, ObjectInfo]]:
    bucket, path = split_s3(pattern)
    if not path:
        raise UserError(f"{pattern} names a whole bucket; write which objects, as in {pattern}/*.parquet")
    store = open_storage(f"s3://{bucket}")
    magic = _MAGIC.search(path)
    if magic is None:
        folder, name = split_uri(pattern)
        info = open_storage(folder).head(name)
        return [] if info is None else [(f"s3://{bucket}/{path}", info)]
    matches = re.compile(glob_to_regex(path), re.DOTALL)
    return [
        (f"s3://{bucket}/{each.key}", replace(each, key=each.key.rpartition("/")[2]))
        for each in store.list(path[: magic.start()])
        if matches.fullmatch(each.key)
    ]


def glob_to_regex(pattern: str) -> str:
    """A regular expression that matches whole keys as `glob.glob(pattern, recursive=True)` matches paths."""
    parts = pattern.split("/")
    out = []
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part == "**":
            out.append(r"(?:(?!\.)[^/]+/)*" + (r"(?!\.)[^/]+" if last else ""))
            continue
        hidden = r"(?!\.)" if part and part[0] in "*?[" else ""
        out.append(hidden + _component(part) + ("" if last else "/"))
    return "".join(out)


def _component(part: str) -> str:
    out, at = "", 0
    while at < len(part):
        char = part[at]
        # A "]" right after the opening (or its "!") is a member; without a closing one "[" is itself.
        close = part.find("]", at + 3 if part[at + 1 : at + 2] == "!" else at + 2) if char == "[" else -1
        if close > 0:
            body = part[at + 1 : close]
            negated = body.startswith("!")
            members = body[negated:].replace("\\", r"\\").replace("^", r"\^").replace("[", r"\[")
            if members.startswith("]"):
                members = "\\" + members
            out += f"(?!/)[{'^' if negated else ''}{members}]"
            at = close + 1
            continue
        out += {"*": "[^/]*", "?": "[^/]"}.get(char) or re.escape(char)
        at += 1
    return out
