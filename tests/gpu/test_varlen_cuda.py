"""The variable-length kernel on a GPU beside the masks: in bfloat16 it may be little further from float32 than they."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill_ray.config.loss import LossSection
from distill_ray.student.module import DistillModule, loss_spec
from distill_ray.student.varlen import FLASH
from tests.unit.student_fakes import VOCAB, documents, pack, tiny_config, tiny_model

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)), reason="needs a GPU with flash"
)

GROUPED = {"hidden_size": 256, "num_key_value_heads": 2}
SLIDING = {**GROUPED, "sliding_window": 40}
MIXED = {**SLIDING, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}
MODELS = [("LlamaConfig", GROUPED), ("MistralConfig", SLIDING), ("Qwen2Config", MIXED)]
WIDTH = 1024


def packs():
    """Two rows of documents of 2 to 200 tokens, each with padding at its end."""
    rng = np.random.default_rng(0)
    rows = [pack(rng, documents(rng, 5, longest=200), WIDTH, 1.0) for _ in range(2)]
    assert all(row.tokens < WIDTH for row in rows)
    names = ("input_ids", "position_ids", "document_ids")
    joined = {n: torch.cat([getattr(row, n) for row in rows]) for n in names}
    return replace(rows[0], rows=torch.cat([rows[0].rows, rows[1].rows + WIDTH]), **joined).to("cuda")


def run(model, kernel, batch):
    """Hidden states of the supervised rows and all gradients of a fixed weighing of them, each as one vector."""
    module = DistillModule(model, loss_spec(model.config, VOCAB, LossSection()), kernel=kernel).cuda()
    assert module.masked_because is None
    hidden_ND = module.hidden_rows(batch).float()
    weights_ND = torch.randn(hidden_ND.shape, generator=torch.Generator().manual_seed(1)).cuda()
    found = torch.autograd.grad((hidden_ND * weights_ND).sum(), list(module.body.parameters()))
    return hidden_ND.detach(), torch.cat([g.float().flatten() for g in found])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("kind", "extra"), MODELS)
def test_flash_is_as_near_to_float32_as_the_masks(kind, extra, head_dim):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny_model(tiny_config(kind, **extra, head_dim=head_dim))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # so that rounding in bfloat16 does not swamp gradients
                parameter.mul_(parameter.shape[1] ** -0.5 / 0.3)
            parameter.copy_(parameter.bfloat16())  # the same weights in both types
    batch = packs()
    exact = run(copy.deepcopy(model), None, batch)
    masked = run(copy.deepcopy(model).bfloat16(), None, batch)
    flash = run(copy.deepcopy(model).bfloat16(), FLASH, batch)
    for name, want, plain, got in zip(("states", "gradients"), exact, masked, flash, strict=True):
        theirs, ours = (float((x - want).norm() / want.norm()) for x in (plain, got))
        assert ours <= 1.5 * theirs + 1e-3, f"{name}: {ours:.3g}, with masks {theirs:.3g}"
        assert ours < 0.05, name
