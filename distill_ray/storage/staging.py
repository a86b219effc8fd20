"""Folders that libraries want on a local disk: a teacher's weights, a student's, a tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from distill_ray.errors import UserError
from distill_ray.storage.atomic import explain_os, locked, replace_durably, temporary_beside
from distill_ray.storage.model_files import model_files, weight_files
from distill_ray.storage.uris import is_s3

# How long one process waits for another's download of the same folder.
_DOWNLOAD_S = 4 * 3600.0


def stage_folder(
    uri: str, cache: Path | None = None, *, weights: bool = True, expect: Mapping[str, str] | None = None
) -> Path:
    """A local folder with the files of the model under `uri` (`model_files`); what else lies there stays out of sight.

    A local folder is given back as it is where all its files are the model's, else as a folder of links to those; what
    lies in folders below it is not looked at. An `s3://` one is downloaded once per content into a folder of the user's
    cache, named by a hash over names, sizes and ETags, so that a changed source never alters a folder in use; a
    manifest beside it, written last, says that it is whole. Files removed or cut short since are fetched again. Objects
    come in parts, many at once; a killed download goes on with the parts it had. Processes of one machine wait for each
    other.

    Args:
        uri: folder.
        cache: where to keep downloads; by default `$XDG_CACHE_HOME` (or `~/.cache`) `/distill_ray/staged`.
        expect: SHA-256 of files by name; what differs in a downloaded copy is fetched again.
        weights: False leaves a model's weights where they are: its configuration and tokenizer are a few megabytes.

    Raises UserError if the folder is missing or empty, StorageError if the store refuses or the disk lacks room (found
    before anything is read), IntegrityError if an object is overwritten meanwhile.
    """
    if not is_s3(uri):
        folder = Path(uri).expanduser().absolute()
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}; correct the path or put the files there")
        return _seen(folder)
    # Not at the top: the client takes a quarter of a second to import.
    from distill_ray.storage.parts import download_folder, is_there
    from distill_ray.storage.s3 import S3Storage

    storage = S3Storage(uri)
    found = sorted(storage.list(""), key=lambda each: each.key)
    names = [each.key for each in found]
    wanted = model_files(names) - (set() if weights else set(weight_files(names)))
    objects = [each for each in found if each.key in wanted]
    if not objects:
        raise UserError(f"{uri}: no object lies under this prefix; correct the URI or upload the folder")
    manifest = json.dumps({"uri": storage.uri, "objects": [[o.key, o.size, o.version] for o in objects]}, indent=1)
    name = hashlib.sha256(manifest.encode()).hexdigest()[:32]
    root = cache or user_cache("staged")
    folder, marker = root / name, root / f"{name}.json"

    def whole() -> bool:
        return marker.exists() and all(is_there(folder / o.key, o.size) for o in objects)

    if whole() and not expect:
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f".lock-{name}", _DOWNLOAD_S):
            # Hashed under the lock: another process may have mended the copy since, and reads it now.
            for file, digest in (expect or {}).items():
                if (folder / file).exists() and _sha256(folder / file) != digest:
                    (folder / file).unlink()
            if not whole():
                download_folder(storage, objects, folder)
                with temporary_beside(marker) as temporary:
                    temporary.write_text(manifest)
                    replace_durably(temporary, marker)
    except OSError as error:
        raise explain_os(error, folder, "write", sum(o.size for o in objects)) from error
    return folder


def _seen(folder: Path) -> Path:
    """The folder, or links to what loaders may see of it: they choose among all that they find."""
    entries = sorted(entry.name for entry in folder.iterdir())
    files = {name for name in entries if (folder / name).is_file()}
    unread = files - model_files(files)
    if not unread:
        return folder
    shown = [name for name in entries if name not in unread]
    target = user_cache("seen") / hashlib.sha256("\n".join([str(folder), *shown]).encode()).hexdigest()[:32]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent / ".lock", 60.0):
            if not target.exists():
                made = Path(tempfile.mkdtemp(dir=target.parent))
                for name in shown:
                    (made / name).symlink_to(folder / name)
                made.rename(target)
    except OSError as error:
        raise UserError(
            f"{folder} holds files that are not the model's own ({', '.join(sorted(unread)[:3])}), and links to the "
            f"others cannot be made in {target.parent} ({error.strerror}); set XDG_CACHE_HOME to a folder that can be "
            "written, or remove those files"
        ) from error
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def user_cache(name: str) -> Path:
    """This project's folder `name` in the user's cache, `$XDG_CACHE_HOME` or `~/.cache`; it may not exist yet.

    Raises UserError if there is no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "distill_ray" / name
    except RuntimeError as error:
        raise UserError("no home folder to keep downloads in; set XDG_CACHE_HOME") from error
