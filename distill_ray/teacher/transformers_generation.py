"""Completions by the reference: one sequence at a time, drawn from float32 probabilities on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distill_ray.teacher.generation import Completion, Writing, sample_seed


@torch.inference_mode()
def write_completion(
    model: Any, vocab_size: int, writing: Writing, prompt: np.ndarray, sample: int, device: torch.device
) -> Completion:
    """One completion of a prompt; greedy ones are those of any exact engine.

    Args:
        model: a transformers causal language model.
        vocab_size: V; rows of a head padded beyond it are never drawn.
        writing: how.
        prompt: [n] int32.
        sample: which of the prompt's completions.
        device: of the model.
    """
    generate = writing.generate
    generator = torch.Generator().manual_seed(sample_seed(generate, prompt, sample))
    new = torch.tensor(prompt, dtype=torch.long, device=device)[None]
    cache, tokens = None, list[int]()
    while True:
        out = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        drawn = draw(out.logits[0, -1, :vocab_size].float().cpu(), generate.temperature, generate.top_p, generator)
        tokens.append(drawn)
        new = torch.tensor([[drawn]], device=device)
        if drawn in writing.ends or _stops(writing, tokens):
            return Completion(np.array(tokens, np.int32), "stop")
        if len(tokens) == generate.max_tokens:
            return Completion(np.array(tokens, np.int32), "length")


def draw(logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token of softmax(z / T), from the fewest likeliest tokens that hold `top_p` of it; T = 0: the likeliest."""
    if temperature == 0:
        return int(logits_V.argmax())
    p_V, ids_V = (logits_V.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    p_V = torch.where(p_V.cumsum(-1) - p_V < top_p, p_V, 0.0)
    return int(ids_V[torch.multinomial(p_V, 1, generator=generator)])


def _stops(writing: Writing, tokens: list[int]) -> bool:
    if not writing.generate.stop:
        return False
    text = writing.tokenizer.decode(tokens, skip_special_tokens=False)
    return any(stop in text for stop in writing.generate.stop)
