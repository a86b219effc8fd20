"""Witnesses: some sequences of a unit, scored a second time by another path while the capture's teacher was loaded.

`targets/<fingerprint>/witness/<unit hash>.npz`, written after the unit's object by whoever wrote that. The audit
compares the object with it and need not load the teacher again.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_ray.errors import IntegrityError
from distill_ray.schema import TargetRows
from distill_ray.storage.base import Storage
from distill_ray.targets.identity import CaptureIdentity, capture_prefix
from distill_ray.units import Units, texts

_NAME = re.compile(r"witness/([0-9a-f]{32})\.npz")
_SPARE = 2
"""Sequences that get a witness for each one that the audit wants: not every unit has as many as were asked of it."""
_COLUMNS = ("ids_NK", "logprobs_NK", "log_tail_N", "actual_logprob_N", "actual_rank_N", "entropy_N")


@dataclass(frozen=True)
class Witness:
    """One sequence scored again."""

    tokens: np.ndarray
    """[n] int32: a second capture may have stored another sequence in its place."""
    rows: TargetRows | str
    """N = n − 1 rows of R ≥ K ids each; or why it cannot be scored again."""


def witness_key(capture: CaptureIdentity | str, unit: str) -> str:
    """Key of one unit's witness."""
    return f"{capture_prefix(capture)}witness/{unit}.npz"


def to_witness(pending: Units, sequences: int) -> dict[str, int]:
    """Unit → of how many sequences the capture is to leave a witness.

    Args:
        pending: units to capture, which happens in the order of their hashes; the ends of these choose some anywhere.
        sequences: as many as the audit compares; 0: none.
    """
    wanted = _SPARE * sequences
    ends = np.ascontiguousarray(pending.hashes).view("S8").reshape(-1, 4)[:, 3]
    chosen = texts(pending.hashes[np.argsort(ends, kind="stable")[:wanted]])
    return dict.fromkeys(chosen, -(-wanted // max(1, len(chosen))))


def places(unit: str, sequences: int, count: int) -> list[int]:
    """Ascending places of `count` of a unit's sequences, or of all, chosen by hash."""
    ranked = sorted(range(sequences), key=lambda i: hashlib.blake2b(f"{unit}/{i}".encode(), digest_size=8).digest())
    return sorted(ranked[:count])


def write_witness(storage: Storage, capture: CaptureIdentity | str, unit: str, witness: Mapping[int, Witness]) -> None:
    """One object in one piece, over one that is there already.

    Args:
        storage: the store that holds `targets/`.
        capture: identity, or its fingerprint.
        unit: hash of the unit.
        witness: by the sequences' places in the stored order.
    """
    sink = io.BytesIO()
    arrays = {f"{place}/{name}": array for place, one in witness.items() for name, array in _arrays(one).items()}
    np.savez(sink, allow_pickle=False, **arrays)
    storage.put(witness_key(capture, unit), sink.getvalue())


def read_witness(storage: Storage, capture: CaptureIdentity | str, unit: str) -> dict[int, Witness]:
    """What `write_witness` wrote. Raises NotFoundError; IntegrityError where the object is something else."""
    key = witness_key(capture, unit)
    data = storage.get(key)
    found: dict[int, dict[str, np.ndarray]] = {}
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            for name in arrays.files:
                place, _, column = name.partition("/")
                found.setdefault(int(place), {})[column] = arrays[name]
        if not found:
            raise ValueError("it holds no sequence")
        return {place: _witness(columns) for place, columns in found.items()}
    except (ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"witness {storage.uri}/{key} is damaged ({type(error).__name__}: {error})") from error


def witnessed(storage: Storage, capture: CaptureIdentity | str) -> list[str]:
    """Hashes of the units of a capture that have a witness, the newest first."""
    prefix = capture_prefix(capture)
    found = [
        (-info.modified, match[1])
        for info in storage.list(f"{prefix}witness/")
        if (match := _NAME.fullmatch(info.key[len(prefix) :]))
    ]
    return [unit for _, unit in sorted(found)]


def _arrays(witness: Witness) -> dict[str, np.ndarray]:
    rows = witness.rows
    if isinstance(rows, str):
        return {"tokens": witness.tokens, "refused": np.array(rows)}
    columns = {name: getattr(rows, name) for name in _COLUMNS} | {f"T={t!r}": a for t, a in rows.log_tail_at.items()}
    return {"tokens": witness.tokens} | {name: array for name, array in columns.items() if array is not None}


def _witness(columns: dict[str, np.ndarray]) -> Witness:
    tokens = columns.pop("tokens")
    if "refused" in columns:
        return Witness(tokens, str(columns["refused"]))
    tails = {float(name[2:]): columns.pop(name) for name in list(columns) if name.startswith("T=")}
    rows: dict[str, Any] = columns | {"log_tail_at": tails}
    return Witness(tokens, TargetRows(**rows))
