"""Whether the weights of a model folder are whole and the model's own, told from listings and file headers alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distill_ray.causal_lm import load_causal_lm
from distill_ray.errors import UserError
from distill_ray.model_config import read_config, stated_quantization
from distill_ray.storage import WEIGHT_FILES, Storage, model_files, open_storage, stage_folder, weight_files

_AGAIN = "copy the model again"
_POINTER, _POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
_INDICES = {"model.safetensors": ".index.json", "pytorch_model.bin": ".index.json"}
_GENERATION = "generation_config.json"
_READERS = 16


def check_files(uri: str) -> None:
    """That every file of a model folder is itself, and every weight file that is named is there.

    Raises UserError naming the first that is not.
    """
    storage = open_storage(uri)
    sizes = {info.key: info.size for info in storage.list("")}
    for name in sorted(model_files(sizes)):
        if sizes[name] < _POINTER_BYTES and storage.get_range(name, 0, len(_POINTER)) == _POINTER:
            raise UserError(
                f"{uri}/{name} is a Git LFS pointer of {sizes[name]} bytes and not the file; fetch it (git lfs pull) "
                f"or {_AGAIN}"
            )
    weights = weight_files(sizes)
    if not weights:
        raise UserError(f"model folder {uri} holds no weights ({WEIGHT_FILES}); {_AGAIN}")
    if empty := [name for name in weights if not sizes[name]]:
        raise UserError(f"{uri}/{empty[0]} is empty; {_AGAIN}")
    for single, suffix in _INDICES.items():
        index = single + suffix
        if single not in sizes and index in sizes and weights[0].endswith(Path(single).suffix):
            _check_index(uri, index, storage.get(index), sizes)


def _check_index(uri: str, index: str, data: bytes, sizes: Mapping[str, int]) -> None:
    try:
        placed: dict[str, str] = json.loads(data)["weight_map"]
        missing = sorted(set(placed.values()) - sizes.keys())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{uri}/{index} is no index of weights ({error!r}); {_AGAIN}") from None
    if missing:
        there = [name for name, file in placed.items() if file == missing[0]]
        raise UserError(
            f"{uri}/{missing[0]} is missing: {index} places {len(there)} weight(s) in it, the first {min(there)}; "
            f"{_AGAIN}"
        )


def check_weights(uri: str, trust_remote_code: bool, *, may_hold_more: bool = False) -> str | None:
    """That the folder's weights are those of its model, each in its shape; `check_files` holds.

    Only names and shapes are read: of a model in `s3://` the headers of its files.

    Returns:
        Why that was not looked at; None where it was.

    Raises:
        UserError: a file cut short; a weight missing, of another shape, or, unless `may_hold_more`, of no module.
    """
    folder, storage = stage_folder(uri, weights=False), open_storage(uri)
    _check_generation(uri, folder)
    if kind := stated_quantization(folder):
        return f"quantised ({kind})"
    sizes = {info.key: info.size for info in storage.list("")}
    names = weight_files(sizes)
    if not names[0].endswith(".safetensors"):
        return f"{names[0]} is no safetensors file"
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(_READERS) as pool:
        for path in folder.iterdir():
            if path.name not in names:
                Path(work, path.name).symlink_to(path.absolute())
        list(pool.map(lambda name: _outline(storage, uri, name, sizes[name], Path(work, name)), names))
        try:
            load_causal_lm(Path(work), "auto", trust_remote_code, device="meta", may_hold_more=may_hold_more)
        except UserError as error:
            raise UserError(str(error).replace(work, uri)) from None
        except ValueError as error:  # an architecture that transformers has no causal language model for
            return " ".join(str(error).split())[:120]
    return None


def _check_generation(uri: str, folder: Path) -> None:
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_dict(read_config(folder, _GENERATION) if (folder / _GENERATION).exists() else {})
    except ValueError as error:
        raise UserError(f"{uri}/{_GENERATION} cannot be loaded: {error}; correct or remove it") from None


def _outline(storage: Storage, uri: str, name: str, size: int, path: Path) -> None:
    """A file with the header of a safetensors file and its size, without its bytes: a hole on the disk.

    Raises UserError: it is none, or was cut short.
    """
    length = storage.get_range(name, 0, 8)
    header = storage.get_range(name, 8, int.from_bytes(length, "little")) if size >= 8 else b""
    try:
        entries: dict[str, Any] = json.loads(header)
        ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{uri}/{name} ({size:,} bytes) does not begin as a safetensors file does; {_AGAIN}") from None
    whole = 8 + len(header) + max(ends, default=0)
    if size != whole:
        raise UserError(f"{uri}/{name} has {size:,} bytes, and its header tells of {whole:,}; {_AGAIN}")
    with path.open("wb") as file:
        file.write(length + header)
        file.truncate(size)
