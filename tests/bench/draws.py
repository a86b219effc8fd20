"""Time of drawing tokens beside the head's matrix product and the reduction that every capture makes, on a CPU.

One float32 tile after another, as a worker has them; figures are milliseconds for all rows.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from distill_ray.teacher.draws import DrawSpec
from distill_ray.teacher.head import Columns, ShardHead
from distill_ray.teacher.seeds import row_keys
from distill_ray.teacher.tiles import TileReducer
from tests.bench.measure import medians

ROWS, HIDDEN, VOCAB, K, DRAWS = 2048, 576, 49_152, 64, 50
"""Width and vocabulary of SmolLM2-135M: with a wider model the product takes more, and drawing as much."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows (default {ROWS:,})")


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Figures named `draws.*`."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(arguments.rows, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator) * 3 * HIDDEN**-0.5
    actual = torch.randint(0, VOCAB, (arguments.rows,), generator=generator)
    rows, keys = np.arange(arguments.rows), row_keys(1, 0, arguments.rows)
    head = cast(ShardHead, _Head(weight))

    def reduce(spec: DrawSpec | None) -> Any:
        return TileReducer(head, SimpleNamespace(), K, (), spec).reduce(hidden, rows, actual, keys)

    def product() -> None:
        for part in hidden.split(85):  # as many rows as a tile has
            part @ weight.T

    seconds = medians(
        {
            "product": product,
            "capture": lambda: reduce(None),
            "capture_all": lambda: reduce(DrawSpec(DRAWS, False, 1.0)),
            "capture_tail": lambda: reduce(DrawSpec(DRAWS, True, 1.0)),
        },
        arguments.repeats,
    )
    figures = {f"draws.{name}_ms": 1e3 * s for name, s in seconds.items()}
    for kind in ("all", "tail"):
        figures[f"draws.{kind}_of_product"] = (seconds[f"capture_{kind}"] - seconds["capture"]) / seconds["product"]
    return figures


class _Head:
    """A whole head, as `ShardHead` shows it."""

    def __init__(self, weight_VD: torch.Tensor) -> None:
        self._weight_VD = weight_VD
        self.width, self.tp_size = len(weight_VD), 1
        self.dtype, self.device = weight_VD.dtype, weight_VD.device
        self.columns = [Columns(0, len(weight_VD), 0)]

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return hidden_RD @ self._weight_VD.T
