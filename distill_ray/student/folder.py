"""The trained student as a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.tiktoken",
)


def write_folder(model: PreTrainedModel, state: dict[str, Tensor], teacher_folder: Path, folder: Path) -> None:
    """Write config, safetensors, generation config and the teacher's tokenizer files.

    Args:
        model: gives the architecture and the configuration; its own weights are not read.
        state: weights by Hugging Face name, adapters merged.
        teacher_folder: local folder whose tokenizer the targets were made with.
        folder: made if missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    dtype = next(iter(state.values())).dtype
    # Without storage: only names, tied weights and the layout on disk are asked of it.
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    if model.generation_config is not None:
        shell.generation_config = model.generation_config
    shell.config.dtype = dtype
    shell.save_pretrained(folder, state_dict=state)
    for pattern in _TOKENIZER_FILES:
        for path in teacher_folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
