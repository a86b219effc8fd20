"""Tiny students and hand-made packed batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from distill_ray.ingest.batch import PackedBatch
from distill_ray.losses import SparseTargets

VOCAB = 60
TOP_K = 8


def tiny_config(kind: str = "LlamaConfig", **extra: object) -> object:
    """A two-layer configuration with 64 embedding rows for 60 real tokens."""
    import transformers

    base = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return getattr(transformers, kind)(**{**base, **extra})


def tiny_model(config: object, seed: int = 0) -> torch.nn.Module:
    """Random weights with logits far from uniform."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        implementation = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.3)
    return model.eval()


def documents(rng: np.random.Generator, count: int, longest: int = 9) -> list[np.ndarray]:
    """Ragged token ids."""
    return [rng.integers(3, VOCAB, int(rng.integers(2, longest + 1))) for _ in range(count)]


def pack(rng: np.random.Generator, docs: list[np.ndarray], width: int, share: float) -> PackedBatch:
    """One pack of whole documents, then padding; a share of the rows is supervised, against random targets."""
    ids, position, document = torch.zeros(width).long(), torch.zeros(width).long(), torch.full((width,), -1)
    rows, labels, at = [], [], 0
    for number, doc in enumerate(docs):
        n = len(doc)
        ids[at : at + n] = torch.from_numpy(doc)
        position[at : at + n], document[at : at + n] = torch.arange(n), number
        for t in range(n - 1):
            if rng.random() < share:
                rows.append(at + t)
                labels.append(int(doc[t + 1]))
        at += n
    logp = torch.from_numpy(rng.normal(size=(len(rows), VOCAB)) * 2).log_softmax(-1)
    top, kept = logp.topk(TOP_K)
    tail = logp.scatter(1, kept, -torch.inf).logsumexp(1)
    targets = SparseTargets(kept, top.float(), tail.float(), torch.tensor(labels).long())
    empty = torch.zeros(len(rows))
    return PackedBatch(
        ids[None], position[None], document[None], torch.tensor(rows).long(), targets, empty, empty.long(), at
    )


def steps_of(rng: np.random.Generator, steps: int, micro_steps: int) -> list[PackedBatch]:
    """Micro-batches of several steps, very unequal in supervised tokens; the last step has one fewer."""
    out = []
    for step in range(steps):
        count = micro_steps - (step == steps - 1)
        packs = [pack(rng, documents(rng, 3), 27, share) for share in (0.1, 1.0, 0.5)[:count]]
        supervised = sum(len(p.rows) for p in packs)
        out += [replace(p, step=step, micro=i, micro_steps=count, supervised=supervised) for i, p in enumerate(packs)]
    return out
