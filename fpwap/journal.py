"""Whose folder this is, and how far its run has come: the identity, the lock, and the commit records.

`Journal.open` makes a folder ours until `close`, or refuses it: ``run.lock`` says who holds it. ``run.json`` holds the
run's identity, which is compared by whoever comes next; ``manifest.json`` (the store's, written last) says that the run
is finished. Between the two lie commit records, ``scratch/commits/000001.json`` and so on. Each names all that a run
needs to go on from there, and holds its own digest and that of the record before: the last one counts. `begin` removes
what it does not name, and only if every name in the folder is one that this library gives to its own files.

The module does not know what an identity is made of, nor what the files hold.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from xxhash import xxh3_128_hexdigest

from archs.contract import MODEL_HOOKS

from .errors import StoreError, reported
from .files import PARTIAL, as_json, put, sealed, sync_folder
from .folder import BEGIN_AGAIN, COMMITS, FORMAT, FORMAT_VERSION, LOCK, MANIFEST, REQUEST, SCRATCH

Resume = Literal["auto", "never", "require"]
"""What becomes of an unfinished run of the same identity: it is gone on with; begun again; there has to be one."""

_OURS = re.compile(
    r"run\.lock|(run|profile|manifest)\.json(\.partial)?|prompts\.safetensors(\.partial)?"
    r"|scratch/[a-z_]+\.[ab]|scratch/commits/\d{6,}\.(json|state)(\.partial)?"
    rf"|(activations|artifacts)/(layer_\d{{3,}}\.[a-z_]+|{'|'.join(MODEL_HOOKS)})(\.[\w-]+)?\.safetensors(\.partial)?"
)
_OUR_FOLDERS = ("activations", "artifacts", SCRATCH)
_ABSENT = "(absent)"
_ENVIRONMENT = "environment."


class Journal:
    """A run folder while it is ours.

    finished: whether a run of this identity is complete in it. records: the commit records of an unfinished one, eldest
    first; none where it is to begin from the start. identity: what was given; where there are records what is stored,
    which differs from it in what was allowed to.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, dict(identity)
        self.finished = False
        self.records: list[dict[str, Any]] = []
        self._begun = self._made = False
        self._above: list[Path] = []
        self._lock, self._ours = -1, threading.Lock()
        self._last = ""

    @classmethod
    def open(
        cls,
        folder: Path,
        identity: Mapping[str, Any],
        *,
        resume: Resume = "auto",
        allow: Collection[str] = (),
    ) -> "Journal":
        """Makes ``folder`` ours; nothing in it is changed before `begin`.

        identity: JSON. allow: keys of its "environment" that may differ from what is stored. Raises `StoreError` where
        the folder is being written to or belongs to another run, where ``resume`` is "require" and there is no run to
        go on with, or where what was committed is damaged.
        """
        journal = cls(folder, identity)
        with reported(folder):
            journal._made = not folder.exists()
            if not journal._made and not folder.is_dir():
                raise StoreError(f"{folder} is a file; out= names a folder")
            journal._above = [folder.parent, *(path.parent for path in folder.parents if not path.exists())]
            folder.mkdir(parents=True, exist_ok=True)
        try:
            journal._hold()
            journal._look(resume, allow)
        except BaseException:
            journal.close()
            raise
        return journal

    def begin(self, command: Mapping[str, Any] | None = None) -> None:
        """The run starts, or goes on: what the last record does not name is removed; ``run.json`` is this run's.

        command: kept beside the identity, for whoever wants to ask for the same again.
        """
        with reported(self.folder):
            last = self.records[-1] if self.records else {"open": []}
            done = [file["file"] for record in self.records for file in record["done"]]
            kept = {*done, *(file["file"] for file in last["open"])}
            kept |= {f"{COMMITS}/{number + 1:06}.json" for number in range(len(self.records))}
            _clear(self.folder, kept)
            self._begun = True
            if not self.records:
                record = {"format": FORMAT, "format_version": FORMAT_VERSION, "identity": self.identity}
                put(self.folder / REQUEST, as_json(record | ({"command": command} if command else {})))
                for path in self._above:
                    sync_folder(path)
            for name in (SCRATCH, COMMITS):
                (self.folder / name).mkdir(exist_ok=True)
                sync_folder((self.folder / name).parent)
            self._last = last.get("digest") or xxh3_128_hexdigest((self.folder / REQUEST).read_bytes())

    def append(self, record: Mapping[str, Any]) -> None:
        """One more commit record, durable when this returns.

        record: JSON with "open", the files of which it depends on the contents, and "done", those that have got their
        final names since the record before; each {"file", "bytes"}, all of them durable. Called by a thread, which may
        outlive an end that was hurried: raises `StoreError` once the journal is closed.
        """
        with self._ours:
            if self._lock < 0:
                raise StoreError(f"{self.folder} is not this run's any more")
            body = {"number": len(self.records) + 1, "before": self._last, **record}
            raw = sealed(body)
            put(self.folder / COMMITS / f"{body['number']:06}.json", raw)
            self.records.append(json.loads(bytes(raw)))
            self._last = self.records[-1]["digest"]

    def forget(self) -> None:
        """The run can only be begun again: its records are removed, the first one first."""
        with reported(self.folder):
            for number in range(len(self.records)):
                (self.folder / COMMITS / f"{number + 1:06}.json").unlink()
            sync_folder(self.folder / COMMITS)
        self.records.clear()

    def close(self) -> None:
        """The folder is anybody's. May be called twice; a run that never began leaves nothing."""
        with self._ours:
            if self._lock >= 0:
                lock, self._lock = self._lock, -1
                with contextlib.suppress(OSError):
                    if _same(self.folder / LOCK, lock):
                        (self.folder / LOCK).unlink()
                os.close(lock)
        if self._made and not self._begun:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- the lock ---

    def _hold(self) -> None:
        """Takes the lock, or says who has it."""
        path = self.folder / LOCK
        with reported(path):
            while True:
                self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                        self._refuse(path)
                    elif _alive(_holder(path)):  # a file system without locks
                        self._refuse(path, f"; if that process is gone, remove {path}")
                if _same(path, self._lock):
                    break
                os.close(self._lock)  # the one who had it took it away meanwhile
                self._lock = -1
            words = as_json({"pid": os.getpid(), "host": socket.gethostname()})
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, words, 0)

    def _refuse(self, path: Path, advice: str = "") -> None:
        holder = _holder(path)
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        os.close(self._lock)
        self._lock = -1
        raise StoreError(f"{self.folder}: {who} is writing there; wait for it or give another out={advice}")

    # --- what is there ---

    def _look(self, resume: Resume, allow: Collection[str]) -> None:
        self.finished = is_finished(self.folder, self.identity, allow=allow)
        unfinished = not self.finished and (self.folder / REQUEST).exists()
        if resume == "require" and not self.finished and not unfinished:
            raise StoreError(f"{self.folder} holds no run to go on with: leave resume='require' out to begin one")
        names = list(_names(self.folder)) if not self.finished else []
        if unfinished and resume != "never":
            numbers = sorted(name for name in names if name.startswith(COMMITS) and name.endswith(".json"))
            if f"{COMMITS}/{1:06}.json" not in numbers:  # whoever began to remove them took the first one first
                numbers = []
            before = xxh3_128_hexdigest((self.folder / REQUEST).read_bytes())
            for number, name in enumerate(numbers):
                self.records.append(_record(self.folder / name, number + 1, before))
                before = self.records[-1]["digest"]
            if self.records:
                self.identity = _read(self.folder / REQUEST)["identity"]
            for file in (file for record in self.records for file in record["done"]):
                _check(self.folder / file["file"], file["bytes"])
            for file in self.records[-1]["open"] if self.records else ():
                path = self.folder / file["file"]
                final = path.with_suffix("") if path.suffix == PARTIAL else path
                _check(final if final.exists() and not path.exists() else path, file["bytes"])


def is_finished(folder: Path, identity: Mapping[str, Any], *, allow: Collection[str] = ()) -> bool:
    """Whether a run of this identity is complete in ``folder``; raises if the run there is of another identity."""
    if not (folder / REQUEST).exists():
        return False
    rows = [
        row
        for row in difference(_read(folder / REQUEST)["identity"], identity)
        if row[0] not in {_ENVIRONMENT + name for name in allow}
    ]
    if rows:
        other = "another run" if (folder / MANIFEST).exists() else "another, unfinished run"
        raise StoreError(f"{folder} holds {other}; give another out= or remove that folder:\n{_table(rows)}")
    return (folder / MANIFEST).exists()


def command_of(folder: Path) -> Mapping[str, Any]:
    """How the run in ``folder`` was asked for. Raises `StoreError` where nothing says so."""
    if not (folder / REQUEST).exists():
        raise StoreError(f"{folder} holds no run: there is no {REQUEST} in it")
    found = _read(folder / REQUEST).get("command")
    if not isinstance(found, Mapping):
        raise StoreError(
            f"{folder} holds a run that a Python program asked for: run that program again to go on with it"
        )
    return found


def difference(stored: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """Where two JSON values differ: (dotted key, stored, now), with "(absent)" for a key that one of them lacks."""
    old, new = dict(_flat(stored)), dict(_flat(now))
    keys = [*old, *(key for key in new if key not in old)]
    pairs = ((key, old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in keys)
    # as text, since 1 == True == 1.0
    return [
        (key, was, is_) for key, was, is_ in pairs if json.dumps(was, sort_keys=True) != json.dumps(is_, sort_keys=True)
    ]


def tidy(folder: Path) -> None:
    """Removes what a finished run needs no more, where that was lost; what cannot be removed stays."""
    if not ((folder / SCRATCH).exists() or (folder / LOCK).exists()):
        return
    with contextlib.suppress(OSError):
        for path in list(_files(folder, begun=True)):
            name = path.relative_to(folder).as_posix()
            left = name.startswith(f"{SCRATCH}/") and _OURS.fullmatch(name) and path.is_file() and not path.is_symlink()
            if left or (name == LOCK and not _alive(_holder(path))):
                path.unlink(missing_ok=True)
        for name in (COMMITS, SCRATCH):
            if (folder / name).is_dir():
                (folder / name).rmdir()


# --- the table of a refusal -----------------------------------------------------------------------------------------


def _table(rows: Sequence[tuple[str, Any, Any]]) -> str:
    """key, stored, now, and what would allow it."""
    cells = [("key", "stored", "now", "to go on all the same")]
    for key, was, now in rows:
        name = key.removeprefix(_ENVIRONMENT)
        cells.append((key, _short(was), _short(now), f"allow=[{name!r}]" if name != key else ""))
    if not any(row[3] for row in cells[1:]):
        cells = [(*row[:3], "") for row in cells]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in cells)
    return "\n".join(f"  {line}".rstrip() for line in lines)


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


def _short(value: Any, width: int = 48) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= width else text[: width - 3] + "..."


# --- reading what is there ------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    """What ``run.json`` holds."""
    try:
        stored: dict[str, Any] = json.loads(path.read_bytes())
        form, _ = (stored["format"], stored["format_version"]), stored["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is not a record of a run ({error}); give another out=") from error
    if form != (FORMAT, FORMAT_VERSION):
        raise StoreError(f"{path} is of format {form}, not {(FORMAT, FORMAT_VERSION)}; give another out=")
    return stored


def _record(path: Path, number: int, before: str) -> dict[str, Any]:
    """The commit record of a number, behind the record of digest ``before``."""
    with reported(path):
        raw = path.read_bytes()
    try:
        found: dict[str, Any] = json.loads(raw)
        sound = (found["number"], found["before"]) == (number, before) and sealed(found) == raw
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise StoreError(f"{path} is not what the run wrote: its digest differs; {BEGIN_AGAIN}")
    return found


def _check(path: Path, size: int) -> None:
    """That a committed file is there and has its size."""
    if not path.is_file() or path.is_symlink():
        raise StoreError(f"{path} is missing, and was committed; {BEGIN_AGAIN}")
    if path.stat().st_size != size:
        raise StoreError(f"{path} has {path.stat().st_size} bytes, not {size}: it was cut or replaced; {BEGIN_AGAIN}")


def _holder(path: Path) -> dict[str, Any] | None:
    """Who says in the lock file that it is theirs."""
    try:
        found = json.loads(path.read_bytes())
        return {"pid": int(found["pid"]), "host": str(found["host"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _alive(holder: Mapping[str, Any] | None) -> bool:
    """Whether a process may be there yet; of another machine nobody can tell."""
    if holder is None or holder["pid"] == os.getpid():
        return False
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _same(path: Path, descriptor: int) -> bool:
    """Whether a path still is the file that is open."""
    try:
        named, held = os.stat(path), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)


# --- removing -------------------------------------------------------------------------------------------------------


def _files(folder: Path, *, begun: bool) -> Iterator[Path]:
    """What lies in a run folder, and in the folders of a run that has begun there."""

    def look(path: Path) -> Iterator[Path]:
        name = path.relative_to(folder).as_posix()
        if begun and name in (*_OUR_FOLDERS, COMMITS) and path.is_dir() and not path.is_symlink():
            for inner in sorted(path.iterdir()):
                yield from look(inner)
        else:
            yield path

    for top in sorted(folder.iterdir()):
        yield from look(top)


def _names(folder: Path) -> Iterator[str]:
    """Every name in a run folder that may be ours, ``activations/...`` and so on. Raises `StoreError` at another's."""
    begun = (folder / REQUEST).exists()
    for path in _files(folder, begun=begun):
        name = path.relative_to(folder).as_posix()
        ours = _OURS.fullmatch(name) if begun else name in (LOCK, REQUEST + PARTIAL)
        if not ours or path.is_symlink() or not path.is_file():
            advice = "move it away" if begun else "give another out="
            raise StoreError(f"{folder} holds {name!r}, which no run of fpwap left there; {advice}")
        yield name


def _clear(folder: Path, kept: Collection[str]) -> None:
    """Removes all but ``kept``, after a look at every name: records first, since they speak of the others.

    What got its final name after the last record is partial again.
    """
    for name in sorted(_names(folder), key=lambda name: not name.startswith(COMMITS)):
        if name + PARTIAL in kept and not (folder / (name + PARTIAL)).exists():
            os.rename(folder / name, folder / (name + PARTIAL))
        elif name not in kept and name not in (REQUEST, LOCK):
            (folder / name).unlink()
    if not kept:
        for name in (COMMITS, *_OUR_FOLDERS):
            if (folder / name).is_dir():
                (folder / name).rmdir()
