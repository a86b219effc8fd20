"""The trained student as a Hugging Face folder."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_ray.causal_lm import causal_lm_shell
from distill_ray.corpus import load_tokenizer, stop_ids

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel

_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*.tiktoken",
)
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("early_stopping", "length_penalty")


def write_folder(
    model: PreTrainedModel,
    state: dict[str, Tensor],
    teacher_folder: Path,
    folder: Path,
    trust_remote_code: bool = False,
) -> None:
    """Write config, safetensors, generation config and the teacher's tokenizer files and chat templates.

    The student stops where the teacher does: it was taught to, whatever its own folder said before.

    Args:
        model: gives the architecture and the configuration; its own weights are not read.
        state: weights by Hugging Face name, adapters merged.
        teacher_folder: local folder whose tokenizer the targets were made with.
        folder: made if missing.
        trust_remote_code: as the recipe has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = next(iter(state.values())).dtype
    # Without storage: only names, tied weights and the layout on disk are asked of it.
    shell = causal_lm_shell(model.config, dtype, trust_remote_code)
    if model.generation_config is not None:
        shell.generation_config = _savable(model.generation_config)
    shell.config.dtype = dtype
    ids = _special_ids(load_tokenizer(teacher_folder, trust_remote_code))
    for part in (shell.config, shell.config.get_text_config(), shell.generation_config):
        for name, value in ids.items():
            setattr(part, name, value)
    twice = _tied(shell)
    shell.save_pretrained(folder, state_dict={name: w for name, w in state.items() if name not in twice})
    for pattern in _TOKENIZER_FILES:
        for path in filter(Path.is_file, teacher_folder.glob(pattern)):
            target = folder / path.relative_to(teacher_folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def _tied(shell: Any) -> set[str]:
    """Further names of weights: a gathered state holds a copy under each, which transformers does not see to be one."""
    first: dict[int, str] = {}
    named = shell.named_parameters(remove_duplicate=False)
    return {name for name, weight in named if first.setdefault(id(weight), name) != name}


def _special_ids(tokenizer: Any) -> dict[str, int | list[int]]:
    """Names of a configuration and the ids that the teacher and its tokenizer have for them; what neither has is left
    as the student had it."""
    stops = list(stop_ids(tokenizer))
    found = {
        "eos_token_id": stops if len(stops) > 1 else next(iter(stops), None),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    return {name: value for name, value in found.items() if value is not None}


def _savable(config: GenerationConfig) -> GenerationConfig:
    """Without settings of a way of writing that the others rule out: transformers saves no such configuration."""
    found = copy.deepcopy(config)
    if not found.do_sample:
        found.update(**dict.fromkeys(_SAMPLING))
    if (found.num_beams or 1) == 1:
        found.update(**dict.fromkeys(_BEAMS))
    if (found.pad_token_id or 0) < 0:
        found.pad_token_id = None
    try:
        found.validate(strict=True)
        return found
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        print(f"warning: of the student's generation config only token ids are exported: {reason}", file=sys.stderr)
        return type(config)()
