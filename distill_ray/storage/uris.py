"""Which store a URI names. Nothing here touches a disk or a network."""

from __future__ import annotations

import re
from pathlib import Path

from distill_ray.errors import UserError
from distill_ray.storage.base import Storage


def is_s3(uri: str) -> bool:
    """True for `s3://…`. Raises UserError for any other scheme, which would otherwise become a folder's name."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if scheme and scheme[1].lower() != "s3":
        raise UserError(
            f"{uri}: scheme {scheme[1]!r} is not supported; give an s3:// URI or a local path without a scheme"
        )
    return scheme is not None


def split_s3(uri: str) -> tuple[str, str]:
    """Bucket and prefix of an `s3://` URI; the prefix is empty or ends with a slash: "s3://b/x", "s3://b/x/" → "x/".

    Every other slash stays: "d//x" and "/x" are keys of their own. Raises UserError.
    """
    bucket, _, prefix = uri[len("s3://") :].partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]", bucket):
        raise UserError(
            f"{uri}: {bucket!r} is no bucket name (3 to 63 lower-case letters, digits, dots or hyphens); "
            "write s3://bucket/prefix"
        )
    return bucket, prefix if not prefix or prefix.endswith("/") else f"{prefix}/"


def join_s3(bucket: str, prefix: str) -> str:
    """The shortest URI that `split_s3` takes apart into these."""
    short = prefix[:-1]
    if prefix and (not short or short.endswith("/")):
        short = prefix  # "s3://b/d/" is the folder "d/": only a further slash says "d//"
    return f"s3://{bucket}/{short}" if short else f"s3://{bucket}"


def split_uri(uri: str) -> tuple[str, str]:
    """Folder and last name: "s3://b/p/x.parquet" → ("s3://b/p", "x.parquet"); a local path alike.

    Raises UserError where nothing is left to name, as in "s3://b", "s3://b/d//" or "/".
    """
    if is_s3(uri):
        bucket, prefix = split_s3(uri)
        folder, slash, name = prefix[:-1].rpartition("/")
        root = join_s3(bucket, folder + slash)
    else:
        root, name = str(Path(uri).parent), Path(uri).name
    if not name:
        raise UserError(f"{uri!r} names a store or a folder and no object in it; add a file name")
    return root, name


def open_storage(uri: str) -> Storage:
    """The store at `uri`: `s3://bucket/prefix` or a local folder (made at the first write).

    Credentials, region and endpoint come from the standard AWS chain (AWS_ENDPOINT_URL, AWS_PROFILE, roles …) at
    the first request of each process, so the result can be pickled and holds no secret.
    """
    if is_s3(uri):
        from distill_ray.storage.s3 import S3Storage

        return S3Storage(uri)
    from distill_ray.storage.local import LocalStorage

    return LocalStorage(uri)


def check_access(uri: str) -> None:
    """Prove within about 10 s that `uri` can be listed, written and deleted under; on S3 also that writes keep their
    conditions.

    Raises StorageError naming the bucket or folder, the endpoint and the remedy.
    """
    if is_s3(uri):
        from distill_ray.storage.s3_check import check_s3

        check_s3(uri)
    else:
        from distill_ray.storage.local import check_local

        check_local(uri)
