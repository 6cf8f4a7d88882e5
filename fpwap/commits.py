"""Commits: when a run makes durable what it has come to, and what that is.

One record is one whole point to go on from: outputs and artifacts that got their names, outputs that are open and which
prompts are in them, callbacks' state, and the residual stream. What it takes is noted between two visits; it reaches
the disk beside the maths, in this order: files, their names, the record (`fpwap.journal`). Who goes on from a record
ends with the bytes of an undisturbed run, since the order of visits is the record's too.

With the residual stream on disk every group ends with a commit, since the next one writes over what the last record
needs. Else a commit is due when as much time has passed as makes its measured cost worth it: the square root of twice
that cost times `MTBF_S` (J. W. Young, "A first order approximation to the optimum checkpoint interval", 1974), but no
more than `AT_RISK_S`, unless its cost were more than `SHARE` of the time then.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128, xxh3_128_hexdigest

from .callbacks.base import Callback
from .costs import Way
from .errors import StoreError
from .files import File, bytes_of, sync_folder
from .folder import BEGIN_AGAIN, COMMITS
from .journal import Journal
from .residual import Residual
from .schedule import START, Point, Step
from .slots import Saved
from .store import Store
from .taps import Taps

MTBF_S = 86_400.0
"""Seconds between two interruptions, about: of machines that are lent for a day."""
AT_RISK_S = 600.0
"""Seconds of work that an interruption may cost."""
SHARE = 0.01
"""Of the time that commits may take."""
ALIGNED = 64
"""Bytes: where a tensor begins in a state file."""
_TENSOR = "$tensor"


class Committing(Protocol):
    """What the engine tells of a run's progress."""

    def after(self, step: Step, ahead: int) -> None:
        """A step and all before it are done; called between two steps. ahead: the row, of the wave's, that is next."""
        ...


class Uncommitted:
    """A run that cannot be gone on with."""

    def after(self, step: Step, ahead: int) -> None:
        pass


class Commits:
    """The commits of one run. way: its order of work; it goes into the first record. flush: as the engine's.

    callbacks: if a public attribute of one changes during the run, which `Callback.state_dict` does not know of, there
    are no more commits, and a warning. expected_s: what a commit costs, until the first one has been measured.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        store: Store,
        taps: Taps,
        residual: Residual,
        callbacks: Sequence[Callback],
        way: Way,
        flush: Callable[[], None],
        expected_s: float,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._journal, self._store, self._taps, self._residual = journal, store, taps, residual
        self._callbacks, self._flush, self._way, self._clock = callbacks, flush, way, clock
        self._configs = [callback.config() for callback in callbacks]
        self._number, self._told = len(journal.records), 0
        self._cost, self._since = expected_s, clock()
        self._last: Future[None] | None = None
        self._off = self._asked = False

    # --- going on ---

    def restore(self) -> Point:
        """Takes up what the last record holds; where the run stands then. Raises `StoreError` if a file is damaged."""
        if not self._journal.records:
            return START
        last = self._journal.records[-1]
        state = _StateFile.read(self._journal.folder, last["state"])
        done = [entry for record in self._journal.records for entry in record["done"]]
        self._told = len(done)
        records = self._store.restore(done, last["outputs"], state)
        self._taps.restore(last["taps"], records, partial(_loaded, fetch=state))
        if last["residual"] is not None:
            self._residual.restore(last["residual"])
        return Point(*last["point"])

    # --- committing ---

    def after(self, step: Step, ahead: int) -> None:
        if not self._asked:
            self._asked = True
            self._taps.state(partial(_plain, keep=lambda tensor: None))  # what cannot be kept is said now, not in hours
        turned = step.last and self._way.tier == "disk" and not self._way.one_visit
        if not self._off and (turned or self._due()) and self._resumable():
            self._commit(step.after, ahead, turned=turned)

    def _due(self) -> bool:
        if self._last is not None and not self._last.done():
            return False
        if self._last is not None:
            self._last.result()  # one that failed is the end: the next would be written over the last that did not
        worth = min(AT_RISK_S, math.sqrt(2 * self._cost * MTBF_S))
        return self._clock() - self._since >= max(worth, self._cost / SHARE)

    def _resumable(self) -> bool:
        """Whether all that the callbacks have gathered is in their state, as far as one can see."""
        for callback, before in zip(self._callbacks, self._configs, strict=True):
            now = callback.config()
            changed = sorted(name for name in now if now[name] != before.get(name))
            if changed:
                self._store.settle()
                self._journal.forget()
                self._off = True
                warnings.warn(
                    f"{type(callback).__name__} changes its public attribute {changed[0]!r} during the run, so the run "
                    "cannot be gone on with if it is interrupted: keep state in private attributes and give state_dict",
                    stacklevel=2,
                )
        return not self._off

    def _commit(self, point: Point, ahead: int, *, turned: bool) -> None:
        started = self._clock()
        self._taps.settle()
        self._flush()
        self._number += 1
        state = _StateFile(self._journal.folder / COMMITS / f"{self._number:06}.state")
        try:
            done = self._store.done(self._told)
            self._told += len(done)
            record: dict[str, Any] = {"point": list(point), "done": done}
            if self._number == 1:
                record["way"] = self._way.to_json()
            record["outputs"] = self._store.state(state.put)
            record["taps"] = self._taps.state(partial(_plain, keep=state.put))
            needed = point.group or point.done  # else the embedding makes it anew
            saving = self._residual.save(ahead) if needed and not self._way.one_visit else None
        except BaseException:
            state.file.close()
            raise
        self._since = self._clock()
        self._cost = self._since - started
        self._last = self._store.save(partial(self._record, record, state, saving), state.file)
        if turned:
            self._residual.hold(self._last)

    def _record(
        self, record: dict[str, Any], state: "_StateFile", saving: Callable[[], tuple[Saved, float]] | None
    ) -> None:
        """On the thread that makes things durable, behind all that the record speaks of."""
        began = thread_time()
        residual, busy = (None, 0.0) if saving is None else saving()
        words = state.finish()
        files = [*record["outputs"], words, *(residual["files"] if residual else ())]
        opened = [{"file": file["file"], "bytes": file["bytes"]} for file in files]
        self._journal.append({**record, "state": words, "residual": residual, "open": opened})
        before = state.path.with_name(f"{int(state.path.stem) - 1:06}.state")
        with suppress(OSError):  # whoever goes on removes it too
            before.unlink(missing_ok=True)
        self._cost += busy + thread_time() - began


# --- callbacks' state, and whatever else is tensors -----------------------------------------------------------------


class _StateFile:
    """Tensors one after the other in a file; what `put` returns says where, for `read`."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, File.made(path, 0)
        self._at, self._digest = 0, xxh3_128()

    def put(self, tensor: Tensor) -> dict[str, Any]:
        """Writes a tensor of any device, which may change afterwards."""
        data = bytes_of(tensor.detach().cpu())
        where = {_TENSOR: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), self._at]}
        for part in (data, memoryview(bytes(-data.nbytes % ALIGNED))):
            self.file.write(part, self._at)
            self._digest.update(part)
            self._at += part.nbytes
        return where

    def finish(self) -> dict[str, Any]:
        """All of it is on the disk, and nothing more is put: its name, size and digest."""
        with closing(self.file):
            self.file.sync()
        sync_folder(self.path.parent)
        name = f"{COMMITS}/{self.path.name}"
        return {"file": name, "bytes": self._at, "digest": self._digest.hexdigest()}

    @staticmethod
    def read(folder: Path, words: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Tensor]:
        """From what `put` returned to the tensor, which is nobody else's."""
        path = folder / words["file"]
        raw = np.fromfile(path, dtype=np.uint8)
        if xxh3_128_hexdigest(raw.data) != words["digest"]:
            raise StoreError(f"{path} is not what the run wrote: its digest differs; {BEGIN_AGAIN}")

        def fetch(kept: Mapping[str, Any]) -> Tensor:
            name, shape, at = kept[_TENSOR]
            dtype: torch.dtype = getattr(torch, name)
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            return torch.from_numpy(raw[at : at + size].copy()).view(dtype).view(shape)

        return fetch


def _plain(state: Any, keep: Callable[[Tensor], Any]) -> Any:
    """``state`` as JSON, each tensor by what ``keep`` gives for it."""
    match state:
        case Tensor():
            return keep(state)
        case Mapping():
            if not all(isinstance(name, str) for name in state):
                raise TypeError(f"a state is tensors and JSON, whose keys are words: {list(state)[:3]} are not")
            return {name: _plain(value, keep) for name, value in state.items()}
        case list() | tuple():
            return [_plain(value, keep) for value in state]
        case np.generic():
            return _plain(state.item(), keep)
        case None | bool() | int() | float() | str():
            return state
    raise TypeError(f"a state is tensors and JSON, not {type(state).__name__}")


def _loaded(kept: Any, fetch: Callable[[Mapping[str, Any]], Tensor]) -> Any:
    """The way back."""
    match kept:
        case Mapping() if _TENSOR in kept:
            return fetch(kept)
        case Mapping():
            return {name: _loaded(value, fetch) for name, value in kept.items()}
        case list():
            return [_loaded(value, fetch) for value in kept]
    return kept
