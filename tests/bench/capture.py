"""Capture inside vLLM's workers beside vLLM's public path, flat and as dicts, and beside what the hardware allows.

Front end: positions a second of ONE thread, from the engine's finished tensors of k = 64 at V = 151,936 to bytes of the
codec. Ours: words → `RowStore` → bytes → rows → codec. Rivals: `FlatLogprobs` and dicts built by vLLM's own
`LogprobsProcessor`, read into arrays, and encoded by the same codec. All in one process, in turns; the garbage
collector's heap is frozen first, as vLLM's engine does.

Engines, float32 (this CPU has no bfloat16): SmolLM2-135M, and a random Llama of two layers and width 256 with 128,256
ids, whose time is nearly all head ("wide"). Every engine is a process of its own, and those of one model live side by
side: an idle one sleeps (vLLM's workers stop spinning after a second, which every timing waits for), so that each round
times them within seconds of each other, and figures are medians of each round's own ratio. `fraction_of_limit` is
(engine without capture + bare head matmul and one read of each logit) / engine with capture, all three in the same
vLLM worker; the head is the fastest of several ways. Peaks are sums over an engine's processes after one pass over the
sequences, before anything else was asked of it.

How much of its time a teacher waits in a whole capture is `python -m tests.bench idle`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill_ray import codec
from distill_ray.codec.format import HEAD
from distill_ray.schema import TargetRows
from distill_ray.teacher.engine import finite_or_reason
from distill_ray.teacher.flat import rows_from_flat
from distill_ray.teacher.spans import Span
from distill_ray.teacher.store import RowStore
from distill_ray.teacher.wire import rows_from_words
from tests.assets import smollm2_folder, tiny_llama_folder
from tests.bench.engines import EngineProcess
from tests.bench.measure import LEAST_REPEATS, apart, medians
from tests.bench.rivals import public_logprobs, rows_from_dicts

K, VOCAB = 64, 151_936
REQUESTS, POSITIONS = 8, 512
WIDE_VOCAB = 128_256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=LEAST_REPEATS, help=f"timed rounds (default {LEAST_REPEATS})")
    parser.add_argument("--only", choices=("frontend", "smollm2", "wide"), help="one part of the figures")


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Figures named `capture.*`; `fraction_of_limit` is the lesser of the two models'."""
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "frontend": lambda: apart(frontend, arguments.rounds)[0],
        "smollm2": lambda: engines("smollm2", smollm2_folder(), ("worker", "flat"), arguments.rounds),
        "wide": lambda: engines("wide", wide_folder(), ("worker", "flat", "dict"), arguments.rounds),
    }
    figures = {k: v for name, part in parts.items() if arguments.only in (None, name) for k, v in part().items()}
    fractions = [v for k, v in figures.items() if k.endswith("fraction_of_limit")]
    return figures | ({"capture.fraction_of_limit": min(fractions)} if fractions else {})


def wide_folder() -> Path:
    """A model whose head is nearly all its work."""
    return tiny_llama_folder(rows=WIDE_VOCAB, hidden=256)


# Front end.


Columns = tuple[torch.Tensor, ...]
"""Of one request, as vLLM's sampler gives them: ids [N, K + 1], log-probabilities [N, K + 1], actual ranks [N]."""


def finished(requests: int, positions: int) -> tuple[torch.Tensor, list[np.ndarray], list[Columns]]:
    """The same made-up rows as our worker's words [R·N, W], and of each request its prompt [N + 1] and `Columns`."""
    n, g = requests * positions, torch.Generator().manual_seed(0)
    logprobs = (-1.3 * torch.arange(1, K + 1).log()).log_softmax(0) - 0.1 + 0.05 * torch.randn(n, K, generator=g)
    logprobs = logprobs.sort(1, descending=True).values.log_softmax(1) - 0.1
    ids = ((torch.randint(VOCAB, (n, 1), generator=g) + torch.randperm(K, generator=g) * (VOCAB // K)) % VOCAB).int()
    # Of every ten actual tokens six are the likeliest, three among the kept, one beyond.
    rank = torch.where(torch.rand(n, generator=g) < 0.6, 1, torch.randint(1, K + K // 3, (n,), generator=g))
    kept = (rank <= K)[:, None]
    place = (rank.clamp(max=K) - 1)[:, None]
    actual = torch.where(kept, ids.gather(1, place), (ids[:, :1] + 1) % VOCAB)
    actual_logprob = torch.where(kept, logprobs.gather(1, place), logprobs[:, -1:] - 0.5)
    log_tail = (-torch.tensor(-0.1).expm1()).log().expand(n, 1)
    floats = torch.cat([logprobs, log_tail, actual_logprob], 1).view(torch.int32)
    words = torch.cat([ids, floats, rank[:, None].int(), torch.ones(n, 1).view(torch.int32)], 1)
    prompts = [np.concatenate([[0], a[:, 0].numpy()]).astype(np.int32) for a in actual.split(positions)]
    columns = torch.cat([actual, ids], 1), torch.cat([actual_logprob, logprobs], 1), rank.int()
    return words, prompts, list(zip(*(c.split(positions) for c in columns), strict=True))


def packed(rows: TargetRows) -> np.ndarray:
    """Checked as the engine does, and encoded."""
    checked = finite_or_reason(rows)
    if isinstance(checked, str):
        raise AssertionError(checked)
    return codec.encode(checked.ids_NK, checked.logprobs_NK, checked.log_tail_N, VOCAB)


def by_words(words: torch.Tensor, requests: int) -> list[np.ndarray]:
    """Our path."""
    names, positions = [f"r{i}" for i in range(requests)], len(words) // requests
    store = RowStore()
    store.add([Span(name, i * positions, 0, positions, positions) for i, name in enumerate(names)], words)
    got = np.frombuffer(store.pop(names), np.int32).reshape(-1, words.shape[1])
    return [packed(rows_from_words(part, K, ())) for part in np.split(got, requests)]


def by_flat(prompts: list[np.ndarray], tensors: list[Any]) -> list[np.ndarray]:
    """vLLM's flat lists."""
    out = []
    for tokens, each in zip(prompts, tensors, strict=True):
        flat = public_logprobs(each, K, flat=True)
        arrays = (np.asarray(flat.token_ids), np.asarray(flat.logprobs), np.asarray(flat.ranks))
        out.append(packed(rows_from_flat(*arrays, tokens, K, VOCAB)))
    return out


def by_dicts(prompts: list[np.ndarray], tensors: list[Any]) -> list[np.ndarray]:
    """vLLM's dicts."""
    return [
        packed(rows_from_dicts(public_logprobs(each, K, flat=False), tokens, K, VOCAB))
        for tokens, each in zip(prompts, tensors, strict=True)
    ]


def frontend(rounds: int) -> dict[str, float]:
    """Positions a second, and the ratios; in a process of its own."""
    from vllm.v1.outputs import LogprobsTensors

    torch.set_num_threads(1)
    words, prompts, columns = finished(REQUESTS, POSITIONS)
    tensors = [LogprobsTensors(*c) for c in columns]
    ways: dict[str, Callable[[], list[np.ndarray]]] = {
        "worker": lambda: by_words(words, REQUESTS),
        "flat": lambda: by_flat(prompts, tensors),
        "dict": lambda: by_dicts(prompts, tensors),
    }
    require_same(*(way() for way in ways.values()))
    gc.collect()
    gc.freeze()
    seconds = medians(ways, rounds)
    return {f"capture.frontend_{name}_positions_per_s": len(words) / s for name, s in seconds.items()} | {
        f"capture.frontend_speedup_vs_{name}": seconds[name] / seconds["worker"] for name in ("flat", "dict")
    }


def require_same(ours: list[np.ndarray], *rivals: list[np.ndarray]) -> None:
    """Raises AssertionError unless all ways gave the same bytes, but for log tails, which the public forms lack."""
    for rival in rivals:
        for a, b in zip(ours, rival, strict=True):
            tails = codec.decode(a, K, VOCAB)[2] - codec.decode(b, K, VOCAB)[2]
            if (a[:, HEAD:] != b[:, HEAD:]).any() or np.abs(tails).max() > 0.01:
                raise AssertionError("the ways to the codec's bytes differ")


# Whole engines.


def engines(model: str, folder: Path, kinds: tuple[str, ...], rounds: int) -> dict[str, float]:
    """Figures of one model: rates, ratios, the fraction of the limit and peaks."""
    if rounds < LEAST_REPEATS:
        raise ValueError(f"{rounds} rounds; a median here takes at least {LEAST_REPEATS}")
    asked = [(kind, "capture") for kind in kinds] + [("worker", "bare"), ("worker", "head")]
    seconds: dict[tuple[str, str], list[float]] = {each: [] for each in asked}
    with tempfile.TemporaryDirectory() as logs:
        running = {kind: EngineProcess(kind, folder, Path(logs) / f"{model}-{kind}.log") for kind in kinds}
        try:
            for engine in running.values():
                engine.ask("capture")
            peaks = {kind: engine.peak_mib() for kind, engine in running.items()}
            for what in ("bare", "head"):
                running["worker"].ask(what)
            for number in range(rounds):
                for kind, what in asked[:: 1 if number % 2 else -1]:
                    seconds[kind, what].append(running[kind].ask(what))
        finally:
            for engine in running.values():
                engine.close()
    return ratios(model, seconds, running["worker"].tokens) | memory(model, peaks)


def ratios(model: str, seconds: dict[tuple[str, str], list[float]], tokens: int) -> dict[str, float]:
    """Medians over rounds of each round's ratio, and of the rates."""
    rounds = {each: np.array(taken) for each, taken in seconds.items()}
    ours, prefix = rounds["worker", "capture"], f"capture.{model}_"
    found = {f"{prefix}fraction_of_limit": (rounds["worker", "bare"] + rounds["worker", "head"]) / ours}
    for (kind, what), taken in rounds.items():
        found[f"{prefix}{kind}_{what}_tokens_per_s"] = tokens / taken
        if kind != "worker":
            found[f"{prefix}speedup_vs_{kind}"] = taken / ours
    return {name: statistics.median(values.tolist()) for name, values in found.items()}


def memory(model: str, peaks: dict[str, float]) -> dict[str, float]:
    """Peaks, and ours as a share of each rival's."""
    found = {f"capture.{model}_{kind}_peak_mib": peak for kind, peak in peaks.items()}
    shares = {f"capture.{model}_peak_vs_{k}": peaks["worker"] / p for k, p in peaks.items() if k != "worker"}
    return found | shares
