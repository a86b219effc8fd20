"""What must stay linear, by seconds: a document of a megabyte on one line, a million sequences packed, and planned.

`scale.line_8x`: the seconds of a line of 1 MB over those of 125 kB, 8 where the work is linear; `scale.pack_10x` and
`scale.plan_10x`: those of 1,000,000 sequences of log-normal length over those of 100,000, 10 where it is. One process,
no Ray; medians, small and large in turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from distill_ray.config.sections import CorpusSection
from distill_ray.corpus import load_tokenizer, plan_units, read_unit_sequences
from distill_ray.ingest import build_plan, pack_lengths
from distill_ray.schema import UnitSummary
from distill_ray.targets import CaptureIdentity, ManifestUnit, RunManifest
from tests.assets import tiny_tokenizer_folder
from tests.bench.measure import medians

LINE_BYTES, SEQUENCES = 1_000_000, 1_000_000
PACK_TOKENS, OF_UNIT = 4096, 10_000
IDENTITY = CaptureIdentity({"weights": "w"}, "tok", 100, 4, (1.0,), 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Figures named `scale.*`."""
    many, few = (lengths(n) for n in (SEQUENCES, SEQUENCES // 10))
    with tempfile.TemporaryDirectory() as folder:
        seconds = medians(
            {
                "line": partial(read_line, Path(folder), LINE_BYTES),
                "line few": partial(read_line, Path(folder), LINE_BYTES // 8),
                "pack": partial(pack_lengths, many, PACK_TOKENS),
                "pack few": partial(pack_lengths, few, PACK_TOKENS),
                "plan": partial(plan, manifest(many)),
                "plan few": partial(plan, manifest(few)),
            }
        )
    figures = {f"scale.{name}_s": seconds[name] for name in ("line", "pack", "plan")}
    times = {"line": "8x", "pack": "10x", "plan": "10x"}
    return figures | {f"scale.{name}_{n}": seconds[name] / seconds[f"{name} few"] for name, n in times.items()}


def lengths(count: int) -> np.ndarray:
    """Tokens of so many sequences."""
    drawn = np.random.default_rng(2).lognormal(6, 1, count)
    return np.clip(drawn, 2, PACK_TOKENS).astype(np.int64)


def read_line(folder: Path, size: int) -> None:
    """One document of `size` characters, from its file to windows."""
    (folder / "a.jsonl").write_text(json.dumps({"text": "lorem ipsum " * (size // 12)}) + "\n")
    section = CorpusSection(sources=(f"{folder}/a.jsonl",), window_tokens=64, window_overlap=4)
    tokenizer = load_tokenizer(tiny_tokenizer_folder())
    rows = 0
    for unit in plan_units(section, "tok", None):
        sequences, dead = read_unit_sequences(unit, section, tokenizer)
        assert not dead
        rows += sum(int(s.loss_mask.sum()) for s in sequences)
    assert rows > size // 4


def manifest(of: np.ndarray) -> RunManifest:
    """A capture of sequences of these lengths, all supervised."""
    units = []
    for i, part in enumerate(np.split(of.astype(np.int32), len(of) // OF_UNIT)):
        keys = np.random.default_rng(i).integers(0, 2**64, len(part), np.uint64)
        summary = UnitSummary(f"u{i:04}", part, part - 1, keys, len(part), f"sha-{i}", 0.0, 0, 0.0)
        units.append(ManifestUnit(summary, 1, "source"))
    return RunManifest(IDENTITY, tuple(units))


def plan(of: RunManifest) -> None:
    """Every batch of one epoch."""
    made = build_plan(of, holdout=0.01, split="train", pack_tokens=PACK_TOKENS, packs_per_batch=256, seed=3, epochs=1)
    assert made.steps
