"""What a Hugging Face model folder's `config.json` says, and what follows from it; no model is loaded.

Teacher, student and preflight read it here, so that they cannot come to different conclusions. Importing this module
imports neither torch nor transformers.
"""

from __future__ import annotations

import json
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


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a Hugging Face folder as it is written.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json; name a Hugging Face model folder") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy the model folder again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is a JSON {type(config).__name__}, not an object; copy the model folder again")
    return config


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
