"""The reduction kernel on a GPU against the same reduction by torch, at real vocabularies."""

from __future__ import annotations

import pytest
import torch

from distill_ray.teacher.reduction import ShardRows, reduce_by_torch, reduce_tile

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = ("ids_RK", "values_RK", "greater_R", "rest_max_R", "rest_sum_RS", "rest_entropy_R")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("vocabulary", "top_k"), [(128_256, 64), (151_936, 64), (49_152, 512), (16_032, 64)])
def test_kernel_is_the_reduction_by_torch(vocabulary: int, top_k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    tile = torch.randn(300, vocabulary, device="cuda", generator=generator) * 4
    tile[1, 7] += 60  # the kept mass rounds to 1
    tile[2] = 1.0  # nothing but equal logits
    tile[3, 100:-100] = -torch.inf
    tile = tile.to(dtype)
    actual = tile[:, 5].float()
    got: ShardRows = reduce_tile(tile.clone(), 1000, actual, top_k, (0.5, 2.0))
    want: ShardRows = reduce_by_torch(tile.clone(), 1000, actual, top_k, (0.5, 2.0))
    for name in NAMES:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-5, msg=name)
