"""Random numbers of the draws: a pure function of a row's sequence, its position and the draw, and of nothing else.

So a row computed again gives the same draws, whatever the batch, the chunk, the preemption, the engine or the process.
A worker learns which sequence a row is of from its request's name, where the front end puts the sequence's hash.

Numbers are SplitMix64's: `mix(key + (i + 1)·γ)` is the i-th output of that generator started at `key` (G. L. Steele,
D. Lea, C. H. Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014; the finaliser is D. Stafford's
variant 13). A row's key is itself such a number: output t of the generator that the sequence's hash starts.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np
import torch

from distill_ray.errors import IntegrityError

_GAMMA = 0x9E3779B97F4A7C15
_STREAM = 0x6469_7374_696C_6C31
"""Tells these numbers from any others that a hash of the same tokens may seed; another value means other draws."""
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_NAMED = re.compile(r"s\d+-([0-9a-f]{16})(?:-.*)?")


def sequence_hash(tokens: np.ndarray) -> int:
    """64-bit hash of [n] token ids, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=8).digest(), "big")


def named_for_draws(request: str, tokens: np.ndarray) -> str:
    """A request's name with its tokens' hash, `s12-00c0ffee00c0ffee`; vLLM appends a part of its own."""
    return f"{request}-{sequence_hash(tokens):016x}"


def hash_in_name(request: str) -> int:
    """The sequence's hash in a request's name.

    Raises:
        IntegrityError: the name is none of `named_for_draws`'s.
    """
    if not (match := _NAMED.fullmatch(request)):
        raise IntegrityError(
            f"vLLM calls a request {request!r}, which does not begin with the name it was given, s<number>-<16 digits "
            "of its tokens' hash>, so its draws cannot be seeded; use the vLLM version of the project's lock file"
        )
    return int(match[1], 16)


def row_keys(sequence: int, start: int, count: int) -> np.ndarray:
    """[count] int64 keys of rows start … start + count − 1 of a sequence.

    Args:
        sequence: its `sequence_hash`.
        start: position of the first row.
        count: of rows.
    """
    first = torch.tensor([_signed(sequence ^ _STREAM)])
    return _outputs(first, torch.arange(start, start + count))[0].numpy()


def uniforms(keys_R: torch.Tensor, count: int, lane: int, lanes: int = 2) -> torch.Tensor:
    """[R, count] float64 in [0, 1), multiples of 2^−53.

    Args:
        keys_R: int64, of `row_keys`.
        count: draws a row.
        lane: which of the `lanes` independent numbers of each draw.
        lanes: numbers that a draw may need.
    """
    index = torch.arange(lane, lanes * count, lanes, device=keys_R.device)
    return _shifted(_outputs(keys_R, index), 11).double() * 2.0**-53


def _outputs(keys_R: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
    """[R, N] outputs `index_N` of the generators that start at `keys_R`; int64 stands for uint64 and wraps like it."""
    x = keys_R[:, None] + (index_N + 1) * _signed(_GAMMA)
    for shift, factor in _MIX:
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, _LAST_SHIFT)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift to the right, filled with zeros: torch's own fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
