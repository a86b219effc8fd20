"""A flat key space on a local folder or S3: atomic objects, conditional writes, globs, staged folders."""

from distill_ray.storage.base import ConflictError, NotFoundError, ObjectInfo, Storage, StorageError
from distill_ray.storage.sources import find_sources, glob_to_regex
from distill_ray.storage.staging import WEIGHT_FILES, is_weights, stage_folder, user_cache
from distill_ray.storage.uris import check_access, is_s3, open_storage, split_uri
from distill_ray.storage.verified import download_verified, read_verified

__all__ = [
    "WEIGHT_FILES",
    "ConflictError",
    "NotFoundError",
    "ObjectInfo",
    "Storage",
    "StorageError",
    "check_access",
    "download_verified",
    "find_sources",
    "glob_to_regex",
    "is_s3",
    "is_weights",
    "open_storage",
    "read_verified",
    "split_uri",
    "stage_folder",
    "user_cache",
]
