"""Storage on S3 or a server that speaks it, with conditional PUTs."""

from __future__ import annotations

import io
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from boto3.s3.transfer import TransferConfig
from botocore.client import BaseClient
from botocore.exceptions import ClientError

from distill_ray.errors import IntegrityError
from distill_ray.storage.atomic import explain_os, is_hidden, replace_durably, temporary_beside
from distill_ray.storage.base import ConflictError, NotFoundError, ObjectInfo, StorageError
from distill_ray.storage.s3_client import s3_client
from distill_ray.storage.s3_errors import S3_ERRORS, explain, is_refused, status_of
from distill_ray.storage.s3_input import RangeStream
from distill_ray.storage.s3_patience import OUTAGE_S, persist
from distill_ray.storage.uris import join_s3, split_s3

T = TypeVar("T")

_MULTIPART = 64 << 20
_WRITER = "writer"  # user metadata that tells a conditional PUT's own retry from a rival's object


class S3Storage:
    """Keys lie under `s3://bucket/prefix`. Holds no client and no secret, so it can be pickled."""

    def __init__(self, uri: str) -> None:
        self._bucket, self._prefix = split_s3(uri)
        self._bucket_seen = False
        # Travels with the object: workers know from the driver that the endpoint is right, and wait for the store.
        self._answered = False

    @property
    def uri(self) -> str:
        return join_s3(self._bucket, self._prefix)

    def get(self, key: str) -> bytes:
        return self.get_versioned(key)[0]

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        def whole() -> tuple[bytes, str]:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._name(key))
            return answer["Body"].read(), _bare(answer["ETag"])

        return self._ask("read", key, whole)

    def get_range(self, key: str, start: int, length: int, version: str | None = None) -> bytes:
        """With a `version`, raises IntegrityError once the object is at another one."""
        return self._range(key, start, length, version)

    def put(self, key: str, data: bytes) -> None:
        name = self._name(key)
        if len(data) > _MULTIPART:
            self._ask(
                "write",
                key,
                lambda: self._client.upload_fileobj(io.BytesIO(data), self._bucket, name, Config=_transfer()),
            )
        else:
            self._ask("write", key, lambda: self._client.put_object(Bucket=self._bucket, Key=name, Body=data))

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        name, writer, attempts = self._name(key), uuid.uuid4().hex, 0
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": f'"{version}"'}

        def write() -> str:
            nonlocal attempts
            attempts += 1
            answer = self._client.put_object(
                Bucket=self._bucket, Key=name, Body=data, Metadata={_WRITER: writer}, **condition
            )
            return _bare(answer["ETag"])

        try:
            return self._persist(write)
        except ClientError as error:
            # 412: not at the version; 409: a rival is writing this moment; 404: If-Match on no object (AWS).
            lost = status_of(error) in (409, 412) or (status_of(error) == 404 and version is not None)
            explained = self._explain(error, "write", key)
            if not lost or (status_of(error) == 404 and isinstance(explained, StorageError)):
                raise explained from error
            retried = attempts > 1 or error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0) > 0
            mine = self._written_by(key, writer) if retried else None
            if mine is None:
                raise ConflictError(
                    f"{self._target(key)} is no longer at version {version}; nothing was written"
                ) from error
            return mine
        except S3_ERRORS as error:
            raise self._explain(error, "write", key) from error

    def upload(self, path: Path, key: str) -> None:
        name = self._name(key)
        self._ask("write", key, lambda: self._client.upload_file(str(path), self._bucket, name, Config=_transfer()))

    def download(self, key: str, path: Path) -> None:
        path, name = Path(path), self._name(key)

        def fetch(temporary: Path) -> None:
            # With more than one part boto3 pins them all to the first answer's ETag.
            self._client.download_file(self._bucket, name, str(temporary), Config=_transfer())

        try:
            with temporary_beside(path) as temporary:
                self._ask("read", key, lambda: fetch(temporary))
                replace_durably(temporary, path)
        except OSError as error:
            raise explain_os(error, path, "write") from error

    def head(self, key: str) -> ObjectInfo | None:
        found = self._head(key)
        if found is None:
            return None
        return ObjectInfo(key, found["ContentLength"], _bare(found["ETag"]), found["LastModified"].timestamp())

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        more: dict[str, str] = {}
        while True:
            # No paginator: after an error it would end as if the listing were complete.
            page = self._ask(
                "list",
                prefix,
                lambda more=more: self._client.list_objects_v2(
                    Bucket=self._bucket, Prefix=self._prefix + prefix, **more
                ),
            )
            for each in page.get("Contents", []):
                key = each["Key"][len(self._prefix) :]
                # A key that ends with a slash is a "folder" that a console made; it has no bytes.
                if key and not key.endswith("/") and not is_hidden(key.rpartition("/")[2]):
                    yield ObjectInfo(key, each["Size"], _bare(each["ETag"]), each["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        name = self._name(key)
        try:
            self._ask("delete", key, lambda: self._client.delete_object(Bucket=self._bucket, Key=name))
        except NotFoundError:
            return

    def half_written(self) -> Iterator[ObjectInfo]:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=self._prefix)
        turn: Iterator[dict[str, Any]] = iter(pages)
        while True:
            try:
                page = next(turn, None)
            except S3_ERRORS as error:
                raise self._explain(error, "list", "") from error
            if page is None:
                return
            for each in page.get("Uploads", []):
                key, upload = each["Key"][len(self._prefix) :], each["UploadId"]
                size, newest = self._parts(each["Key"], upload)
                yield ObjectInfo(key, size, upload, max(newest, each["Initiated"].timestamp()))

    def _parts(self, name: str, upload: str) -> tuple[int, float]:
        """Bytes of an upload's parts, and when the last of them came."""
        pages = self._client.get_paginator("list_parts").paginate(Bucket=self._bucket, Key=name, UploadId=upload)
        try:
            parts = [part for page in pages for part in page.get("Parts", [])]
        except S3_ERRORS as error:
            if status_of(error) == 404:  # completed or aborted since the listing
                return 0, time.time()
            raise self._explain(error, "list", name) from error
        return sum(part["Size"] for part in parts), max((p["LastModified"].timestamp() for p in parts), default=0.0)

    def discard(self, info: ObjectInfo) -> None:
        name = self._prefix + info.key
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=info.version)
        except S3_ERRORS as error:
            if status_of(error) != 404:
                raise self._explain(error, "delete", info.key) from error

    def open_input(self, key: str) -> IO[bytes]:
        """Ranged reads pinned to the version found at opening: IntegrityError once it was overwritten."""
        info = self.head(key)
        if info is None:
            raise NotFoundError(f"no such object: {self._target(key)}")
        version = info.version
        raw = RangeStream(lambda start, length: self._range(key, start, length, version), info.size)
        return io.BufferedReader(raw, 256 << 10)

    @property
    def _client(self) -> BaseClient:
        return s3_client()

    def _name(self, key: str) -> str:
        parts = key.split("/")
        if any(part in ("", ".", "..") for part in parts) or is_hidden(parts[-1]):
            raise ValueError(f"bad storage key {key!r}: no empty, '.', '..' or hidden parts")
        return self._prefix + key

    def _target(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    def _explain(self, error: Exception, action: str, key: str):
        return explain(error, action, self._target(key), self._client.meta.endpoint_url)

    def _persist(self, request: Callable[[], T]) -> T:
        """An endpoint that never answered is more likely wrong than down: there botocore's patience must do."""
        answer = persist(request, OUTAGE_S if self._answered else 0.0)
        self._answered = True
        return answer

    def _ask(self, action: str, key: str, request: Callable[[], T]) -> T:
        try:
            return self._persist(request)
        except S3_ERRORS as error:
            if action == "read" and is_refused(error) and self._is_absent(key):
                raise NotFoundError(f"no such object: {self._target(key)}") from error
            raise self._explain(error, action, key) from error

    def _head(self, key: str) -> dict[str, Any] | None:
        """The answer to a HEAD; None if there is no such object."""
        try:
            return self._persist(lambda: self._client.head_object(Bucket=self._bucket, Key=self._name(key)))
        except S3_ERRORS as error:
            if status_of(error) == 404:
                self._require_bucket()
                return None
            if is_refused(error) and self._is_absent(key):
                return None
            raise self._explain(error, "read", key) from error

    def _is_absent(self, key: str) -> bool:
        """Whether a read was refused of no object: some stores say 403 where a policy lets list some prefixes only."""
        name = self._name(key)
        try:
            return name not in self._some_keys(name)
        except S3_ERRORS as error:
            raise self._explain(error, "read", key) from error

    def _some_keys(self, prefix: str) -> list[str]:
        page = self._persist(lambda: self._client.list_objects_v2(Bucket=self._bucket, Prefix=prefix, MaxKeys=1))
        return [each["Key"] for each in page.get("Contents", [])]

    def _range(self, key: str, start: int, length: int, version: str | None) -> bytes:
        if length <= 0:
            return b""
        name, span = self._name(key), f"bytes={start}-{start + length - 1}"

        def part() -> bytes:
            if version is None:
                return self._client.get_object(Bucket=self._bucket, Key=name, Range=span)["Body"].read()
            answer = self._client.get_object(Bucket=self._bucket, Key=name, Range=span, IfMatch=f'"{version}"')
            return answer["Body"].read()

        try:
            return self._ask("read", key, part)
        except StorageError as error:
            status = status_of(error.__cause__) if isinstance(error.__cause__, Exception) else 0
            if status == 416:  # starts at or past the end
                return b""
            if status == 412:
                raise IntegrityError(
                    f"{self._target(key)} was overwritten while it was being read (it was at version {version}); "
                    "nothing read after that was used: run again"
                ) from error
            raise

    def encrypted_by_key(self, key: str) -> bool:
        """Whether the object is encrypted by a key of KMS or the customer's own, so that its ETag is no MD5."""
        found = self._ask("read", key, lambda: self._client.head_object(Bucket=self._bucket, Key=self._name(key)))
        return "SSECustomerAlgorithm" in found or found.get("ServerSideEncryption", "").startswith("aws:kms")

    def _written_by(self, key: str, writer: str) -> str | None:
        """The version, if this very call wrote it: its first answer was lost and its retry met its own object."""
        found = self._head(key)
        return _bare(found["ETag"]) if found and found.get("Metadata", {}).get(_WRITER) == writer else None

    def _require_bucket(self) -> None:
        """Asked once a process, after a HEAD's 404: that does not tell a missing object from a missing bucket."""
        if self._bucket_seen:
            return
        try:
            # No HeadBucket: a policy that lets list some prefixes only refuses it.
            self._some_keys(self._prefix)
        except S3_ERRORS as error:
            if not is_refused(error):  # who may not list a bucket still learns that it is there
                raise self._explain(error, "list", "") from error
        self._bucket_seen = True


def _bare(etag: str) -> str:
    return etag.strip('"')


def _transfer() -> TransferConfig:
    return TransferConfig(multipart_threshold=_MULTIPART, multipart_chunksize=16 << 20, max_concurrency=8)
