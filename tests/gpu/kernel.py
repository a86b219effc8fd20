"""Time of the reduction kernel over the bare head matmul, beside torch's own top-k and log-sum-exp.

python -m tests.gpu.kernel [FILE.json]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from distill_ray.teacher.kernel_triton import reduce_rows

ROWS, WIDTH, TOP_K, REPEATS = 8192, 8192, 64, 9
VOCABULARIES = (128_256, 151_936)


def milliseconds(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median time of each on the device, interleaved, after two rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(REPEATS + 2):
        for name, call in work.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t[2:]) for name, t in times.items()}


def measure(vocabulary: int) -> dict[str, float]:
    """Times in milliseconds and `ratio`, (matmul + kernel) / matmul, for one tile of bfloat16 logits."""
    hidden = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16)
    head = torch.randn(vocabulary, WIDTH, device="cuda", dtype=torch.bfloat16) * WIDTH**-0.5
    logits = hidden @ head.T
    actual = logits[:, 0].float()
    found = milliseconds(
        {
            "matmul_ms": lambda: hidden @ head.T,
            "kernel_ms": lambda: reduce_rows(logits, actual, TOP_K, ()),
            "kernel_one_temperature_ms": lambda: reduce_rows(logits, actual, TOP_K, (2.0,)),
            "torch_ms": lambda: (logits.topk(TOP_K, dim=-1), logits.logsumexp(-1)),
        }
    )
    return found | {"ratio": (found["matmul_ms"] + found["kernel_ms"]) / found["matmul_ms"]}


def main(file: str | None = None) -> None:
    figures: dict[str, float | str] = {"device": torch.cuda.get_device_name()}
    for vocabulary in VOCABULARIES:
        figures |= {f"gpu_kernel.{vocabulary}.{name}": value for name, value in measure(vocabulary).items()}
    text = json.dumps(figures, indent=1)
    print(text)
    if file:
        Path(file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
