"""Whatever fails in whichever thread: the first error comes out of `run` as it was raised, and nothing is left behind.

The run can then be made again, and ends as if nothing had been.
"""

import gc
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from late import Late
from test_engine import content
from test_resume import sweep

from fpwap import commits, engine, outbox, reading, residual, slots, store, weights
from fpwap.errors import FpwapError, Interrupted, ModelError, StoreError

Checkpoint = Callable[[str], Path]
FULL = pytest.mark.full

STREAMED = {"loading": "stream", "residual": "disk", "layers_per_visit": 1}
IN_RAM = {"loading": "resident", "residual": "ram", "layers_per_visit": 1}
STAGES: dict[str, tuple[Any, str, dict[str, Any], bool]] = {
    "reads of a shard": (reading.Reader, "_read", STREAMED, False),
    "a stage's weights": (weights.Weights, "_stage", STREAMED, False),
    "what becomes of bytes": (weights._Loader, "load", IN_RAM, False),
    "rows read ahead": (residual.OnDisk, "_read_file", STREAMED, False),
    "rows written behind": (residual.OnDisk, "_write_file", STREAMED, False),
    "copies of rows": (slots.Copies, "_copy", IN_RAM, False),
    "names of files": (store.Store, "_publish", IN_RAM, False),
    "records": (commits.Commits, "_record", IN_RAM, False),
    "outputs on their way": (outbox.Outbox, "_hand_on", IN_RAM, True),
    "state": (commits._StateFile, "put", IN_RAM, False),
    "the maths": (engine, "_forward", IN_RAM, False),
}
"""Where it fails: class or module, name, request, whether on a device whose copies come late."""


def threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("fpwap"))


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No thread, descriptor or temporary file."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert threads() == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert os.listdir(temporary) == []


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run leaves, in whichever way."""
    return content(sweep(checkpoint("llama"), tmp_path_factory.mktemp("whole") / "out", **IN_RAM))


@pytest.mark.parametrize("where", list(STAGES))
@pytest.mark.parametrize(("kind", "at"), [(RuntimeError, 0), (OSError, 3), pytest.param(MemoryError, 1, marks=FULL)])
def test_an_error_in_any_stage_comes_out_as_it_was_raised(
    where: str,
    kind: type[Exception],
    at: int,
    checkpoint: Checkpoint,
    tmp_path: Path,
    eager: None,
    whole: dict[str, bytes],
) -> None:
    owner, name, request, late = STAGES[where]
    error = kind("injected")
    folder, plain, calls = checkpoint("llama"), getattr(owner, name), iter(range(10**6))

    def failing(*given: Any, **more: Any) -> Any:
        if next(calls) == at:
            raise error
        return plain(*given, **more)

    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        if late:
            patch.setattr("fpwap.sweep.open_device", lambda asked: Late(0))
        patch.setattr(owner, name, failing)
        with pytest.raises(Exception, match="injected") as caught:
            sweep(folder, tmp_path / "out", **request)
    assert time.monotonic() - began < 5
    assert caught.value is error or caught.value.__cause__ is error
    assert any(frame.name == "failing" for frame in caught.traceback) or caught.value.__cause__ is error
    assert content(sweep(folder, tmp_path / "out", **request)) == whole
    with pytest.MonkeyPatch.context() as patch:
        calls = iter(range(10**6))
        patch.setattr(owner, name, failing)
        if not late and where not in ("records", "state", "copies of rows"):  # a temporary run commits nothing
            with pytest.raises(Exception, match="injected"):
                sweep(folder, None, **request)  # type: ignore[arg-type]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("slow", ["a sync", "a read", "a callback"])
def test_a_signal_ends_it_within_five_seconds(
    slow: str,
    signum: signal.Signals,
    checkpoint: Checkpoint,
    tmp_path: Path,
    eager: None,
    whole: dict[str, bytes],
) -> None:
    """Whatever is waited for; here for as long as the run lasts, and two seconds more."""
    folder, out, release = checkpoint("llama"), tmp_path / "out", threading.Event()
    owner, name = {"a sync": (os, "fdatasync"), "a read": (os, "preadv"), "a callback": (engine, "_forward")}[slow]
    plain, reached = getattr(owner, name), threading.Event()

    def held(*given: Any) -> Any:
        if not reached.is_set():
            reached.set()
            threading.Timer(0.2, os.kill, (os.getpid(), signum)).start()
            release.wait(0.5 if slow == "a callback" else 2.5)
        return plain(*given)

    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, held)
        with pytest.raises(Interrupted) as caught:
            sweep(folder, out, **STREAMED)
    assert time.monotonic() - began < 5
    assert caught.value.signum == signum
    assert content(sweep(folder, out, **STREAMED)) == whole


@pytest.mark.parametrize("how", ["truncated", "replaced", "written to"])
def test_a_shard_that_changes_amid_the_run(
    how: str, checkpoint: Checkpoint, tmp_path: Path, eager: None, whole: dict[str, bytes]
) -> None:
    """It is named, the run goes on when it is back, and not with another one."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in checkpoint("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (shard,) = folder.glob("*.safetensors")
    kept, out, visits, plain = shard.read_bytes(), tmp_path / "out", iter(range(100)), engine._visit

    def changed(*given: Any) -> None:
        if next(visits) == 6:
            if how == "truncated":
                os.truncate(shard, len(kept) // 2)
            else:
                other = tmp_path / "other" if how == "replaced" else shard
                other.write_bytes(kept[:-4] + bytes(4))
                other.rename(shard)
        plain(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_visit", changed)
        with pytest.raises(ModelError, match=rf"{shard.name}.*{how}"):
            sweep(folder, out, loading="stream", residual="disk", layers_per_visit=1)
    with pytest.raises(FpwapError, match=r"model\.shards|truncated|safetensors"):
        sweep(folder, out, loading="stream", residual="disk", layers_per_visit=1)
    shard.write_bytes(kept)
    assert content(sweep(folder, out, loading="stream", residual="disk", layers_per_visit=1)) == whole


def test_a_shard_that_is_written_to_behind_its_maps(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """All layers in one visit, which are mapped before: nothing is read after that."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    (shard,) = folder.glob("*.safetensors")
    plain = engine._forward

    def changed(*given: Any) -> Any:
        os.utime(shard)
        return plain(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_forward", changed)
        with pytest.raises(ModelError, match=f"{shard.name} was written to"):
            sweep(folder, tmp_path / "out", loading="resident", layers_per_visit=100)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_two_runs_in_one_folder(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The second one is refused at once and told who is there; the first one does not notice."""
    folder, out, told = checkpoint("llama"), tmp_path / "out", list[str]()
    plain = engine._visit

    def meanwhile(*given: Any) -> None:
        if not told:
            told.append("")
            with pytest.raises(StoreError) as caught:
                sweep(folder, out)
            told[0] = str(caught.value)
        plain(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_visit", meanwhile)
        result = sweep(folder, out)
    assert f"process {os.getpid()} on {os.uname().nodename} is writing there" in told[0]
    result.verify()
