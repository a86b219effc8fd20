"""No flipped bit and no truncation of a target object is ever accepted, by whole read or by range."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_ray import targets
from distill_ray.errors import IntegrityError
from distill_ray.targets.container import Region, check_region, digest, footer_start, open_sealed, seal
from distill_ray.targets.layout import checksum
from tests.unit.targets_fakes import captured, dead_letter, identity, unit

OF, U = identity(vocab=70_000, k=400, temperatures=(1.0, 2.0)), unit()
SEED = 20_261_122


@pytest.fixture(scope="module")
def sound() -> bytes:
    """Two row groups, every kind of column, a dead letter."""
    rng = np.random.default_rng(0)
    small = identity(vocab=1000, k=400)  # cheap rows; the larger vocabulary adds the bit planes
    sequences, rows = captured(small, lengths=(820, 40, 2), seed=int(rng.integers(99)))
    data, _ = targets.encode_unit(OF, U, sequences, rows, [dead_letter(U)], 0.0)
    assert len(open_whole(data).info.regions) == 2
    return data


def open_whole(data: bytes) -> targets.UnitTargets:
    return targets.UnitTargets(data, OF.fingerprint, U.hash, "memory")


def open_ranges(data: bytes) -> targets.UnitReader:
    return targets.UnitReader(len(data), lambda at, n: data[at : at + n], OF.fingerprint, U.hash, "memory")


def flipped(data: bytes, byte: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[byte] ^= 1 << bit
    return bytes(changed)


def positions(data: bytes) -> list[int]:
    """Every part of the object gets its share: anywhere, page headers, side columns, seal, footer, the very ends."""
    rng = np.random.default_rng(SEED)
    footer = footer_start(data)
    regions = open_ranges(data).info.regions
    spots = [0, 3, 4, footer - 20, footer - 1, footer, *range(len(data) - 8, len(data))]
    spots += rng.integers(0, len(data), 60).tolist()
    spots += rng.integers(footer - 20, len(data), 60).tolist()
    for region in regions:
        spots += rng.integers(region.start, region.start + 200, 15).tolist()
        spots += rng.integers(max(region.start, region.stop - 4000), region.stop, 30).tolist()
    return spots


def test_no_flipped_bit_passes_a_whole_read(sound):
    for n, byte in enumerate(positions(sound)):
        with pytest.raises(IntegrityError, match="memory"):
            open_whole(flipped(sound, byte, n % 8))


def test_no_flipped_bit_passes_a_range_read_of_its_sequences(sound):
    regions = open_ranges(sound).info.regions
    ranges = [(0, 2), (2, 3)]
    for n, byte in enumerate(positions(sound)):
        if byte < 4:
            continue  # the leading magic is no part of any range
        changed = flipped(sound, byte, n % 8)
        hit = [g for g, r in enumerate(regions) if r.start <= byte < r.stop]
        if not hit:
            with pytest.raises(IntegrityError, match="memory"):
                open_ranges(changed)
            continue
        reader = open_ranges(changed)
        for g, (start, stop) in enumerate(ranges):
            if g in hit:
                with pytest.raises(IntegrityError, match=f"memory, row group {g}"):
                    reader.sequences(start, stop)
            else:
                assert len(reader.sequences(start, stop)) == stop - start


def test_no_truncation_passes(sound):
    rng = np.random.default_rng(SEED)
    for size in [0, 1, 4, 11, 31, 32, 33, len(sound) - 1, len(sound) - 9, *rng.integers(0, len(sound), 40)]:
        for read in (open_whole, open_ranges):
            with pytest.raises(IntegrityError):
                read(sound[:size])
    for data in (sound + b"\0", b"\0" + sound, sound + sound[-8:]):
        with pytest.raises(IntegrityError):
            open_whole(data)


def test_an_object_cut_after_its_footer_was_read_is_refused(sound):
    reader = targets.UnitReader(
        len(sound),
        lambda at, n: sound[at : at + n] if at > 100 else sound[at : at + n - 1],
        OF.fingerprint,
        U.hash,
        "memory",
    )
    with pytest.raises(IntegrityError, match="truncated"):
        reader.sequences(0, 1)


def test_a_foreign_parquet_file_is_refused(tmp_path):
    pq.write_table(pa.table({"a": list(range(100))}), tmp_path / "a.parquet")
    with pytest.raises(IntegrityError, match="not a target object"):
        open_whole((tmp_path / "a.parquet").read_bytes())


def forged(data: bytes, byte: int) -> bytes:
    """One bit of a row group flipped and every digest over raw bytes made to agree."""
    whole = open_whole(data)
    changed = flipped(data, byte, 3)
    region = next(r for r in whole.info.regions if r.start <= byte < r.stop)
    at = footer_start(data)
    body, footer = changed[: whole.info.regions[-1].stop], changed[at:]
    old, new = region.digest.encode(), digest(changed[region.start : region.stop]).encode()
    assert footer.count(old) == 1
    return seal(body + footer.replace(old, new))


def test_an_altered_value_with_honest_digests_fails_its_sequences_checksum(sound):
    packed = open_whole(sound).sequence(0).packed_NB.tobytes()[500_000:500_040]
    with pytest.raises(IntegrityError, match=r"memory, sequence 0: checksum \w{16}, stored \w{16}"):
        open_whole(forged(sound, sound.index(packed)))


def test_the_checksum_holds_capture_unit_and_place(sound):
    s = open_whole(sound).sequence(1)
    sums = {checksum(fp, u, i, s) for fp in ("a" * 32, "b" * 32) for u in ("c" * 32, "d" * 32) for i in (1, 2)}
    assert len(sums) == 8


def test_checks_name_what_where_and_remedy(sound):
    with pytest.raises(
        IntegrityError, match=r"x: bytes 4…8 have digest \w{32}, the footer says 00: .*; delete the object"
    ):
        check_region(b"abcd", Region(4, 8, "00"), "x")
    with pytest.raises(IntegrityError, match=r"x: 3 of the 4 bytes at 4: truncated; delete"):
        check_region(b"abc", Region(4, 8, "00"), "x")
    with pytest.raises(IntegrityError, match=r"x: its footer claims to be longer than its 100 bytes"):
        open_sealed(100, lambda at, n: (b"\0" * 92 + b"\xff\0\0\0PAR1")[at : at + n], "x")
