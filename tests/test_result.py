"""A finished folder, reopened: values, errors, damage, copies and the life of a temporary folder."""

import errno
import gc
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fpwap import result
from fpwap.callbacks.base import LayerArtifact
from fpwap.errors import RequestError, StoreError
from fpwap.files import sealed
from fpwap.journal import Journal
from fpwap.profile import Profile
from fpwap.result import Ragged, Result
from fpwap.store import Record, Store, layout

LENGTHS = np.array([3, 1, 4], np.int64)
IDS = np.arange(8, dtype=np.int32)
LAYERS = 6
PROFILE = Profile(wall_s=2.0, reading_s=1.0, prompts=3, tokens=8, predicted_s=None, spans=())

POOLED = {
    Record(layer, hook, name, "prompt", (4,), torch.bfloat16): torch.randn(3, 4).bfloat16()
    for layer, hook, name in (
        *((0, "residual_post", None), (5, "residual_post", None), (5, "residual_post", "norm")),
        *((5, "q", None), (None, "logits", None)),
    )
}
FLAT_RECORD = Record(2, "mlp_out", None, "token", (2,), torch.float32)
FLAT = torch.randn(8, 2)
BASIS = {"components": torch.randn(2, 4), "count": torch.tensor(8)}


def make(folder: Path) -> Path:
    """A small finished run."""
    with Journal.open(folder, {"model": "tiny"}) as journal:
        journal.begin()
    store = Store.open(folder, LENGTHS)
    for record, values in POOLED.items():
        store.declare(record)
        store.write(record, values[[2, 0]], torch.tensor([2, 0]))
        store.write(record, values[[1]], torch.tensor([1]))
    store.declare(FLAT_RECORD)
    for sample in (1, 2, 0):
        end = int(LENGTHS[: sample + 1].sum())
        store.write(FLAT_RECORD, FLAT[None, end - int(LENGTHS[sample]) : end], torch.tensor([sample]))
    for layer, hook in ((5, "q"), (5, "residual_post"), (0, "q"), (None, "logits")):
        store.artifact(layer, hook, LayerArtifact("basis", BASIS, {"at": [layer, hook]}))
    store.commit([*(record.site for record in POOLED), FLAT_RECORD.site])
    store.put_json("profile.json", PROFILE.to_json())
    store.finish({"layers": LAYERS, "model": "tiny"}, IDS)
    store.close()
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make(tmp_path / "out")


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def pieces(flat: Tensor, lengths: list[int]) -> list[Tensor]:
    ends = np.cumsum(lengths).tolist()
    return [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def tensor(values: Tensor | Ragged) -> Tensor:
    assert isinstance(values, Tensor)
    return values


def ragged(values: Tensor | Ragged) -> Ragged:
    assert isinstance(values, Ragged)
    return values


# --- what was put in comes out --------------------------------------------------------------------------------------


def test_pooled_outputs_come_in_input_order(run: Path) -> None:
    found = Result.open(str(run))
    for record, values in POOLED.items():
        assert torch.equal(tensor(found.activations(record.layer, record.hook, record.name)), values)
    assert torch.equal(tensor(found.activations(layer=5)), tensor(found.activations(layer=-1)))
    assert torch.equal(tensor(found.activations(layer=0)), tensor(found.activations(layer=-LAYERS)))


def test_outputs_of_every_token_are_ragged(run: Path) -> None:
    acts = ragged(Result.open(run).activations(layer=-4, hook="mlp_out"))
    assert torch.equal(acts.flat, FLAT)
    assert acts.offsets.tolist() == [0, 3, 4, 8]
    assert len(acts) == 3
    for got, want in zip(acts, pieces(FLAT, LENGTHS.tolist()), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(acts[-1], acts[2])
    for index in (3, -4):
        with pytest.raises(IndexError):
            acts[index]


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    rest=st.sampled_from([(), (2,), (2, 3)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    value=st.sampled_from([0.0, -7.0]),
)
@settings(deadline=None)
def test_padding(lengths: list[int], rest: tuple[int, ...], dtype: torch.dtype, value: float) -> None:
    flat = torch.randn(sum(lengths), *rest).mul(100).to(dtype)
    acts = Ragged(flat, torch.tensor([0, *np.cumsum(lengths).tolist()]))
    right = acts.padded(value=value)
    assert right.dtype == dtype
    assert torch.equal(right, pad_sequence(pieces(flat, lengths), batch_first=True, padding_value=value))
    left = acts.padded(side="left", value=value)
    assert torch.equal(
        left, pad_sequence(pieces(flat, lengths), batch_first=True, padding_value=value, padding_side="left")
    )
    assert left.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr()


def test_padding_has_two_sides() -> None:
    with pytest.raises(RequestError, match="middle"):
        Ragged(torch.zeros(1), torch.tensor([0, 1])).padded(side="middle")  # type: ignore[arg-type]


def test_artifacts(run: Path) -> None:
    found = Result.open(run)
    basis = found.artifact("basis", layer=-1, hook="q")
    assert (basis.name, basis.layer, basis.hook, basis.meta) == ("basis", 5, "q", {"at": [5, "q"]})
    assert list(basis.keys()) == list(basis.tensors) == ["components", "count"]
    assert torch.equal(basis["components"], BASIS["components"])
    assert int(basis["count"]) == 8
    assert found.artifact("basis", layer=0).hook == "q"
    assert found.artifact("basis").hook == "logits"
    assert set(found.artifacts) == {
        ("basis", layer, hook) for layer, hook in ((5, "q"), (5, "residual_post"), (0, "q"))
    } | {("basis", None, "logits")}
    assert len(found.artifacts) == 4
    assert found.artifacts["basis", 0, "q"].meta == {"at": [0, "q"]}
    with pytest.raises(RequestError, match="components, count, not 'mean'"):
        basis["mean"]


def test_prompts_profile_and_manifest(run: Path) -> None:
    found = Result.open(run)
    assert [ids.tolist() for ids in found.prompts] == [[0, 1, 2], [3], [4, 5, 6, 7]]
    assert found.prompts.flat.dtype == torch.int32
    assert found.profile == PROFILE
    assert found.manifest["model"] == "tiny"
    assert found.path == run


def test_a_result_says_what_it_holds(run: Path) -> None:
    text = repr(Result.open(run))
    for part in (str(run), "3 prompts, 8 tokens", "residual_post (layers 0, 5)", "logits", "'basis' (layers 0, 5)"):
        assert part in text
    assert "3 prompts" in repr(Result.open(run).prompts)
    assert "components (2, 4)" in repr(Result.open(run).artifact("basis"))


# --- what is not there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "hook", "name"),
    [
        *((1, "residual_post", None), (None, "residual_post", None), (0, "q", None), (0, "residual_post", "norm")),
        *((-7, "residual_post", None), (5, "typo", None), (0, "logits", None)),
    ],
)
def test_an_unknown_output_is_answered_with_what_there_is(
    run: Path, layer: int | None, hook: str, name: str | None
) -> None:
    with pytest.raises(RequestError, match=rf"no output at layer {layer}, hook '{hook}', name {name!r}") as caught:
        Result.open(run).activations(layer, hook, name)
    have = "residual_post (layers 0, 5), mlp_out (layers 2), q (layers 5), residual_post 'norm' (layers 5), logits"
    assert have in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_artifact_is_answered_with_what_there_is(run: Path) -> None:
    found = Result.open(run)
    with pytest.raises(RequestError, match="at the hooks q, residual_post; say which by hook="):
        found.artifact("basis", layer=5)
    for name, layer, hook in (("basis", 4, None), ("typo", 5, None), ("basis", 0, "residual_post")):
        with pytest.raises(RequestError, match=r"it has q 'basis' \(layers 0, 5\), residual_post 'basis'"):
            found.artifact(name, layer, hook)


# --- damage ---------------------------------------------------------------------------------------------------------


def test_every_file_must_be_there_and_whole(run: Path) -> None:
    for name in files(run):
        raw = (run / name).read_bytes()
        for damaged in (raw[:-1], raw + b"\0", b"", None):
            (run / name).unlink() if damaged is None else (run / name).write_bytes(damaged)
            with pytest.raises(StoreError, match=name):
                Result.open(run)
        (run / name).write_bytes(raw)
    Result.open(run).verify()


def test_one_flipped_bit_anywhere_is_found(run: Path) -> None:
    rng = random.Random(0)
    assert len(files(run)) == len(POOLED) + 1 + 4 + 4
    for name in files(run):
        raw = (run / name).read_bytes()
        for at in [0, 7, 8, len(raw) - 1, *rng.choices(range(len(raw)), k=16)]:
            damaged = bytearray(raw)
            damaged[at] ^= 1 << rng.randrange(8)
            (run / name).write_bytes(damaged)
            with pytest.raises(StoreError, match=name):
                Result.open(run).verify()
        (run / name).write_bytes(raw)
    Result.open(run).verify()


def test_an_edited_header_is_not_believed(run: Path) -> None:
    path = run / FLAT_RECORD.file
    raw = path.read_bytes()
    assert b"[8,2]" in raw
    path.write_bytes(raw.replace(b"[8,2]", b"[2,8]"))
    with pytest.raises(StoreError, match=FLAT_RECORD.file):
        Result.open(run).activations(2, "mlp_out")


def test_an_edited_artifact_is_not_believed(run: Path) -> None:
    path = run / "artifacts/layer_000.q.basis.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(StoreError, match=path.name):
        Result.open(run).artifact("basis", layer=0)


def test_a_file_that_grew_after_opening(run: Path) -> None:
    found = Result.open(run)
    with (run / FLAT_RECORD.file).open("ab") as file:
        file.write(b"x")
    with pytest.raises(StoreError, match=FLAT_RECORD.file):
        found.verify()


def test_a_file_cut_after_opening(run: Path) -> None:
    found = Result.open(run)
    os.truncate(run / FLAT_RECORD.file, 200)
    with pytest.raises(StoreError, match=FLAT_RECORD.file):
        found.activations(2, "mlp_out")
    with pytest.raises(StoreError, match=FLAT_RECORD.file):
        found.verify()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\x80"])
def test_a_manifest_that_is_none(run: Path, text: str) -> None:
    (run / "manifest.json").write_text(text, encoding="latin1")
    with pytest.raises(StoreError, match=r"manifest\.json is not the manifest of a run"):
        Result.open(run)


def test_a_manifest_of_a_later_format(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_bytes(sealed({**manifest, "format_version": 2}))
    with pytest.raises(StoreError, match=r"format \('fpwap-run', 2\); this fpwap reads"):
        Result.open(run)


def test_folders_that_hold_no_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere", run / "manifest.json"):
        with pytest.raises(StoreError, match=path.name):
            Result.open(path)


# --- private maps ---------------------------------------------------------------------------------------------------


def test_editing_values_never_reaches_the_files(run: Path) -> None:
    before = {name: (run / name).read_bytes() for name in files(run)}
    found = Result.open(run)
    edited = tensor(found.activations(5))
    edited.zero_()
    acts = ragged(found.activations(2, "mlp_out"))
    acts.flat.numpy()[:] = 7
    acts.offsets.fill_(0)
    found.prompts.flat.fill_(1)
    found.artifact("basis")["components"].fill_(1)
    assert torch.equal(
        tensor(found.activations(5)), POOLED[Record(5, "residual_post", None, "prompt", (4,), torch.bfloat16)]
    )
    assert {name: (run / name).read_bytes() for name in files(run)} == before
    found.verify()


def test_an_output_larger_than_memory_opens(tmp_path: Path) -> None:
    rows = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    tensors = {"values": (torch.uint8, (rows, 2**20))}
    plan = layout(tensors, "")
    with (tmp_path / "sparse").open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.size)
    values = result._mapped(tmp_path / "sparse", tensors)["values"]
    values[-1, -1] = 7
    assert values[-1, -2:].tolist() == [0, 7]


# --- temporary runs and copies --------------------------------------------------------------------------------------


def test_a_temporary_run_goes_with_its_result_and_its_tensors_stay(run: Path) -> None:
    found = Result.adopt(Result.open(run))
    acts, flat, basis = found.activations(5, "q"), found.activations(2, "mlp_out"), found.artifact("basis")
    assert run.exists()
    del found
    gc.collect()
    assert not run.exists()
    assert torch.equal(tensor(acts), POOLED[Record(5, "q", None, "prompt", (4,), torch.bfloat16)])
    assert torch.equal(ragged(flat).flat, FLAT)
    assert torch.equal(basis["components"], BASIS["components"])


def test_artifacts_keep_a_temporary_run(run: Path) -> None:
    artifacts = Result.adopt(Result.open(run)).artifacts
    gc.collect()
    assert artifacts["basis", 0, "q"].hook == "q"
    del artifacts
    gc.collect()
    assert not run.exists()


def test_a_forked_child_does_not_remove_its_parents_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Result.adopt(Result.open(run))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    del found
    gc.collect()
    assert run.exists()


def test_a_given_folder_is_never_removed(run: Path) -> None:
    found = Result.open(run)
    del found
    gc.collect()
    assert run.exists()


def test_save_copies_a_run(run: Path, tmp_path: Path) -> None:
    found = Result.adopt(Result.open(run))
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "deep" / "kept", tmp_path / "empty"):
        kept = found.save(str(target))
        assert kept.path == target
        assert files(target) == files(run)
        assert all((target / name).stat().st_nlink == 1 for name in files(target))
    (run / FLAT_RECORD.file).write_bytes(b"")
    del found
    gc.collect()
    assert not run.exists()
    kept.verify()
    with Journal.open(kept.path, {"model": "tiny"}) as journal:
        assert journal.finished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty"]


def test_save_refuses_a_folder_in_use(run: Path, tmp_path: Path) -> None:
    found = Result.open(run)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in (run, tmp_path / "used", tmp_path / "file"):
        before = files(tmp_path)
        with pytest.raises(StoreError, match=f"{target.name} exists"):
            found.save(target)
        assert files(tmp_path) == before


def test_a_save_that_fails_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StoreError, match=r"kept\.partial: .* \d+ bytes needed, \d+ bytes free"):
        Result.open(run).save(tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
