"""A Hugging Face folder in another number type, shard by shard: memory holds one shard, whatever the model's size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from distill_ray.errors import IntegrityError, UserError

FloatName = Literal["bfloat16", "float32", "float16"]
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_INDEX = "model.safetensors.index.json"


def convert_folder(source: Path, target: Path, dtype: FloatName, *, shard_bytes: int = 5 * 10**9) -> None:
    """Copy a model folder with its floating-point weights cast to `dtype`.

    Args:
        source: folder with config.json, safetensors and the rest.
        target: made; must not exist.
        dtype: of the weights and of config.json.
        shard_bytes: most bytes of one safetensors file, as transformers has it; a larger tensor gets its own file.

    Raises:
        IntegrityError: no weights, or a weight is not finite.
        UserError: a finite weight does not fit `dtype`.
    """
    target.mkdir(parents=True)
    weights = sorted(source.glob("*.safetensors"))
    if not weights:
        raise IntegrityError(f"{source} holds no safetensors file; train again under a new --version")
    skipped = {path.name for path in weights} | {_INDEX, "config.json", "manifest.json", "README.md"}
    for path in filter(Path.is_file, source.rglob("*")):
        if path.name not in skipped:
            (target / path.relative_to(source)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(source))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    _write_json(target / "config.json", _with_dtype(config, dtype))
    if not (target / "generation_config.json").exists():
        ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(k) is not None}
        _write_json(target / "generation_config.json", {"_from_model_config": True, **ids})
    _write_weights(weights, target, dtype, shard_bytes)


def _with_dtype(config: dict[str, Any], dtype: FloatName) -> dict[str, Any]:
    """The configuration, parts of composite models included, with `dtype` for the type of the weights."""
    changed = {k: _with_dtype(v, dtype) if isinstance(v, dict) else v for k, v in config.items()}
    for key in ("dtype", "torch_dtype"):
        if isinstance(config.get(key), str):
            changed[key] = dtype
    return changed


def _write_weights(weights: list[Path], target: Path, dtype: FloatName, shard_bytes: int) -> None:
    from safetensors.torch import save_file

    shards = _plan(weights, dtype, shard_bytes)
    where: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = dict(_cast(shard, dtype))
        save_file(tensors, target / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(shards) > 1:
        _write_json(target / _INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _plan(weights: list[Path], dtype: FloatName, shard_bytes: int) -> list[list[tuple[Path, str]]]:
    """Which tensors go into which file, from the headers alone."""
    from safetensors import safe_open

    shards: list[list[tuple[Path, str]]] = [[]]
    size = 0
    for path in weights:
        with safe_open(path, framework="pt") as stored:
            for name in sorted(stored.keys()):
                numel = 1
                for length in stored.get_slice(name).get_shape():
                    numel *= length
                bytes_ = numel * _BYTES[dtype]
                if shards[-1] and size + bytes_ > shard_bytes:
                    shards.append([])
                    size = 0
                shards[-1].append((path, name))
                size += bytes_
    return shards


def _cast(shard: list[tuple[Path, str]], dtype: FloatName) -> Iterator[tuple[str, Any]]:
    import torch
    from safetensors import safe_open

    for path, name in shard:
        with safe_open(path, framework="pt") as stored:
            tensor = stored.get_tensor(name)
        if not tensor.is_floating_point():
            yield name, tensor
            continue
        if not torch.isfinite(tensor).all():
            raise IntegrityError(f"weight {name} of the trained student is not finite; lower train.learning_rate")
        cast = tensor.to(getattr(torch, dtype)).contiguous()
        if not torch.isfinite(cast).all():
            raise UserError(
                f"weight {name} reaches {float(tensor.abs().max()):.3g}, more than export.dtype={dtype} holds; "
                "use bfloat16"
            )
        yield name, cast


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
