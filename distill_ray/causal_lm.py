"""Causal language models of Hugging Face folders, loaded so that every weight is accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_ray.errors import UserError
from distill_ray.model_config import attention_implementation

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def load_causal_lm(
    folder: Path,
    dtype: torch.dtype | str,
    trust_remote_code: bool = False,
    *,
    device: str | None = None,
    may_hold_more: bool = False,
) -> PreTrainedModel:
    """The model of a folder; transformers itself would fill what is missing with random numbers.

    Args:
        folder: configuration and weights.
        dtype: of the weights.
        trust_remote_code: run Python code of the folder.
        device: "meta" reads names and shapes alone; None is the CPU.
        may_hold_more: whether the folder may hold weights of which the model has none, such as heads that draft tokens.

    Raises:
        UserError: a weight that the folder lacks, or that the model does not have, named.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    with _quietly():
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            device_map=device,
            attn_implementation=attention_implementation(config),
            ignore_mismatched_sizes=True,  # told below with the others
            output_loading_info=True,
        )
    _account_for(model, found, folder, may_hold_more)
    return model


def causal_lm_shell(config: PretrainedConfig, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """A model of a configuration without storage: names, shapes and modules alone."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def _account_for(model: PreTrainedModel, found: dict[str, Any], folder: Path, may_hold_more: bool) -> None:
    missing, more = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    other = sorted(found["mismatched_keys"])
    what = type(model).__name__
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
