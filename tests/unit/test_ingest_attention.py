"""No document attends to another: a packed model equals the unpacked one, in hidden states and gradients."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from distill_ray.ingest.attention import attention_mask

LENGTHS = [7, 1, 12, 4]


def _packed(width=30):
    """Two rows: [7, 1, 12, padding] and [4, padding]."""
    g = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 50, (n,), generator=g) for n in LENGTHS]
    ids = torch.zeros(2, width, dtype=torch.long)
    owners, positions = torch.full_like(ids, -1), torch.zeros_like(ids)
    places, at = [], 0
    for number, document in enumerate(documents):
        row, start = (1, 0) if number == 3 else (0, at)
        span = slice(start, start + len(document))
        ids[row, span], owners[row, span], positions[row, span] = document, number, torch.arange(len(document))
        places.append((row, span))
        at += len(document)
    return documents, ids, owners, positions, places


def _model(implementation):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=implementation,
    )
    return LlamaModel(config).eval()


def _run(model, ids, positions, mask):
    return model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).last_hidden_state


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_equals_unpacked(implementation):
    documents, ids, owners, positions, places = _packed()
    model = _model(implementation)
    mask = attention_mask(owners, torch.float32 if implementation == "eager" else None)
    packed = _run(model, ids, positions, mask)
    assert torch.isfinite(packed).all()
    weights = torch.randn(30, 32, generator=torch.Generator().manual_seed(1))
    sum((packed[row, span] * weights[: span.stop - span.start]).sum() for row, span in places).backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for document, (row, span) in zip(documents, places, strict=True):
        alone = _run(model, document[None], torch.arange(len(document))[None], None)[0]
        torch.testing.assert_close(packed[row, span], alone, rtol=1e-5, atol=1e-5)
        (alone * weights[: len(document)]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_without_the_mask_documents_would_mix():
    """The comparison above has teeth."""
    _, ids, owners, positions, places = _packed()
    model = _model("sdpa")
    mask = attention_mask(torch.zeros_like(owners))
    row, span = places[2]
    mixed, kept = (_run(model, ids, positions, m)[row, span] for m in (mask, attention_mask(owners)))
    assert (mixed - kept).abs().max() > 1e-2


def test_who_sees_whom():
    mask = attention_mask(torch.tensor([[0, 0, 1, 1, -1, -1]]))
    assert mask.shape == (1, 1, 6, 6)
    want = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert mask[0, 0].int().tolist() == [*want, [0, 0, 0, 0, 0, 1]]
    added = attention_mask(torch.tensor([[0, 1]]), torch.bfloat16)
    assert added.dtype == torch.bfloat16
    assert added[0, 0].tolist() == [[0, torch.finfo(torch.bfloat16).min], [torch.finfo(torch.bfloat16).min, 0]]
