"""What a Hugging Face model folder's `config.json` says, and what follows from it; no model is loaded.

Teacher, student and preflight read it here, so that they cannot come to different conclusions. Importing this module
imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def attention_implementation(config: PretrainedConfig) -> str | None:
    """`eager` for a model that soft-caps attention logits (Gemma 2): SDPA leaves the cap out without a word.

    None otherwise: transformers then takes SDPA, or `eager` for a model that says it cannot use that.
    """
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A configuration of a Hugging Face folder as it is written.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    path = folder / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {name}; name a Hugging Face model folder") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy the model folder again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is a JSON {type(config).__name__}, not an object; copy the model folder again")
    return config


@dataclass(frozen=True)
class ModelShape:
    """What of a causal language model decides how it can be split and what it can be asked."""

    layers: int
    heads: int
    kv_heads: int
    """Heads of keys and values; as many as `heads` without grouped queries."""
    vocab_size: int
    context: int | None
    """Most tokens of a sequence; None where the config states none."""


def model_shape(folder: Path, trust_remote_code: bool = False) -> ModelShape:
    """Shape of the (text) model of a Hugging Face folder, whatever names its family uses (`n_head`, `n_layer`, …).

    Raises:
        UserError: no usable `config.json`, a model type that transformers does not know, or no shape in it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    read_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        text = config.get_text_config()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"transformers cannot use {folder}/config.json: {reason}; name a causal language model"
        ) from None
    sizes: dict[str, Any] = {
        name: getattr(text, name, None) for name in ("num_hidden_layers", "num_attention_heads", "vocab_size")
    }
    wrong = [f"{name} = {value!r}" for name, value in sizes.items() if not isinstance(value, int) or value < 1]
    if wrong:
        raise UserError(f"{folder}/config.json states {', '.join(wrong)}; name the folder of a causal language model")
    context = getattr(text, "max_position_embeddings", None)
    kv_heads = getattr(text, "num_key_value_heads", None)
    return ModelShape(
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        kv_heads=kv_heads if isinstance(kv_heads, int) and kv_heads > 0 else sizes["num_attention_heads"],
        vocab_size=sizes["vocab_size"],
        context=context if isinstance(context, int) else None,
    )


def stated_quantization(folder: Path) -> str | None:
    """How a folder's `config.json` says that its weights are quantised (`fp8`, `awq`); None where it says nothing.

    Raises:
        UserError: no usable `config.json`.
    """
    config = read_config(folder)
    for part in (config, config.get("text_config") or {}):
        if found := part.get("quantization_config") or part.get("compression_config"):
            return str(found.get("quant_method", "unnamed")) if isinstance(found, dict) else str(found)
    return None


def stated_dtype(folder: Path) -> str | None:
    """The type of the weights that a folder's `config.json` states (`bfloat16`), in the order that loaders ask.

    `dtype` before its old name `torch_dtype`; the model's own before that of the text model in a composite one.

    Raises:
        UserError: no usable `config.json`.
    """
    config = read_config(folder)
    for part in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) is not None:
                return str(part[key]).removeprefix("torch.")
    return None
