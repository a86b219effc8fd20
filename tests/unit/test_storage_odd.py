"""Stores and policies as they are: what `check` proves of them, and what is done without."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from distill_ray.storage import ConflictError, NotFoundError, StorageError, check_access, find_sources, open_storage
from distill_ray.storage.s3_errors import explain
from tests.odd_s3 import OddS3

ROOT = "s3://bucket/own/place"
UNSUPPORTED = "Unsupported header 'x-amz-sdk-checksum-algorithm' received for this API call."


@pytest.fixture
def odd() -> Iterator[OddS3]:
    with OddS3().serving() as server:
        yield server


def test_a_store_that_keeps_conditions_passes_and_nothing_stays(odd: OddS3) -> None:
    check_access(ROOT)
    assert odd.objects == {}
    assert len({line.split()[1] for line in odd.seen if line.startswith("PUT")}) == 1, "two keys were tried"


@pytest.mark.parametrize(
    ("header", "fact"),
    [
        ("if-none-match", r"it ignores If-None-Match: \* \(it took a second write of one key\)"),
        ("if-match", r"it ignores If-Match \(it took a write at an ETag that the object had no more\)"),
    ],
)
def test_a_store_that_ignores_a_condition_is_refused(odd: OddS3, header: str, fact: str) -> None:
    odd.ignored = {header}
    with pytest.raises(StorageError, match=rf"one writer per run cannot be kept on this store: {fact}; use a store"):
        check_access(ROOT)
    assert odd.objects == {}


@pytest.mark.parametrize("header", ["if-none-match", "if-match"])
@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (400, "InvalidArgument")])
def test_a_store_without_a_condition_is_refused(odd: OddS3, header: str, status: int, code: str) -> None:
    odd.refusals = {header: (status, code, "not offered")}
    with pytest.raises(StorageError, match=rf"one writer per run cannot.* by HTTP {status} \({code}\); use a store"):
        check_access(ROOT)
    assert odd.objects == {}


def test_a_store_that_refuses_every_condition_is_refused(odd: OddS3) -> None:
    odd.refusals = {"if-none-match": (412, "PreconditionFailed", "")}
    with pytest.raises(StorageError, match=r"one writer .*it refuses the first write of a new key with If-None-Match"):
        check_access(ROOT)
    odd.refusals = {"if-match": (412, "PreconditionFailed", "")}
    with pytest.raises(StorageError, match=r"one writer .*it refuses If-Match with the ETag that the object has"):
        check_access(ROOT)
    assert odd.objects == {}


@pytest.mark.parametrize(
    "answer",
    [
        (400, "InvalidArgument", UNSUPPORTED),
        (501, "NotImplemented", "A header you provided (x-amz-checksum-crc32) is not implemented"),
        (501, "NotImplemented", "A header you provided implies functionality that is not implemented"),
    ],
)
def test_a_store_that_refuses_checksums_works_without_them(
    odd: OddS3, monkeypatch: pytest.MonkeyPatch, answer: tuple[int, str, str]
) -> None:
    odd.refusals = {"x-amz-sdk-checksum": answer, "x-amz-checksum-": answer}
    with pytest.raises(StorageError, match="set AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_"):
        check_access(ROOT)
    assert odd.objects == {}
    without_checksums(monkeypatch)
    check_access(ROOT)
    storage = open_storage(ROOT)
    first = storage.put_if("k", b"1", None)
    with pytest.raises(ConflictError):
        storage.put_if("k", b"2", None)
    assert storage.get_versioned("k") == (b"1", first)


def test_an_upload_in_parts_sends_no_checksum_either(
    odd: OddS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "large"
    with path.open("wb") as stream:
        stream.write(os.urandom(1000))
        stream.truncate(65 << 20)
    without_checksums(monkeypatch)
    odd.seen.clear()
    open_storage(ROOT).upload(path, "large")
    assert len([line for line in odd.seen if line.startswith("PUT")]) == 5
    assert not [line for line in odd.seen if "checksum" in line]
    assert odd.objects["own/place/large"] == path.read_bytes()


def without_checksums(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    patch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        (400, {"Code": "InvalidArgument", "Message": "no", "ArgumentName": "x-amz-trailer"}, True),
        (400, {"Code": "InvalidRequest", "Message": "STREAMING-UNSIGNED-PAYLOAD-TRAILER is not supported"}, True),
        (400, {"Code": "InvalidArgument", "Message": "x-amz-content-sha256 must be UNSIGNED-PAYLOAD"}, True),
        (400, {"Code": "XAmzContentSHA256Mismatch", "Message": "x-amz-content-sha256 does not match"}, False),
        (400, {"Code": "InvalidArgument", "Message": "the key is too long"}, False),
    ],
)
def test_words_for_a_checksum_that_is_refused(status: int, error: dict[str, str], told: bool) -> None:
    answer = ClientError({"Error": error, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")  # type: ignore
    said = str(explain(answer, "write", "s3://bucket/k", "http://store"))
    assert ("AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in said) is told


def test_a_policy_that_lets_list_the_own_prefix_is_enough(odd: OddS3, tmp_path: Path) -> None:
    odd.lists = "own/"
    check_access(ROOT)
    storage = open_storage(ROOT)
    assert storage.head("none") is None
    for read in (storage.get, storage.open_input, lambda key: storage.download(key, tmp_path / "out")):
        with pytest.raises(NotFoundError, match=f"no such object: {ROOT}/none"):
            read("none")
    storage.put("nonesuch", b"1")
    assert storage.head("none") is None, "a longer key was taken for it"
    assert [info.key for info in storage.list("")] == ["nonesuch"]
    assert "HEAD /bucket" not in odd.seen


def test_what_a_policy_does_not_let_know_is_told(odd: OddS3) -> None:
    odd.lists = "other/"
    storage = open_storage(ROOT)
    for ask in (lambda: storage.head("none"), lambda: storage.get("none"), lambda: check_access(ROOT)):
        with pytest.raises(StorageError, match=r"AccessDenied \(HTTP 403\); these keys may not do that: grant s3:Get"):
            ask()


def test_a_missing_bucket_is_told_without_asking_for_it_by_itself(odd: OddS3) -> None:
    for ask in (lambda: open_storage("s3://none/x").head("k"), lambda: check_access("s3://none/x")):
        with pytest.raises(StorageError, match="there is no bucket 'none'; create it"):
            ask()
    assert "HEAD /none" not in odd.seen


def test_an_endpoint_that_answers_every_listing_by_404_has_no_such_bucket(odd: OddS3) -> None:
    odd.refusals = {"host": (404, "NotFound", "some web server")}
    for ask in (lambda: open_storage(ROOT).head("k"), lambda: check_access(ROOT)):
        with pytest.raises(StorageError, match="there is no bucket 'bucket'; create it or correct the URI"):
            ask()


def test_an_object_that_may_not_be_read_is_not_taken_for_a_missing_one(odd: OddS3) -> None:
    storage = open_storage(ROOT)
    storage.put("k", b"1")
    odd.refusals = {"if-match": (403, "AccessDenied", "")}
    with storage.open_input("k") as stream, pytest.raises(StorageError, match="AccessDenied"):
        stream.read()


def test_keys_with_slashes_that_name_nothing_are_keys_of_their_own(odd: OddS3) -> None:
    odd.objects = {key: key.encode() for key in ("/x", "x", "d//x", "d/x", "//d/x", "d//e//f[1]", "d//e//f1")}
    every = {f"s3://bucket/{key}" for key in odd.objects}
    assert set(find_sources(["s3://bucket/**"])) == every
    for uri in every:
        assert list(find_sources([uri])) == [uri]
    assert list(find_sources(["s3://bucket/d//*"])) == ["s3://bucket/d//x"]
    assert list(find_sources(["s3://bucket//*"])) == ["s3://bucket//x"]


def test_the_folder_that_a_console_made_is_no_object(odd: OddS3) -> None:
    odd.objects = {"model/": b"", "model/config.json": b"{}", "model/sub/": b""}
    assert [info.key for info in open_storage("s3://bucket/model").list("")] == ["config.json"]
