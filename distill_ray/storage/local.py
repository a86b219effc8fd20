"""Storage on a local or shared POSIX folder."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from distill_ray.storage.atomic import (
    LOCK,
    TEMPORARY,
    create_durably,
    explain_os,
    is_hidden,
    locked,
    replace_durably,
    temporary_beside,
)
from distill_ray.storage.base import ConflictError, NotFoundError, ObjectInfo, StorageError

# A path through a file, or the path of a folder: no object has that key.
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def local_version(status: os.stat_result) -> str:
    """Size and modification time in nanoseconds, which every write of this storage moves forward."""
    return f"{status.st_size:x}-{status.st_mtime_ns:x}"


class LocalStorage:
    """Objects are plain files under the folder; `put_if` makes a new one by a hard link, which never replaces, and
    holds a lock file beside one that it replaces.

    Conditional writes exclude each other over every process that sees the folder through one kernel, or through a
    network file system that carries hard links and flock.
    """

    def __init__(self, uri: str) -> None:
        self._root = Path(os.path.abspath(os.path.expanduser(uri)))

    @property
    def uri(self) -> str:
        return str(self._root)

    def get(self, key: str) -> bytes:
        return self.get_versioned(key)[0]

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        with self._reading(key) as stream:
            # One descriptor for both: a rename in between cannot pair new bytes with an old version.
            version = local_version(os.fstat(stream.fileno()))
            return stream.read(), version

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._reading(key) as stream:
            stream.seek(start)
            return stream.read(length)

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._writing(path, len(data)) as temporary:
            temporary.write_bytes(data)
            self._replace(temporary, path)

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        path = self._path(key)
        with self._writing(path, len(data)) as temporary:
            temporary.write_bytes(data)
            if version is None:
                return self._create(key, temporary, path)
            with _exclusive(path):
                info = self.head(key)
                found = info.version if info else None
                if found != version:
                    raise ConflictError(f"{path} is at version {found}, not at {version}; nothing was written")
                replace_durably(temporary, path)
                return local_version(path.stat())

    def _create(self, key: str, temporary: Path, path: Path) -> str:
        try:
            create_durably(temporary, path)
        except FileExistsError:
            info = self.head(key)
            raise ConflictError(
                f"{path} is at version {info.version if info else None}, not at None; nothing was written"
            ) from None
        return local_version(path.stat())

    def upload(self, path: Path, key: str) -> None:
        target = self._path(key)
        with self._writing(target, path.stat().st_size) as temporary:
            shutil.copyfile(path, temporary)
            self._replace(temporary, target)

    def download(self, key: str, path: Path) -> None:
        path = Path(path)
        with self._reading(key) as stream, self._writing(path, os.fstat(stream.fileno()).st_size) as temporary:
            with temporary.open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
            replace_durably(temporary, path)

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        try:
            return _info(key, path) if not path.is_dir() else None
        except _ABSENT:
            return None
        except OSError as error:
            raise explain_os(error, path, "read") from error

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        folder, _, start = prefix.rpartition("/")
        yield from self._walk(self._root / folder, f"{folder}/" if folder else "", start)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            if _lock_of(path).exists():
                with _exclusive(path):
                    path.unlink()
            else:
                path.unlink()
            for parent in path.parents:
                if parent == self._root:
                    break
                parent.rmdir()
        except _ABSENT:
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise explain_os(error, path, "delete") from error

    def half_written(self) -> Iterator[ObjectInfo]:
        for folder, _, names in os.walk(self._root):
            for name in names:
                if name.startswith(TEMPORARY):
                    path = Path(folder, name)
                    try:
                        yield _info(path.relative_to(self._root).as_posix(), path)
                    except FileNotFoundError:  # it became an object since the folder was read
                        continue

    def discard(self, info: ObjectInfo) -> None:
        path = self._root / info.key
        assert path.name.startswith(TEMPORARY), info
        path.unlink(missing_ok=True)

    def open_input(self, key: str) -> IO[bytes]:
        path = self._path(key)
        try:
            return path.open("rb")
        except _ABSENT:
            raise NotFoundError(f"no such file: {path}") from None
        except OSError as error:
            raise explain_os(error, path, "read") from error

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if any(part in ("", ".", "..") for part in parts) or is_hidden(parts[-1]):
            raise ValueError(f"bad storage key {key!r}: no empty, '.', '..' or hidden parts")
        return self._root.joinpath(*parts)

    def _replace(self, temporary: Path, path: Path) -> None:
        if _lock_of(path).exists():
            # Somebody writes this key conditionally: a bare rename could fall between their check and theirs.
            with _exclusive(path):
                replace_durably(temporary, path)
        else:
            replace_durably(temporary, path)

    @contextmanager
    def _reading(self, key: str) -> Iterator[IO[bytes]]:
        with self.open_input(key) as stream:
            try:
                yield stream
            except IsADirectoryError:
                raise NotFoundError(f"no such file: {self._path(key)}") from None

    @contextmanager
    def _writing(self, path: Path, size: int) -> Iterator[Path]:
        try:
            with temporary_beside(path) as temporary:
                yield temporary
        except OSError as error:
            raise explain_os(error, path, "write", size) from error

    def _walk(self, folder: Path, base: str, start: str) -> Iterator[ObjectInfo]:
        try:
            with os.scandir(folder) as entries:
                # With its slash a folder sorts where its keys do: "a-b" < "a/b" < "a0".
                found = sorted((e.name + "/" if e.is_dir() else e.name, e.path) for e in entries)
        except _ABSENT:
            return
        except OSError as error:
            raise explain_os(error, folder, "list") from error
        for name, path in found:
            if not name.startswith(start) or is_hidden(name):
                continue
            if name.endswith("/"):
                yield from self._walk(Path(path), base + name, "")
                continue
            try:
                info = _info(base + name, Path(path))
            except FileNotFoundError:  # deleted since the folder was read
                continue
            yield info


def _lock_of(path: Path) -> Path:
    return path.with_name(LOCK + path.name)


def _exclusive(path: Path) -> AbstractContextManager[None]:
    # Held for a check, an fsync and a rename: whoever has it for longer than this was paused in there.
    return locked(_lock_of(path), 30.0)


def _info(key: str, path: Path) -> ObjectInfo:
    status = path.stat()
    return ObjectInfo(key, status.st_size, local_version(status), status.st_mtime)


def check_local(uri: str) -> None:
    """Prove that files can be made at `uri`, or where its first missing folder would be made. Leaves nothing.

    Raises StorageError.
    """
    root = Path(LocalStorage(uri).uri)
    folder = root
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise StorageError(f"{folder} is a file, so {root} cannot be a folder; choose another storage root")
    try:
        with temporary_beside(folder / "probe") as probe:
            probe.write_bytes(b"probe")
            os.listdir(folder)
    except OSError as error:
        raise explain_os(error, root, "write under", 5) from error
