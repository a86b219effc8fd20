"""What the teacher's weights are, told by content and never by path."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from distill_ray.errors import UserError
from distill_ray.model_config import read_config
from distill_ray.storage import MOST_HEADER, WEIGHT_FILES, ObjectInfo, Storage, open_storage, stage_folder, weight_files

_BLOCK = 8 * 2**20
_SAMPLES, _SAMPLE_BYTES = 8, 64 * 2**10
_READERS = 8


def weights_identity(uri: str, revision: str | None) -> dict[str, str]:
    """A model's weights as identity: the hash of the weight files' content or, with a revision, of a sketch.

    The sketch is cheap whatever the size: each weight file's name, size, safetensors header and a few samples of its
    bytes, and the index. So two models that were given one revision by mistake are told apart, and weights in `s3://`
    stay there; without a revision they are staged to this machine to be hashed.

    `config.json` is part of it either way: it fixes soft-caps, scales and the real vocabulary; and so is Python code
    beside it. Files are hashed in parallel, and a file seen before (same path, size and modification time) is not read
    again; that memory lies in the user's cache folder, never beside the model.

    Args:
        uri: Hugging Face folder, local or `s3://`.
        revision: `teacher.revision`.

    Raises:
        UserError: the folder holds no weights or no `config.json`.
    """
    folder = stage_folder(uri, weights=False)
    identity = {"config": _hash_config(read_config(folder))}
    storage = open_storage(uri)
    listed = {o.key: o for o in storage.list("")}
    names = weight_files(listed)
    if not names:
        raise UserError(f"model folder {uri} holds no weight files ({WEIGHT_FILES}); copy the model again")
    files = [listed[name] for name in names]
    if code := sorted(folder.glob("*.py")):
        identity["code"] = _combined([p.name for p in code], [_sha256(p) for p in code])
    if revision is None:
        whole = stage_folder(uri)
        return identity | {"sha256": _combined(names, _hash_files([whole / name for name in names]))}
    index = sorted(folder.glob("*.safetensors.index.json"))
    with ThreadPoolExecutor(_READERS) as pool:
        sketches = [*pool.map(partial(_sketch, storage), files), *map(_sha256, index)]
    return identity | {"revision": revision, "sketch": _combined([*names, *(p.name for p in index)], sketches)}


def _combined(names: list[str], digests: list[str]) -> str:
    lines = (f"{name} {digest}\n" for name, digest in zip(names, digests, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sketch(storage: Storage, file: ObjectInfo) -> str:
    """Hash of a weight file's size, its safetensors header, and evenly spread samples with its first and last bytes.

    Models of one shape have one header: only the samples tell a model from its fine-tuned version.
    """
    digest = hashlib.sha256(f"{file.size}\n".encode())
    if file.key.endswith(".safetensors"):
        length = storage.get_range(file.key, 0, 8)
        header = min(int.from_bytes(length, "little"), MOST_HEADER)
        digest.update(length + storage.get_range(file.key, 8, header))
    for i in range(_SAMPLES):
        start = max(0, file.size - _SAMPLE_BYTES) * i // (_SAMPLES - 1)
        digest.update(storage.get_range(file.key, start, min(_SAMPLE_BYTES, file.size - start)))
    return digest.hexdigest()


def _hash_config(values: dict[str, Any]) -> str:
    """Of the values, not of the layout; the version of the library that wrote them does not count."""
    kept = {k: v for k, v in values.items() if k not in ("transformers_version", "_name_or_path")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _hash_files(files: list[Path]) -> list[str]:
    cache_path = _cache_path()
    cache = _read_cache(cache_path)
    keys = [f"{f.resolve()}|{f.stat().st_size}|{f.stat().st_mtime_ns}" for f in files]
    missing = [(key, f) for key, f in zip(keys, files, strict=True) if key not in cache]
    if missing:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = pool.map(lambda item: _sha256(item[1]), missing)
            cache |= {key: digest for (key, _), digest in zip(missing, digests, strict=True)}
        _write_cache(cache_path, cache)
    return [cache[key] for key in keys]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _cache_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "distill_ray" / "weights.json"


def _read_cache(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # missing or of another program: hashing again costs only time
        return {}


def _write_cache(path: Path, cache: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".weights-")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(cache, stream)
        Path(name).replace(path)
    except OSError as error:
        print(
            f"warning: cannot keep the hashes of the weights in {path} ({error.strerror}), so the weights are read "
            "again each time; set XDG_CACHE_HOME to a folder that can be written",
            file=sys.stderr,
        )
