"""The columns of a target object: one Parquet row per sequence, plain encoding, no compression, no statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from distill_ray.codec import row_bytes
from distill_ray.schema import DRAW_BYTES, ROW_DRAW_BYTES
from distill_ray.targets.identity import CaptureIdentity

SCHEMA_VERSION = 2
METADATA_KEY = b"distill_ray"
GROUP_BYTES = 1 << 20
"""A row group is closed once it holds this many packed bytes."""


@dataclass(frozen=True)
class StoredDraws:
    """Tokens drawn at a sequence's rows, M distinct ones in all; see `schema.Draws`."""

    words_M: np.ndarray
    """uint32 id | count << 20."""
    logprobs_M: np.ndarray
    """float16 at T = 1."""
    distinct_N: np.ndarray
    """uint16 of them at each row."""

    @property
    def nbytes(self) -> int:
        return self.words_M.nbytes + self.logprobs_M.nbytes + self.distinct_N.nbytes


@dataclass(frozen=True)
class StoredSequence:
    """One sequence as stored, still packed. n tokens, N = n − 1 rows, B bytes a packed row."""

    tokens: np.ndarray
    """[n] int32."""
    loss_mask: np.ndarray
    """[n] bool."""
    doc_key: int
    """64-bit hash of the source document."""
    packed_NB: np.ndarray
    """uint8, codec rows."""
    actual_logprob_N: np.ndarray
    """float16 log-probability of token t + 1."""
    actual_rank_N: np.ndarray
    """int32, 1 the most likely."""
    entropy_N: np.ndarray | None
    """float16 nats; None where the engine could not give it."""
    log_tail_at: Mapping[float, np.ndarray]
    """Temperature T ≠ 1 → float16 [N] log tail mass at T."""
    draws: StoredDraws | None = None
    """None where the capture keeps none."""
    finish: str | None = None
    """Why a completion of the teacher's ended; None where the corpus gave the tokens."""

    @property
    def nbytes(self) -> int:
        """Bytes of its largest columns."""
        return self.packed_NB.nbytes + (self.draws.nbytes if self.draws else 0)


_DRAW_COLUMNS = {"draws": pa.uint32(), "draw_logprob": pa.float16(), "draw_counts": pa.uint16()}


def _draw_arrays(draws: StoredDraws) -> dict[str, np.ndarray]:
    """The draws by the names of their columns."""
    return dict(zip(_DRAW_COLUMNS, (draws.words_M, draws.logprobs_M, draws.distinct_N), strict=True))


def tail_column(temperature: float) -> str:
    """Name of the column that holds the log tail mass at T."""
    return f"log_tail_at_{temperature!r}"


def arrow_schema(identity: CaptureIdentity, with_entropy: bool) -> pa.Schema:
    """Columns of the objects of one capture."""

    def items(kind: pa.DataType) -> pa.DataType:
        return pa.list_(pa.field("item", kind, nullable=False))

    columns: list[tuple[str, pa.DataType]] = [
        ("doc_key", pa.uint64()),
        ("checksum", pa.binary(8)),
        ("tokens", items(pa.int32())),
        ("loss_mask", items(pa.bool_())),
        ("packed", pa.large_binary()),
        ("actual_logprob", items(pa.float16())),
        ("actual_rank", items(pa.int32())),
    ]
    if with_entropy:
        columns.append(("entropy", items(pa.float16())))
    columns += [(tail_column(t), items(pa.float16())) for t in identity.extra_temperatures]
    if identity.generate is not None:
        columns.append(("finish", pa.string()))
    if identity.draws:
        columns += [(name, items(kind)) for name, kind in _DRAW_COLUMNS.items()]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def stored_row_bytes(identity: CaptureIdentity, with_entropy: bool) -> float:
    """Bytes of one target row in an object, its token and mask included; every drawn token counts as a distinct one.

    What a sequence, a row group and the footer take besides is below a hundredth of it in units of ordinary size.
    """
    drawn = DRAW_BYTES * identity.draws + ROW_DRAW_BYTES if identity.draws else 0
    side = [
        field.type.value_type.bit_width
        for field in arrow_schema(identity, with_entropy)
        if pa.types.is_list(field.type) and field.name not in _DRAW_COLUMNS
    ]
    return row_bytes(identity.top_k, identity.vocab_size) + drawn + sum(side) / 8


def checksum(fingerprint: str, unit: str, index: int, s: StoredSequence) -> bytes:
    """8 bytes of SHA-256 over capture, unit, place and every array of a sequence; processors have instructions for it.

    So a sequence of another teacher, another unit or another place in the same unit fails, not only an altered one.
    """
    h = hashlib.sha256(f"{fingerprint}/{unit}/{index}\n".encode())
    arrays: dict[str, np.ndarray | None] = {
        f"doc_key {s.doc_key} tokens": s.tokens,
        "loss_mask": s.loss_mask,
        "packed": s.packed_NB,
        "actual_logprob": s.actual_logprob_N,
        "actual_rank": s.actual_rank_N,
        "entropy": s.entropy_N,
        **{tail_column(t): s.log_tail_at[t] for t in sorted(s.log_tail_at)},
        **(_draw_arrays(s.draws) if s.draws else {}),
    }
    for name, array in arrays.items():
        if array is not None:
            h.update(f"{name} {array.dtype.str} {array.shape}".encode())
            h.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    if s.finish is not None:
        h.update(f"finish {s.finish}".encode())
    return h.digest()[:8]


def to_table(sequences: list[StoredSequence], checksums: list[bytes], schema: pa.Schema) -> pa.Table:
    """One row group."""

    def lists(name: str, arrays: list[np.ndarray]) -> pa.Array:
        kind = schema.field(name).type
        offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])])
        if pa.types.is_large_binary(kind):
            values = np.concatenate([a.reshape(-1) for a in arrays])
            offsets = np.concatenate([[0], np.cumsum([a.size for a in arrays])]).astype("<i8")
            return pa.LargeBinaryArray.from_buffers(
                kind, len(arrays), [None, pa.py_buffer(offsets), pa.py_buffer(values)]
            )
        values = pa.array(np.concatenate(arrays), kind.value_type)
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, type=kind)

    side = {tail_column(t): [s.log_tail_at[t] for s in sequences] for t in sequences[0].log_tail_at}
    if sequences[0].entropy_N is not None:
        side["entropy"] = [s.entropy_N for s in sequences if s.entropy_N is not None]
    drawn = [_draw_arrays(s.draws) for s in sequences if s.draws is not None]
    side |= {name: [arrays[name] for arrays in drawn] for name in (_DRAW_COLUMNS if drawn else ())}
    columns = {
        "doc_key": pa.array([s.doc_key for s in sequences], pa.uint64()),
        "checksum": pa.array(checksums, pa.binary(8)),
        "tokens": lists("tokens", [s.tokens for s in sequences]),
        "loss_mask": lists("loss_mask", [s.loss_mask for s in sequences]),
        "packed": lists("packed", [s.packed_NB for s in sequences]),
        "actual_logprob": lists("actual_logprob", [s.actual_logprob_N for s in sequences]),
        "actual_rank": lists("actual_rank", [s.actual_rank_N for s in sequences]),
        "finish": pa.array([s.finish for s in sequences], pa.string()),
        **{name: lists(name, arrays) for name, arrays in side.items()},
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


def from_table(table: pa.Table, stride: int, temperatures: tuple[float, ...]) -> list[StoredSequence]:
    """Sequences of one row group, as views of its columns; the inverse of `to_table` but for the checksums."""

    def split(name: str) -> list[np.ndarray]:
        column = table.column(name).combine_chunks()
        if pa.types.is_large_binary(column.type):
            offsets = np.frombuffer(column.buffers()[1], "<i8", len(column) + 1, column.offset * 8)
            data = column.buffers()[2]
            values = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
        else:
            offsets = column.offsets.to_numpy()
            values = column.values.to_numpy(zero_copy_only=False)
        return [values[a:b] for a, b in pairwise(offsets.tolist())]

    n = table.num_rows
    tails = {t: split(tail_column(t)) for t in temperatures}
    tokens, mask, packed = split("tokens"), split("loss_mask"), split("packed")
    logprob, rank = split("actual_logprob"), split("actual_rank")
    entropy = split("entropy") if "entropy" in table.column_names else [None] * n
    draws: list[StoredDraws | None] = [None] * n
    if "draws" in table.column_names:
        draws = [StoredDraws(*arrays) for arrays in zip(*map(split, _DRAW_COLUMNS), strict=True)]
    finish = table.column("finish").to_pylist() if "finish" in table.column_names else [None] * n
    doc_keys = table.column("doc_key").to_pylist()
    return [
        StoredSequence(
            tokens=tokens[i],
            loss_mask=mask[i],
            doc_key=doc_keys[i],
            packed_NB=packed[i].reshape(-1, stride),
            actual_logprob_N=logprob[i],
            actual_rank_N=rank[i],
            entropy_N=entropy[i],
            log_tail_at={t: tails[t][i] for t in temperatures},
            draws=draws[i],
            finish=finish[i],
        )
        for i in range(n)
    ]
