"""Attention by document equals attention under a mask over the pack, and documents run alone.

`varlen_attn` runs on CUDA only. Here a loop of plain matrix products with its signature stands in for it, so what is
tested is all around the kernel: bounds, layout, windows, grouped heads, and when masks stay. The kernel itself is
compared in `tests/gpu`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill_ray.config.loss import LossSection
from distill_ray.ingest.attention import document_bounds
from distill_ray.ingest.batch import PackedBatch
from distill_ray.model_config import attention_implementation
from distill_ray.student.folder import write_folder
from distill_ray.student.module import DistillModule, loss_spec
from distill_ray.student.varlen import FLASH, Kernel
from tests.assets import tiny_teacher_folder
from tests.unit.student_fakes import VOCAB, documents, pack, tiny_config, tiny_model


def reference_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """`varlen_attn` as its documentation has it, and what its kernel checks before it runs."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q.is_contiguous()
    bounds = cu_seq_q.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(query) == len(key) == len(value)
    assert 0 < max(b - a for a, b in pairwise(bounds)) <= max_q == max_k
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = []
    for first, end in pairwise(bounds):
        q, k, v = (x[first:end].transpose(0, 1) for x in (query, key, value))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        place = torch.arange(end - first)
        ahead = place[None, :] - place[:, None]
        hidden = (ahead > right if right >= 0 else ahead < -len(place)) | (ahead < -left if left >= 0 else False)
        out.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


REFERENCE = Kernel("distill_ray_reference", reference_attn, (torch.float32,))
SLIDING = {"sliding_window": 3, "num_key_value_heads": 2}
MIXED = {**SLIDING, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}
MODELS = [
    ("LlamaConfig", {"num_key_value_heads": 2}),
    ("LlamaConfig", {"num_key_value_heads": 1, "attention_bias": True}),
    ("MistralConfig", SLIDING),
    ("Qwen2Config", MIXED),
    ("GraniteConfig", {"attention_multiplier": 0.2}),
]


def two_packs() -> tuple[list[np.ndarray], PackedBatch]:
    """Five documents in two rows, each with padding; all but each document's last token supervised."""
    rng = np.random.default_rng(3)
    docs = [*documents(rng, 4), rng.integers(3, VOCAB, 1 + 9)]
    first, second = pack(rng, docs[:3], 30, 1.0), pack(rng, docs[3:], 30, 1.0)
    assert first.tokens < 30 > second.tokens
    names = ("input_ids", "position_ids", "document_ids")
    joined = {n: torch.cat([getattr(first, n), getattr(second, n)]) for n in names}
    return docs, replace(first, rows=torch.cat([first.rows, second.rows + 30]), **joined)


def student(kind: str, extra: dict[str, object], kernel: Kernel | None) -> DistillModule:
    config = tiny_config(kind, **extra)
    # Not all of these may be asked for SDPA, as `tiny_model` does.
    model = loaded_as_a_student(config) if kind == "GptOssConfig" else tiny_model(config)
    return DistillModule(model, loss_spec(model.config, VOCAB, LossSection()), kernel=kernel)


def loaded_as_a_student(config: object) -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention_implementation(config)).eval()


def gradients(module: nn.Module, hidden_ND: Tensor) -> Tensor:
    """Of a fixed weighing of the hidden states, in one vector over all weights of the body."""
    weights_ND = torch.randn(hidden_ND.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((hidden_ND * weights_ND).sum(), list(module.body.parameters()))
    return torch.cat([g.flatten() for g in found])


def off(got: Tensor, want: Tensor) -> float:
    return float(((got - want).norm() / want.norm()).detach())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "extra"), MODELS)
def test_states_and_gradients_equal_the_masks_and_documents_alone(
    kind: str, extra: dict[str, object], checkpointing: bool
):
    docs, batch = two_packs()
    masked, ours = student(kind, extra, None), student(kind, extra, REFERENCE)
    assert ours.masked_because is None
    if checkpointing:
        ours.body.gradient_checkpointing_enable({"use_reentrant": False})
        ours.train()
    assert batch.bounds is None
    for given in (batch, batch.to("cpu")):
        hidden = ours.hidden_rows(given)
        want = masked.hidden_rows(batch)
        each = [masked.body(torch.from_numpy(d)[None], use_cache=False).last_hidden_state[0, :-1] for d in docs]
        alone = torch.cat(each)
        assert off(hidden, want) <= 1e-5
        assert off(hidden, alone) <= 1e-5
        got = gradients(ours, hidden)
        assert off(got, gradients(masked, want)) <= 1e-5
        assert off(got, gradients(masked, alone)) <= 1e-5


@pytest.mark.parametrize("fault", ["two documents joined", "window one too wide", "window one too narrow"])
def test_the_comparison_has_teeth(fault: str):
    """The same comparison with a fault in what the kernel is given."""

    def faulty(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, _: Tensor, *lengths: int, **rest) -> Tensor:
        if fault == "two documents joined":
            bounds = torch.cat([bounds[:1], bounds[2:]])
        else:
            rest["window_size"] = (rest["window_size"][0] + (1 if "wide" in fault else -1), 0)
        return reference_attn(query, key, value, bounds, bounds, *lengths, **rest)

    _, batch = two_packs()
    masked = student("MistralConfig", SLIDING, None)
    ours = student("MistralConfig", SLIDING, replace(REFERENCE, name="distill_ray_faulty", call=faulty))
    hidden, want = ours.hidden_rows(batch), masked.hidden_rows(batch)
    assert off(hidden, want) > 1e-3
    assert off(gradients(ours, hidden), gradients(masked, want)) > 1e-3


def test_the_kernel_is_what_attends_and_masks_still_do():
    """Nothing falls back in silence; and a model that is called without bounds attends as transformers has it."""
    calls: list[int] = []

    def counted(*args: Tensor, **rest) -> Tensor:
        calls.append(args[3].numel())
        return reference_attn(*args, **rest)

    _, batch = two_packs()
    ours = student("Qwen2Config", MIXED, replace(REFERENCE, name="distill_ray_counted", call=counted))
    assert not calls
    with torch.no_grad():
        ours.hidden_rows(batch)
        assert calls == [5 + 2 + 1] * 2
        plain = student("Qwen2Config", MIXED, None)
        ids = torch.arange(14)[None]
        torch.testing.assert_close(ours.body(ids).last_hidden_state, plain.body(ids).last_hidden_state)
    assert len(calls) == 2


def test_bounds_of_rows_documents_and_padding():
    ids = torch.tensor([[0, 0, 1, -1], [0, 1, 1, 1], [0, -1, -1, -1], [-1] * 4])
    bounds = document_bounds(ids)
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 2, 3, 4, 5, 8, 9, 12, 16]
    assert document_bounds(torch.zeros(1, 1)).tolist() == [0, 1]


FLASH_ANYWHERE = replace(FLASH, name="distill_ray_anywhere", capability=None)
HEAD_OF_12 = {"hidden_size": 48, "head_dim": 12}
CAPPED = {"sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0}
SINKS = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}
KEPT = [
    ("Gemma2Config", CAPPED, REFERENCE, "'eager'"),
    ("GptOssConfig", SINKS, REFERENCE, "'eager'"),
    ("LlamaConfig", {}, FLASH_ANYWHERE, r"attention is in torch\.float32"),
    ("LlamaConfig", HEAD_OF_12, REFERENCE, r"heads are of sizes \[12\]"),
    ("LlamaConfig", {"attention_dropout": 0.1}, REFERENCE, "dropout"),
    ("StableLmConfig", {}, REFERENCE, "registry"),
]


@pytest.mark.parametrize(("kind", "extra", "kernel", "why"), KEPT)
def test_a_model_that_asks_for_more_keeps_its_masks_and_says_why(
    kind: str, extra: dict[str, object], kernel: Kernel, why: str
):
    _, batch = two_packs()
    ours, plain = student(kind, extra, kernel), student(kind, extra, None)
    assert re.search(why, ours.masked_because or "")
    assert plain.masked_because is None
    assert ours.body.config._attn_implementation == plain.body.config._attn_implementation
    assert torch.equal(ours.hidden_rows(batch), plain.hidden_rows(batch))


def test_a_soft_cap_keeps_the_masks_however_the_model_was_loaded():
    """Only the layers know of it where a folder's own code says neither `eager` nor a configuration we look at."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config("Gemma2Config", **CAPPED), attn_implementation="sdpa")
    assert REFERENCE.install(model) == "Gemma2ForCausalLM: a layer asks for softcap"
    assert model.config._attn_implementation == "sdpa"


def test_a_window_that_the_configuration_does_not_tell_keeps_the_masks():
    model = tiny_model(tiny_config("Qwen2Config", **MIXED))
    model.model.layers[1].self_attn.sliding_window = 5
    assert "sliding windows [None, 5], but the configuration says [None, 3]" in str(REFERENCE.install(model))


def test_the_published_folder_does_not_name_the_kernel(tmp_path: Path):
    model = tiny_model(tiny_config())
    assert REFERENCE.install(model) is None
    assert model.config._attn_implementation == REFERENCE.name
    write_folder(model, model.state_dict(), tiny_teacher_folder(), tmp_path / "out")
    assert "distill_ray" not in (tmp_path / "out" / "config.json").read_text()
