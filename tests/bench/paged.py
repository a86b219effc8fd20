"""A store whose target objects are names in a listing, for benches of a million of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from distill_ray.storage import ObjectInfo
from distill_ray.storage.local import LocalStorage
from distill_ray.units import texts

PAGE = 1000
"""Keys that S3 gives in one answer."""
OBJECT_BYTES = 4 << 20
MODIFIED = 1.0
"""Before anything could have been indexed."""


class PagedStorage(LocalStorage):
    """A folder, and besides `<prefix><hash>.parquet` for every hash of a file, which can be listed and not read.

    Listings come as S3's do: a page at a time, each made when it is asked for. Calls are counted.

    Args:
        folder: where all other objects lie.
        prefix: of the listed objects.
        hashes: `.npy` of ascending `units.HASH`.
    """

    def __init__(self, folder: Path, prefix: str, hashes: Path) -> None:
        super().__init__(str(folder))
        self._prefix, self._hashes = prefix, np.load(hashes, mmap_mode="r")
        self.list_calls = self.gets = 0

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        objects = chain(self._named(prefix), super().list(prefix))
        while True:
            page = list(islice(objects, PAGE))
            self.list_calls += 1
            yield from page
            if len(page) < PAGE:
                return

    def get(self, key: str) -> bytes:
        self.gets += 1
        return super().get(key)

    def _named(self, prefix: str) -> Iterator[ObjectInfo]:
        if not self._prefix.startswith(prefix):
            return
        for start in range(0, len(self._hashes), PAGE):
            for unit in texts(self._hashes[start : start + PAGE]):
                yield ObjectInfo(f"{self._prefix}{unit}.parquet", OBJECT_BYTES, unit, MODIFIED)
