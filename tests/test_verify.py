"""The comparison with Hugging Face, of runs and of checkpoints: it passes what is right and stops what is not."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LONGEST
from harness import DTYPES, Keep, edit_config, prompts, run
from torch import Tensor

import archs
from archs.contract import Tap
from fpwap import Result, Sweep
from fpwap.callbacks.base import Callback, WriteBack
from fpwap.callbacks.common import RawActivations
from fpwap.cli import main
from fpwap.errors import DatasetError, RequestError, VerificationError
from fpwap.residual import InMemory
from fpwap.schedule import Stage
from fpwap.verify import Row, compare, verify
from fpwap.watch import CHOSEN, choose
from fpwap.watch import LONGEST as LIMIT
from fpwap.weights import Weights

DATASET = prompts([LONGEST] * 8 + [13] * 5 + [5] * 4 + [1], seed=11)
SHAPES: list[dict[str, Any]] = [{}, {"batching": "padded", "microbatch_size": 5}, {"microbatch_tokens": 40}]

# --- a run ----------------------------------------------------------------------------------------------------------


class Scale(Callback):
    phase = "write"

    def __init__(self, hook: str, layer: int = 1) -> None:
        self.target_layers, self.target_hooks = [layer], (hook,)

    def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> WriteBack:
        return WriteBack(acts * 3)


@pytest.mark.parametrize(("request_", "dtype"), list(zip(SHAPES, DTYPES, strict=True)))
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "mixtral", "mistral"])
def test_a_sound_run_is_certified(
    name: str, dtype: torch.dtype, request_: dict[str, Any], checkpoint: Callable[[str], Path]
) -> None:
    callbacks = [RawActivations([0, 1]), RawActivations([], "logits")]
    result = run(checkpoint(name), DATASET, *callbacks, verify=True, dtype=dtype, **request_)
    found = result.manifest["certificate"]
    assert found["layers"] == [0, 1, 2]
    assert found["parts"] == ["embedding", "final_norm", "logits"]
    assert found["nearness"] <= 2 and found["drift"] < 4 * torch.finfo(dtype).eps
    assert LONGEST in {len(DATASET[sample]) for sample in found["prompts"]}
    assert found["tokens"] == sum(len(DATASET[sample]) for sample in found["prompts"])


def test_what_is_verified_does_not_change_the_run(checkpoint: Callable[[str], Path]) -> None:
    plain, watched = Keep(("residual_post",)), Keep(("residual_post",))
    run(checkpoint("mixtral"), DATASET, plain)
    run(checkpoint("mixtral"), DATASET, watched, verify=True)
    for site, rows in plain.kept.items():
        assert all(torch.equal(rows[sample], watched.kept[site][sample]) for sample in rows)


@pytest.mark.parametrize("layers_per_visit", [1, 2, 3])
def test_one_flipped_weight_in_memory_stops_it_at_that_layer(
    layers_per_visit: int, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = Weights.acquire

    def flipped(self: Weights, stage: Stage) -> Any:
        weights = acquire(self, stage)
        if stage == Stage("layer", 1):
            down = weights.down.clone()
            down.view(torch.int32)[3, 7] ^= 1 << 20
            weights = dataclasses.replace(weights, down=down)
        return weights

    monkeypatch.setattr(Weights, "acquire", flipped)
    with pytest.raises(VerificationError, match=r"layer 1, hook 'mlp_out'.*prompts \[.*ulp"):
        run(checkpoint("llama_gqa"), DATASET, RawActivations([-1]), verify=True, layers_per_visit=layers_per_visit)


def test_one_swapped_row_pair_in_the_store_stops_it(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, turns = InMemory.write, iter(range(100))

    def swapped(self: InMemory, rows: slice, x: Tensor, name: str = "residual") -> None:
        if next(turns) == 1:
            x = x.clone()
            x[[2, 60]] = x[[60, 2]]
        write(self, rows, x, name)

    monkeypatch.setattr(InMemory, "write", swapped)
    with pytest.raises(VerificationError, match=r"layer 2, hook 'residual_pre', prompt 0: what enters is not"):
        run(checkpoint("llama_gqa"), DATASET, RawActivations([-1]), verify=True, layers_per_visit=1)


@pytest.mark.parametrize("callbacks", [(), ("final_norm",)], ids=["reads", "writes behind the layers"])
def test_prompts_that_are_exchanged_from_the_start_stop_it(
    callbacks: tuple[str, ...], checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts of one length trade places before the embedding: each layer for itself looks right."""
    embed = archs.llama.embed

    def exchanged(w: Any, c: Any, batch: Any) -> Tensor:
        x = embed(w, c, batch)
        if batch.height is not None:
            x[: 2 * LONGEST] = x[: 2 * LONGEST].roll(LONGEST, dims=0)
        return x

    family = dataclasses.replace(archs.llama.FAMILY, embed=exchanged)
    monkeypatch.setattr(archs, "FAMILIES", (family,))
    writers = [Scale(hook) for hook in callbacks]
    with pytest.raises(VerificationError, match=r"layer 0, hook 'residual_post', prompt \d+: a row is .* away from"):
        run(checkpoint("llama_gqa"), prompts([LONGEST] * 3, seed=1), RawActivations([-1]), *writers, verify=True)


@pytest.mark.parametrize(
    ("part", "hook"), [("embed", "embedding"), ("final_norm", "final_norm"), ("unembed", "logits")]
)
def test_a_part_outside_the_layers_that_is_off_stops_it(
    part: str, hook: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    maths: Callable[..., Tensor] = getattr(archs.llama, part)
    off: dict[str, Any] = {part: lambda *given: maths(*given) * 1.001}
    family = dataclasses.replace(archs.llama.FAMILY, **off)
    monkeypatch.setattr(archs, "FAMILIES", (family,))
    with pytest.raises(VerificationError, match=f"model, hook '{hook}': our result and Hugging Face's differ"):
        run(checkpoint("llama_gqa"), DATASET, RawActivations([], "logits"), verify=True)


def test_a_router_that_is_off_in_packed_form_stops_it(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even behind a write, where no stream is followed: other experts are excused by ties alone."""
    block = archs.mixtral.block

    def off(x: Tensor, w: Any, c: Any, layer: int, batch: Any, tap: Tap) -> Tensor:
        if batch.height is not None and layer == 2:
            w = dataclasses.replace(w, router=w.router.flip(0))
        return block(x, w, c, layer, batch, tap)

    monkeypatch.setattr(archs, "FAMILIES", (dataclasses.replace(archs.mixtral.FAMILY, block=off),))
    with pytest.raises(VerificationError, match=r"layer 2, hook 'router_logits', prompts .* have other experts"):
        run(checkpoint("mixtral"), DATASET, Scale("residual_post", 0), RawActivations([-1]), verify=True)


def test_a_packed_form_that_is_off_stops_it(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The padded form is right, and the rows of the run are not."""
    block = archs.llama.block

    def off(x: Tensor, w: Any, c: Any, layer: int, batch: Any, tap: Tap) -> Tensor:
        if batch.height is not None and layer == 1:
            w = dataclasses.replace(w, down=w.down * (1 + 1e-3))
        return block(x, w, c, layer, batch, tap)

    monkeypatch.setattr(archs, "FAMILIES", (dataclasses.replace(archs.llama.FAMILY, block=off),))
    with pytest.raises(VerificationError, match=r"layer 1, hook 'residual_post', prompt \d+: the run's rows are"):
        run(checkpoint("llama_gqa"), DATASET, RawActivations([-1]), verify=True, dtype=torch.float32)


@pytest.mark.parametrize("hook", ["residual_post", "mlp_out", "residual_pre", "embedding"])
def test_a_run_that_writes_is_checked_layer_by_layer(hook: str, checkpoint: Callable[[str], Path]) -> None:
    result = run(checkpoint("llama_gqa"), DATASET, Scale(hook), RawActivations([-1]), verify=True)
    found = result.manifest["certificate"]
    assert found["layers"] == [0, 1, 2]
    assert found["near_layers"] == ([0, 1, 2] if hook == "embedding" else [0, 2])
    assert found["followed_layers"] == ([] if hook == "embedding" else [0])


@pytest.mark.parametrize("hook", ["residual_pre", "attn_out", "attn_pattern", "residual_post"])
def test_a_run_that_ends_inside_a_layer_is_checked_too(hook: str, checkpoint: Callable[[str], Path]) -> None:
    dataset = prompts([LONGEST] * 4, seed=2)
    result = run(checkpoint("llama_gqa"), dataset, RawActivations([1], hook), verify=True)
    assert result.manifest["certificate"]["layers"] == [0, 1]


def test_a_finished_run_without_a_certificate_does_not_pass_for_one(
    tmp_path: Path, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def sweep(verify: bool, out: str) -> Result:
        callbacks = [RawActivations([-1])]
        return Sweep(
            checkpoint("llama"), DATASET, callbacks=callbacks, out=tmp_path / out, verify=verify, progress=False
        ).run()

    sweep(False, "plain")
    with pytest.raises(RequestError, match="without verify=True; give another out="):
        sweep(True, "plain")
    sweep(True, "checked")
    sweep(True, "checked")  # opened
    assert main(["inspect", str(tmp_path / "checked")]) == 0
    printed = capsys.readouterr().out
    assert "verified   3 layers and embedding equal to transformers" in printed
    assert main(["inspect", str(tmp_path / "plain")]) == 0
    assert "verified " not in capsys.readouterr().out


def test_without_transformers_one_sentence_says_so(checkpoint: Callable[[str], Path]) -> None:
    code = f"""
import sys
sys.modules["transformers"] = None
from fpwap import Sweep
from fpwap.callbacks.common import RawActivations
Sweep({str(checkpoint("llama"))!r}, [[1, 2]], callbacks=[RawActivations([-1])], verify=True, progress=False).run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1].endswith("needs transformers: pip install transformers")


def test_the_chosen_prompts_are_of_all_lengths() -> None:
    assert choose([5]) == [0]
    assert choose([7, 3]) == [1, 0]
    lengths = [10, LIMIT + 1, 3, 50, 20, 40, 30]
    chosen = choose(lengths)
    assert len(chosen) == CHOSEN and lengths[chosen[0]] == 3 and lengths[chosen[-1]] == 50
    assert choose([LIMIT + 5, LIMIT + 9]) == [0], "all too long: the shortest of them"


# --- a checkpoint ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "mixtral", "mistral"])
def test_a_checkpoint_passes(name: str, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(checkpoint(name)), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "PASS" in printed and "NO" not in printed and "first difference" not in printed
    for hook in ("embedding", "attn_out", "mlp_out", "residual_post", "final_norm", "logits"):
        assert hook in printed


def test_a_wrong_block_fails_and_the_first_difference_is_marked(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = dataclasses.replace(
        archs.mistral.FAMILY, config=lambda hf: dataclasses.replace(archs.mistral.Config.from_hf(hf), eps=1.01e-3)
    )
    monkeypatch.setattr(archs, "FAMILIES", (wrong,))
    assert main(["verify", str(checkpoint("mistral")), "--layers", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (first,) = [line for line in lines if line.endswith("<- first difference")]
    assert first.split()[:2] == ["1", "q"] and "NO" in first
    assert lines[-1].startswith("FAIL")


def test_only_the_layers_that_are_asked_for(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"input_ids": ids}) for ids in DATASET[:3]))
    report = verify(str(checkpoint("llama_gqa")), DATASET[:3], layers=[0, -1])
    assert {row.layer for row in report.rows} == {None, 0, 2} and report.passed
    assert report.yardsticks.keys() == {0, 2}
    assert all(score is not None and score > 1e-3 for score in report.yardsticks.values())
    assert main(["verify", str(checkpoint("llama_gqa")), "--layers", "0", "--prompts", str(file)]) == 0


def test_positions_do_not_enter_a_layer_of_gpt2(checkpoint: Callable[[str], Path]) -> None:
    assert set(verify(str(checkpoint("gpt2"))).yardsticks.values()) == {None}


@pytest.mark.parametrize(
    ("prompts_", "named"), [([[1, 999]], "is 999"), ([[]], "is empty"), ([[1], ["a"]], "sample 1")]
)
def test_prompts_that_are_refused(prompts_: Any, named: str, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(DatasetError, match=named):
        verify(str(checkpoint("llama")), prompts_)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_short_prompt_is_no_false_alarm(dtype: torch.dtype, checkpoint: Callable[[str], Path]) -> None:
    """Hugging Face's batch and its single prompt are the same call then, and equal."""
    result = run(checkpoint("llama_gqa"), [[5, 6]], RawActivations([-1]), verify=True, dtype=dtype)
    assert result.manifest["certificate"]["nearness"] < 1


def test_a_checkpoint_that_is_refused(
    tmp_path: Path, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert main(["verify", str(tmp_path)]) == 2
    assert "'mamba' is not supported" in capsys.readouterr().err
    assert main(["verify", str(checkpoint("llama")), "--attn-implementation", "flash"]) == 2
    assert "'flash' is not one of Llama's" in capsys.readouterr().err
    assert main(["verify", str(checkpoint("llama")), "--device", "nonsense"]) == 2
    assert "device 'nonsense' is not to be had" in capsys.readouterr().err
    assert main(["verify", str(checkpoint("llama")), "--layers", "7"]) == 2
    assert "layer 7 is out of range" in capsys.readouterr().err


def test_a_draft_names_every_tensor(checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint("mixtral")
    edit_config(folder, model_type="mixtral")
    assert main(["verify", "--draft", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert 'source("block_sparse_moe.experts.{e}.w1.weight", "intermediate_size", "hidden_size")' in printed
    assert 'source("model.embed_tokens.weight", "vocab_size", "hidden_size")' in printed
    assert printed.count("experts.{e}") == 3


def test_a_comparison_counts_in_units_of_the_last_place() -> None:
    one = torch.tensor([1.0, -1.0, 0.0])
    assert compare(0, "q", None, one, one.clone()) == Row(0, "q", None, True, 0.0, 0, 0.0)
    row = compare(0, "q", None, one, torch.tensor([1.0, -1.0, -0.0]))
    assert row.equal, "as torch.equal has it"
    eps = torch.finfo(torch.float32).eps
    row = compare(0, "q", None, one, torch.tensor([1.0 + eps, -1.0 - 2 * eps, 0.0]))
    assert (row.ulps, row.equal) == (2, False) and row.share == pytest.approx(2 / 3)
    assert compare(0, "q", None, one, torch.full((3,), torch.nan)).largest == torch.inf
