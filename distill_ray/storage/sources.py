"""Source objects named by globs, with one meaning locally and on S3."""

from __future__ import annotations

import functools
import glob
import heapq
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate, dropwhile
from pathlib import Path

from distill_ray.errors import UserError
from distill_ray.storage.atomic import is_hidden
from distill_ray.storage.base import ObjectInfo
from distill_ray.storage.local import LocalStorage
from distill_ray.storage.uris import is_s3, open_storage, split_s3, split_uri

_MAGIC = re.compile(r"[*?\[]")


def find_sources(patterns: Iterable[str]) -> dict[str, ObjectInfo]:
    """Objects that any of the patterns matches, by URI; each info's key is the URI's last name (see `split_uri`).

    A pattern that is a file's path or an object's key as it is written, brackets and all, is that one alone. Else `*`,
    `?` and `[…]` stay within one path component and match no leading dot; a component `**` stands for any number of
    folders. On S3 only the pattern's literal prefix is listed. A local file that several paths lead to, over symbolic
    links, is there once: by the path over the fewest links, of those by the first.

    In the order of the patterns, then of the URIs.

    Raises UserError where a pattern matches nothing, StorageError where the store cannot be asked.
    """
    found: dict[str, ObjectInfo] = {}
    for pattern in patterns:
        matched = _on_s3(pattern) if is_s3(pattern) else _on_disk(pattern)
        if not matched:
            raise UserError(f"{pattern}: no file matches; correct the path or glob, or add the files")
        found |= {uri: matched[uri] for uri in sorted(matched)}
    return _each_file_once(found)


def _on_s3(pattern: str) -> dict[str, ObjectInfo]:
    bucket, prefix = split_s3(pattern)
    path = prefix[:-1]
    if not path:
        raise UserError(f"{pattern} names a whole bucket; write which objects, as in s3://{bucket}/*.parquet")
    magic = _MAGIC.search(path)
    if magic is None:
        folder, name = split_uri(pattern)
        info = open_storage(folder).head(name)
        return {} if info is None else {f"s3://{bucket}/{path}": info}
    matches, found = re.compile(glob_to_regex(path), re.DOTALL), dict[str, ObjectInfo]()
    for each in open_storage(f"s3://{bucket}").list(path[: magic.start()]):
        info = replace(each, key=each.key.rpartition("/")[2])
        if each.key == path:
            return {f"s3://{bucket}/{path}": info}
        if matches.fullmatch(each.key):
            found[f"s3://{bucket}/{each.key}"] = info
    return found


def _on_disk(pattern: str) -> dict[str, ObjectInfo]:
    # Absolute: workers of a cluster start in folders of their own.
    pattern = os.path.abspath(os.path.expanduser(pattern))
    paths = [pattern] if os.path.isfile(pattern) else _paths("/", pattern.lstrip("/"))
    found: dict[str, ObjectInfo] = {}
    for path in paths:
        folder, name = os.path.split(path)
        info = LocalStorage(folder).head(name) if os.path.isfile(path) and not is_hidden(name) else None
        if info is not None:
            found[path] = info
    return found


def _paths(folder: str, pattern: str) -> Iterator[str]:
    """Paths below `folder` that match."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from (os.path.join(folder, name) for name in glob.glob(pattern, root_dir=folder))
        return
    at = parts.index("**")
    rest = "/".join(dropwhile(lambda part: part == "**", parts[at:])) or "*"
    for top in _paths(folder, "/".join(parts[:at])) if at else [folder]:
        for each in _folders(top):
            yield from _paths(each, rest)


def _folders(top: str) -> Iterator[str]:
    """`top` and the folders below it that are not hidden, each once however many links lead to it.

    glob's own `**` enters every link: two that lead upwards give more paths than there is time for.
    """
    seen: set[str] = set()
    links = [top]
    while links:
        # Over links last: a folder keeps the path that needs none.
        for folder, names, _ in os.walk(heapq.heappop(links)):
            real = os.path.realpath(folder)
            names[:] = [] if real in seen else [name for name in names if not name.startswith(".")]
            if real in seen:
                continue
            seen.add(real)
            yield folder
            for path in (os.path.join(folder, name) for name in names):
                if os.path.islink(path):
                    heapq.heappush(links, path)


def _each_file_once(found: dict[str, ObjectInfo]) -> dict[str, ObjectInfo]:
    real_folder = functools.cache(os.path.realpath)
    uris = defaultdict[str, list[str]](list)
    for uri in found:
        folder, name = os.path.split(uri)
        if is_s3(uri):
            real = uri
        else:
            real = os.path.realpath(uri) if os.path.islink(uri) else os.path.join(real_folder(folder), name)
        uris[real].append(uri)
    kept = {each[0] if len(each) == 1 else min(each, key=_by_links) for each in uris.values()}
    return {uri: info for uri, info in found.items() if uri in kept}


def _by_links(path: str) -> tuple[int, str]:
    return sum(map(os.path.islink, accumulate(Path(path).parts, os.path.join))), path


def matching(pattern: str, uris: Iterable[str]) -> set[str]:
    """Those of known URIs that a pattern names as `find_sources` reads it: itself alone, where it is one of them."""
    known, matches = set(uris), re.compile(glob_to_regex(pattern), re.DOTALL).fullmatch
    return {pattern} if pattern in known else {uri for uri in known if matches(uri)}


def glob_to_regex(pattern: str) -> str:
    """A regular expression that matches whole keys as `glob.glob(pattern, recursive=True)` matches paths."""
    parts = pattern.split("/")
    out = []
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part == "**":
            # The key "d//x" lies in a folder without a name.
            out.append(r"(?:(?!\.)[^/]*/)*" + (r"(?!\.)[^/]+" if last else ""))
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
