"""Whether the weights of a model folder are whole and the model's own, told from listings and file headers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distill_ray.causal_lm import CannotBuildError, compare_weights
from distill_ray.errors import UserError
from distill_ray.model_config import read_config, stated_quantization
from distill_ray.storage import (
    MOST_HEADER,
    WEIGHT_FILES,
    Storage,
    model_files,
    open_storage,
    stage_folder,
    weight_files,
)

_AGAIN = "copy the model again"
_POINTER, _POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
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
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = f"{single}.index.json"
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


def check_weights(uri: str, trust_remote_code: bool, *, by_vllm: bool = False) -> str | None:
    """That the folder's weights are those of its model, each in its shape; `check_files` holds.

    Only names and shapes are read, from the headers of its files.

    Args:
        uri: of the folder.
        trust_remote_code: run its code.
        by_vllm: whether vLLM loads it, which judges by itself what it leaves out, and builds what transformers cannot.

    Returns:
        Why that was not looked at; None where it was.

    Raises:
        UserError: a file cut short; a weight missing, of another shape or of no module.
    """
    folder, storage = stage_folder(uri, weights=False), open_storage(uri)
    _check_generation(uri, folder)
    sizes = {info.key: info.size for info in storage.list("")}
    names = weight_files(sizes)
    if not names[0].endswith(".safetensors"):
        return f"{names[0]} is no safetensors file"
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda name: _shapes(storage, uri, name, sizes[name]), names)
        shapes = {name: shape for each in found for name, shape in each.items()}
    if kind := stated_quantization(folder):
        return f"quantised ({kind})"
    try:
        compare_weights(folder, shapes, trust_remote_code, may_hold_more=by_vllm)
    except UserError as error:
        if by_vllm and isinstance(error, CannotBuildError):
            return str(error)
        raise UserError(str(error).replace(str(folder), uri)) from None
    return None


def _check_generation(uri: str, folder: Path) -> None:
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_dict(read_config(folder, _GENERATION) if (folder / _GENERATION).exists() else {})
    except ValueError as error:
        raise UserError(f"{uri}/{_GENERATION} cannot be loaded: {error}; correct or remove it") from None


def _shapes(storage: Storage, uri: str, name: str, size: int) -> dict[str, list[int]]:
    """Names and shapes in a safetensors file.

    Raises UserError: it is none, or was cut short.
    """
    length = int.from_bytes(storage.get_range(name, 0, 8), "little")
    try:
        if size < 8 or length > min(size - 8, MOST_HEADER):
            raise ValueError("no length of a header")
        entries: dict[str, Any] = json.loads(storage.get_range(name, 8, length))
        entries.pop("__metadata__", None)
        shapes = {key: [int(n) for n in entry["shape"]] for key, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{uri}/{name} ({size:,} bytes) does not begin as a safetensors file does; {_AGAIN}") from None
    if size != 8 + length + end:
        raise UserError(f"{uri}/{name} has {size:,} bytes, and its header tells of {8 + length + end:,}; {_AGAIN}")
    return shapes
