"""Codec v1: `[top-1 logprob f16][log tail f16][q8 × k][low 16 id bits × k][bit planes of id bits ≥ 16]`, little-endian.

q = round(255·√(Δ/24)) with Δ the gap in nats to the top-1, clipped at 24: fine near the top, where the mass is, and
at most 0.0945 nats off at the far end. Renormalising moves a row as a whole by its mass-weighted gap error: below 0.01
nats on a language model's rows, 0.035 at the very worst (511 ties at the least fortunate gap).
A plane holds one id bit of the k ids in ⌈k/8⌉ bytes, the first id in the highest bit.

What both implementations share: the format's numbers, the rows' first two columns, and the renormalisation. So the
compiled one holds no transcendental function and its bits are the reference's on every processor.

Legend of shapes: N rows, K kept tokens (k), V real vocabulary, B bytes of a row.
"""

from __future__ import annotations

import numpy as np

from distill_ray.errors import IntegrityError

CODEC_VERSION = 1
MAX_GAP = 24.0
"""Nats below the top-1 at which kept log-probabilities are clipped; −inf (a one-hot teacher) is stored there."""
LOG_FLOOR = -80.0
"""Least log mass stored: log(1 − P) of a row whose P rounds to 1. exp(−80) = 1.8e-35 is still a normal float32."""
MAX_K = 512
MAX_VOCAB = 1 << 20

HEAD = 4
"""Bytes before the gaps."""
ABOVE_ZERO = 1e-3
"""A log-probability this far above 0 is rounding; more is an error."""
BLOCK = 1 << 17
"""Elements worked on at once, so that temporaries stay in the cache."""
GAP_SCALE = np.float32(255.0**2 / MAX_GAP)
GAPS = (MAX_GAP * (np.arange(256) / 255.0) ** 2).astype(np.float32)
"""q → gap in nats."""
MASS_ONE = 1 << 43
MASSES = np.rint(np.exp(-GAPS.astype(np.float64)) * MASS_ONE).astype(np.int64)
"""q → exp(−gap)·2^43. Whole numbers, so that a row's sum is exact in any order; 512 of them stay below 2^53."""


def planes_of(vocab_size: int) -> int:
    """Bit planes of a row: the id bits beyond 16."""
    return max(0, (vocab_size - 1).bit_length() - 16)


def row_bytes(k: int, vocab_size: int) -> int:
    """Stride of one packed row in bytes: 204 at k = 64 and V = 128,256; 212 at V = 151,936.

    Raises:
        ValueError: k outside 1 … min(512, V), or V outside 1 … 2^20.
    """
    if not 1 <= vocab_size <= MAX_VOCAB:
        raise ValueError(f"vocab_size={vocab_size} is outside 1 … {MAX_VOCAB}; codec v1 stores no larger ids")
    if not 1 <= k <= min(MAX_K, vocab_size):
        raise ValueError(f"k={k} is outside 1 … {min(MAX_K, vocab_size)}; lower top_k")
    return HEAD + 3 * k + planes_of(vocab_size) * ((k + 7) // 8)


def check_input(ids_NK: np.ndarray, logprobs_NK: np.ndarray, log_tail_N: np.ndarray) -> None:
    """Raises ValueError unless the three arrays speak of the same rows and the ids are integers."""
    if ids_NK.dtype.kind not in "iu":
        raise ValueError(f"ids are {ids_NK.dtype}, not integers")
    if ids_NK.ndim != 2 or logprobs_NK.shape != ids_NK.shape or log_tail_N.shape != ids_NK.shape[:1]:
        raise ValueError(
            f"shapes do not fit: ids {ids_NK.shape}, logprobs {logprobs_NK.shape}, log tail {log_tail_N.shape}"
        )


def check_packed_shape(packed_NB: np.ndarray, k: int, vocab_size: int) -> None:
    """Raises IntegrityError unless the stride is that of (k, V)."""
    stride = row_bytes(k, vocab_size)
    if packed_NB.ndim != 2 or packed_NB.shape[1] != stride or packed_NB.dtype != np.uint8:
        raise IntegrityError(
            f"packed rows are {packed_NB.dtype} {packed_NB.shape}; k={k} and vocab_size={vocab_size} need "
            f"uint8 rows of {stride} bytes: they were captured under another k or vocabulary"
        )


def flat_rows(array_NK: np.ndarray) -> tuple[np.ndarray, int]:
    """The memory that holds the rows, as one row, and the items from one row to the next; a copy only if it must be."""
    n, k = array_NK.shape
    items, rest = divmod(array_NK.strides[0], array_NK.itemsize)
    aligned = array_NK.flags.aligned and array_NK.dtype.isnative
    if not aligned or rest or items < k or (k > 1 and array_NK.strides[1] != array_NK.itemsize):
        return np.ascontiguousarray(array_NK, array_NK.dtype.newbyteorder("=")).reshape(-1), k
    whole = np.lib.stride_tricks.as_strided(array_NK, ((n - 1) * items + k,), (array_NK.itemsize,), writeable=False)
    return whole, items


def write_head(top_N: np.ndarray, log_tail_N: np.ndarray, out_NB: np.ndarray) -> None:
    """Fill the first two columns. float16 rounds to nearest even; what is above 0 (or −0) becomes 0."""
    head_N2 = np.stack([top_N, np.maximum(log_tail_N, np.float32(LOG_FLOOR))], axis=1)
    out_NB[:, :HEAD] = np.where(head_N2 < 0, head_N2, np.float32(0)).astype("<f2").view(np.uint8)


def read_head(packed_NB: np.ndarray, mass_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Renormalise kept + tail to 1.

    Args:
        packed_NB: packed rows.
        mass_N: int64 [N], the sum of `MASSES` over the row's q.

    Returns:
        float32 [N] log-probability of the top-1 and log tail mass.
    """
    head_N2 = np.ascontiguousarray(packed_NB[:, :HEAD]).view("<f2").astype(np.float32)
    kept_N = np.exp(head_N2[:, 0]) * (mass_N * (1.0 / MASS_ONE)).astype(np.float32)
    log_total_N = np.log(kept_N + np.exp(head_N2[:, 1]))
    # Rounding of exp and log can put a mass of 1 a hair above it.
    return (
        np.minimum(head_N2[:, 0] - log_total_N, np.float32(0)),
        np.minimum(head_N2[:, 1] - log_total_N, np.float32(0)),
    )
