"""Cases of sources and stores: links, awkward keys, and S3 stores that lack something (`pytest -m cases`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_ray.storage import open_storage
from tests.odd_s3 import OddS3
from tests.unit.test_cases import Case, prose

pytestmark = pytest.mark.cases


@pytest.fixture
def case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Case:
    made = Case(tmp_path, capsys)
    capsys.readouterr()  # what libraries print when the teacher is made is no sequence
    return made


@pytest.fixture
def odd() -> Iterator[OddS3]:
    with OddS3().serving() as server:
        yield server


def lines(text: str, count: int) -> str:
    return "".join(json.dumps({"text": f"{text} {prose(20)} {i}"}) + "\n" for i in range(count))


def recipe(case: Case, **changes: str) -> str:
    """A recipe over texts with `root` or `data/*` in another place."""
    path = Path(case.recipe("text"))
    for name, value in changes.items():
        path.write_text(path.read_text().replace(f"{case.folder}/{name}", value))
    return str(path)


def test_22_a_link_to_a_folder_beside_it_doubles_no_file(case: Case) -> None:
    (case.folder / "data/2024").mkdir()
    (case.folder / "data/2024/a.jsonl").write_text(lines("", 48))
    (case.folder / "data/latest").symlink_to("2024")
    found, refused = case.preview(recipe(case, **{"data/*": f"{case.folder}/data/**"}))
    assert not refused
    assert len(found) == 48
    assert {each["source"] for each in found} == {f"{case.folder}/data/2024/a.jsonl"}


def test_23_a_key_with_brackets_is_read_and_not_the_one_beside_it(case: Case, s3_uri: str) -> None:
    storage = open_storage(f"{s3_uri}/d")
    storage.put("part[1].jsonl", lines("", 48).encode())
    storage.put("part1.jsonl", lines("DECOY", 48).encode())
    found, refused = case.preview(recipe(case, **{"data/*": f"{s3_uri}/d/part[1].jsonl"}))
    assert not refused
    assert len(found) == 48
    assert not any("DECOY" in each["text"] for each in found)


def test_23_a_key_with_two_slashes_is_read(case: Case, odd: OddS3) -> None:
    odd.objects = {"d//a.jsonl": lines("", 48).encode(), "d/a.jsonl": lines("DECOY", 48).encode()}
    for pattern in ("d//a.jsonl", "d//*.jsonl"):
        found, _ = case.preview(recipe(case, **{"data/*": f"s3://bucket/{pattern}"}))
        assert len(found) == 48
        assert not any("DECOY" in each["text"] for each in found)


@pytest.mark.parametrize("kind", ["ignored", "answered 501"])
def test_24_a_store_without_conditional_writes_is_found_by_check(case: Case, odd: OddS3, kind: str) -> None:
    case.write({"text": prose(20)})
    if kind == "ignored":
        odd.ignored = {"if-none-match", "if-match"}
    else:
        answer = (501, "NotImplemented", "A header you provided implies functionality that is not implemented")
        odd.refusals = {"if-none-match": answer, "if-match": answer}
    code, said = case.check(recipe(case, root="s3://bucket/d"))
    assert code == 2
    assert "s3://bucket/d" in said
    assert "one writer per run cannot be kept on this store" in said
    assert ("it ignores If-None-Match: *" if kind == "ignored" else "HTTP 501 (NotImplemented)") in said
    assert odd.objects == {}


def test_25_a_store_that_refuses_checksums_is_found_by_check_and_works_without(
    case: Case, odd: OddS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.write(*({"text": prose(40)} for _ in range(48)))
    answer = (400, "InvalidArgument", "Unsupported header 'x-amz-sdk-checksum-algorithm' received for this API call.")
    odd.refusals = {"x-amz-sdk-checksum": answer, "x-amz-checksum-": answer}
    checked = recipe(case, root="s3://bucket/d")
    code, said = case.check(checked)
    assert code == 2
    assert "AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in said
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    code, said = case.check(checked)
    assert "checksum" not in said.lower()
    assert code == 0, said
