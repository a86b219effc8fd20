"""Reading target objects back: whole, or the row groups of a few sequences; nothing unverified is handed out."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from distill_ray.codec import at_temperature, decode, row_bytes
from distill_ray.errors import IntegrityError, UserError
from distill_ray.schema import DeadLetter, TargetRows, UnitSummary
from distill_ray.storage.base import NotFoundError, Storage
from distill_ray.targets.container import MAGIC, REMEDY, Fetch, Region, Window, check_region, open_sealed
from distill_ray.targets.draws import decode_draws
from distill_ray.targets.footer import check_identity, open_footer
from distill_ray.targets.identity import CaptureIdentity, fingerprint_of, unit_key
from distill_ray.targets.layout import StoredSequence, checksum, from_table


def decode_rows(identity: CaptureIdentity, stored: StoredSequence, temperature: float = 1.0) -> TargetRows:
    """Unpack one sequence's rows.

    Args:
        identity: the capture the sequence belongs to.
        stored: one sequence as read.
        temperature: `logprobs_NK` and `log_tail_N` are those of softmax(z / T), exact in the tail. The actual token's
            log-probability, the entropy, `log_tail_at` and the draws are as stored, whatever T.

    Raises:
        UserError: T was not captured; nothing stands in for its normaliser.
    """
    if temperature not in identity.temperatures:
        raise UserError(
            f"temperature {temperature} was not captured (captured: {list(identity.temperatures)}); the tail mass at T "
            f"cannot be known from the kept tokens: add {temperature} to capture.temperatures and capture again"
        )
    ids_NK, logprobs_NK, log_tail_N = decode(stored.packed_NB, identity.top_k, identity.vocab_size)
    tails = {t: v.astype(np.float32) for t, v in stored.log_tail_at.items()}
    if temperature != 1.0:
        log_tail_N = tails[temperature]
        logprobs_NK = at_temperature(logprobs_NK, log_tail_N, temperature)
    return TargetRows(
        ids_NK=ids_NK,
        logprobs_NK=logprobs_NK,
        log_tail_N=log_tail_N,
        actual_logprob_N=stored.actual_logprob_N.astype(np.float32),
        actual_rank_N=stored.actual_rank_N,
        entropy_N=None if stored.entropy_N is None else stored.entropy_N.astype(np.float32),
        log_tail_at=tails,
        draws=None if stored.draws is None else decode_draws(stored.draws),
    )


class UnitReader:
    """Sequences of one target object, read by range: only the row groups that hold them are fetched and verified."""

    def __init__(self, size: int, fetch: Fetch, fingerprint: str, unit: str, where: str) -> None:
        """Fetches and checks the footer.

        Args:
            size: bytes of the object.
            fetch: reads ranges of it.
            fingerprint: the capture the object must belong to.
            unit: the unit it must hold.
            where: its name for messages.

        Raises:
            IntegrityError: truncated, altered, or of another capture or unit.
        """
        self._fetch, self._where, self._fingerprint = fetch, where, fingerprint
        footer, sealed = open_sealed(size, fetch, where)
        self._window = Window(size)
        self._file, self.info = open_footer(footer, self._window, sealed, where)
        check_identity(self.info, fingerprint, unit, where)
        groups = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._first = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])

    @property
    def identity(self) -> CaptureIdentity:
        return self.info.identity

    @property
    def dead(self) -> tuple[DeadLetter, ...]:
        """Documents and sequences of the unit that failed."""
        return self.info.dead

    def __len__(self) -> int:
        return self.info.sequences

    @property
    def groups(self) -> int:
        """Row groups of the object."""
        return len(self.info.regions)

    def group_of(self, i: int) -> tuple[int, int]:
        """First and last + 1 of the sequences that share sequence i's row group: reading one costs reading all."""
        g = int(np.searchsorted(self._first, i, side="right"))
        return int(self._first[g - 1]), int(self._first[g])

    def sequences(self, start: int, stop: int) -> list[StoredSequence]:
        """Sequences start … stop − 1, verified.

        Raises:
            IntegrityError: altered bytes, or a sequence whose checksum is not its own.
            IndexError: outside 0 … len(self).
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"sequences {start}…{stop} of {self._where}, which holds {len(self)}")
        if start == stop:
            return []
        first = int(np.searchsorted(self._first, start, side="right")) - 1
        last = int(np.searchsorted(self._first, stop, side="left"))
        regions = self.info.regions[first:last]
        data = memoryview(self._fetch(regions[0].start, regions[-1].stop - regions[0].start))
        found: list[StoredSequence] = []
        for g, region in enumerate(regions, start=first):
            part = data[region.start - regions[0].start : region.stop - regions[0].start]
            found += self._group(g, region, part)
        return found[start - self._first[first] : stop - self._first[first]]

    def rows(self, i: int, temperature: float = 1.0) -> TargetRows:
        """Decoded rows of sequence i; see `decode_rows`."""
        return decode_rows(self.identity, self.sequences(i, i + 1)[0], temperature)

    def _group(self, g: int, region: Region, part: memoryview) -> list[StoredSequence]:
        identity = self.identity
        check_region(part, region, f"{self._where}, row group {g}")
        self._window.add(region.start, part)
        try:
            table = self._file.read_row_group(g, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise IntegrityError(f"{self._where}, row group {g}: {error}; {REMEDY}") from error
        finally:
            self._window.drop(region.start)
        found = from_table(table, row_bytes(identity.top_k, identity.vocab_size), identity.extra_temperatures)
        sums = table.column("checksum").to_pylist()
        for i, (s, want) in enumerate(zip(found, sums, strict=True), start=int(self._first[g])):
            if (got := checksum(self._fingerprint, self.info.unit.hash, i, s)) != want:
                raise IntegrityError(
                    f"{self._where}, sequence {i}: checksum {got.hex()}, stored {want.hex()}: not the sequence that "
                    f"was written there; {REMEDY}"
                )
        return found


class UnitTargets:
    """One target object read whole, every byte verified."""

    def __init__(self, data: bytes, fingerprint: str, unit: str, where: str) -> None:
        """Raises IntegrityError: truncated, altered, or of another capture or unit."""
        view = memoryview(data)
        if data[: len(MAGIC)] != MAGIC:
            raise IntegrityError(f"{where}: starts with {data[:4]!r}, not {MAGIC!r}: not a target object; {REMEDY}")
        reader = UnitReader(len(data), lambda start, n: view[start : start + n], fingerprint, unit, where)
        self.info = reader.info
        self.object_bytes = len(data)
        self.object_sha256 = hashlib.sha256(data).hexdigest()
        self._sequences = reader.sequences(0, len(reader))
        if (rows := sum(len(s.packed_NB) for s in self._sequences)) != self.info.rows:
            raise IntegrityError(f"{where}: {rows} rows, its footer says {self.info.rows}; {REMEDY}")

    @property
    def identity(self) -> CaptureIdentity:
        return self.info.identity

    @property
    def dead(self) -> tuple[DeadLetter, ...]:
        """Documents and sequences of the unit that failed."""
        return self.info.dead

    def __len__(self) -> int:
        return len(self._sequences)

    def sequence(self, i: int) -> StoredSequence:
        """Sequence i, still packed."""
        return self._sequences[i]

    def rows(self, i: int, temperature: float = 1.0) -> TargetRows:
        """Decoded rows of sequence i; see `decode_rows`."""
        return decode_rows(self.identity, self._sequences[i], temperature)

    def summary(self) -> UnitSummary:
        """What the index keeps of the unit; `teacher_seconds` is not in the object and reads 0."""
        return UnitSummary(
            unit=self.info.unit.hash,
            lengths=np.array([len(s.tokens) for s in self._sequences], np.int32),
            supervised=np.array([s.loss_mask.sum() for s in self._sequences], np.int32),
            doc_keys=np.array([s.doc_key for s in self._sequences], np.uint64),
            object_bytes=self.object_bytes,
            object_sha256=self.object_sha256,
            kept_mass_sum=self.info.kept_mass_sum,
            dead=len(self.info.dead),
            teacher_seconds=0.0,
            entropy=self.info.entropy,
            distinct_draws=sum(len(s.draws.words_M) for s in self._sequences if s.draws is not None),
            unfinished=sum(s.finish == "length" for s in self._sequences),
        )


def read_unit(
    storage: Storage, capture: CaptureIdentity | str, unit: str, *, expect_sha256: str | None = None
) -> UnitTargets:
    """Read one unit's object whole and verify every byte of it.

    Args:
        storage: the store that holds `targets/`.
        capture: identity, or its fingerprint.
        unit: unit hash.
        expect_sha256: of the whole object, where the index or a manifest states it.

    Raises:
        NotFoundError: no such object.
        IntegrityError: truncated, altered, of another capture or unit, or not the object that was recorded.
    """
    key = unit_key(capture, unit)
    where = f"{storage.uri}/{key}"
    # Parsed before the digests are compared: what is wrong inside says more than that something is.
    read = UnitTargets(storage.get(key), fingerprint_of(capture), unit, where)
    if expect_sha256 is not None and read.object_sha256 != expect_sha256:
        raise IntegrityError(
            f"{where}: SHA-256 {read.object_sha256}, recorded {expect_sha256}: whole, but captured again since it was "
            "recorded; run capture again to record it anew"
        )
    return read


def open_unit(
    storage: Storage, capture: CaptureIdentity | str, unit: str, *, object_bytes: int | None = None
) -> UnitReader:
    """Open one unit's object for range reads; fetches its footer only.

    Args:
        storage: the store that holds `targets/`.
        capture: identity, or its fingerprint.
        unit: unit hash.
        object_bytes: size of the object where a manifest states it; saves one request and catches truncation.

    Raises:
        NotFoundError: no such object.
        IntegrityError: truncated, altered, or of another capture or unit.
    """
    key = unit_key(capture, unit)
    if object_bytes is None:
        found = storage.head(key)
        if found is None:
            raise NotFoundError(f"{storage.uri}/{key} does not exist; run capture")
        object_bytes = found.size
    return UnitReader(
        object_bytes,
        lambda start, length: storage.get_range(key, start, length),
        fingerprint_of(capture),
        unit,
        f"{storage.uri}/{key}",
    )
