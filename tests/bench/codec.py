"""Size, error and speed of codec v1 on a real teacher's rows; speeds are of one thread, checks included."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distill_ray import codec, targets
from distill_ray.codec import reference
from distill_ray.schema import Sequence, SourceSlice, TargetRows, Unit
from distill_ray.targets import CaptureIdentity
from tests.assets import corpus_folder, smollm2_folder
from tests.bench.measure import medians

K = 64
VOCAB = 151_936
WINDOW = 512
SPEED_ROWS = 1 << 15
TEMPERATURE = 2.0
UNIT_WINDOWS = 64
"""Windows in the unit that is weighed: 130 KiB of text, a thirtieth of the default unit; a larger one weighs less."""


@dataclass(frozen=True)
class TeacherText:
    """Token windows of real text and the teacher's rows of each."""

    tokens: list[np.ndarray]
    rows: list[TargetRows]
    vocab: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--windows", type=int, default=4, help=f"teacher windows of {WINDOW} tokens (default 4)")
    parser.add_argument("--repeats", type=int, default=11, help="timed rounds (default 11)")


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Figures named `codec.*`."""
    taught = teach(arguments.windows)
    widened = [widen(r, i) for i, r in enumerate(taught.rows)]
    return {
        "codec.bytes_per_row": bytes_per_row(taught, widened),
        **errors(taught),
        **speeds(widened, arguments.repeats),
    }


def teach(windows: int) -> TeacherText:
    """SmolLM2-135M's own rows over the corpus, from dense float32 logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distill_ray.teacher.transformers_engine import rows_from_logits

    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    vocab = int(model.config.vocab_size)
    tokens = [np.array(t, np.int32) for t in _windows(tokenizer, windows)]
    rows = []
    with torch.inference_mode():
        for window in tokens:
            ids = torch.tensor(window, dtype=torch.long)
            logits = model(input_ids=ids[None]).logits[0, :-1, :vocab].float()
            rows.append(rows_from_logits(logits, ids[1:], K, (TEMPERATURE,)))
    return TeacherText(tokens, rows, vocab)


def _windows(tokenizer, count: int) -> Iterator[list[int]]:
    """The first WINDOW tokens of `count` documents that are long enough."""
    found = 0
    for part in sorted(corpus_folder().glob("part-*.jsonl")):
        for line in part.read_text().splitlines():
            tokens = tokenizer(json.loads(line)["text"])["input_ids"][:WINDOW]
            if len(tokens) == WINDOW and found < count:
                found += 1
                yield tokens
    if found < count:
        raise SystemExit(f"the corpus has {found} documents of {WINDOW} tokens, not {count}; ask for fewer --windows")


def widen(rows: TargetRows, seed: int) -> TargetRows:
    """The same rows with ids spread over VOCAB: real log-probabilities at the vocabulary the figures are stated for."""
    spread = np.random.default_rng(seed).permutation(VOCAB).astype(np.int32)
    return TargetRows(
        spread[rows.ids_NK],
        rows.logprobs_NK,
        rows.log_tail_N,
        rows.actual_logprob_N,
        rows.actual_rank_N,
        rows.entropy_N,
        rows.log_tail_at,
    )


def bytes_per_row(taught: TeacherText, widened: list[TargetRows]) -> float:
    """Bytes of a target object per row, but for token ids (4 bytes each) and mask (1 bit each).

    Footer, digests, page headers and keys are counted. The taught windows are repeated to fill the unit.
    """
    teacher = {"weights": "smollm2-135m-instruct", "dtype": "float32", "engine": "transformers"}
    identity = CaptureIdentity(teacher, "smollm2", VOCAB, K, (1.0, TEMPERATURE), codec.CODEC_VERSION)
    digest = hashlib.sha256(b"bench").hexdigest()
    unit = Unit(digest[:32], SourceSlice("corpus/part-0.jsonl", digest, "lines", 0, 1 << 20), 1 << 20)
    sequences = []
    for i, tokens in enumerate(taught.tokens):
        spread = np.random.default_rng(i).permutation(VOCAB).astype(np.int32)
        mask = np.arange(len(tokens)) > 0
        sequences.append(Sequence(spread[tokens], mask, i))
    pick = [i % len(sequences) for i in range(UNIT_WINDOWS)]
    data, summary = targets.encode_unit(
        identity, unit, [sequences[i] for i in pick], [widened[i] for i in pick], [], 1.0
    )
    stored_tokens = int(summary.lengths.sum())
    return (len(data) - 4 * stored_tokens - stored_tokens / 8) / summary.rows


def errors(taught: TeacherText) -> dict[str, float]:
    """KL(teacher ‖ decoded) in nats over the kept tokens and the tail as one more outcome, in float64."""
    kl = []
    for rows in taught.rows:
        packed = codec.encode(rows.ids_NK, rows.logprobs_NK, rows.log_tail_N, taught.vocab)
        ids, logprobs, tail = codec.decode(packed, K, taught.vocab)
        if (ids != rows.ids_NK).any():
            raise AssertionError("decoded ids differ from the teacher's")
        log_p = np.concatenate([rows.logprobs_NK, rows.log_tail_N[:, None]], axis=1).astype(np.float64)
        log_q = np.concatenate([logprobs, tail[:, None]], axis=1).astype(np.float64)
        kl.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
    kl_N = np.concatenate(kl)
    return {"codec.kl": float(kl_N.mean()), "codec.kl_worst_row": float(kl_N.max()), "codec.kl_rows": float(len(kl_N))}


def speeds(widened: list[TargetRows], repeats: int) -> dict[str, float]:
    """Rows per second of one thread, the compiled codec and the numpy reference in turns."""

    def repeated(arrays: list[np.ndarray]) -> np.ndarray:
        rows = np.concatenate(arrays)
        return np.resize(rows, (SPEED_ROWS, *rows.shape[1:]))

    ids = repeated([r.ids_NK for r in widened])
    logprobs = repeated([r.logprobs_NK for r in widened])
    tail = repeated([r.log_tail_N for r in widened])
    packed = reference.encode(ids, logprobs, tail, VOCAB)
    if (codec.encode(ids, logprobs, tail, VOCAB) != packed).any():
        raise AssertionError("the compiled codec's bytes differ from the reference's")
    seconds = medians(
        {
            "encode": lambda: codec.encode(ids, logprobs, tail, VOCAB),
            "encode_numpy": lambda: reference.encode(ids, logprobs, tail, VOCAB),
            "decode": lambda: codec.decode(packed, K, VOCAB),
            "decode_numpy": lambda: reference.decode(packed, K, VOCAB),
        },
        repeats,
    )
    figures = {f"codec.{name}_rows_per_s": SPEED_ROWS / taken for name, taken in seconds.items()}
    for name in ("encode", "decode"):
        figures[f"codec.{name}_speedup_vs_numpy"] = seconds[f"{name}_numpy"] / seconds[name]
    return figures
