"""A flat key space on a local folder or S3: atomic objects, conditional writes, globs, staged folders."""

from distill_ray.storage.base import ConflictError, NotFoundError, ObjectInfo, Storage, StorageError
from distill_ray.storage.model_files import MOST_HEADER, WEIGHT_FILES, model_files, weight_files
from distill_ray.storage.sources import find_sources, matching
from distill_ray.storage.staging import stage_folder, user_cache
from distill_ray.storage.uris import check_access, is_s3, open_storage, split_uri
from distill_ray.storage.verified import download_verified, read_verified

__all__ = [
    "MOST_HEADER",
    "WEIGHT_FILES",
    "ConflictError",
    "NotFoundError",
    "ObjectInfo",
    "Storage",
    "StorageError",
    "check_access",
    "download_verified",
    "find_sources",
    "is_s3",
    "matching",
    "model_files",
    "open_storage",
    "read_verified",
    "split_uri",
    "stage_folder",
    "user_cache",
    "weight_files",
]
