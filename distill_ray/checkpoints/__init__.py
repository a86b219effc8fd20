"""Checkpoints of a run: shards of every rank, a manifest written last, and the lease's record that makes it count.

A checkpoint exists only if `lease.json` names its manifest with the manifest's checksum. Layout under a run:
`checkpoints/step-00000400/e0002/<file>` with the lease epoch, so that a driver that lost its lease can never write
over what its successor published.
"""

from distill_ray.checkpoints.manifest import Manifest, StoredFile, latest_whole, load_manifest, problems_of
from distill_ray.checkpoints.retention import prune, release
from distill_ray.checkpoints.shards import publish, restore, upload
from distill_ray.checkpoints.universal import forget_universal, store_universal, universal_of

__all__ = [
    "Manifest",
    "StoredFile",
    "forget_universal",
    "latest_whole",
    "load_manifest",
    "problems_of",
    "prune",
    "publish",
    "release",
    "restore",
    "store_universal",
    "universal_of",
    "upload",
]
