"""A file system that counts what is read through it: `counted:///folder`, for `prefloop bench scale`.

It is a folder of this machine that claims to be none, so a run on it goes the way of an object store. Every process that
reads adds to a file of its own in the folder that `PREFLOOP_COUNTS` names.
"""

import io
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

COUNTS_VARIABLE = "PREFLOOP_COUNTS"
_RAY_WORKER = "default_worker.py"


class CountedFileSystem(DirFileSystem):  # type: ignore[misc]  # fsspec has no annotations
    """The files of this machine, with bytes read counted by path."""

    protocol = "counted"

    def __init__(self, **options: Any) -> None:
        super().__init__(path="/", fs=LocalFileSystem(auto_mkdir=True), **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("counted://").strip("/")

    def _join(self, path: Any) -> Any:
        return self._strip_protocol(path) if isinstance(path, str) else super()._join(path)

    def _relpath(self, path: Any) -> Any:
        return path if isinstance(path, str) else super()._relpath(path)

    def open(self, path: str, mode: str = "rb", *arguments: Any, **options: Any) -> Any:
        """Open a file; what is read of it is counted."""
        stream = self.fs.open(self._join(path), mode, *arguments, **options)
        return _Counted(stream, self._join(path)) if mode == "rb" else stream

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """Return the content of a file."""
        content: bytes = self.fs.cat_file(self._join(path), start=start, end=end, **options)
        _count(self._join(path), len(content))
        return content

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        """Copy a file."""
        self.fs.get_file(self._join(rpath), lpath, **options)
        _count(self._join(rpath), self.fs.size(self._join(rpath)))


class _Counted(io.RawIOBase):
    def __init__(self, stream: Any, path: str) -> None:
        self._stream, self._path, self._bytes = stream, path, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def read(self, size: int | None = -1) -> bytes:
        content: bytes = self._stream.read(-1 if size is None else size)
        self._bytes += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            _count(self._path, self._bytes)
        super().close()


def _count(path: str, size: int) -> None:
    if (folder := os.environ.get(COUNTS_VARIABLE)) and size:
        with Path(folder, f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([path, Path(sys.argv[0]).name == _RAY_WORKER, size]) + "\n")


def counts(folder: Path) -> Mapping[tuple[str, bool], int]:
    """Return the bytes that were read, by path and by whether a process of Ray's read them or the driver."""
    found: Counter[tuple[str, bool]] = Counter()
    for file in folder.glob("*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            path, by_ray, size = json.loads(line)
            found[path, by_ray] += size
    return found
