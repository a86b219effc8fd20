"""One captured unit → the bytes of its target object. Deterministic: the same rows give the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from distill_ray.codec import CODEC_VERSION, LOG_FLOOR, encode
from distill_ray.errors import IntegrityError
from distill_ray.schema import DeadLetter, Draws, Sequence, TargetRows, Unit, UnitSummary
from distill_ray.targets.container import MAGIC, digest, footer_start, seal
from distill_ray.targets.identity import CaptureIdentity
from distill_ray.targets.layout import (
    GROUP_BYTES,
    METADATA_KEY,
    SCHEMA_VERSION,
    StoredDraws,
    StoredSequence,
    arrow_schema,
    checksum,
    to_table,
)
from distill_ray.targets.validate import check_rows, check_sequence


def encode_unit(
    identity: CaptureIdentity,
    unit: Unit,
    sequences: list[Sequence],
    rows: list[TargetRows],
    dead: list[DeadLetter],
    teacher_seconds: float,
    engine: str = "",
) -> tuple[bytes, UnitSummary]:
    """Check, pack and lay out one unit.

    Args:
        identity: the capture the rows belong to.
        unit: which slice of the corpus they are of.
        sequences: token ids and masks, in the order in which they will be read back.
        rows: the teacher's rows of each, N = n − 1; log tails at exactly the identity's extra temperatures.
        dead: documents and sequences of the unit that failed.
        teacher_seconds: goes to the summary only, so that the object does not depend on speed.
        engine: what computed the rows, and its version; kept for those who look, no part of what the rows are.

    Returns:
        The object's bytes and what the index keeps of it.

    Raises:
        IntegrityError: a row that is not a distribution, or not of its token; names unit, sequence, row and numbers.
        ValueError: another codec version, or lists that do not fit each other.
    """
    if identity.codec != CODEC_VERSION:
        raise ValueError(f"this program writes codec {CODEC_VERSION}, the capture is of codec {identity.codec}")
    if len(sequences) != len(rows):
        raise ValueError(f"{len(sequences)} sequences with {len(rows)} sets of rows")
    stored, kept_mass = [], 0.0
    for i, (sequence, r) in enumerate(zip(sequences, rows, strict=True)):
        try:
            check_sequence(identity, sequence)
            kept_mass += float(check_rows(identity, sequence.tokens, r).sum())
            stored.append(_pack(identity, sequence, r))
        except IntegrityError as error:
            raise IntegrityError(f"unit {unit.hash} of {unit.source.uri}, sequence {i}: {error}") from error
    if len({s.entropy_N is None for s in stored}) > 1:
        raise IntegrityError(
            f"unit {unit.hash}: entropy given for some sequences only; the engine must give all or none"
        )
    entropy = any(s.entropy_N is not None for s in stored)
    data = _to_bytes(identity, unit, stored, dead, kept_mass, entropy, engine)
    summary = UnitSummary(
        unit=unit.hash,
        lengths=np.array([len(s.tokens) for s in stored], np.int32),
        supervised=np.array([s.loss_mask.sum() for s in stored], np.int32),
        doc_keys=np.array([s.doc_key for s in stored], np.uint64),
        object_bytes=len(data),
        object_sha256=hashlib.sha256(data).hexdigest(),
        kept_mass_sum=kept_mass,
        dead=len(dead),
        teacher_seconds=teacher_seconds,
        entropy=entropy,
        distinct_draws=sum(len(s.draws.words_M) for s in stored if s.draws is not None),
        unfinished=sum(s.finish == "length" for s in stored),
    )
    return data, summary


def _log_f2(log_N: np.ndarray) -> np.ndarray:
    return np.clip(log_N, LOG_FLOOR, 0.0).astype("<f2")


def _pack(identity: CaptureIdentity, sequence: Sequence, rows: TargetRows) -> StoredSequence:
    return StoredSequence(
        tokens=sequence.tokens.astype("<i4"),
        loss_mask=sequence.loss_mask,
        doc_key=int(sequence.doc_key),
        packed_NB=encode(rows.ids_NK, rows.logprobs_NK, rows.log_tail_N, identity.vocab_size),
        actual_logprob_N=_log_f2(rows.actual_logprob_N),
        actual_rank_N=rows.actual_rank_N.astype("<i4"),
        entropy_N=None if rows.entropy_N is None else np.maximum(rows.entropy_N, 0.0).astype("<f2"),
        log_tail_at={t: _log_f2(rows.log_tail_at[t]) for t in identity.extra_temperatures},
        draws=None if rows.draws is None else _pack_draws(rows.draws),
        finish=sequence.finish,
    )


def _pack_draws(draws: Draws) -> StoredDraws:
    return StoredDraws(draws.words(), _log_f2(draws.logprobs_M), draws.distinct_N.astype("<u2"))


def _groups(stored: list[StoredSequence]) -> Iterator[tuple[int, int]]:
    first, size = 0, 0
    for i, s in enumerate(stored):
        size += s.nbytes
        if size >= GROUP_BYTES or i == len(stored) - 1:
            yield first, i + 1
            first, size = i + 1, 0


def _to_bytes(
    identity: CaptureIdentity,
    unit: Unit,
    stored: list[StoredSequence],
    dead: list[DeadLetter],
    kept_mass: float,
    entropy: bool,
    engine: str = "",
) -> bytes:
    schema = arrow_schema(identity, with_entropy=entropy)
    sink = io.BytesIO()
    fingerprint = identity.fingerprint
    ends = []
    with pq.ParquetWriter(
        sink, schema, compression="none", use_dictionary=False, write_statistics=False, version="2.6"
    ) as writer:
        for first, stop in _groups(stored):
            sums = [checksum(fingerprint, unit.hash, i, stored[i]) for i in range(first, stop)]
            writer.write_table(to_table(stored[first:stop], sums, schema), row_group_size=stop - first)
            ends.append(sink.tell())
        with sink.getbuffer() as view:
            starts = [len(MAGIC), *ends[:-1]]
            groups = [[end, digest(view[start:end])] for start, end in zip(starts, ends, strict=False)]
        metadata = _metadata(identity, unit, stored, dead, kept_mass) | {"engine": engine, "row_groups": groups}
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False)
        writer.add_key_value_metadata({METADATA_KEY: text})
    data = sink.getvalue()
    if footer_start(data) != (ends or [len(MAGIC)])[-1]:
        raise AssertionError(f"{footer_start(data)=} {ends[-1:]=}: this pyarrow writes bytes that no digest covers")
    return seal(data)


def _metadata(
    identity: CaptureIdentity, unit: Unit, stored: list[StoredSequence], dead: list[DeadLetter], kept_mass: float
) -> dict[str, Any]:
    """The footer's JSON. Lengths and masks are the columns' own; multiplicity and paths are a run's, not the object's:
    the same content gives the same bytes wherever it lies and whenever it was written."""
    source = asdict(unit.source) | {"uri": "", "version": ""}
    described = {k: v for k, v in asdict(unit).items() if k != "multiplicity"} | {"source": source}
    return {
        "schema_version": SCHEMA_VERSION,
        "identity": identity.to_dict(),
        "fingerprint": identity.fingerprint,
        "unit": described,
        "sequences": len(stored),
        "rows": sum(len(s.packed_NB) for s in stored),
        "kept_mass_sum": kept_mass,
        "dead": [asdict(d) | {"source": ""} for d in dead],
    }
