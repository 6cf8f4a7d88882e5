"""The journal: whose a folder is, what is kept of an unfinished run, and what is refused."""

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_store import FLAT, LENGTHS, POOLED, complete, finish

from fpwap.callbacks.base import LayerArtifact
from fpwap.errors import StoreError
from fpwap.journal import Journal, difference, tidy
from fpwap.store import Store

IDENTITY = {"model": {"id": "m", "shards": [1, 2]}, "callbacks": [{"name": "A"}, {"name": "B"}], "seq_len": None}


NEW = ["run.json", "scratch", "scratch/commits"]


def claim(folder: Path, identity: dict[str, Any], **how: Any) -> Literal["new", "finished"]:
    """Begins a run there and lets go of it at once."""
    with Journal.open(folder, identity, **how) as journal:
        if journal.finished:
            return "finished"
        journal.begin()
        return "new"


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def interrupted(folder: Path) -> None:
    """What a killed run leaves: committed, partial and temporary files, the residual stream."""
    assert claim(folder, IDENTITY) == "new"
    store = Store.open(folder, LENGTHS)
    complete(store, POOLED)
    store.declare(FLAT)
    store.artifact(None, "logits", LayerArtifact("basis", {}))
    store.put_json("profile.json", {})
    store.close()
    for name in ("scratch/residual.a", "manifest.json.partial", "prompts.safetensors.partial", "run.json.partial"):
        (folder / name).write_bytes(b"x")


def test_a_new_folder_is_made_and_an_empty_one_taken(tmp_path: Path) -> None:
    for folder in (tmp_path / "deep" / "down", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert claim(folder, IDENTITY) == "new"
        assert listing(folder) == NEW
        assert json.loads((folder / "run.json").read_text())["identity"] == IDENTITY


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(StoreError, match="out is a file; out= names a folder"):
        claim(tmp_path / "out", IDENTITY)
    assert (tmp_path / "out").read_bytes() == b"mine"


def test_a_thread_that_outlives_the_run_writes_no_record(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "out", IDENTITY) as held:
        held.begin()
        held.append({"open": [], "done": []})
    before = listing(tmp_path)
    with pytest.raises(StoreError, match="is not this run's any more"):
        held.append({"open": [], "done": []})
    assert listing(tmp_path) == before


def test_a_folder_that_vanishes_while_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made it and never began takes it away again, lock and all."""
    folder, plain, closed = tmp_path / "out", fcntl.flock, list[int]()
    folder.mkdir()

    def flock(descriptor: int, how: int) -> None:
        plain(descriptor, how)
        (folder / "run.lock").unlink()
        folder.rmdir()

    def close(descriptor: int, plain: Callable[[int], None] = os.close) -> None:
        closed.append(descriptor)
        plain(descriptor)

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr("os.close", close)
    with pytest.raises(StoreError, match="No such file"):
        Journal.open(folder, IDENTITY)
    assert len(closed) == 1


def test_folders_that_were_made_for_it_have_names_that_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = list[Path]()
    monkeypatch.setattr("fpwap.journal.sync_folder", synced.append)
    claim(tmp_path / "a" / "b" / "c", IDENTITY)
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= set(synced)


def test_a_foreign_file_is_no_reason_to_keep_what_is_left_over(tmp_path: Path) -> None:
    assert claim(tmp_path, IDENTITY) == "new"
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds 'notes.txt', which no run of fpwap left there; move it away"):
        claim(tmp_path, IDENTITY)
    (tmp_path / "scratch" / "residual.a").write_bytes(b"x")
    (tmp_path / "scratch" / "theirs").write_text("mine")
    tidy(tmp_path)
    assert listing(tmp_path) == ["notes.txt", "run.json", "scratch", "scratch/theirs"]


def test_an_interrupted_run_is_begun_again(tmp_path: Path) -> None:
    interrupted(tmp_path)
    assert len(listing(tmp_path)) > 9
    assert claim(tmp_path, IDENTITY) == "new"
    assert listing(tmp_path) == NEW


def test_a_claim_that_is_killed_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path)
    calls = len([name for name in listing(tmp_path) if (tmp_path / name).is_file()]) - 2

    def unlink(path: Path, real: Callable[[Path], None] = Path.unlink) -> None:
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(path)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(StoreError, match="Input/output error"):
        claim(tmp_path, IDENTITY)
    monkeypatch.undo()
    left = ["activations", "artifacts", "run.json", "run.lock", "scratch", "scratch/commits", "scratch/residual.a"]
    assert listing(tmp_path) == left
    assert claim(tmp_path, IDENTITY) == "new"


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    claim(tmp_path, IDENTITY)
    store = Store.open(tmp_path, LENGTHS)
    complete(store, POOLED)
    finish(store)
    store.close()
    before = listing(tmp_path)
    assert claim(tmp_path, {**IDENTITY}) == "finished"
    assert listing(tmp_path) == before


@pytest.mark.parametrize("finished", [False, True])
def test_another_identity_is_refused_with_the_difference(tmp_path: Path, finished: bool) -> None:
    claim(tmp_path, IDENTITY)
    if finished:
        (tmp_path / "manifest.json").write_text("{}")
    other = {**IDENTITY, "seq_len": 256, "model": {"id": "n", "shards": [1, 2]}}
    with pytest.raises(StoreError) as caught:
        claim(tmp_path, other)
    lines = str(caught.value).splitlines()
    assert "out=" in lines[0]
    assert "remove" in lines[0]
    assert [line.split() for line in lines[1:]] == [
        ["key", "stored", "now"],
        ["model.id", "m", "n"],
        ["seq_len", "null", "256"],
    ]
    assert "run.json" in listing(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("notes.txt", "activations/mine.safetensors", "activations/layer_003.q.safetensors.bak", "artifacts/x.npy"),
        *("scratch/thesis.tex", "mine/data.bin", "activations/deep/layer_003.q.safetensors"),
    ],
)
def test_files_that_are_not_ours_are_never_removed(tmp_path: Path, name: str) -> None:
    interrupted(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(StoreError, match="which no run of fpwap left there"):
        claim(tmp_path, IDENTITY)
    assert listing(tmp_path) == before


def test_links_are_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "layer_000.q.safetensors").write_text("mine")
    for name, target in (("artifacts", precious), ("profile.json", precious / "layer_000.q.safetensors")):
        folder = tmp_path / f"out_{name}"
        claim(folder, IDENTITY)
        (folder / name).symlink_to(target)
        with pytest.raises(StoreError, match=name):
            claim(folder, IDENTITY)
    assert listing(precious) == ["layer_000.q.safetensors"]


@pytest.mark.parametrize("name", ["activations", "manifest.json", "x"])
def test_a_folder_without_a_record_must_be_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(StoreError, match=name):
        claim(tmp_path, IDENTITY)
    assert listing(tmp_path) == [name]


@pytest.mark.parametrize("text", ["", "[]", '{"format": "x"}', "\x80"])
def test_a_record_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, encoding="latin1")
    with pytest.raises(StoreError, match=r"run\.json"):
        claim(tmp_path, IDENTITY)


def test_a_record_of_a_later_format(tmp_path: Path) -> None:
    claim(tmp_path, IDENTITY)
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**record, "format_version": 2}))
    with pytest.raises(StoreError, match="format"):
        claim(tmp_path, IDENTITY)


def test_difference_names_the_leaves() -> None:
    now = {"model": {"id": "m", "shards": [1, 3]}, "callbacks": [{"name": "A"}], "seq_len": None, "more": True}
    assert difference(IDENTITY, now) == [
        ("model.shards", [1, 2], [1, 3]),
        ("callbacks.1.name", "B", "(absent)"),
        ("more", "(absent)", True),
    ]
    assert difference({"a": 1}, {"a": True}) == [("a", 1, True)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(stored=st.dictionaries(st.text("ab", min_size=1, max_size=2), JSON), now=JSON.map(lambda value: {"a": value}))
def test_no_difference_means_equal(stored: dict[str, Any], now: dict[str, Any]) -> None:
    assert difference(stored, stored) == []
    same = json.dumps(stored, sort_keys=True) == json.dumps(now, sort_keys=True)
    assert (difference(stored, now) == []) == same
