"""The store against a plain model of it (dicts of arrays) and an independent reader (safetensors)."""

import errno
import json
import os
import random
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from xxhash import xxh3_128

from fpwap.callbacks.base import LayerArtifact
from fpwap.errors import CallbackError, StoreError
from fpwap.files import File
from fpwap.store import Record, Store, layout

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool]
POOLED = Record(3, "residual_post", None, "prompt", (4,), torch.bfloat16)
FLAT = Record(3, "residual_post", "all", "token", (2, 3), torch.float32)
LENGTHS = np.array([3, 1, 2, 3], np.int64)
ROWS_OR_RAM = pytest.mark.parametrize("ram", [0, 2**20])


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits, NaNs of all kinds among them."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, count, np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def put(store: Store, record: Record, values: dict[int, Tensor], order: list[int]) -> None:
    """Write prompts one by one in this order."""
    for sample in order:
        store.write(record, values[sample][None], torch.tensor([sample]))


def filled(record: Record, lengths: np.ndarray) -> dict[int, Tensor]:
    lead = [() if record.per == "prompt" else (int(n),) for n in lengths]
    return {i: noise((*at, *record.rest), record.dtype, i) for i, at in enumerate(lead)}


def complete(store: Store, record: Record, lengths: np.ndarray = LENGTHS) -> dict[int, Tensor]:
    values = filled(record, lengths)
    store.declare(record)
    put(store, record, values, list(reversed(values)))
    store.commit([record.site])
    return values


def settled(store: Store, record: Record) -> None:
    complete(store, record)
    store.settle()


def finish(store: Store, lengths: np.ndarray = LENGTHS) -> None:
    store.finish({"layers": 8}, np.arange(lengths.sum(), dtype=np.int32))


# --- outputs --------------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=10),
    records=st.lists(
        st.builds(
            Record,
            layer=st.sampled_from([None, 0, 1234]),
            hook=st.sampled_from(["logits", "q"]),
            name=st.sampled_from([None, "a", "b-1"]),
            per=st.sampled_from(["prompt", "token"]),
            rest=st.sampled_from([(), (1,), (3,), (2, 2)]),
            dtype=st.sampled_from(DTYPES),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda r: (r.layer, r.hook, r.name),
    ),
    ram=st.sampled_from([0, 40, 2**20]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None)
def test_any_order_of_writes_gives_the_same_files(
    lengths: list[int], records: list[Record], ram: int, seed: int
) -> None:
    rng, sizes = random.Random(seed), np.array(lengths, np.int64)
    model = {record: filled(record, sizes) for record in records}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = Store.open(folder, sizes, ram=ram)
        for record in records:
            store.declare(record)
        calls = []
        for record in records:
            ids = list(range(len(sizes)))
            rng.shuffle(ids)
            while ids:  # some prompts of one length together, as callbacks see them
                same = [i for i in ids if sizes[i] == sizes[ids[0]]][: rng.randint(1, 3)]
                ids = [i for i in ids if i not in same]
                calls.append((record, same))
        rng.shuffle(calls)
        for record, same in calls:
            store.write(record, torch.stack([model[record][i] for i in same]), torch.tensor(same))
        sites = list({record.site for record in records})
        rng.shuffle(sites)
        for site in sites:
            store.commit([site])
        finish(store, sizes)
        store.close()

        entries = {
            (e["layer"], e["hook"], e["name"]): e for e in json.loads((folder / "manifest.json").read_text())["records"]
        }
        assert len(entries) == len(records)
        for record, values in model.items():
            entry = entries[record.layer, record.hook, record.name]
            assert entry["bytes"] == (folder / entry["file"]).stat().st_size
            found = safetensors.torch.load_file(folder / entry["file"])
            every = [values[i] for i in range(len(sizes))]
            joined = torch.stack(every) if record.per == "prompt" else torch.cat(every)
            assert (found["values"].shape, found["values"].dtype) == (joined.shape, joined.dtype)
            assert bits(found["values"]) == bits(joined)
            assert entry["rows"] == len(joined)
            if record.per == "token":
                assert found["offsets"].tolist() == [0, *np.cumsum(sizes).tolist()]
            digests = b"".join(xxh3_128(bits(value)).digest() for value in every)
            assert entry["digest"] == xxh3_128(digests).hexdigest()


def test_files_are_named_by_their_site(tmp_path: Path) -> None:
    store = Store.open(tmp_path, LENGTHS)
    for record in (POOLED, FLAT, Record(None, "logits", None, "prompt", (), torch.float16)):
        complete(store, record)
    store.settle()
    assert sorted(path.name for path in (tmp_path / "activations").iterdir()) == [
        "layer_003.residual_post.all.safetensors",
        "layer_003.residual_post.safetensors",
        "logits.safetensors",
    ]
    store.close()


@ROWS_OR_RAM
@pytest.mark.parametrize("record", [POOLED, FLAT])
def test_a_buffer_may_be_reused_at_once(tmp_path: Path, ram: int, record: Record) -> None:
    store = Store.open(tmp_path, LENGTHS, ram=ram)
    store.declare(record)
    values = filled(record, LENGTHS)
    for sample, value in values.items():
        buffer, ids = value[None].clone(), torch.tensor([sample])
        store.write(record, buffer, ids)
        buffer.fill_(7)
        ids.fill_(0)
    store.commit([record.site])
    store.close()
    every = list(values.values())
    found = safetensors.torch.load_file(tmp_path / record.file)["values"]
    assert bits(found) == bits(torch.stack(every) if record is POOLED else torch.cat(every))


@ROWS_OR_RAM
def test_values_need_not_be_contiguous(tmp_path: Path, ram: int) -> None:
    store = Store.open(tmp_path, LENGTHS, ram=ram)
    store.declare(POOLED)
    values = noise((4, 4), torch.bfloat16, 0)
    store.write(POOLED, values.t(), torch.arange(4))
    store.commit([POOLED.site])
    store.close()
    assert bits(safetensors.torch.load_file(tmp_path / POOLED.file)["values"]) == bits(values.t())


def test_an_output_has_no_name_before_it_is_committed(tmp_path: Path) -> None:
    store = Store.open(tmp_path, LENGTHS)
    values = filled(FLAT, LENGTHS)
    store.declare(FLAT)
    put(store, FLAT, values, [2, 0, 3])
    partial = tmp_path / f"{FLAT.file}.partial"
    assert not (tmp_path / FLAT.file).exists()
    with safetensors.safe_open(partial, "pt") as file:  # header first, full size from the start
        assert file.get_slice("values").get_shape() == [9, 2, 3]
    put(store, FLAT, values, [1])
    store.commit([FLAT.site])
    store.settle()
    assert not partial.exists()
    assert not (tmp_path / "manifest.json").exists()
    store.close()


def test_commit_takes_the_given_sites_only(tmp_path: Path) -> None:
    other = Record(4, "residual_post", None, "prompt", (), torch.float32)
    store = Store.open(tmp_path, LENGTHS)
    store.declare(other)
    complete(store, POOLED)
    store.settle()
    assert (tmp_path / POOLED.file).exists()
    assert not (tmp_path / other.file).exists()
    store.close()


@ROWS_OR_RAM
@pytest.mark.parametrize("second", [[1], [0, 0], [2, 1, 3]])
def test_a_prompt_written_twice_is_refused(tmp_path: Path, ram: int, second: list[int]) -> None:
    store = Store.open(tmp_path, LENGTHS, ram=ram)
    store.declare(POOLED)
    store.write(POOLED, torch.zeros(1, 4, dtype=torch.bfloat16), torch.tensor([1]))
    with pytest.raises(StoreError, match=r"layer 3, hook residual_post: sample [01] was written twice"):
        store.write(POOLED, torch.zeros(len(second), 4, dtype=torch.bfloat16), torch.tensor(second))
    store.close()


@ROWS_OR_RAM
def test_a_missing_prompt_is_refused_and_nothing_is_committed(tmp_path: Path, ram: int) -> None:
    store = Store.open(tmp_path, LENGTHS, ram=ram)
    values = filled(FLAT, LENGTHS)
    store.declare(FLAT)
    store.declare(POOLED)
    put(store, FLAT, values, [0, 1, 2, 3])
    store.write(POOLED, torch.zeros(2, 4, dtype=torch.bfloat16), torch.tensor([0, 3]))
    with pytest.raises(StoreError, match=r"layer 3, hook residual_post: 2 prompts .* first sample 1"):
        store.commit([POOLED.site])
    store.close()
    assert not (tmp_path / FLAT.file).exists()
    assert not (tmp_path / POOLED.file).exists()


def test_two_outputs_of_one_name_are_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path, LENGTHS)
    store.declare(POOLED)
    with pytest.raises(CallbackError, match="layer 3, hook residual_post: there are two outputs"):
        store.declare(Record(3, "residual_post", None, "token", (), torch.float32))
    put(store, POOLED, filled(POOLED, LENGTHS), [0, 1, 2, 3])
    store.commit([POOLED.site])
    with pytest.raises(CallbackError, match="two outputs"):
        store.declare(POOLED)
    store.close()


@pytest.mark.parametrize("name", ["../up", "a/b", "", "a.b", "x" * 200])
def test_a_name_that_cannot_be_part_of_a_file_name(tmp_path: Path, name: str) -> None:
    store = Store.open(tmp_path, LENGTHS)
    with pytest.raises(CallbackError, match="letters, digits"):
        store.declare(Record(0, "q", name, "prompt", (), torch.float32))
    with pytest.raises(CallbackError, match="letters, digits"):
        store.artifact(0, "q", LayerArtifact(name, {}))
    store.close()


def test_a_dtype_that_files_cannot_hold(tmp_path: Path) -> None:
    store = Store.open(tmp_path, LENGTHS)
    with pytest.raises(CallbackError, match=r"layer 0, hook q.*complex128"):
        store.declare(Record(0, "q", None, "prompt", (), torch.complex128))
    store.close()


@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=3),
        st.tuples(
            st.sampled_from([*DTYPES, torch.float64, torch.int8, torch.uint16, torch.float8_e4m3fn, torch.complex64]),
            st.lists(st.integers(0, 3), max_size=3).map(tuple),
        ),
        max_size=5,
    )
)
@settings(deadline=None)
def test_a_layout_is_what_safetensors_reads(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    plan = layout(tensors, "here")
    raw = bytearray(np.random.default_rng(0).integers(0, 2, plan.size, np.uint8).tobytes())
    raw[: len(plan.header)] = plan.header
    found = safetensors.torch.load(bytes(raw))
    assert found.keys() == tensors.keys()
    for name, (dtype, shape) in tensors.items():
        assert (found[name].dtype, tuple(found[name].shape)) == (dtype, shape)
        assert plan.starts[name] % dtype.itemsize == 0
        assert bits(found[name]) == raw[plan.starts[name] :][: found[name].nbytes]


# --- artifacts and the manifest -------------------------------------------------------------------------------------


def test_artifacts_hold_any_tensors(tmp_path: Path) -> None:
    base = noise((4, 6), torch.float32, 0)
    tensors = {
        "count": torch.tensor(7),
        "turned": base.t(),
        "row": base[1],
        "flags": torch.tensor([True, False, True]),
        "half": noise((5,), torch.bfloat16, 1),
        "nothing": torch.empty(0, 3),
        "learned": torch.nn.Parameter(torch.ones(2)),
    }
    store = Store.open(tmp_path, LENGTHS)
    store.artifact(7, "q", LayerArtifact("basis", tensors, {"labels": ["a", 1], "pair": (1, 2)}))
    store.artifact(None, "logits", LayerArtifact("basis", {}))
    finish(store)
    store.close()
    entries = json.loads((tmp_path / "manifest.json").read_text())["artifacts"]
    assert [entry["file"] for entry in entries] == [
        "artifacts/layer_007.q.basis.safetensors",
        "artifacts/logits.basis.safetensors",
    ]
    assert entries[0]["meta"] == {"labels": ["a", 1], "pair": [1, 2]}
    path = tmp_path / entries[0]["file"]
    assert entries[0]["digest"] == xxh3_128(path.read_bytes()).hexdigest()
    found = safetensors.torch.load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        assert bits(found[name]) == bits(tensor.detach())


def test_artifacts_that_are_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path, LENGTHS)
    store.artifact(7, "q", LayerArtifact("basis", {}))
    with pytest.raises(CallbackError, match="layer 7, hook q, name basis: there are two"):
        store.artifact(7, "q", LayerArtifact("basis", {}))
    with pytest.raises(CallbackError, match="must be JSON"):
        store.artifact(8, "q", LayerArtifact("basis", {}, {"fn": print}))
    with pytest.raises(CallbackError, match=r"complex128 \('odd'\)"):
        store.artifact(9, "q", LayerArtifact("basis", {"odd": torch.zeros(1, dtype=torch.complex128)}))
    store.close()


def test_the_manifest_does_not_depend_on_the_order_of_commits(tmp_path: Path) -> None:
    records = [Record(layer, hook, None, "prompt", (), torch.float32) for layer in (2, 11) for hook in ("q", "k")]
    records.append(Record(None, "logits", None, "prompt", (), torch.float32))
    manifests = []
    for name, order in (("a", records), ("b", records[::-1])):
        (tmp_path / name).mkdir()
        store = Store.open(tmp_path / name, LENGTHS)
        for record in order:
            complete(store, record)
            store.artifact(record.layer, record.hook, LayerArtifact("x", {"t": torch.ones(2)}))
        finish(store)
        store.close()
        manifests.append((tmp_path / name / "manifest.json").read_bytes())
    assert manifests[0] == manifests[1]
    found = json.loads(manifests[0])
    assert [(e["layer"], e["hook"]) for e in found["records"]] == [
        *((2, "k"), (2, "q"), (11, "k"), (11, "q")),
        (None, "logits"),
    ]


def test_names_come_after_bytes_and_the_manifest_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, names, log = set(), [], []

    def fsync(fd: int, real: Callable[[int], None] = os.fsync) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        synced.add(path)
        log.append(("fsync", path))
        real(fd)

    def rename(old: Path, new: Path, real: Callable[[Path, Path], None] = os.rename) -> None:
        assert old in synced, f"{old} was renamed before it was on disk"
        names.append(new)
        log.append(("rename", new))
        real(old, new)

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, fsync)
    monkeypatch.setattr(os, "rename", rename)
    store = Store.open(tmp_path, LENGTHS)
    assert log == [("fsync", tmp_path)], "the names of the folders are not durable"
    complete(store, FLAT)
    store.artifact(0, "q", LayerArtifact("basis", {}))
    store.put_json("profile.json", {})
    finish(store)
    store.close()
    assert names[-1] == tmp_path / "manifest.json"
    everything = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert set(names) == everything
    for at, (kind, path) in enumerate(log):
        if kind == "rename":
            assert ("fsync", path.parent) in log[at:], f"the name {path} is not durable"


def test_a_commit_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, gate = Store.open(tmp_path, LENGTHS), threading.Event()

    def fsync(fd: int, real: Callable[[int], None] = os.fsync) -> None:
        assert gate.wait(60)
        real(fd)

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, fsync)
    complete(store, POOLED)
    assert not (tmp_path / POOLED.file).exists()
    gate.set()
    store.settle()
    assert (tmp_path / POOLED.file).exists()
    store.close()


def test_a_slow_disk_lets_no_commits_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waiting file holds a descriptor; here the disk begins no sync before three commits have been asked for."""
    monkeypatch.setattr("fpwap.store.WAITING", 1)
    store, asked, waiting = Store.open(tmp_path, LENGTHS), threading.Semaphore(0), []

    def fsync(fd: int, real: Callable[[int], None] = os.fsync) -> None:
        assert asked.acquire(timeout=60)
        real(fd)

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, fsync)
    for layer in range(6):
        for _ in range(2 * (layer > 1)):  # of the eldest: its file, its folder
            asked.release()
        complete(store, Record(layer, "residual_post", None, "prompt", (4,), torch.bfloat16))
        waiting.append(len(list((tmp_path / "activations").glob("*.partial"))))
    assert max(waiting) <= 3
    for _ in range(20):
        asked.release()
    store.settle()
    store.close()


def test_a_commit_does_not_wait_for_what_is_saved(tmp_path: Path) -> None:
    """A residual stream may take minutes to reach the disk, and no layer's end has to wait for that."""
    gate = threading.Event()

    def check() -> None:
        assert gate.is_set() or not store._publishing or store._publishing[0][1].done(), "it has waited"

    store = Store.open(tmp_path, LENGTHS, check=check)

    def afterwards() -> None:
        assert gate.wait(60)

    store.save(afterwards, File.made(tmp_path / "state", 0))
    outputs = [Record(layer, "residual_post", None, "prompt", (4,), torch.bfloat16) for layer in range(3)]
    for layer, output in enumerate(outputs):
        store.artifact(layer, "residual_post", LayerArtifact("basis", {}))
        complete(store, output)
    assert not any((tmp_path / output.file).exists() for output in outputs)
    gate.set()
    store.settle()
    assert all((tmp_path / output.file).exists() for output in outputs)
    store.close()


def test_a_close_that_is_interrupted_changes_no_name_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks twice does not wait for the disk, and the folder may be another run's when it answers."""
    store, entered, gate = Store.open(tmp_path, LENGTHS), threading.Event(), threading.Event()
    pool = store._publisher

    def fdatasync(fd: int) -> None:
        entered.set()
        assert gate.wait(60)

    def shutdown(**how: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr("fpwap.store.GRACE", 0.0)
    complete(store, POOLED)
    assert entered.wait(60)
    with monkeypatch.context() as twice:
        twice.setattr(pool, "shutdown", shutdown)
        with pytest.raises(KeyboardInterrupt):
            store.close()
    gate.set()
    pool.shutdown(wait=True)
    assert (tmp_path / f"{POOLED.file}.partial").exists()
    assert not (tmp_path / POOLED.file).exists()


# --- what a disk does -----------------------------------------------------------------------------------------------


@ROWS_OR_RAM
def test_short_writes_are_continued(tmp_path: Path, ram: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(fd: int, data: memoryview, at: int, real: Callable[..., int] = os.pwrite) -> int:
        return real(fd, data[: max(1, len(data) // 2)], at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    store = Store.open(tmp_path, LENGTHS, ram=ram)
    pooled, flat = complete(store, POOLED), complete(store, FLAT)
    store.artifact(0, "q", LayerArtifact("basis", {"t": torch.arange(100)}))
    finish(store)
    store.close()
    found = safetensors.torch.load_file(tmp_path / POOLED.file)["values"]
    assert bits(found) == bits(torch.stack([pooled[i] for i in range(4)]))
    found = safetensors.torch.load_file(tmp_path / FLAT.file)["values"]
    assert bits(found) == bits(torch.cat([flat[i] for i in range(4)]))
    assert safetensors.torch.load_file(tmp_path / "artifacts/layer_000.q.basis.safetensors")["t"].equal(
        torch.arange(100)
    )
    assert json.loads((tmp_path / "manifest.json").read_text())["layers"] == 8


def test_outputs_in_ram_make_room_when_they_are_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []

    def pwrite(fd: int, data: memoryview, at: int, real: Callable[..., int] = os.pwrite) -> int:
        writes.append(len(data))
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    records = [Record(layer, "q", None, "prompt", (4,), torch.bfloat16) for layer in range(3)]
    store = Store.open(tmp_path, LENGTHS, ram=32)
    for record in records[:2]:  # one after the other: each is written in one pass
        complete(store, record)
        assert writes[-1] == 32
    store.declare(records[2])
    complete(store, POOLED)  # beside another one: row by row
    assert writes[-4:] == [8] * 4
    store.close()


def test_a_file_that_is_already_there_is_not_written_to(tmp_path: Path) -> None:
    store = Store.open(tmp_path, LENGTHS)
    (tmp_path / f"{POOLED.file}.partial").write_text("mine")
    with pytest.raises(StoreError, match="exists"):
        store.declare(POOLED)
    store.close()
    assert (tmp_path / f"{POOLED.file}.partial").read_text() == "mine"


def fail(code: int, after: int = 0) -> Callable[..., Any]:
    calls = iter(range(after + 1))

    def failing(*args: Any, real: Callable[..., int] = os.pwrite) -> int:
        if next(calls, None) in (None, after):
            raise OSError(code, os.strerror(code))
        return real(*args)

    return failing


@pytest.mark.parametrize("operation", ["posix_fallocate", "pwrite"])
def test_a_full_disk_says_what_is_needed_and_what_is_free(
    tmp_path: Path, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(tmp_path, LENGTHS)
    monkeypatch.setattr(os, operation, fail(errno.ENOSPC))
    size = layout(FLAT.tensors(4, 9), "").size
    with pytest.raises(StoreError, match=rf"{FLAT.file}.partial: .*: {size} bytes needed, \d+ bytes free"):
        store.declare(FLAT)
    store.close()


@pytest.mark.parametrize("after", range(6))
def test_a_disk_that_fills_up_later(tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", fail(errno.ENOSPC, after))
    store = Store.open(tmp_path, LENGTHS, ram=0)
    with pytest.raises(StoreError, match="bytes needed"):
        complete(store, FLAT)
    store.close()
    assert not (tmp_path / FLAT.file).exists()


@pytest.mark.parametrize("operation", ["fdatasync", "rename", "pwrite", "open", "posix_fallocate"])
def test_any_failing_operation_names_the_file(tmp_path: Path, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path, LENGTHS)
    monkeypatch.setattr(os, operation, fail(errno.EIO))
    with pytest.raises(StoreError, match=r"layer_003.residual_post.all.safetensors.partial: Input/output error"):
        settled(store, FLAT)
    monkeypatch.undo()
    store.close()
    assert not (tmp_path / FLAT.file).exists()


def test_a_file_system_that_cannot_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", fail(errno.EOPNOTSUPP))
    store = Store.open(tmp_path, LENGTHS)
    values = complete(store, POOLED)
    store.close()
    found = safetensors.torch.load_file(tmp_path / POOLED.file)["values"]
    assert bits(found) == bits(torch.stack([values[i] for i in range(4)]))


def test_space_is_reserved_at_once(tmp_path: Path) -> None:
    record = Record(0, "q", None, "token", (2**16,), torch.float32)
    store = Store.open(tmp_path, LENGTHS)
    store.declare(record)
    status = (tmp_path / f"{record.file}.partial").stat()
    assert status.st_blocks * 512 >= status.st_size > 9 * 2**18
    store.close()


def test_close_leaves_nothing_open_also_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(os.listdir("/proc/self/fd"))
    store = Store.open(tmp_path, LENGTHS)
    store.declare(POOLED)
    monkeypatch.setattr(os, "pwrite", fail(errno.ENOSPC))
    with pytest.raises(StoreError):
        store.declare(FLAT)
    with pytest.raises(StoreError):
        store.artifact(0, "q", LayerArtifact("basis", {}))
    store.close()
    store.close()
    assert set(os.listdir("/proc/self/fd")) == before
