"""Files that came from somebody else: opened without a wait, bounded before they are read, JSON read strictly.

Only regular files inside the model's own folder are opened, or in the blob store of the hub cache that the folder is a
snapshot of. What the files mean is not known here.
"""

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from .errors import ModelError

MOST_JSON = 1 << 25
"""Bytes that a JSON file or a header may have; a trillion parameters in shards need 15 MB."""
MOST_ITEMS = 4_000_000
"""Values that it may hold: what they take in memory is bounded too."""
DEEPEST = 32
"""Levels of nesting; no config that is written has ten."""


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file, for reading; a FIFO, a socket or a device is refused at once.

    Raises `ModelError`.
    """
    folder = path.parent
    real = os.path.realpath(path)
    if not _is_inside(real, folder):
        raise ModelError(f"{path} leads to {real!r}, outside the model's folder: put the file there, not a link")
    try:
        descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        raise ModelError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ModelError(f"{path} is not a regular file")
        yield descriptor
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _is_inside(real: str, folder: Path) -> bool:
    home = os.path.realpath(folder)
    above, repository = os.path.basename(os.path.dirname(home)), os.path.dirname(os.path.dirname(home))
    blobs = os.path.realpath(os.path.join(repository, "blobs"))
    return real.startswith(home + os.sep) or (above == "snapshots" and os.path.dirname(real) == blobs)


def read_part(descriptor: int, begin: int, end: int) -> bytes:
    """Bytes ``begin`` to ``end`` of a file, or up to its end."""
    parts, at = [], begin
    while at < end and (part := os.pread(descriptor, end - at, at)):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def read_json(path: Path, *, unique: bool = False) -> Any:
    """What a JSON file holds. unique: no key of an object may come twice. Raises `ModelError`."""
    with opened(path) as descriptor:
        raw = read_part(descriptor, 0, MOST_JSON + 1)
    try:
        return parse(raw, unique=unique)
    except ValueError as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error


def parse(raw: bytes, *, unique: bool = False, numbers: Callable[[str], Any] | None = None) -> Any:
    """JSON in UTF-8. numbers: reads each number instead of Python. Raises `ValueError` with what is wrong."""
    if len(raw) > MOST_JSON:
        raise ValueError(f"it is longer than {MOST_JSON} bytes")
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MOST_ITEMS:
        raise ValueError(f"it holds more than {MOST_ITEMS} values")
    reading: dict[str, Any] = {"object_pairs_hook": _unique} if unique else {}
    if numbers is not None:
        reading |= dict.fromkeys(("parse_int", "parse_float", "parse_constant"), numbers)
    try:
        found = json.loads(raw.decode(), **reading)
        _walk(found)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(twice)} comes twice")
    return made


def _walk(found: Any) -> None:
    """Refuses what Python reads and cannot write: great depth, halves of surrogate pairs."""
    level = [found]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, str):
                _whole(value)
            elif isinstance(value, dict):
                for key in value:
                    _whole(key)
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
        if not inner:
            return
        level = inner
    raise ValueError("it is nested too deeply")


def _whole(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("it is not Unicode: it holds half of a surrogate pair") from error


def shown(value: object) -> str:
    """As an error shows it: one line, in bounds."""
    from archs.contract import shown  # brings torch, which reading a command line does without

    return shown(value)


def one_line(error: BaseException) -> str:
    """What somebody else's exception says, in one line that can be printed."""
    words = " ".join(str(error)[:1000].split())
    return "".join(sign for sign in words if sign.isprintable())[:300]


def is_plain(name: object) -> TypeGuard[str]:
    """Whether it can be printed as it is: a string, not too long, of one line, with no control characters."""
    return isinstance(name, str) and 0 < len(name) <= 512 and name.isprintable()
