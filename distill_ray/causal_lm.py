"""Causal language models of Hugging Face folders, loaded so that every weight is accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_ray.errors import UserError
from distill_ray.model_config import attention_implementation

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


_LEFT_OVER = re.compile(r"(^|\.)(masked_bias|causal_mask|inv_freq)$|\.attn(\.attention)?\.bias$")
"""Buffers that older versions of a family saved, and newer ones compute."""


class CannotBuildError(UserError):
    """transformers has no class for the model, lacks a package for it, or fails in the model's own code."""


def load_causal_lm(
    folder: Path, dtype: torch.dtype | str, trust_remote_code: bool = False, *, may_hold_more: bool = False
) -> PreTrainedModel:
    """The model of a folder; transformers itself would fill what is missing with random numbers.

    Args:
        folder: configuration and weights.
        dtype: of the weights.
        trust_remote_code: run Python code of the folder.
        may_hold_more: whether the folder may hold weights of which the model has none, such as heads that draft tokens.

    Raises:
        CannotBuildError: transformers fails.
        UserError: a weight that the folder lacks, or that the model does not have, named.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    # What a disk or memory did may be another time's luck.
    with _building(str(folder), (ValueError, ImportError)), _quietly():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            attn_implementation=attention_implementation(config),
            **_ACCOUNT,
        )
    model, found = loaded
    # Of a model of text and images the text part may be all that is used.
    parts = config.get_text_config() is not config
    _account_for(type(model).__name__, found, folder, may_hold_more or parts)
    head, embedding, text = model.get_output_embeddings(), model.get_input_embeddings(), config.get_text_config()
    if head is not None and getattr(text, "tie_word_embeddings", False) and head.weight is not embedding.weight:
        # The folder has two that differ: transformers trains both, and by the configuration would save one.
        for part in (model.config, model.config.get_text_config()):
            part.tie_word_embeddings = False
    return model


def compare_weights(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    trust_remote_code: bool = False,
    *,
    may_hold_more: bool = False,
) -> None:
    """What `load_causal_lm` would say of weights with these names and shapes; none are read.

    Raises UserError as it does.
    """
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    kind = type(causal_lm_shell(config, trust_remote_code=trust_remote_code))
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with _building(str(folder)), _quietly():
        # From a folder it would read the bytes of every weight, for nothing.
        _, found = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, device_map="meta", **_ACCOUNT
        )
    parts = config.get_text_config() is not config
    _account_for(kind.__name__, found, folder, may_hold_more or parts)


def causal_lm_shell(config: PretrainedConfig, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """A model of a configuration without storage: names, shapes and modules alone.

    Raises CannotBuildError.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with _building(str(config.name_or_path)), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


_ACCOUNT = {"ignore_mismatched_sizes": True, "output_loading_info": True}
"""What is missing, more or of another shape is told, and judged below."""


def _account_for(what: str, found: dict[str, Any], folder: Path, may_hold_more: bool) -> None:
    missing, other = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    more = sorted(name for name in found["unexpected_keys"] if not _LEFT_OVER.search(name))
    if missing:
        beside = f"; it holds {more[0]} instead" if more else ""
        raise UserError(
            f"{folder} lacks {len(missing)} weight(s) of {what}, the first {missing[0]}{beside}; copy the model again, "
            "or rename the weights where a program put a prefix before them"
        )
    if other:
        name, stored, wanted = other[0]
        raise UserError(
            f"{folder}: {len(other)} weight(s) have another shape than config.json states, the first {name}: "
            f"{list(stored)} against {list(wanted)}; config.json and weights are of two models"
        )
    if more and not may_hold_more:
        raise UserError(
            f"{folder} holds {len(more)} weight(s) that {what} does not have, the first {more[0]}; save the model "
            "without them, or correct config.json"
        )


@contextmanager
def _building(what: str, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    try:
        yield
    except kinds as error:  # by code of transformers' or the model's own, so of any kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CannotBuildError(f"transformers cannot build a causal language model from {what}: {reason}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """What transformers warns of is an error here, and progress is ours to show."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
