"""`Sweep` from the outside: what it refuses, what callbacks may do, how it stops, what it leaves and what it costs."""

import contextlib
import gc
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checkpoints import LONGEST, VARIANTS, VOCAB, tensors, write
from harness import (
    DTYPES,
    HOOKS,
    WRITABLE,
    Edit,
    Keep,
    Reference,
    Request,
    differences,
    edit_config,
    flat,
    given,
    keep,
    pooled,
    prompts,
    run,
)
from safetensors.torch import save_file
from torch import Tensor

from fpwap import Callback, Emit, Interrupted, ProgressEvent, Result, Sweep, WriteBack
from fpwap.callbacks.base import Context, Site
from fpwap.callbacks.common import DiffOfMeans, IncrementalPCA, RawActivations, SteerInBasis
from fpwap.errors import (
    CallbackError,
    DatasetError,
    FpwapError,
    HubError,
    ModelError,
    NonFiniteError,
    RequestError,
    StoreError,
)
from fpwap.profile import PHASES
from fpwap.store import Store

Checkpoint = Callable[[str], Path]
Error = type[FpwapError]
DATA = prompts([5, 1, 12, 12, 3, 20, 9, 5], seed=20)
LAYERS = 3


@pytest.fixture
def folder(checkpoint: Checkpoint) -> Path:
    return checkpoint("llama_gqa")


class Write(Callback):
    """Puts ``edit(acts)`` in the place of every value at one site."""

    phase = "write"

    def __init__(self, edit: Edit, hook: str = "residual_post", layer: int = 1, positions: Any = "all") -> None:
        self.target_hooks, self.target_layers, self.positions, self._edit = (hook,), [layer], positions, edit

    def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> WriteBack:
        return WriteBack(self._edit(acts))


class Does(Callback):
    """Calls a function at every batch; what that returns is returned."""

    def __init__(self, action: Callable[[Tensor, Tensor], Any], layers: Any = (0,), **attributes: Any) -> None:
        self.target_layers, self._action, self.calls = layers, action, 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def config(self) -> dict[str, Any]:
        return {}

    def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> Any:
        self.calls += 1
        return self._action(acts, sample_ids)


def contents(folder: Path) -> dict[str, bytes]:
    """What a run put out, byte by byte."""
    files = [path for part in ("activations", "artifacts") for path in sorted((folder / part).iterdir())]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# --- requests that are refused --------------------------------------------------------------------------------------

REFUSED: Mapping[str, tuple[dict[str, Any], Error, str]] = {
    "batching": ({"batching": "bucketed"}, RequestError, "batching must be one of packed, padded, not 'bucketed'"),
    "truncation": ({"truncation": "middle"}, RequestError, "truncation must be one of error, left, right"),
    "tier": ({"residual": "tape"}, RequestError, "residual must be one of auto, device, ram, disk"),
    "no length": ({"seq_len": 0}, RequestError, "seq_len must be a positive integer, not 0"),
    "a flag for a length": ({"seq_len": True}, RequestError, "seq_len must be a positive integer, not True"),
    "no layers per visit": ({"layers_per_visit": 0}, RequestError, "layers_per_visit must be a positive integer"),
    "rows in packed mode": ({"microbatch_size": 4}, RequestError, "microbatch_size counts rows of a padded batch"),
    "tokens in padded mode": (
        {"batching": "padded", "microbatch_tokens": 64},
        RequestError,
        "microbatch_tokens belongs to packed mode",
    ),
    "dtype": ({"dtype": "int8"}, RequestError, "dtype must be 'auto' or one of bfloat16, float16, float32"),
    "fp64": ({"dtype": torch.float64}, RequestError, "not torch.float64"),
    "no callbacks": ({"callbacks": []}, RequestError, "no callbacks"),
    "a class": ({"callbacks": [RawActivations]}, RequestError, "must be instances of fpwap.Callback"),
    "one callback twice": ({"callbacks": [Keep()] * 2}, RequestError, "the same callback object is given twice"),
    "device": ({"device": "abacus"}, RequestError, "device 'abacus' is not to be had"),
    "attention": ({"attn_implementation": "flash"}, RequestError, "attn_implementation 'flash' is not one of Llama's"),
    "layer": ({"callbacks": [Keep(layers=[99])]}, RequestError, "Keep: layer 99 is out of range"),
    "layer from the end": ({"callbacks": [Keep(layers=[-4])]}, RequestError, "layer -4 is out of range"),
    "no layer": ({"callbacks": [Keep(layers=[])]}, RequestError, "Keep targets no layer"),
    "layers in words": ({"callbacks": [Keep(layers="first")]}, RequestError, "layers must be 'all' or a list"),  # type: ignore[arg-type]
    "half a layer": ({"callbacks": [Keep(layers=[0.5])]}, RequestError, "a list of integers"),  # type: ignore[list-item]
    "hook": ({"callbacks": [Keep(["resid_post"])]}, RequestError, "no hook 'resid_post'; its hooks are"),
    "no hook": ({"callbacks": [Keep([])]}, RequestError, "Keep targets no hook"),
    "phase": ({"callbacks": [Keep(phase="after")]}, RequestError, "phase 'after' is none of read, write"),  # type: ignore[arg-type]
    "write to logits": ({"callbacks": [Write(torch.neg, "logits")]}, RequestError, "hook 'logits' is read-only"),
    "write to a pattern": ({"callbacks": [Write(torch.neg, "attn_pattern")]}, RequestError, "is read-only"),
    "positions in words": ({"callbacks": [Keep(positions="first")]}, RequestError, "positions must be 'all'"),  # type: ignore[arg-type]
    "no positions": ({"callbacks": [Keep(positions=[])]}, RequestError, "or a list of integers, not []"),
    "position": ({"callbacks": [Keep(positions=[1])]}, RequestError, "position 1 is outside prompt 1, which has 1 "),
    "position from the end": ({"callbacks": [Keep(positions=[-5])]}, RequestError, "position -5 is outside prompt 1"),
    "no such model": ({"model": "/no/such/model"}, HubError, "/no/such/model is not a folder"),
    "a file": ({"model": __file__}, HubError, "is a file: give the folder"),
    "revision of a folder": ({"revision": "main"}, HubError, "revision='main' applies to hub models only"),
    "text": ({"dataset": "Hello"}, RequestError, "not a string: tokenise first"),
    "texts": ({"dataset": ["Hello"]}, DatasetError, "sample 0: input_ids is text, not token ids"),
    "no prompts": ({"dataset": iter(())}, DatasetError, "the dataset is empty"),
    "id": ({"dataset": [[1], [2, VOCAB]]}, DatasetError, f"sample 1: input_ids[1] is {VOCAB}, but the model's ids"),
    "no ids": ({"dataset": [{"ids": [1]}]}, DatasetError, "sample 0 has no 'input_ids'"),
    "long prompts": ({"seq_len": 11}, DatasetError, "3 of 8 samples have input_ids of more than 11 tokens"),
    "missing label": (
        {"callbacks": [DiffOfMeans([0], lambda row: row["label"])], "dataset": [{"input_ids": [1], "class": 0}]},
        RequestError,
        "label_fn raised KeyError: 'label' on sample 0, whose keys are class, input_ids",
    ),
    "components": ({"callbacks": [IncrementalPCA("all", 8)]}, RequestError, "n_components=8"),
    "basis": ({"callbacks": [SteerInBasis(torch.ones(7), layers=[0])]}, RequestError, "width 7"),
    "metadata": (
        {"callbacks": [Does(print, on_sweep_start=lambda ctx: ctx.metadata(0))]},
        RequestError,
        "set needs_metadata = True",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_sentence(change: Request, error: Error, words: str, folder: Path, device: str) -> None:
    request: Request = {
        "model": folder,
        "dataset": DATA,
        "callbacks": [Keep()],
        "device": device,
        "progress": False,
    } | change
    with pytest.raises(error) as caught:
        Sweep(**request).run()
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert isinstance(caught.value, OSError if error is HubError else ValueError)


def test_prompts_beyond_learned_positions_are_refused(checkpoint: Checkpoint, device: str) -> None:
    with pytest.raises(DatasetError, match="1 of 2 samples have input_ids of more than 40 tokens"):
        Sweep(checkpoint("gpt2"), prompts([40, 41]), callbacks=[Keep()], device=device).preflight()


def test_construction_touches_nothing() -> None:
    class Untouchable(list[int]):
        def __iter__(self) -> Any:
            raise AssertionError("the dataset was read")

    Sweep("/no/such/model", Untouchable(), callbacks=[Keep()])


# --- models that are refused ----------------------------------------------------------------------------------------


def damage(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrites a checkpoint of one file."""
    held = tensors(folder)
    change(held)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / "model.safetensors")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 7)


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


Q1 = "model.layers.1.self_attn.q_proj.weight"
DAMAGED: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: damage(f, lambda t: t.pop(Q1)), f"{Q1} is missing (expected q_width 60 x hidden 60)"),
    "mis-shaped": (
        lambda f: damage(f, lambda t: t.update({Q1: t[Q1][:48]})),
        f"{Q1} has shape [48, 60] where the config says q_width 60 x hidden 60",
    ),
    "extra": (
        lambda f: damage(f, lambda t: t.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(60)})),
        "q_norm",
    ),
    "correction bias": (
        lambda f: damage(f, lambda t: t.update({"model.layers.0.mlp.gate.e_score_correction_bias": torch.ones(4)})),
        "e_score_correction_bias",
    ),
    "integers": (lambda f: damage(f, lambda t: t.update({Q1: t[Q1].to(torch.int8)})), f"{Q1} is stored as I8"),
    "more layers than tensors": (lambda f: edit_config(f, num_hidden_layers=4), "model.layers.3."),
    "fewer layers than tensors": (lambda f: edit_config(f, num_hidden_layers=2), "model.layers.2."),
    "another width": (lambda f: edit_config(f, intermediate_size=99), "mlp_width 99"),
    "unknown family": (lambda f: edit_config(f, model_type="mamba"), "model_type 'mamba' is not supported"),
    "no family": (lambda f: edit_config(f, model_type=None), "model_type None is not supported"),
    "unknown key": (lambda f: edit_config(f, attn_temperature=2.0), "'attn_temperature' = 2.0"),
    "sliding window": (lambda f: edit_config(f, sliding_window=8), "'sliding_window' = 8"),
    "quantised": (lambda f: edit_config(f, quantization_config={"bits": 4}), "quantization_config"),
    "missing key": (lambda f: edit_config(f, hidden_size=None), "lacks 'hidden_size'"),
    "mis-typed key": (lambda f: edit_config(f, hidden_size="60"), "'hidden_size' must be a positive integer"),
    "rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "longrope"}),
        "rope type 'longrope' needs 'short_factor'",
    ),
    "activation": (lambda f: edit_config(f, hidden_act="mish"), "hidden_act 'mish' is not supported"),
    "dtype": (lambda f: edit_config(f, dtype="float8"), "is made for float8"),
    "config is no object": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "pickles": (pickle_only, "pytorch_model.bin is a pickle and is never opened"),
    "cut short": (cut, "model.safetensors is not a readable safetensors file"),
}


@pytest.mark.parametrize(("change", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_model_that_does_not_fit_is_refused_by_name(
    change: Callable[[Path], object], words: str, checkpoint: Checkpoint, tmp_path: Path, device: str
) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    change(folder)
    with pytest.raises(ModelError) as caught:
        Sweep(folder, DATA, callbacks=[Keep()], device=device).preflight()
    message = str(caught.value)
    assert words in message
    assert str(folder) in message
    assert "\n" not in message


def test_all_that_is_wrong_with_a_checkpoint_is_named_at_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    gone = [Q1, "model.norm.weight", "model.layers.2.mlp.up_proj.weight"]
    damage(folder, lambda held: [held.pop(name) for name in gone])
    with pytest.raises(ModelError) as caught:
        Sweep(folder, DATA, callbacks=[Keep()]).preflight()
    assert all(f"{name} is missing" in str(caught.value) for name in gone)


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folder, tmp_path / "model")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} is missing"):
        Sweep(folder, DATA, callbacks=[Keep()]).preflight()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shard_that_shrinks_after_preflight_is_an_error(
    dtype: str, checkpoint: Checkpoint, tmp_path: Path, device: str
) -> None:
    """Mapped or read, before a run or within: a map beyond the end of a file would kill the interpreter."""
    for begun in (False, True):
        folder = shutil.copytree(checkpoint("llama"), tmp_path / f"model {begun}")

        class Shrinks(Keep):
            def on_sweep_start(self, ctx: object, begun: bool = begun, folder: Path = folder) -> None:
                super().on_sweep_start(ctx)
                if begun:
                    os.truncate(folder / "model.safetensors", 30_000)

        sweep = Sweep(folder, DATA, callbacks=[Shrinks()], dtype=dtype, device=device, progress=False)
        sweep.preflight()
        if not begun:
            os.truncate(folder / "model.safetensors", 30_000)
        cut = r"was truncated while it was read: .* is cut off" if begun else "is not a readable safetensors file"
        with pytest.raises(ModelError, match=rf"model\.safetensors {cut}"):
            sweep.run()


# --- tied embeddings (NUMERICS section 8) ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_tied", "llama_tied_other_head", "llama_tied_head_alone", "gpt2_other_head"])
def test_tied_heads_are_what_transformers_makes_of_them(name: str, checkpoint: Checkpoint, device: str) -> None:
    for hook in ("embedding", "logits"):
        found = keep(checkpoint(name), DATA, Keep([hook]), batching="padded", device=device)
        expected = Reference.load(checkpoint(name), torch.float32, device=device).kept(DATA, 16)
        assert differences(found, {(None, hook): expected[None, hook]}) == []


def test_without_a_head_there_are_no_logits_but_all_else(checkpoint: Checkpoint, tmp_path: Path, device: str) -> None:
    """transformers would fill the head with random numbers."""
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    damage(folder, lambda held: held.pop("lm_head.weight"))
    with pytest.raises(RequestError, match=r"has no lm_head\.weight and ties no weights: it has no logits"):
        Sweep(folder, DATA, callbacks=[Keep(["logits"])], device=device).preflight()
    hooks = [hook for hook in HOOKS if hook != "logits"]
    found, expected = (keep(f, DATA, Keep(hooks), device=device) for f in (folder, checkpoint("llama")))
    assert differences(found, expected) == []


# --- what callbacks see ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_acts_are_prompts_of_one_length_without_padding(batching: Any, folder: Path, device: str) -> None:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("residual_pre", "attn_out", "residual_mid", "mlp_out", "residual_post"), (60,)
    )
    shapes |= {"q": (6, 10), "q_rot": (6, 10), "z": (6, 10), "k": (2, 10), "k_rot": (2, 10), "v": (2, 10)}
    shapes |= {"mlp_hidden": (101,), "embedding": (60,), "final_norm": (60,), "logits": (VOCAB,)}
    seen: dict[str, list[int]] = {}

    class Look(Keep):
        def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> None:
            super().on_batch(layer_idx, hook, acts, sample_ids)
            assert (layer_idx is None) == (hook in ("embedding", "final_norm", "logits"))
            assert sample_ids.dtype == torch.int64 and sample_ids.device.type == "cpu" and sample_ids.ndim == 1
            assert acts.device.type == torch.device(device).type and acts.is_contiguous()
            assert acts.dtype == (torch.float32 if hook == "attn_pattern" else torch.bfloat16)
            b, (s,) = len(sample_ids), {len(DATA[i]) for i in sample_ids.tolist()}
            assert acts.shape == ((b, 6, s, s) if hook == "attn_pattern" else (b, s, *shapes[hook]))
            seen.setdefault(hook, []).extend(sample_ids.tolist())

    run(folder, DATA, Look(HOOKS, layers=[2]), batching=batching, dtype="bfloat16", device=device)
    assert {hook: sorted(ids) for hook, ids in seen.items()} == {hook: list(range(8)) for hook in HOOKS}


def test_positions_count_real_tokens(folder: Path, device: str) -> None:
    """Under left and right padding, as without."""
    rows = prompts([5, 12, 7])
    all_of_them = keep(folder, rows, device=device)
    for dataset, batching in ((rows, "packed"), (given(rows, "left"), "padded"), (given(rows, "right"), "padded")):
        for chosen in ([-1], [0, 3], [-2, 1, -5]):
            callback = Keep(positions="last" if chosen == [-1] else chosen)
            found = keep(folder, dataset, callback, batching=batching, device=device)
            for (layer, hook), by_sample in found.items():
                for sample, value in by_sample.items():
                    torch.testing.assert_close(value, all_of_them[layer, hook][sample][chosen])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_life_cycle(size: int, folder: Path, device: str) -> None:
    calls: list[Any] = []

    class Log(Callback):
        target_layers = (0, 2)
        target_hooks = ("residual_post", "logits", "q")

        def on_sweep_start(self, ctx: Context) -> None:
            calls.append("start")
            sites: list[Site] = [(0, "q"), (0, "residual_post"), (2, "q"), (2, "residual_post"), (None, "logits")]
            assert list(ctx.sites(self)) == sites
            assert (ctx.layers, ctx.hidden, ctx.vocab, ctx.dtype) == (LAYERS, 60, VOCAB, torch.float32)
            assert (ctx.n_prompts, ctx.total_tokens, ctx.length(2)) == (8, sum(map(len, DATA)), 12)
            assert ctx.tokens(2).tolist() == DATA[2] and ctx.tokens(2).dtype == torch.int32
            assert (ctx.widths("k"), ctx.widths("logits"), ctx.widths("attn_pattern")) == ((2, 10), (VOCAB,), (6,))

        def on_layer_start(self, layer_idx: int | None) -> None:
            calls.append(("layer", layer_idx))

        def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> None:
            calls.append((layer_idx, hook))

        def on_layer_end(self, layer_idx: int | None) -> None:
            calls.append(("end", layer_idx))

        def on_sweep_end(self) -> None:
            calls.append("end")

    run(folder, DATA, Log(), layers_per_visit=size, device=device)
    order = [call for index, call in enumerate(calls) if index == 0 or call != calls[index - 1]]
    first, second = [(0, "q"), (0, "residual_post")], [(2, "q"), (2, "residual_post")]
    if size == 3:
        middle = [("layer", 0), ("layer", 2), *first, *second, (None, "logits"), ("end", 0), ("end", 2)]
    else:
        middle = [("layer", 0), *first, ("end", 0), ("layer", 2), *second, ("end", 2), (None, "logits")]
    assert order == ["start", ("layer", None), *middle, ("end", None), "end"]


def test_metadata_and_labels_reach_callbacks(folder: Path, device: str) -> None:
    samples = [{"input_ids": row, "label": index % 3, "text": str(index)} for index, row in enumerate(DATA)]
    seen: list[Any] = []
    look = Does(print, needs_metadata=True, on_sweep_start=lambda ctx: seen.extend(map(ctx.metadata, range(8))))
    look._action = lambda acts, sample_ids: None
    run(folder, samples, look, device=device)
    assert seen == [{"label": index % 3, "text": str(index)} for index in range(8)]


# --- phases at one site ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_readers_come_before_writers_before_readers_after(batching: Any, folder: Path, device: str) -> None:
    """Whatever the order of registration; each writer sees what the one before wrote."""
    seen: dict[str, dict[int, Tensor]] = {}

    def look(name: str, change: Edit | None = None) -> Callable[[Tensor, Tensor], WriteBack | None]:
        def action(acts: Tensor, sample_ids: Tensor) -> WriteBack | None:
            seen.setdefault(name, {}).update(zip(sample_ids.tolist(), acts.clone(), strict=True))
            return WriteBack(change(acts)) if change else None

        return action

    after = Does(look("after"), phase="read_after_write")
    first = Does(look("first", lambda acts: acts + 1), phase="write")
    before = Does(look("before"), phase="read")
    second = Does(look("second", lambda acts: acts * 2), phase="write")
    run(folder, DATA, after, first, before, second, batching=batching, device=device)
    original = keep(folder, DATA, Keep(layers=[0]), batching=batching, device=device)[0, "residual_post"]
    for sample, value in original.items():
        expected = {"before": value, "first": value, "second": value + 1, "after": (value + 1) * 2}
        assert all(torch.equal(seen[name][sample].cpu(), expected[name]) for name in expected)


def test_every_form_of_answer(folder: Path, device: str) -> None:
    forms: list[Callable[[Tensor], Any]] = [
        lambda acts: None,
        lambda acts: Emit(acts[:, -1]),
        lambda acts: WriteBack(acts),
        lambda acts: (Emit(acts[:, -1]), WriteBack(acts + 1)),
        lambda acts: (WriteBack(acts - 1), Emit(acts[:, -1, 0])),
        lambda acts: (Emit(acts[:, -1]), Emit(acts.sum(-1), per="token", name="sums")),
    ]
    callbacks = [Does(lambda acts, ids, form=form: form(acts), phase="write") for form in forms]  # type: ignore[misc]
    result = run(folder, DATA, *callbacks, device=device)
    found = {(entry["name"], entry["per"], *entry["rest"]) for entry in result.manifest["records"]}
    expected = {(None, "prompt", 60), ("Does", "prompt", 60), ("Does_2", "prompt"), ("Does_3", "prompt", 60)}
    assert found == {*expected, ("sums", "token")}
    assert torch.equal(pooled(result, 0, name="Does_2"), pooled(result, 0)[:, 0] + 1)
    torch.testing.assert_close(pooled(result, 0, name="Does_3"), pooled(result, 0))


WRONG: Mapping[str, tuple[Callable[[Tensor, Tensor], Any], str, str]] = {
    "write in a read phase": (lambda acts, _: WriteBack(acts), "read", "returned WriteBack in phase 'read'"),
    "write after the write": (
        lambda acts, _: WriteBack(acts),
        "read_after_write",
        "returned WriteBack in phase 'read_after_write'",
    ),
    "write of another shape": (lambda acts, _: WriteBack(acts[:, :1, :3]), "write", "wrote back shape"),
    "a tensor": (lambda acts, _: acts, "read", "returned a Tensor; on_batch returns Emit, WriteBack, both or None"),
    "a list": (lambda acts, _: [Emit(acts[:, 0])], "read", "returned a list"),
    "rows of nobody": (lambda acts, _: Emit(acts[0]), "read", "emitted shape"),
    "tokens of nobody": (lambda acts, _: Emit(acts[:, -1], per="token"), "read", "per token; it must start with"),
    "two outputs of one name": (
        lambda acts, _: (Emit(acts[:, 0], name="a"), Emit(acts[:, 0], name="a")),
        "read",
        "emitted two outputs of one name at once",
    ),
    "some prompts only": (
        lambda acts, ids: Emit(acts[:, -1]) if 5 not in ids else None,
        "read",
        "Does emitted 7 of 8 prompts at layer 0, hook 'residual_post'",
    ),
    "a width that changes": (
        lambda acts, ids: Emit(acts[:, -1, : len(ids)]),
        "read",
        "they must stay the same",
    ),
    "a dtype that changes": (
        lambda acts, ids: Emit(acts[:, -1], dtype=torch.float16 if 0 in ids else torch.float32),
        "read",
        "they must stay the same",
    ),
    "a name that is no name": (lambda acts, _: Emit(acts[:, -1], name="../x"), "read", "'../x' will not do"),
}


@pytest.mark.parametrize(("action", "phase", "words"), WRONG.values(), ids=WRONG)
def test_wrong_answers_are_callback_errors(
    action: Callable[[Tensor, Tensor], Any], phase: str, words: str, folder: Path, device: str
) -> None:
    with pytest.raises(FpwapError, match=r"layer 0, hook '?residual_post") as caught:
        run(folder, DATA, Does(action, phase=phase), device=device)
    assert words in str(caught.value)


# --- what is written goes on ----------------------------------------------------------------------------------------

STEERED = [*prompts([1, 9, LONGEST]), *given(prompts([20, 5, 13], seed=1), "left"), *prompts([8, 3], seed=2)]


@pytest.mark.parametrize("hook", WRITABLE)
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
def test_a_write_feeds_the_block_and_the_layers_after_it(
    name: str, hook: str, checkpoint: Checkpoint, device: str
) -> None:
    """As an independent hook in Hugging Face does it: all later values bit by bit, all earlier ones untouched."""
    dtype = DTYPES[WRITABLE.index(hook) % 3]
    site = (None if hook in ("embedding", "final_norm") else 1, hook)
    look = Keep([hook for hook in HOOKS if hook != "attn_pattern"], phase="read_after_write")
    padded = {"batching": "padded", "microbatch_size": 3, "dtype": dtype, "device": device}
    run(checkpoint(name), STEERED, Write(lambda acts: acts * 0.5 + 0.25, hook), look, **padded)
    reference = Reference.load(checkpoint(name), dtype, device=device)
    assert differences(look.kept, reference.kept(STEERED, 3, {site: lambda value: value * 0.5 + 0.25})) == []


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
def test_steering_is_a_direction_added_in_fp32_at_every_position(
    name: str, layer: int, checkpoint: Checkpoint, device: str
) -> None:
    direction = torch.randn(3, 60, generator=torch.Generator().manual_seed(1))
    steer = SteerInBasis(direction, direction_idx=2, alpha=-1.7, layers=[layer])
    look = Keep([hook for hook in HOOKS if hook != "attn_pattern"], phase="read_after_write")
    padded = {"batching": "padded", "microbatch_size": 3, "dtype": "bfloat16", "device": device}
    run(checkpoint(name), STEERED, steer, look, **padded)
    reference = Reference.load(checkpoint(name), torch.bfloat16, device=device)

    def edit(value: Tensor) -> Tensor:
        return (value.float() + -1.7 * direction[2].to(value.device)).bfloat16()

    assert differences(look.kept, reference.kept(STEERED, 3, {(layer, "residual_post"): edit})) == []


def test_a_write_at_some_positions_leaves_the_others(folder: Path, device: str) -> None:
    dataset = prompts([10] * 4)
    look = Keep(phase="read_after_write")
    write = Write(lambda acts: acts * 0.5, layer=0, positions=[-1, 2])
    run(folder, dataset, write, look, batching="padded", device=device)

    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, [-1, 2]] *= 0.5
        return value

    expected = Reference.load(folder, torch.float32, device=device).kept(dataset, 16, {(0, "residual_post"): edit})
    assert differences(look.kept, {site: expected[site] for site in look.kept}) == []


def test_a_steered_prompt_alone_has_the_bits_it_has_in_the_dataset(folder: Path, device: str) -> None:
    def steered(dataset: list[list[int]]) -> Any:
        look = Keep(HOOKS)
        steer = SteerInBasis(torch.ones(60), alpha=0.3, layers=[0, 1])
        run(folder, dataset, look, steer, dtype="bfloat16", device=device)
        return look.kept

    together = steered(DATA)
    for sample in (1, 3, 5):
        alone = steered(DATA[sample : sample + 1])
        assert differences(alone, {site: {0: rows[sample]} for site, rows in together.items()}) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_written_value_is_cast_to_the_models_dtype(dtype: torch.dtype, folder: Path, device: str) -> None:
    values = torch.randn(8, 60, generator=torch.Generator().manual_seed(3))
    write = Does(lambda acts, ids: WriteBack(values[ids][:, None].to(acts.device)), phase="write", positions="last")
    look = Keep(layers=[0], phase="read_after_write", positions="last")
    run(folder, DATA, write, look, dtype=dtype, device=device)
    for sample, value in look.kept[0, "residual_post"].items():
        assert torch.equal(value[0], values[sample].to(dtype))


# --- the plan --------------------------------------------------------------------------------------------------------


def warnings(folder: Path, *callbacks: Callback, dataset: Any = DATA) -> list[str]:
    plan = Sweep(folder, dataset, callbacks=callbacks).preflight()
    assert all(warning in plan.summary() for warning in plan.warnings)
    return list(plan.warnings)


def test_a_write_that_nobody_reads_is_a_warning(folder: Path) -> None:
    def write(hook: str = "residual_post", layer: int = 1) -> Write:
        return Write(torch.neg, hook, layer)

    unread = "Write writes at layer 1, hook 'residual_post' and nothing reads after it"
    assert warnings(folder, write()) == [unread]
    assert warnings(folder, write(), Keep(layers=[1])) == [unread]  # which sees the value before
    assert warnings(folder, write(), Keep(layers=[0])) == [unread]
    assert warnings(folder, write(), Keep(["mlp_out"], layers=[1])) == [unread]
    assert warnings(folder, write(), Keep(layers=[1], phase="read_after_write")) == []
    assert warnings(folder, write(), Keep(layers=[2])) == []
    assert warnings(folder, write(), Keep(["logits"])) == []
    assert warnings(folder, write("q"), Keep(["k"], layers=[1])) == []  # in the order in which hooks are shown


def test_prompts_beyond_the_trained_length_are_a_warning(folder: Path) -> None:
    assert warnings(folder, Keep(), dataset=prompts([65, 64])) == [
        "1 prompts are longer than max_position_embeddings (64)"
    ]


def test_the_plan_says_what_it_will_do(folder: Path, device: str) -> None:
    plan = Sweep(folder, DATA, callbacks=[RawActivations(layers=[1])], dtype="bfloat16", device=device).preflight()
    assert plan.feasible and plan.blockers == ()
    assert (plan.prompts, plan.tokens, plan.longest, plan.dtype) == (8, 67, 20, torch.bfloat16)
    assert plan.costs.outputs == 8 * 60 * 2
    assert plan.costs.residual == 67 * 60 * 2
    stored = tensors(folder)
    below = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.")
    assert plan.weights_bytes == sum(t.nbytes for name, t in stored.items() if name.startswith(below))
    for words in ("Llama, 3 layers, bfloat16", "8 prompts, 67 tokens", "up to layer 1, hook 'residual_post'"):
        assert words in plan.summary()


def test_the_dtype_is_the_checkpoints_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert Sweep(checkpoint("llama_mqa"), DATA, callbacks=[Keep()]).preflight().dtype == torch.bfloat16
    folder = shutil.copytree(checkpoint("llama_mqa"), tmp_path / "model")
    edit_config(folder, dtype=None, torch_dtype="float16")
    assert Sweep(folder, DATA, callbacks=[Keep()]).preflight().dtype == torch.float16
    edit_config(folder, torch_dtype=None)
    assert Sweep(folder, DATA, callbacks=[Keep()]).preflight().dtype == torch.bfloat16


# --- truncation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_truncated_prompts_are_run_as_if_given_so(side: Any, batching: Any, folder: Path, device: str) -> None:
    short = [row[-7:] if side == "left" else row[:7] for row in DATA]
    for dataset in (DATA, given(DATA, "left"), given(DATA, "right")):
        found = keep(folder, dataset, seq_len=7, truncation=side, batching=batching, device=device)
        assert differences(found, keep(folder, short, batching=batching, device=device)) == []


# --- being stopped ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_at_the_next_tap(signum: int, folder: Path, tmp_path: Path, device: str) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stop = Does(lambda acts, ids: os.kill(os.getpid(), signum), layers="all")
    later = Keep(layers=[1])
    with pytest.raises(Interrupted) as caught:
        run(folder, DATA, stop, later, out=tmp_path / "out", device=device)
    assert caught.value.signum == signum and isinstance(caught.value, KeyboardInterrupt)
    assert stop.calls == 1 and later.kept == {}
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    with pytest.raises(StoreError, match="no finished run"):
        Result.open(tmp_path / "out")


def test_an_interrupted_run_is_begun_again(folder: Path, tmp_path: Path, device: str) -> None:
    class Stop(RawActivations):
        _armed = True

        def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> Emit:
            if layer_idx == 1 and self._armed:
                os.kill(os.getpid(), signal.SIGINT)
            return super().on_batch(layer_idx, hook, acts, sample_ids)

    stop = Stop()
    with pytest.raises(Interrupted):
        run(folder, DATA, stop, out=tmp_path / "out", device=device)
    assert (tmp_path / "out" / "activations").exists()
    stop._armed = False
    result = run(folder, DATA, stop, out=tmp_path / "out", device=device)
    expected = run(folder, DATA, RawActivations(), device=device)
    assert all(torch.equal(pooled(result, layer), pooled(expected, layer)) for layer in range(LAYERS))
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_outside_the_main_thread_no_handler_is_touched(folder: Path, device: str) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    seen: list[Any] = []

    def look(acts: Tensor, ids: Tensor) -> None:
        seen.append({number: signal.getsignal(number) for number in handlers})

    worker = threading.Thread(target=lambda: run(folder, DATA, Does(look), device=device))
    worker.start()
    worker.join()
    assert seen and all(found == handlers for found in seen)


# --- errors in the midst of a run -----------------------------------------------------------------------------------


class Broken(Callback):
    """Raises in one of its methods."""

    def __init__(self, method: str) -> None:
        self.target_layers, self.method = [1], method

        def fail(*arguments: Any) -> Any:
            raise KeyError("broken")

        setattr(self, method, fail)

    def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> None:
        pass


@pytest.mark.parametrize("method", ["on_sweep_start", "on_layer_start", "on_batch", "on_layer_end", "on_sweep_end"])
def test_a_callback_that_raises_is_named(method: str, folder: Path, tmp_path: Path, device: str) -> None:
    with pytest.raises(CallbackError) as caught:
        run(folder, DATA, Broken(method), out=tmp_path / "out", device=device)
    message = str(caught.value)
    assert f"Broken.{method}" in message and "KeyError: 'broken'" in message
    if method.startswith(("on_layer", "on_batch")):
        assert "layer 1, hook 'residual_post'" in message
    if method == "on_batch":
        assert "samples [5]" in message  # the longest prompt comes first
    assert isinstance(caught.value.__cause__, KeyError)
    complete = method == "on_sweep_end"
    assert (tmp_path / "out" / "manifest.json").exists() == complete


def overflowing(folder: Path, layer: int) -> Path:
    """A checkpoint whose residual stream leaves the range of fp16 in one layer, at every token."""
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    write(VARIANTS["llama"], folder)
    damage(folder, lambda held: held.update({name: held[name] * 1e6}))
    return folder


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("last", [1, 2])
def test_non_finite_activations_stop_the_run(last: int, batching: Any, tmp_path: Path, device: str) -> None:
    """Also where the layer is the last that anybody wants."""
    folder = overflowing(tmp_path / "model", 1)
    request = {"batching": batching, "dtype": "float16", "device": device}
    with pytest.raises(NonFiniteError, match=r"sample \d is infinite or NaN at layer 1, hook .*float16 is too narrow"):
        run(folder, DATA, RawActivations(layers=[last]), **request)
    run(folder, DATA, RawActivations(layers=[0]), **request)
    run(folder, DATA, RawActivations(layers=[last]), **request | {"dtype": "float32"})


def test_non_finite_logits_stop_the_run(checkpoint: Checkpoint, tmp_path: Path, device: str) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    damage(folder, lambda held: held.update({"lm_head.weight": held["lm_head.weight"] * 1e5}))
    with pytest.raises(NonFiniteError, match=r"sample \d is infinite or NaN at hook 'logits'"):
        run(folder, DATA, RawActivations(hook="logits"), dtype="float16", device=device)


# --- the folder of a run --------------------------------------------------------------------------------------------


def test_a_finished_identical_run_is_opened_not_repeated(
    folder: Path, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = run(folder, DATA, RawActivations(), out=out, device=device)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    def unwanted(*arguments: Any, **more: Any) -> None:
        raise AssertionError("the sweep was begun")

    monkeypatch.setattr("fpwap.sweep.sweep", unwanted)
    for change in ({}, {"residual": "disk"}, {"layers_per_visit": 2}, {"progress": True}):  # none of which changes bits
        again = run(folder, DATA, RawActivations(), out=out, device=device, **change)
        assert again.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


DIFFERENT: Mapping[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "bfloat16"}, "numerics.dtype"),
    "batching": ({"batching": "padded"}, "numerics.batching"),
    "prompts": ({"dataset": DATA[1:]}, "dataset.digest"),
    "layers": ({"callbacks": [RawActivations(layers=[0])]}, "callbacks"),
    "attention": ({"attn_implementation": "eager"}, "numerics.attention"),
}


@pytest.mark.parametrize(("change", "key"), DIFFERENT.values(), ids=DIFFERENT)
def test_another_run_is_refused_with_the_difference(
    change: Request, key: str, folder: Path, tmp_path: Path, device: str
) -> None:
    out = tmp_path / "out"
    request: Request = {
        "callbacks": [RawActivations()],
        "dataset": DATA,
        "out": out,
        "device": device,
        "progress": False,
    }
    Sweep(folder, **request).run()
    before = contents(out)
    with pytest.raises(StoreError, match="holds another run") as caught:
        Sweep(folder, **request | change).run()
    assert key in str(caught.value)
    assert contents(out) == before


def test_other_labels_are_another_run(folder: Path, tmp_path: Path, device: str) -> None:
    """A label function has no identity; what it returns has."""

    def by(modulus: int) -> DiffOfMeans:
        return DiffOfMeans([1], lambda sample: len(sample["input_ids"]) % modulus)

    run(folder, DATA, by(2), out=tmp_path / "out", device=device)
    run(folder, DATA, by(2), out=tmp_path / "out", device=device)
    with pytest.raises(StoreError, match="holds another run"):
        run(folder, DATA, by(3), out=tmp_path / "out", device=device)


def test_a_folder_with_foreign_files_is_left_alone(folder: Path, tmp_path: Path, device: str) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match=r"holds 'thesis\.tex'"):
        run(folder, DATA, RawActivations(), out=tmp_path, device=device)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_without_a_folder_lives_as_long_as_its_result(folder: Path, tmp_path: Path, device: str) -> None:
    result = run(folder, DATA, RawActivations(), device=device)
    path, acts = result.path, pooled(result, 1)
    kept = result.save(tmp_path / "kept")
    del result
    gc.collect()
    assert not path.exists()
    assert torch.equal(pooled(kept, 1), acts)
    assert torch.equal(pooled(Result.open(tmp_path / "kept"), -2), acts)


def test_a_failed_run_without_a_folder_leaves_none(folder: Path, tmp_path: Path, device: str) -> None:
    tempfile_folder = tmp_path / "tmp"
    tempfile_folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tempfile_folder))
        with pytest.raises(CallbackError):
            run(folder, DATA, Broken("on_batch"), device=device)
    assert not list(tempfile_folder.iterdir())


def label(sample: Mapping[str, Any]) -> bool:
    return len(sample["input_ids"]) > 8


def everything() -> list[Callback]:
    """One of each shipped callback, on several hooks."""
    return [
        SteerInBasis(torch.linspace(-1, 1, 60), alpha=0.5, layers=[0, 2]),
        RawActivations(phase="read_after_write"),
        RawActivations(hook="q", last_token_only=False),
        RawActivations(hook="logits", positions=[-1]),
        IncrementalPCA("all", 3),
        IncrementalPCA("all", 5, hook="mlp_hidden", last_token_only=False),
        DiffOfMeans("all", label),
    ]


def test_tiers_and_layer_groups_leave_the_same_bytes(folder: Path, tmp_path: Path, device: str) -> None:
    expected: dict[str, bytes] = {}
    for residual, size in (("ram", 1), ("disk", 1), ("disk", 2), ("ram", 2), ("auto", 3)):
        out = tmp_path / f"{residual}-{size}"
        request = {"residual": residual, "layers_per_visit": size, "microbatch_tokens": 30, "dtype": "bfloat16"}
        run(folder, DATA, *everything(), out=out, device=device, **request)
        expected = expected or contents(out)
        assert contents(out) == expected
        assert not (out / "scratch").exists()
    assert len(expected) == 3 + 3 + 1 + 3 * 3


def test_a_sweep_may_be_run_twice(folder: Path, tmp_path: Path, device: str) -> None:
    """Also over a generator, which can be read only once."""
    callbacks = everything()
    sweep = Sweep(folder, iter(DATA), callbacks=callbacks, device=device, progress=False)
    first, second = sweep.run().save(tmp_path / "1"), sweep.run().save(tmp_path / "2")
    assert contents(first.path) == contents(second.path)
    third = Sweep(folder, DATA, callbacks=callbacks, device=device, progress=False).run().save(tmp_path / "3")
    assert contents(third.path) == contents(first.path)


# --- model-level hooks, and no more work than is wanted -------------------------------------------------------------


def test_model_level_hooks_belong_to_no_layer(folder: Path, device: str) -> None:
    hooks = ("embedding", "final_norm", "logits")
    raw = [RawActivations(layers=[0], hook=hook, last_token_only=False) for hook in hooks]
    result = run(folder, DATA, *raw, RawActivations(hook="residual_pre", last_token_only=False), device=device)
    assert {entry["file"] for entry in result.manifest["records"] if entry["layer"] is None} == {
        f"activations/{hook}.safetensors" for hook in hooks
    }
    assert torch.equal(flat(result, None, "embedding"), flat(result, 0, "residual_pre"))
    assert flat(result, None, "logits").shape == (sum(map(len, DATA)), VOCAB)
    last = run(folder, DATA, RawActivations(hook="logits"), device=device)
    ends = torch.tensor([len(row) for row in DATA]).cumsum(0) - 1
    assert torch.equal(pooled(last, None, "logits"), flat(result, None, "logits")[ends])


def test_artifacts_of_model_level_hooks(folder: Path, device: str) -> None:
    result = run(folder, DATA, IncrementalPCA("all", 2, hook="final_norm"), device=device)
    assert result.artifact("pca_basis", hook="final_norm")["components"].shape == (2, 60)
    assert list(result.artifacts) == [("pca_basis", None, "final_norm")]


@pytest.mark.parametrize(
    ("callback", "names"),
    [
        (Keep(["embedding"]), ["model.embed_tokens."]),
        (Keep(["q"], layers=[0]), ["model.embed_tokens.", "model.layers.0."]),
        (Keep(layers=[-2]), ["model.embed_tokens.", "model.layers.0.", "model.layers.1."]),
        (Keep(["final_norm"]), ["model."]),
        (Keep(["logits"]), ["model.", "lm_head."]),
    ],
)
def test_nothing_is_read_past_the_last_wanted_site(callback: Keep, names: list[str], folder: Path, device: str) -> None:
    moved = run(folder, DATA, callback, device=device).profile.bytes_moved()
    assert moved["weights"] == sum(t.nbytes for name, t in tensors(folder).items() if name.startswith(tuple(names)))


def test_inside_the_last_layer_nothing_is_computed_past_the_last_site(folder: Path, device: str) -> None:
    computed: list[str] = []

    def mlp(*arguments: Any) -> Tensor:
        computed.append("mlp")
        out: Tensor = arguments[0]
        return out

    look = Does(lambda acts, ids: computed.append("q"), layers=[1], target_hooks=("q",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("archs.llama.mlp", mlp)
        run(folder, DATA, look, device=device)
    assert list(dict.fromkeys(computed)) == ["mlp", "q"]  # the MLP is layer 0's
    assert computed.count("mlp") == 1


# --- progress and profile -------------------------------------------------------------------------------------------


def test_progress_events_count_every_step(folder: Path, device: str, capfd: pytest.CaptureFixture[str]) -> None:
    events: list[ProgressEvent] = []
    run(folder, DATA, Keep(["logits"]), progress=events.append, microbatch_tokens=20, device=device)
    total = events[-1].total
    assert [event.done for event in events] == list(range(1, total + 1))
    assert list(dict.fromkeys(event.stage for event in events)) == ["embed", "0", "1", "2", "norm", "head"]
    elapsed = [event.elapsed_s for event in events]
    assert elapsed == sorted(elapsed) and elapsed[0] >= 0
    run(folder, DATA, Keep(), progress=False, device=device)
    run(folder, DATA, Keep(), progress=True, device=device)  # a pipe is no terminal
    assert capfd.readouterr() == ("", "")


class Clock:
    """The profile's, which moves when a test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("fpwap.profile.perf_counter", lambda: self.now)

    def move(self, *_: object) -> None:
        self.now += 1.0


def test_phases_add_up_to_the_wall_clock(folder: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose unit here is a call of a function, or a return from one."""
    data = prompts([LONGEST, 6] * 100)
    request = {"device": device, "residual": "disk", "layers_per_visit": 1, "microbatch_tokens": 500}
    clock = Clock(monkeypatch)
    sys.setprofile(clock.move)
    try:
        profile = run(folder, data, *everything(), **request).profile
    finally:
        sys.setprofile(None)
    phases = profile.by_phase()
    assert set(phases) == {*PHASES, "unattributed"}
    assert sum(phases.values()) == pytest.approx(profile.wall_s)
    assert all(seconds >= 0 for seconds in phases.values())
    assert phases["unattributed"] < 0.02 * profile.wall_s
    layers = profile.by_layer()
    assert {"0", "1", "2", "head"} <= set(layers)
    assert sum(sum(row.values()) for row in layers.values()) == pytest.approx(
        sum(phases.values()) - phases["unattributed"]
    )
    assert profile.throughput_tok_per_s() == pytest.approx(100 * (LONGEST + 6) / profile.wall_s)
    rows = 100 * (LONGEST + 6) * 60 * 4
    assert profile.bytes_moved()["residual_read"] == profile.bytes_moved()["residual_written"] == 3 * rows
    assert profile.slowest_layer()[0] in range(LAYERS)
    for words in ("load", "forward", "callback", "write", "unattributed", "tokens/s", "GB/s"):
        assert words in profile.summary()


def test_what_a_callback_takes_shows_as_callback(folder: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lazy = Does(lambda acts, ids: clock.move() if 0 in ids else None, layers=[1])
    profile = run(folder, DATA, lazy, RawActivations(layers=[1]), device=device).profile
    assert profile.by_layer()["1"]["callback"] == profile.wall_s == 1.0


def test_what_the_store_takes_shows_as_write(folder: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = Clock(monkeypatch), Store.write

    def slow(store: Store, record: Any, values: Tensor, sample_ids: Tensor) -> None:
        if 0 in sample_ids:
            clock.move()
        written(store, record, values, sample_ids)

    monkeypatch.setattr(Store, "write", slow)
    profile = run(folder, DATA, RawActivations(layers=[1]), device=device).profile
    assert profile.by_layer()["1"]["write"] == profile.wall_s == 1.0


# --- nothing is left behind -----------------------------------------------------------------------------------------


def interrupt(acts: Tensor, ids: Tensor) -> None:
    os.kill(os.getpid(), signal.SIGINT)


ENDINGS: Mapping[str, Callable[[], Callback]] = {
    "success": lambda: RawActivations(last_token_only=False),
    "success, stopping early": lambda: RawActivations(layers=[0], hook="q"),
    "a callback that raises": lambda: Broken("on_batch"),
    "a callback that raises at the end": lambda: Broken("on_layer_end"),
    "an output that cannot be": lambda: Does(lambda acts, ids: Emit(acts[:, 0], name="/")),
    "a signal": lambda: Does(interrupt, layers=[1]),
}


@pytest.mark.parametrize("callback", ENDINGS.values(), ids=ENDINGS)
def test_no_thread_or_descriptor_is_left(
    callback: Callable[[], Callback], folder: Path, tmp_path: Path, device: str
) -> None:
    def one(out: Path | None, dtype: str) -> None:
        with contextlib.suppress(FpwapError, Interrupted):
            run(folder, DATA, RawActivations(), callback(), out=out, residual="disk", dtype=dtype, device=device)

    one(None, "float32")  # what is opened once and for all
    gc.collect()
    process = psutil.Process()
    before = process.num_fds(), threading.enumerate()
    for index, dtype in enumerate(("float32", "bfloat16")):
        one(None, dtype)
        one(tmp_path / str(index), dtype)
    gc.collect()
    assert (process.num_fds(), threading.enumerate()) == before
