"""A result is reused only for the very same run: whatever could change a byte makes it another one.

And what a callback does to what it was handed, or who else asks, changes nobody's rows.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fpwap import Callback, Emit, Sweep
from fpwap.callbacks.common import RawActivations
from fpwap.errors import DatasetError, FpwapError, RequestError, StoreError

PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5], [3, 5, 8]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=31, num_hidden_layers=2, **sizes))  # type: ignore[arg-type]
    for parameter in made.parameters():
        parameter.data = torch.randn_like(parameter)
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def sweep(model: Path, out: Path | None = None, **arguments: Any) -> Sweep:
    arguments = {"dataset": PROMPTS, "callbacks": [RawActivations()], "progress": False, **arguments}
    return Sweep(model, out=out, **arguments)


class Scaled(Callback):
    needs_metadata = True

    def __init__(self, scale: Any) -> None:
        self.scale = scale

    def on_sweep_start(self, ctx: Any) -> None:
        self._ctx = ctx

    def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> Emit:
        scale = self.scale() if callable(self.scale) else 1.0
        return Emit(acts[:, -1] * scale)


def edited(folder: Path) -> None:
    """A fine-tune saved over the model: one tensor of the same shape, one value of it changed at its end."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] += 1
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def test_a_model_saved_over_is_another_run(model: Path, tmp_path: Path) -> None:
    sweep(model, tmp_path / "out").run()
    edited(model)
    with pytest.raises(StoreError, match=r"shards"):
        sweep(model, tmp_path / "out").run()


def test_a_copy_of_the_model_elsewhere_is_another_run_and_says_so(model: Path, tmp_path: Path) -> None:
    sweep(model, tmp_path / "out").run()
    shutil.copytree(model, tmp_path / "copy")
    with pytest.raises(StoreError, match=r"model\.name"):
        sweep(tmp_path / "copy", tmp_path / "out").run()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([Scaled(lambda: 1.0)], [Scaled(lambda: 2.0)]),
        ([RawActivations(layers=[0])], [RawActivations(layers=[1])]),
        ([RawActivations(dtype=torch.float16)], [RawActivations()]),
    ],
)
def test_another_callback_is_another_run(
    model: Path, tmp_path: Path, first: list[Callback], second: list[Callback]
) -> None:
    sweep(model, tmp_path / "out", callbacks=first).run()
    with pytest.raises(StoreError, match="holds another run"):
        sweep(model, tmp_path / "out", callbacks=second).run()


def test_other_metadata_is_another_run_where_a_callback_asks_for_it(model: Path, tmp_path: Path) -> None:
    def data(label: str) -> list[dict[str, Any]]:
        return [{"input_ids": ids, "label": label} for ids in PROMPTS]

    sweep(model, tmp_path / "out", dataset=data("a"), callbacks=[Scaled(None)]).run()
    with pytest.raises(StoreError, match="metadata"):
        sweep(model, tmp_path / "out", dataset=data("b"), callbacks=[Scaled(None)]).run()
    sweep(model, tmp_path / "unasked", dataset=data("a")).run()
    sweep(model, tmp_path / "unasked", dataset=data("b")).run()


def test_what_has_no_identity_is_never_taken_for_a_finished_run(model: Path, tmp_path: Path) -> None:
    def closure(value: float) -> Callable[[], float]:
        return lambda: value

    with pytest.warns(UserWarning, match="cannot be gone on with if it is interrupted.*scale"):
        sweep(model, tmp_path / "out", callbacks=[Scaled(closure(1.0))]).run()
    with pytest.raises(RequestError, match="scale"):
        sweep(model, tmp_path / "out", callbacks=[Scaled(closure(2.0))]).run()


def test_a_layer_by_its_number_from_the_end_is_the_same_run(model: Path, tmp_path: Path) -> None:
    first = sweep(model, tmp_path / "out", callbacks=[RawActivations(layers=[1])]).run()
    before = first.path.joinpath("manifest.json").stat().st_mtime_ns
    sweep(model, tmp_path / "out", callbacks=[RawActivations(layers=[-1, 1])]).run()
    assert first.path.joinpath("manifest.json").stat().st_mtime_ns == before


def test_a_generator_refused_once_is_refused_again(model: Path) -> None:
    def broken() -> Iterator[list[int]]:
        yield PROMPTS[0]
        yield [99]
        yield from PROMPTS[2:]

    run = sweep(model, dataset=broken())
    for _ in range(2):
        with pytest.raises(DatasetError, match="99"):
            run.preflight()
    with pytest.raises(DatasetError, match="99"):
        run.run()


def test_a_generator_outlives_a_refused_request(model: Path) -> None:
    run = sweep(model, dataset=iter(PROMPTS), callbacks=[RawActivations(name="no good")])
    for _ in range(2):
        with pytest.raises(RequestError, match="no good"):
            run.preflight()


def test_sample_ids_are_the_callbacks_own(model: Path) -> None:
    class Meddler(Callback):
        def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> None:
            sample_ids.zero_()

    plain = sweep(model).run()
    meddled = sweep(model, callbacks=[Meddler(), RawActivations()]).run()
    for layer in range(2):
        assert torch.equal(plain.activations(layer=layer), meddled.activations(layer=layer))  # type: ignore[arg-type]


@pytest.mark.parametrize("batching", ["padded", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_do_not_depend_on_who_else_asks(model: Path, batching: str, dtype: str) -> None:
    def last(*others: Callback) -> Tensor:
        callbacks = [RawActivations(hook="logits"), *others]
        logits = sweep(model, callbacks=callbacks, batching=batching, dtype=dtype).run().activations(hook="logits")
        assert isinstance(logits, Tensor)
        return logits

    alone = last()
    for other in ({"positions": [0]}, {"positions": [0, -1]}, {"last_token_only": False}):
        assert torch.equal(alone, last(RawActivations(hook="logits", name="other", **other)))


def test_names_of_outputs_are_checked_before_any_work(model: Path) -> None:
    for callbacks in ([RawActivations(name="a b")], [RawActivations(name="a"), RawActivations(name="a")]):
        with pytest.raises(RequestError, match="name"):
            sweep(model, callbacks=callbacks).preflight()


@pytest.mark.parametrize(
    "arguments", [{"progress": "no"}, {"verify": "yes"}, {"memory": "much"}, {"dtype": "float64"}, {"device": "cuda:9"}]
)
def test_arguments_that_cannot_be_are_refused(model: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(FpwapError, match=next(iter(arguments))):
        sweep(model, **arguments).preflight()
