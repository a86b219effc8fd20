"""Proof, before a run begins, that an S3 store does what runs need of it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from botocore.client import BaseClient
from botocore.exceptions import ClientError

from distill_ray.storage.atomic import TEMPORARY
from distill_ray.storage.base import StorageError
from distill_ray.storage.s3_client import s3_client
from distill_ray.storage.s3_errors import S3_ERRORS, code_of, explain, status_of
from distill_ray.storage.s3_patience import persist
from distill_ray.storage.uris import split_s3

_QUICK_S = 5.0
"""A check at the start outlasts throttling, not an outage: the endpoint may be wrong."""


def check_s3(uri: str) -> None:
    """Prefix listable, a probe written under every kind of condition and deleted, within about 10 s.

    Raises StorageError: the bucket is not there, the keys may not do one of these, or the store does not keep the
    conditions of writes, by which a run has one writer.
    """
    client, (bucket, prefix) = s3_client(quick=True), split_s3(uri)
    probe = _Probe(client, bucket, f"{prefix}{TEMPORARY}check-{uuid.uuid4().hex}")
    with _explained("list", uri, client):
        persist(lambda: client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1), _QUICK_S)
    try:
        with _explained("write under", uri, client):
            fault = _fault_of_conditions(probe)
        if fault:
            raise StorageError(
                f"{uri} at {client.meta.endpoint_url}: one writer per run cannot be kept on this store: {fault}; use a "
                "store with conditional writes (AWS S3, MinIO, SeaweedFS), or a local or shared folder"
            )
        with _explained("delete under", uri, client):
            persist(probe.delete, _QUICK_S)
    except BaseException:
        with suppress(*S3_ERRORS):
            probe.delete()
        raise


@contextmanager
def _explained(action: str, uri: str, client: BaseClient) -> Iterator[None]:
    try:
        yield
    except S3_ERRORS as error:
        raise explain(error, action, uri, client.meta.endpoint_url) from error


def _fault_of_conditions(probe: _Probe) -> str | None:
    """How the store fails to keep a condition; None if it keeps each."""
    try:
        if not probe.write(b"1", IfNoneMatch="*"):
            return "it refuses the first write of a new key with If-None-Match: *"
        if probe.write(b"2", IfNoneMatch="*"):
            return "it ignores If-None-Match: * (it took a second write of one key)"
        version = probe.version()
        if not probe.write(b"3", IfMatch=version):
            return "it refuses If-Match with the ETag that the object has"
        if probe.write(b"4", IfMatch=version):
            return "it ignores If-Match (it took a write at an ETag that the object had no more)"
    except ClientError as error:
        if status_of(error) not in (400, 405, 501):
            raise
        # Refused for the condition, or for what every write has, as a checksum? That is then refused again.
        probe.write(b"5")
        return f"it answers a write with If-None-Match or If-Match by HTTP {status_of(error)} ({code_of(error)})"
    return None


@dataclass(frozen=True)
class _Probe:
    """An object whose key nobody else knows."""

    client: BaseClient
    bucket: str
    key: str

    def write(self, body: bytes, **condition: str) -> bool:
        """Whether the store took it. `body` must be another one than those written before."""

        def put() -> bool:
            self.client.put_object(Bucket=self.bucket, Key=self.key, Body=body, **condition)
            return True

        try:
            return persist(put, _QUICK_S)
        except ClientError as error:
            if status_of(error) not in (409, 412):
                raise
        # If the first answer was lost, its retry was refused because of what this very write had put.
        return self._body() == body

    def version(self) -> str:
        return persist(lambda: self.client.head_object(Bucket=self.bucket, Key=self.key)["ETag"], _QUICK_S)

    def delete(self) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self.key)

    def _body(self) -> bytes | None:
        def get() -> bytes:
            return self.client.get_object(Bucket=self.bucket, Key=self.key)["Body"].read()

        try:
            return persist(get, _QUICK_S)
        except ClientError as error:
            if status_of(error) == 404:
                return None
            raise
