"""Whose folder this is: a run's identity, written before anything else and compared by whoever comes next.

`claim` makes a folder ours or refuses it; `difference` says in which keys two identities differ. ``run.json`` holds the
identity, ``manifest.json`` (the store's, written last) says that the run is finished. What an interrupted run left is
removed only if every name in the folder is one that this library gives to its own files.

The module does not know what an identity is made of, nor what the files hold.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from archs.contract import MODEL_HOOKS

from .errors import StoreError

FORMAT, FORMAT_VERSION = "fpwap-run", 1
REQUEST, MANIFEST = "run.json", "manifest.json"

_OURS = re.compile(
    r"run\.json\.tmp|run\.json|(profile|plan|manifest)\.json(\.partial)?|prompts\.safetensors(\.partial)?"
    r"|scratch/[a-z_]+\.[ab]"
    rf"|(activations|artifacts)/(layer_\d{{3,}}\.[a-z_]+|{'|'.join(MODEL_HOOKS)})(\.[\w-]+)?\.safetensors(\.partial)?"
)
_OUR_FOLDERS = ("activations", "artifacts", "scratch")
_ABSENT = "(absent)"


def claim(folder: Path, identity: Mapping[str, Any]) -> Literal["new", "finished"]:
    """Make ``folder`` this run's: "new" (empty but for ``run.json``) or "finished" (a run of this identity is in it).

    identity: JSON. An unfinished run of the same identity is removed and begun again. Raises `StoreError`, and changes
    nothing, where the folder belongs to another run, holds anything that is not ours, or is being written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_finished(folder, identity):
            return "finished"
        with _locked(folder):
            if is_finished(folder, identity):
                return "finished"
            _clear(folder)
            _begin(folder, identity)
            return "new"
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{error.filename or folder}: {error.strerror or error}") from error


def difference(stored: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """Where two JSON values differ: (dotted key, stored, now), with "(absent)" for a key that one of them lacks."""
    old, new = dict(_flat(stored)), dict(_flat(now))
    keys = [*old, *(key for key in new if key not in old)]
    pairs = ((key, old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in keys)
    # as text, since 1 == True == 1.0
    return [
        (key, was, is_) for key, was, is_ in pairs if json.dumps(was, sort_keys=True) != json.dumps(is_, sort_keys=True)
    ]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a JSON value; a list without mappings in it is one leaf."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = list(enumerate(value))
    if not items:
        yield key, value
    for name, item in items:
        yield from _flat(item, f"{key}.{name}" if key else str(name))


def is_finished(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a run of this identity is complete in ``folder``; raises if the run there is of another identity."""
    if not (folder / REQUEST).exists():
        return False
    try:
        stored = json.loads((folder / REQUEST).read_bytes())
        form, identity_there = (stored["format"], stored["format_version"]), stored["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder / REQUEST} is not a record of a run ({error}); give another out=") from error
    if form != (FORMAT, FORMAT_VERSION):
        raise StoreError(f"{folder / REQUEST} is of format {form}, not {(FORMAT, FORMAT_VERSION)}; give another out=")
    rows = difference(identity_there, identity)
    if rows:
        cells = [("key", "stored", "now"), *((key, _short(was), _short(now)) for key, was, now in rows)]
        widths = [max(len(row[column]) for row in cells) for column in (0, 1)]
        table = "\n".join(f"  {key:<{widths[0]}}  {was:<{widths[1]}}  {now}" for key, was, now in cells)
        other = "another run" if (folder / MANIFEST).exists() else "another, unfinished run"
        raise StoreError(f"{folder} holds {other}; give another out= or remove that folder:\n{table}")
    return (folder / MANIFEST).exists()


def _short(value: Any, width: int = 48) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def _clear(folder: Path) -> None:
    """Remove what an unfinished run left, after a look at every name; without a record nothing there is ours."""
    begun = (folder / REQUEST).exists()
    files, folders = [], []
    for path in sorted(folder.iterdir()):
        inside = begun and path.name in _OUR_FOLDERS and path.is_dir() and not path.is_symlink()
        if inside:
            folders.append(path)
        files += sorted(path.iterdir()) if inside else [path]
    for path in files:
        name = path.relative_to(folder).as_posix()
        ours = _OURS.fullmatch(name) if begun else name == f"{REQUEST}.tmp"
        if not ours or path.is_symlink() or not path.is_file():
            raise StoreError(f"{folder} holds {name!r}, which no run of fpwap left there; give another out=")
    for path in files:
        if path.name != REQUEST:
            path.unlink()
    for path in folders:
        path.rmdir()


def _begin(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write ``run.json``: complete and durable, or not there."""
    record = {"format": FORMAT, "format_version": FORMAT_VERSION, "identity": identity}
    partial = folder / f"{REQUEST}.tmp"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / REQUEST)
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for a moment, and find out whether a running store holds it."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"{folder}: another run is writing there; wait for it or give another out=") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(fd)
