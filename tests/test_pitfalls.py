"""How tools like this one have been silently wrong: one test for each way, named by it.

Those that are tested elsewhere:

* rotary tables from row 0's length, the shortest prompt first, both padding sides; GPT-2 with left pads; a trailing
  partial microbatch; masks that take another kernel: `test_parity.PADDED`
* prompts longer than ``seq_len``: `test_sweep.REFUSED`; cut on request: `test_truncated_prompts_are_run_as_if_given_so`
* sliding windows ignored, buffers that nobody reads (``e_score_correction_bias``): no family here has them, so they are
  refused by name, `test_sweep.DAMAGED`
* observing changed the result: `test_parity.test_capturing_every_hook_leaves_the_residual_stream_as_it_was`
* steering on normed states at the last layer: `test_sweep.test_steering_is_a_direction_added_in_fp32_at_every_position`
* ``E[xx] - mean mean`` cancels: `test_callbacks.test_pca_of_outlier_dimensions`
* partial files that look complete, names before data, folders that do not reopen: `test_store`, `test_result`
* the README's first example: `test_readme`

``pin_memory()`` with its result thrown away has no test: nothing pins memory.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LONGEST, tensors
from harness import (
    DTYPES,
    HOOKS,
    SEQUENTIAL_HOOKS,
    Keep,
    Reference,
    Sample,
    differences,
    edit_config,
    flat,
    given,
    keep,
    pooled,
    prompts,
    run,
)
from safetensors.torch import load_file
from torch import Tensor

from fpwap import Callback, Emit, Interrupted, Sweep, WriteBack
from fpwap.callbacks.common import RawActivations
from fpwap.errors import RequestError
from fpwap.weights import Weights

Checkpoint = Callable[[str], Path]
DATA = prompts([3, 1, 17, 8, 8, 23, 2, 17, 5, 11], seed=30)


@pytest.fixture
def folder(checkpoint: Checkpoint) -> Path:
    return checkpoint("llama_gqa")


# --- rows and positions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_last_token_pooling_took_a_pad(side: Any, folder: Path, device: str) -> None:
    """The row of each prompt's own last token, by Hugging Face on the unpadded prompt."""
    reference = Reference.load(folder, torch.float32, device=device).kept(DATA, 1)
    for batching in ("packed", "padded"):
        for dataset in (given(DATA, side), given(DATA, side, width=40)):
            acts = pooled(run(folder, dataset, RawActivations(), batching=batching, device=device), 1)
            expected = torch.stack([reference[1, "residual_post"][i][-1] for i in range(len(DATA))])
            torch.testing.assert_close(acts, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", ["ram", "disk"])
@pytest.mark.parametrize("last", [True, False])
def test_rows_came_back_in_engine_order(last: bool, residual: Any, folder: Path, device: str) -> None:
    """The embedding of row i is that of prompt i's ids, from many microbatches sorted by length."""
    request = {"microbatch_tokens": 25, "residual": residual, "device": device}
    raw = [RawActivations(hook=hook, last_token_only=last) for hook in ("embedding", "residual_post")]
    result = run(folder, DATA, *raw, **request)
    table = tensors(folder)["model.embed_tokens.weight"]
    ids = torch.tensor([row[-1] for row in DATA] if last else [token for row in DATA for token in row])
    show = pooled if last else flat
    assert torch.equal(show(result, None, "embedding"), table[ids])
    alone = keep(folder, DATA, Keep(layers=[2]), device=device, layers_per_visit=3)[2, "residual_post"]
    assert torch.equal(show(result, 2), torch.cat([alone[i][-1:] if last else alone[i] for i in range(len(DATA))]))
    assert result.prompts.flat.tolist() == [token for row in DATA for token in row]


@pytest.mark.parametrize("residual", ["ram", "disk"])
def test_pooled_rows_narrower_than_seq_len_were_zero_padded(residual: Any, folder: Path, device: str) -> None:
    acts = pooled(run(folder, DATA, RawActivations(), seq_len=500, residual=residual, device=device), 2)
    assert acts.shape == (len(DATA), 60)
    assert acts.ne(0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama_gqa", "llama_dynamic", "gpt2"])
def test_a_short_first_row_gave_longer_rows_wrong_positions(
    name: str, side: Any, checkpoint: Checkpoint, device: str
) -> None:
    for dataset in (prompts([1, LONGEST]), given(prompts([1, LONGEST]), side)):
        found = keep(checkpoint(name), dataset, batching="padded", device=device)
        alone = keep(checkpoint(name), dataset[1:], batching="padded", device=device)
        for site in alone.keys() - {(None, "logits")}:
            torch.testing.assert_close(found[site][1], alone[site][0], rtol=1e-4, atol=1e-4)


def test_mixed_padding_sides_lost_tokens(folder: Path, device: str) -> None:
    rows = prompts([4, 9, 6, 9])
    mixed: list[Sample] = [*given(rows[:1], "left", 9), *given(rows[1:3], "right", 9), rows[3]]
    bare = keep(folder, rows, device=device)
    assert differences(keep(folder, mixed, device=device), bare) == []
    for dataset in (mixed, mixed[:3]):  # padded anew, and as given
        found = keep(folder, dataset, Keep(), batching="padded", device=device)
        for sample in range(len(dataset)):
            for layer in range(3):
                site = (layer, "residual_post")
                torch.testing.assert_close(found[site][sample], bare[site][sample], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_gpt2_with_one_left_pad_had_other_positions(batching: Any, checkpoint: Checkpoint, device: str) -> None:
    row = prompts([12])
    bare = keep(checkpoint("gpt2"), row, batching=batching, device=device)
    shifted = keep(checkpoint("gpt2"), given(row, "left", width=13), batching=batching, device=device)
    assert torch.equal(shifted[None, "embedding"][0], bare[None, "embedding"][0])
    loss = [
        torch.nn.functional.cross_entropy(kept[None, "logits"][0][:-1], torch.tensor(row[0][1:]))
        for kept in (shifted, bare)
    ]
    torch.testing.assert_close(*loss)


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_trailing_partial_batch_was_dropped(batching: Any, n: int, folder: Path, device: str) -> None:
    size = {"microbatch_size": 3} if batching == "padded" else {"microbatch_tokens": 20}
    dataset = prompts([9] * n, seed=n)
    found = keep(folder, dataset, Keep(["embedding"]), batching=batching, device=device, **size)
    table = tensors(folder)["model.embed_tokens.weight"]
    assert differences(found, {(None, "embedding"): {i: table[row] for i, row in enumerate(dataset)}}) == []


@pytest.mark.parametrize("residual", ["ram", "disk"])
def test_two_emitters_on_one_site_shared_rows(residual: Any, folder: Path, tmp_path: Path, device: str) -> None:
    first, second = RawActivations([1]), RawActivations([1], positions=0)
    pair = run(folder, DATA, first, second, residual=residual, device=device)
    assert torch.equal(pooled(pair, 1), pooled(run(folder, DATA, first, device=device), 1))
    assert torch.equal(pooled(pair, 1, name="RawActivations"), pooled(run(folder, DATA, second, device=device), 1))
    assert [entry["rows"] for entry in pair.manifest["records"]] == [len(DATA)] * 2


# --- maths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
def test_future_tokens_leaked_where_no_mask_was_passed(
    name: str, attention: Any, batching: Any, checkpoint: Checkpoint, device: str
) -> None:
    request = {"batching": batching, "attn_implementation": attention, "device": device}
    (row,) = prompts([LONGEST])
    found, other = (
        keep(checkpoint(name), [row[:15] + tail], Keep(SEQUENTIAL_HOOKS), **request) for tail in (row[15:], row[:14:-1])
    )
    for (layer, hook), rows in found.items():
        a, b = rows[0], other[layer, hook][0]
        if hook == "attn_pattern":
            assert torch.equal(a, a.tril())
            assert torch.equal(a[:, :15], b[:, :15])
        else:
            assert torch.equal(a[:15], b[:15])
            assert not torch.equal(a[15:], b[15:])


@pytest.mark.parametrize("name", ["llama_legacy", "gpt2_buffers", "gpt2_no_prefix"])
def test_buffers_in_the_checkpoint_took_part(name: str, checkpoint: Checkpoint, device: str) -> None:
    """Old files hold rotary frequencies and masks; these are drawn at random, and transformers reads neither."""
    dataset = prompts([9, LONGEST])
    found = keep(checkpoint(name), dataset, Keep(), batching="padded", device=device)
    expected = Reference.load(checkpoint(name), torch.float32, device=device).kept(dataset, 16)
    assert differences(found, {site: expected[site] for site in found}) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama_llama3", "llama_llama3_legacy"])
def test_llama3_rope_scaling_was_missed(
    name: str, dtype: torch.dtype, checkpoint: Checkpoint, tmp_path: Path, device: str
) -> None:
    """Queries have HF's bits, from inv_freq computed on the CPU, and not those of plain rope."""
    dataset, sites = prompts([LONGEST, 7]), [(layer, hook) for layer in range(3) for hook in ("q_rot", "k_rot")]
    found = keep(checkpoint(name), dataset, Keep(["q_rot", "k_rot"]), batching="padded", dtype=dtype, device=device)
    expected = Reference.load(checkpoint(name), dtype, device=device).kept(dataset, 16)
    assert differences(found, {site: expected[site] for site in sites}) == []
    plain = shutil.copytree(checkpoint(name), tmp_path / "plain")
    edit_config(plain, rope_scaling=None, rope_theta=None, rope_parameters={"rope_theta": 500.0})
    unscaled = keep(plain, dataset, Keep(["q_rot", "k_rot"]), batching="padded", dtype=dtype, device=device)
    assert not torch.equal(unscaled[0, "q_rot"][0], found[0, "q_rot"][0])


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
def test_the_last_residual_post_was_normed(name: str, checkpoint: Checkpoint, device: str) -> None:
    hooks = ("residual_mid", "mlp_out", "residual_post", "final_norm")
    kept = keep(checkpoint(name), DATA, Keep(hooks), device=device)
    model: Any = Reference.load(checkpoint(name), torch.float32, device=device).model.base_model
    norm = model.norm if name.startswith("llama") else model.ln_f
    for sample in range(len(DATA)):
        middle, branch, post = (kept[2, hook][sample] for hook in hooks[:3])
        assert torch.equal(post, middle + branch)
        with torch.no_grad():
            torch.testing.assert_close(kept[None, "final_norm"][sample], norm(post.to(device)).cpu())
        assert not torch.allclose(kept[None, "final_norm"][sample], post, atol=0.1)


def test_the_final_norm_kept_every_graph(folder: Path, device: str) -> None:
    class Look(Keep):
        def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> None:
            assert not torch.is_grad_enabled()
            assert not acts.requires_grad and acts.grad_fn is None
            super().on_batch(layer_idx, hook, acts, sample_ids)

    look = Look(HOOKS, phase="read_after_write")
    with torch.enable_grad():
        direction = torch.ones(60, device=device, requires_grad=True)
        result = run(folder, DATA, Steer(direction), look, RawActivations(hook="final_norm"), device=device)
        assert torch.is_grad_enabled()
    assert {hook for _, hook in look.kept} == set(HOOKS)
    assert not pooled(result, None, "final_norm").requires_grad


class Steer(Callback):
    """Adds a direction that somebody else is training."""

    phase = "write"

    def __init__(self, direction: Tensor) -> None:
        self._direction = direction

    def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> WriteBack:
        with torch.enable_grad():
            return WriteBack(acts + self._direction)


# --- state and storage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_captures_aliased_a_buffer_that_was_reused(
    batching: Any, dtype: torch.dtype, folder: Path, device: str
) -> None:
    """Every acts is kept as it came and compared with its first sight at the end."""
    first: list[tuple[Tensor, Tensor]] = []

    class Look(Keep):
        def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> None:
            first.append((acts, acts.clone()))

    run(folder, DATA, Look(HOOKS), batching=batching, dtype=dtype, device=device)
    assert len(first) > 3 * len(SEQUENTIAL_HOOKS)
    assert all(torch.equal(now, then) for now, then in first)


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_reader_that_zeroes_acts_changed_the_run(batching: Any, folder: Path, device: str) -> None:
    """Through numpy, where torch does not see it; before and after the others in registration, and in every phase."""

    class Zero(Keep):
        def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> None:
            if acts.device.type == "cpu":
                acts.numpy()[:] = 0
            else:
                acts.zero_()

    def zeros() -> list[Zero]:
        phases: list[Any] = ["read", "write", "read_after_write"]
        return [
            Zero([h for h in HOOKS if phase != "write" or h in ("q", "residual_post")], phase=phase) for phase in phases
        ]

    quiet, disturbed = Keep(HOOKS), Keep(HOOKS)
    emitted = [RawActivations(last_token_only=False, phase="read_after_write") for _ in range(2)]
    expected = run(folder, DATA, quiet, emitted[0], batching=batching, device=device)
    found = run(folder, DATA, *zeros(), disturbed, emitted[1], *zeros(), batching=batching, device=device)
    assert differences(disturbed.kept, quiet.kept) == []
    assert all(torch.equal(flat(found, layer), flat(expected, layer)) for layer in range(3))


@pytest.mark.parametrize("size", [1, 2])
def test_prefetch_overwrote_weights_in_use(
    size: int, folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that may be read ahead is read before a layer computes; a cast is what makes reading use the buffers."""
    expected = keep(folder, DATA, dtype="bfloat16", device=device)
    acquired = Weights.acquire

    def patient(weights: Weights, stage: Any) -> Any:
        wait([future for _, future in weights._reading])
        return acquired(weights, stage)

    monkeypatch.setattr(Weights, "acquire", patient)
    assert differences(keep(folder, DATA, dtype="bfloat16", layers_per_visit=size, device=device), expected) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_short_read_left_old_bytes_in_place(
    dtype: str, folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights and of the residual stream: `preadv` returns what it likes."""
    request = {"dtype": dtype, "device": device, "microbatch_tokens": 30, "loading": "stream"}
    request |= {"residual": "disk", "layers_per_visit": 1}
    expected = keep(folder, DATA, Keep(), **request)
    read, calls = os.preadv, iter(range(10**9))

    def short(fd: int, buffers: list[Any], offset: int) -> int:
        (buffer,) = buffers
        return read(fd, [buffer[: 1 + 977 * next(calls) % 499]], offset)

    monkeypatch.setattr(os, "preadv", short)
    assert differences(keep(folder, DATA, Keep(), **request), expected) == []
    assert next(calls) > 100


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_a_misaligned_tensor_was_read_askew(shift: int, checkpoint: Checkpoint, tmp_path: Path, device: str) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length].rstrip(b" ")
    header += b" " * ((shift - len(header)) % 4)
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    assert (8 + len(header)) % 4 == shift and load_file(path).keys() == tensors(checkpoint("llama")).keys()
    for dtype in DTYPES:
        found, expected = (keep(f, DATA, Keep(), dtype=dtype, device=device) for f in (folder, checkpoint("llama")))
        assert differences(found, expected) == []


@pytest.mark.parametrize("phase", ["read", "write", "read_after_write"])
def test_emits_of_a_phase_were_dropped_and_their_dtype_ignored(phase: Any, folder: Path, device: str) -> None:
    class Both(Callback):
        target_layers = (1,)

        def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> Any:
            emits = (
                Emit(acts[:, -1]),
                Emit(acts[:, -1], name="wide", dtype=torch.float64),
                Emit(acts[:, -1].float(), name="narrow", dtype=torch.bfloat16),
                Emit(acts.argmax(-1), per="token", name="place"),
            )
            return (*emits, WriteBack(acts + 1)) if self.phase == "write" else emits

    both = Both()
    both.phase = phase
    result = run(folder, DATA, both, dtype="float16", device=device)
    rows = keep(folder, DATA, Keep(layers=[1]), dtype="float16", device=device)[1, "residual_post"]
    last = torch.stack([rows[i][-1] for i in range(len(DATA))])
    for name, dtype in ((None, torch.float16), ("wide", torch.float64), ("narrow", torch.bfloat16)):
        values = pooled(result, 1, name=name)
        assert values.dtype == dtype and torch.equal(values, last.to(dtype))
    places = flat(result, 1, name="place")
    assert places.dtype == torch.int64
    assert torch.equal(places, torch.cat([rows[i].argmax(-1) for i in range(len(DATA))]))


def test_a_second_run_overwrote_the_first_ones_files_through_hard_links(
    folder: Path, tmp_path: Path, device: str
) -> None:
    """A copy by hard links of an unfinished run stays as it was when the run is begun again."""

    class Stop(Keep):
        _armed = True

        def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> None:
            if self._armed:
                raise Interrupted(2)

    out, copy = tmp_path / "out", tmp_path / "copy"
    raw, stop = RawActivations(last_token_only=False), Stop(layers=[2])
    with pytest.raises(Interrupted):
        run(folder, DATA, raw, stop, out=out, device=device)
    shutil.copytree(out, copy, copy_function=os.link)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert len(before) == 1 + 2 + 1  # run.json, two layers, and one that was under way
    stop._armed = False
    run(folder, DATA, raw, stop, out=out, device=device)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("typo", [{"layers": [99]}, {"hook": "residual_pst"}], ids=str)
def test_typos_were_found_after_the_full_run(
    typo: dict[str, Any], folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untouchable() -> Iterator[list[int]]:
        raise AssertionError("the dataset was read")
        yield [1]

    def unreadable(*arguments: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Weights, "_stage", unreadable)
    sweep = Sweep(folder, untouchable(), callbacks=[RawActivations(), RawActivations(**typo)], device=device)
    for ask in (sweep.preflight, sweep.run):
        with pytest.raises(RequestError, match=r"layer 99 is out of range|no hook 'residual_pst'"):
            ask()


def test_preflight_consumed_a_generator(folder: Path, device: str) -> None:
    look = Keep(HOOKS)
    sweep = Sweep(folder, (row for row in DATA), callbacks=[look], device=device, progress=False)
    assert sweep.preflight().prompts == sweep.preflight().prompts == len(DATA)
    sweep.run()
    assert differences(look.kept, keep(folder, DATA, device=device)) == []


def test_preflight_was_always_feasible_in_no_memory(
    folder: Path, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers are those of the run, and what does not fit is refused before anything is made."""
    out, raw = tmp_path / "out", RawActivations(last_token_only=False)
    request = {"callbacks": [raw], "residual": "ram", "device": device, "progress": False}
    plan = Sweep(folder, DATA, **request).preflight()  # type: ignore[arg-type]
    tokens = sum(map(len, DATA))
    assert plan.costs.outputs == 3 * tokens * 60 * 4
    assert plan.costs.residual == tokens * 60 * 4
    assert plan.memory_bytes > plan.costs.residual + 6 * tokens * 60 * 4
    assert plan.disk_bytes >= plan.costs.outputs
    for free, words in (("available_memory", "of RAM are needed"), ("free_disk", "of disk are needed")):
        with monkeypatch.context() as patch:
            patch.setattr(f"fpwap.machine.{free}", lambda *arguments: 1000)
            sweep = Sweep(folder, DATA, out=out, **request)  # type: ignore[arg-type]
            assert not sweep.preflight().feasible
            assert words in sweep.preflight().summary()
            with pytest.raises(RequestError, match=f"{words} and 1.0 kB may be taken"):
                sweep.run()
            assert not out.exists()


def test_the_manifest_says_what_was_run(folder: Path, device: str) -> None:
    """Nobody has to remember what a folder of numbers is."""
    result = run(folder, DATA, RawActivations([2]), dtype="bfloat16", device=device)
    manifest = json.loads((result.path / "manifest.json").read_text())
    assert manifest["model"]["name"] == str(folder)
    assert manifest["model"]["config"] == json.loads((folder / "config.json").read_text())
    assert (manifest["numerics"]["dtype"], manifest["numerics"]["batching"]) == ("bfloat16", "packed")
    assert manifest["environment"]["torch"] == torch.__version__
    (record,) = manifest["records"]
    assert (record["layer"], record["hook"], record["rows"], record["dtype"]) == (2, "residual_post", 10, "bfloat16")
    result.verify()
