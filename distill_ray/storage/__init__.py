"""A flat key space on a local folder or S3: atomic objects, conditional writes, globs, staged folders."""

from distill_ray.storage.base import ConflictError, NotFoundError, ObjectInfo, Storage, StorageError
from distill_ray.storage.sources import glob_sources
from distill_ray.storage.staging import stage_folder, user_cache
from distill_ray.storage.uris import check_access, open_storage, split_uri

__all__ = [
    "ConflictError",
    "NotFoundError",
    "ObjectInfo",
    "Storage",
    "StorageError",
    "check_access",
    "glob_sources",
    "open_storage",
    "split_uri",
    "stage_folder",
    "user_cache",
]
