"""Files that survive: made whole or not at all, written where it is asked, on the disk when it is said.

A `File` is open for writing from `made`, `kept` or `found` to `close`. Its space is reserved, its bytes go in place by
``pwrite``, the system is told to begin with them at once, and `sync` returns when they have reached the disk. Names are
durable after `sync_folder`. Whatever the system refuses is a `StoreError` that names the path. A sync that failed is
not tried again: the pages may be lost.

What the bytes mean is not known here.
"""

import ctypes
import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from .errors import StoreError, reported

PARTIAL = ".partial"
"""Ending of a file's name until it has reached the disk."""
WRITEBACK = 1 << 25
"""Bytes written after which the system is asked to begin with them: a sync then finds little left."""
_BEGIN = 2  # SYNC_FILE_RANGE_WRITE
_REFUSES = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def _sync_file_range() -> Callable[..., int] | None:
    try:
        call: Callable[..., int] = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):  # not Linux
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)  # type: ignore[attr-defined]
    return call


_begin_writing = _sync_file_range()


class File:
    """A file that is being written. needed: its size, for a message; what: it is, in words before its path."""

    def __init__(self, path: Path, fd: int, needed: int, what: str = "") -> None:
        self.path, self.fd, self.needed, self._what = path, fd, needed, what
        self._fresh = 0

    @classmethod
    def made(cls, path: Path, needed: int, what: str = "") -> "File":
        """A new one. Raises `StoreError` if there is one of this name."""
        return cls._opened(path, needed, what, os.O_CREAT | os.O_EXCL)

    @classmethod
    def kept(cls, path: Path, needed: int, what: str = "") -> "File":
        """One that is there, as it is, else a new one."""
        return cls._opened(path, needed, what, os.O_CREAT)

    @classmethod
    def found(cls, path: Path, needed: int, what: str = "") -> "File":
        """One that is there, as it is. Raises `StoreError` if it is of another size."""
        file = cls._opened(path, needed, what, 0)
        size = os.fstat(file.fd).st_size
        if size != needed:
            file.close()
            raise StoreError(f"{what}{path} has {size} bytes, not {needed}: it was cut or replaced")
        return file

    @classmethod
    def _opened(cls, path: Path, needed: int, what: str, flags: int) -> "File":
        with reported(path, needed, what):
            return cls(path, os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o666), needed, what)

    def reserve(self) -> None:
        """Take the disk space now, where the file system can: a run should not find it missing in hour three."""
        with reported(self.path, self.needed, self._what):
            try:
                os.posix_fallocate(self.fd, 0, max(1, self.needed))
            except OSError as error:
                if error.errno not in _REFUSES:
                    raise
            os.ftruncate(self.fd, self.needed)

    def write(self, data: memoryview, at: int) -> None:
        """All of ``data [bytes]``, at a byte."""
        with reported(self.path, self.needed, self._what):
            self._fresh += data.nbytes
            while data:
                done = os.pwrite(self.fd, data, at)
                data, at = data[done:], at + done
        if self._fresh >= WRITEBACK and _begin_writing is not None:
            self._fresh = 0
            _begin_writing(self.fd, 0, 0, _BEGIN)  # a hint: what it says of errors, the sync says too

    def read(self, room: memoryview, at: int) -> None:
        """Fill ``room [bytes]`` from a byte on."""
        with reported(self.path, self.needed, self._what):
            while room:
                got = os.preadv(self.fd, [room], at)
                if got == 0:
                    raise StoreError(f"{self._what}{self.path} ends at byte {at}: it was truncated")
                room, at = room[got:], at + got

    def sync(self) -> None:
        """What was written is on the disk when this returns."""
        with reported(self.path, self.needed, self._what):
            os.fdatasync(self.fd)

    def forget(self, at: int, size: int) -> None:
        """These bytes will not be read again: the page cache may use their place."""
        with reported(self.path, self.needed, self._what):
            os.posix_fadvise(self.fd, at, size, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """May be called twice."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    with reported(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def put(path: Path, *parts: memoryview) -> None:
    """A whole file, durably under its name, or not there: by way of ``*.partial`` beside it."""
    partial = path.with_name(path.name + PARTIAL)
    file, at = File.made(partial, sum(part.nbytes for part in parts)), 0
    try:
        for part in parts:
            file.write(part, at)
            at += part.nbytes
        file.sync()
    finally:
        file.close()
    with reported(path):
        os.rename(partial, path)
    sync_folder(path.parent)


def bytes_of(values: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order; shares its memory if that is contiguous."""
    # the new last dimension has stride 1 whatever the others have; torch counts a stray stride of a dimension of size 1
    # as contiguous and then refuses to view it as bytes
    return values.contiguous().unsqueeze(-1).view(torch.uint8).numpy().reshape(-1).data


def as_json(value: Any) -> memoryview:
    """For a reader too."""
    return memoryview(json.dumps(value, indent=1).encode() + b"\n")


def sealed(value: Mapping[str, Any]) -> memoryview:
    """A JSON file's bytes; its last key is the digest of all the others, so that an edit shows."""
    body = {key: item for key, item in value.items() if key != "digest"}
    return as_json({**body, "digest": xxh3_128_hexdigest(as_json(body))})
