"""The command line and prompt files: what options mean, what a user is told, and how a command ends."""

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import VARIANTS, write
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import fpwap
from fpwap import Interrupted, Result, Sweep, calibrate, cli, commits, engine, hub, machine, sweep
from fpwap.callbacks.common import IncrementalPCA, RawActivations
from fpwap.cli import main
from fpwap.errors import DatasetError
from fpwap.text import open_prompts

IDS = [[5, 17, 80], [3, 9, 33, 2, 60], [44, 7]]
WORDS = ("the", "mind", "is", "a", "river")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(VARIANTS["llama_gqa"], tmp_path_factory.mktemp("model"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "prompts.jsonl", [{"input_ids": ids} for ids in IDS])


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    file = jsonl(folder / "prompts.jsonl", [{"input_ids": ids} for ids in IDS])
    arguments = ("--layers", "-1,0", "--positions", "0", "--hooks", "residual_post,q,logits", "--seq-len", "9")
    assert main(["run", str(model), "--prompts", str(file), "--out", str(folder / "out"), "--quiet", *arguments]) == 0
    return folder / "out"


def jsonl(path: Path, rows: Sequence[object]) -> Path:
    """A prompt file; rows that are bytes stand in it as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def acts(folder: Path, layer: int | None, hook: str = "residual_post") -> Tensor:
    found = Result.open(folder).activations(layer, hook)
    return found if isinstance(found, Tensor) else found.flat


def tokenizer(folder: Path) -> Path:
    """A word tokenizer that begins with BOS, and whose file asks for truncation and padding as some on the hub do."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1} | {word: 10 + i for i, word in enumerate(WORDS)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.enable_truncation(3)
    made.enable_padding(length=8)
    made.save(str(folder / "tokenizer.json"))
    return folder


# --- run ------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_what_hugging_face_computes(model: Path, tmp_path: Path, device: str) -> None:
    ids = [[5, 17, 80, 4], [3, 9, 33, 2], [44, 7, 7, 1]]
    file = jsonl(tmp_path / "prompts.jsonl", [{"input_ids": row} for row in ids])
    arguments = ["--hooks", "residual_post,logits", "--batching", "padded", "--device", device, "--quiet"]
    assert main(["run", str(model), "--prompts", str(file), "--out", str(tmp_path / "out"), *arguments]) == 0

    reference: Any = AutoModelForCausalLM.from_pretrained(model)
    reference.to(device)
    with torch.no_grad():
        want = reference(torch.tensor(ids, device=device), output_hidden_states=True, logits_to_keep=1)
    for layer in (0, 1):
        assert torch.equal(acts(tmp_path / "out", layer), want.hidden_states[layer + 1][:, -1].cpu())
    assert torch.equal(acts(tmp_path / "out", None, "logits"), want.logits[:, -1].cpu())


def test_layers_hooks_and_positions(model: Path, prompts: Path, tmp_path: Path) -> None:
    def run(name: str, *arguments: str) -> Path:
        assert main(["run", str(model), "--prompts", str(prompts), "--out", str(tmp_path / name), *arguments]) == 0
        return tmp_path / name

    every = run("every", "--positions", "all")
    flat = [torch.split(acts(every, layer), [3, 5, 2]) for layer in range(3)]

    last = run("last", "--layers", "-1,0", "--hooks", "residual_post,mlp_out,residual_post")
    records = [(record["layer"], record["hook"]) for record in Result.open(last).manifest["records"]]
    assert records == [(0, "mlp_out"), (0, "residual_post"), (2, "mlp_out"), (2, "residual_post")]
    assert torch.equal(acts(last, 2), torch.stack([rows[-1] for rows in flat[2]]))

    second = run("second", "--layers", "1", "--positions", "-2")
    assert torch.equal(acts(second, 1), torch.stack([rows[-2] for rows in flat[1]]))

    both = run("both", "--layers=1", "--positions", "-1,0,1")
    assert torch.equal(acts(both, 1), torch.stack([rows[[-1, 0, 1]] for rows in flat[1]]))


def test_every_option_reaches_the_sweep(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def record(model: str, dataset: object, seq_len: int, callbacks: list[RawActivations], **rest: object) -> Any:
        asked.update(model=model, seq_len=seq_len, callbacks=callbacks, **rest)
        return SimpleNamespace(preflight=lambda: SimpleNamespace(summary=str, feasible=True))

    monkeypatch.setattr(sweep, "Sweep", record)
    words = {"seq_len": 7, "truncation": "left", "revision": "v1", "dtype": "float16", "attn_implementation": "eager"}
    words |= {
        "batching": "padded",
        "microbatch_tokens": 5,
        "microbatch_size": 6,
        "device": "cuda",
        "residual": "disk",
        "loading": "stream",
        "resume": "never",
    }
    words |= {"layers_per_visit": 4, "out": "there", "memory": "3GB"}
    words |= {"device_memory": "2GB", "disk": "1TB"}
    options = [part for name, value in words.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    asked_for = ["--layers", "-1", "--hooks", "q,z", "--verify", "--allow", "torch,threads", *options]
    assert main(["plan", "some/model", "--prompts", str(prompts), *asked_for]) == 0
    first, second = asked.pop("callbacks")
    words["allow"] = ("torch", "threads")
    assert asked == {"model": "some/model", "progress": False, "verify": True, **words}
    assert (first.target_layers, first.target_hooks, first.positions) == ([-1], ("q",), "last")
    assert (second.target_layers, second.target_hooks, second.positions) == ([-1], ("z",), "last")


def test_choices_and_defaults_are_those_of_the_sweep(prompts: Path) -> None:
    parser = cli._parser()
    options = parser.parse_args(["plan", "m", "--prompts", str(prompts)])
    for name, parameter in inspect.signature(fpwap.Sweep).parameters.items():
        if name not in ("model", "dataset", "callbacks", "progress"):
            assert getattr(options, name) == parameter.default, name
    for name, values in sweep.CHOICES.items():
        for value in values:
            assert getattr(parser.parse_args(["plan", "m", "--prompts", "p", f"--{name}", value]), name) == value


def test_run_shows_plan_and_result_and_knows_a_finished_one(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(model), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert f"model      {model}" in shown
    assert "3 prompts, 10 tokens" in shown
    assert "3 outputs" in shown
    assert "tokens/s" in shown
    before = (tmp_path / "out" / "manifest.json").stat()
    assert main(command) == 0
    assert "nothing was computed" in capsys.readouterr().out
    assert (tmp_path / "out" / "manifest.json").stat() == before
    assert main([*command, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


# --- the machine ---------------------------------------------------------------------------------------------------


def test_calibration_is_kept_for_the_next_plan(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FPWAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "BUDGET_S", 0.001)
    monkeypatch.setattr(calibrate, "BLOCK", 2**12)
    plan = ["plan", str(model), "--prompts", str(prompts), "--device", "cpu"]
    assert main(plan) == 0
    assert "conservative rates, not calibrated" in capsys.readouterr().out
    assert main([*plan, "--calibrate"]) == 0
    measured = capsys.readouterr().out
    assert "compute calibrated on 20" in measured
    assert (tmp_path / "cache" / "rates.json").is_file()
    assert main(plan) == 0
    assert capsys.readouterr().out.splitlines()[-2] == measured.splitlines()[-2]


@pytest.mark.parametrize("value", ["0", "many", "1.5", "2,3"])
def test_layers_per_visit_are_a_number_or_auto(
    value: str, model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(model), "--prompts", str(prompts), "--layers-per-visit", value]) == 2
    assert value in capsys.readouterr().err
    assert main(["plan", str(model), "--prompts", str(prompts), "--layers-per-visit", "auto"]) == 0


# --- text -----------------------------------------------------------------------------------------------------------


def test_text_is_tokenised_as_hugging_face_does(model: Path, tmp_path: Path) -> None:
    folder = tokenizer(Path(shutil.copytree(model, tmp_path / "model")))
    texts = ["the mind is a river", "river", "", "a stone is the mind"]
    reference = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))  # type: ignore[no-untyped-call]
    want = [reference(text)["input_ids"] for text in texts]
    assert [len(ids) for ids in want] == [6, 2, 1, 6]

    file = jsonl(tmp_path / "prompts.jsonl", [{"text": text} for text in texts])
    assert main(["run", str(folder), "--prompts", str(file), "--out", str(tmp_path / "out"), "--layers", "0"]) == 0
    assert [ids.tolist() for ids in Result.open(tmp_path / "out").prompts] == want


def test_a_hub_models_tokenizer_is_fetched_only_for_text(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Path(shutil.copytree(model, tmp_path / "c0ffee"))
    asked: list[tuple[str | None, bool]] = []

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert repo == "some/model"
        asked.append((revision, "tokenizer.json" in allow_patterns))
        if asked[-1][1]:
            tokenizer(commit)
        return str(commit)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert main(["plan", "some/model", "--prompts", str(prompts), "--revision", "v1"]) == 0
    assert not any(tokens for _, tokens in asked)
    file = jsonl(tmp_path / "text.jsonl", [{"text": "the river"}, {"text": "a mind"}])
    assert main(["plan", "some/model", "--prompts", str(file), "--revision", "v1"]) == 0
    assert [revision for revision, tokens in asked if tokens] == ["c0ffee"]


def no_tokenizer() -> Path:
    raise AssertionError("nobody needs a tokenizer")


def test_rows_keep_what_else_they_hold_and_are_read_one_at_a_time(tmp_path: Path) -> None:
    row = {"input_ids": [1, 2], "text": "of the same", "label": "é"}
    file = jsonl(tmp_path / "p.jsonl", [b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r", b"broken", b"", b" "])
    with open_prompts(file, no_tokenizer) as rows:
        assert next(rows) == row
        with pytest.raises(DatasetError, match="not JSON"):
            next(rows)


def test_blank_lines_at_the_end_are_no_rows(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "p.jsonl", [{"input_ids": [1]}, b"", b" "])
    with open_prompts(file, no_tokenizer) as rows:
        assert list(rows) == [{"input_ids": [1]}]


def test_a_file_without_a_newline_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"input_ids": [1]}\n{"input_ids": [2]}')
    with open_prompts(tmp_path / "p.jsonl", no_tokenizer) as rows:
        assert [row["input_ids"] for row in rows] == [[1], [2]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"input_ids": [1, 2', "not JSON: Expecting ',' delimiter at column 20"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 10"),
        (b"", "the line is blank"),
        ([1, 2], "a row is a JSON object with 'input_ids' or 'text', not an array"),
        ("the mind", "not a string"),
        ({"prompt": "the mind", "id": 3}, "a row has 'input_ids' or 'text'; this one has 'prompt', 'id'"),
        ({}, "this one has nothing"),
        ({"text": 5}, "'text' is a number; it must be a string"),
        ({"text": None}, "'text' is null"),
        ({"text": "\ud800"}, "'text' is not Unicode"),
        ({"input_ids": [1, 97]}, r"input_ids\[1\] is 97, but the model's ids are 0 to 96"),
        ({"input_ids": "1 2"}, "input_ids is text"),
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask has length 1"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: object, message: str
) -> None:
    folder = tokenizer(Path(shutil.copytree(model, tmp_path / "model")))
    file = jsonl(tmp_path / "p.jsonl", [*[{"input_ids": [1]}] * 6, row, {"input_ids": [2]}])
    said = refusal(capsys, ["plan", str(folder), "--prompts", str(file)])
    assert said.startswith(f"{file}, line 7: ")
    assert re.search(message, said)


def test_what_is_wrong_with_the_whole_file_names_no_line(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, ["plan", str(model), "--prompts", str(prompts), "--seq-len", "2"])
    assert said.startswith(f"{prompts}: 2 of 3 samples")
    said = refusal(capsys, ["plan", str(model), "--prompts", str(jsonl(tmp_path / "none.jsonl", []))])
    assert said.startswith(f"{tmp_path}/none.jsonl: the dataset is empty")


def test_text_without_a_tokenizer(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = jsonl(tmp_path / "p.jsonl", [{"text": "the mind"}, {"text": "a river"}])
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    command = ["plan", str(folder), "--prompts", str(file)]
    assert f"{folder}/tokenizer.json is missing" in refusal(capsys, command)
    (folder / "tokenizer.json").write_text("{}")
    assert f"{folder}/tokenizer.json is not a tokenizer" in refusal(capsys, command)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    said = refusal(capsys, command)
    assert said.startswith(f"{file}, line 1: ")
    assert "pip install 'fpwap[text]'" in said


# --- plan, inspect, demo --------------------------------------------------------------------------------------------


def test_plan(
    model: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = [str(model), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    assert main(["plan", *command]) == 0
    assert "feasible   yes" in capsys.readouterr().out
    monkeypatch.setattr(machine, "free_disk", lambda folder: 100)
    assert main(["plan", *command]) == 1
    assert "BLOCKER" in capsys.readouterr().out
    assert "of disk are needed" in refusal(capsys, ["run", *command, "--quiet"])
    assert not (tmp_path / "out").exists()


def test_inspect(finished: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(finished), "--verify"]) == 0
    shown = capsys.readouterr().out
    for part in (
        str(finished),
        str(model),
        "float32",
        "3 prompts, 10 tokens, seq_len 9",
        f"fpwap {fpwap.__version__}",
        "verified",
        Result.open(finished).profile.summary(),
    ):
        assert part in shown
    listed = [line.split() for line in shown.split("outputs\n")[1].split("\n\n")[0].splitlines()]
    assert [line[-1] for line in listed] == [entry["file"] for entry in Result.open(finished).manifest["records"]]
    assert listed[0][:8] == ["layer", "0", "q", "[3,", "6,", "10]", "float32", listed[0][7]]
    assert listed[-1][:5] == ["model", "logits", "[3,", "97]", "float32"]


def test_inspect_lists_artifacts_and_ragged_outputs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [IncrementalPCA([1], 2), RawActivations([1], last_token_only=False, name="tokens")]
    fpwap.Sweep(str(model), IDS, callbacks=callbacks, out=tmp_path / "out", progress=False).run()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "artifacts/layer_001.residual_post.pca_basis.safetensors" in shown
    assert re.search(r"layer 1  residual_post tokens  \[10, 60\] float32, every token ", shown)
    assert "verified" not in shown


def test_inspect_as_json(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(finished), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = Result.open(finished)
    assert told.pop("path") == str(finished)
    assert told.pop("profile") == json.loads((finished / "profile.json").read_text())
    assert told == found.manifest


def test_inspect_finds_damage(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "out"))
    path = folder / "activations" / "logits.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert main(["inspect", str(folder)]) == 0
    capsys.readouterr()
    assert "logits.safetensors" in refusal(capsys, ["inspect", str(folder), "--verify"])
    assert "logits.safetensors" in refusal(capsys, ["inspect", str(folder), "--verify", "--json"])


@pytest.mark.parametrize(("options", "want"), [([], (None, None)), (["--model", "m", "--out", "d"], ("m", "d"))])
def test_demo(options: list[str], want: object, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def run(model: str | None, out: str | None) -> int:
        called.append((model, out))
        return 7

    monkeypatch.setitem(sys.modules, "fpwap.demo", SimpleNamespace(run=run))
    assert main(["demo", *options]) == 7
    assert called == [want]


# --- refusals -------------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    """What a command that must fail says on its one line, less the program's name."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fpwap: ")
    assert err.count("\n") == 1
    return err.removeprefix("fpwap: ").rstrip("\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "x"], "argument --layers: 'x' is neither 'all' nor integers such as 0,5,-1"),
        (["--layers", "1,,2"], "argument --layers: '1,,2' is neither"),
        (["--layers", "0,3"], "layer 3 is out of range: the model has layers 0 to 2"),
        (["--layers", "-1,-4"], "layer -4 is out of range"),
        (["--hooks", "resid_post"], "has no hook 'resid_post'; its hooks are .*residual_post"),
        (["--hooks", "residual_post,"], "has no hook ''"),
        (["--positions", "first"], "argument --positions: 'first' is neither 'last' nor 'all' nor integers"),
        (["--positions", "0,4"], "position 4 is outside prompt 0, which has 3 tokens"),
        (["--seq-len", "many"], "argument --seq-len: invalid int value: 'many'"),
        (["--seq-len", "0"], "seq_len must be a positive integer"),
        (["--truncation", "both"], "argument --truncation: invalid choice: 'both'"),
        (["--dtype", "int8"], "dtype must be 'auto' or one of"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--attn-implementation", "flash"], "'flash' is not one of"),
        (["--revision", "v1"], "is a local folder: revision='v1'"),
        (["--microbatch-size", "4"], "packed mode has microbatch_tokens"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_wrong_options(
    model: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    command = [str(model), "--prompts", str(prompts), "--out", str(tmp_path / "out"), *options]
    assert re.search(message, refusal(capsys, ["plan", *command]))
    assert re.search(message, refusal(capsys, ["run", *command]))
    assert not (tmp_path / "out").exists()


def test_what_is_missing(model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: COMMAND (see fpwap --help)" in refusal(capsys, [])
    assert "'frob'" in refusal(capsys, ["frob"])
    assert "required: MODEL, --prompts, --out (see fpwap run --help)" in refusal(capsys, ["run"])
    assert "required: MODEL, --prompts (see fpwap plan --help)" in refusal(capsys, ["plan"])
    nowhere = f"{tmp_path}/nowhere"
    assert f"{nowhere} cannot be read: No such file" in refusal(capsys, ["plan", str(model), "--prompts", nowhere])
    assert "cannot be read: Is a directory" in refusal(capsys, ["plan", str(model), "--prompts", str(tmp_path)])
    assert f"{nowhere} is not a folder" in refusal(capsys, ["plan", nowhere, "--prompts", str(prompts)])
    assert f"{nowhere} holds no finished run" in refusal(capsys, ["inspect", nowhere])
    assert f"{model} holds no finished run" in refusal(capsys, ["inspect", str(model)])


def test_a_folder_in_use_is_left_alone(model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(model.iterdir())
    command = ["run", str(model), "--prompts", str(prompts), "--out", str(model), "--quiet"]
    assert "which no run of fpwap left there" in refusal(capsys, command)
    assert sorted(model.iterdir()) == before


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_so_and_can_be_begun_again(
    model: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    signum: signal.Signals,
) -> None:
    command = ["run", str(model), "--prompts", str(prompts), "--out", str(tmp_path / "out"), "--quiet"]

    def on_batch(*arguments: Any) -> Any:
        if not stopped:  # a second signal would not wait
            stopped.append(signum)
            os.kill(os.getpid(), signum)
        return own(*arguments)

    stopped: list[int] = []
    own: Callable[..., Any] = RawActivations.on_batch
    with monkeypatch.context() as patch:
        patch.setattr(RawActivations, "on_batch", on_batch)
        assert main(command) == 128 + signum
    said = f"fpwap: stopped by {signum.name} before it was done; the same command goes on from what was committed\n"
    assert capsys.readouterr() == ("", said)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert main(command) == 0
    Result.open(tmp_path / "out").verify()


def test_a_signal_outside_a_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for error, status in ((KeyboardInterrupt(), 130), (Interrupted(signal.SIGTERM), 143)):

        def fail(path: str, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(Result, "open", fail)
        assert main(["inspect", "anything"]) == status
        assert "stopped by SIG" in capsys.readouterr().err


def fpwap_process(*arguments: object, **options: Any) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "fpwap", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **options)


def test_ctrl_c_while_prompts_are_read(model: Path) -> None:
    with fpwap_process("plan", model, "--prompts", "/dev/stdin", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b'{"input_ids": [1, 2, 3]}\n' * 20_000)  # more than a pipe holds: it is being read
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=100)
    said = b"fpwap: stopped by SIGINT before it was done; the same command goes on from what was committed\n"
    assert (process.returncode, err) == (130, said)


def test_a_reader_that_has_gone(finished: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with fpwap_process("inspect", finished, stdout=write) as process:
        os.close(write)
        _, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (128 + signal.SIGPIPE, b"")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with fpwap_process("--version", stdout=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=100)
    assert (process.returncode, out.decode(), err) == (0, f"fpwap {fpwap.__version__}\n", b"")
    for command in ([], ["run"], ["plan"], ["inspect"], ["demo"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code == 0
        assert " ".join(["usage: fpwap", *command]) in capsys.readouterr().out


def test_the_parser_needs_nothing_heavy() -> None:
    """The package's own ``__init__`` left aside: what this module imports."""
    code = (
        "import sys, types; package = sys.modules['fpwap'] = types.ModuleType('fpwap')\n"
        f"package.__path__, package.__version__ = [{str(Path(cli.__file__).parent)!r}], '0'\n"
        "import fpwap.cli; fpwap.cli._parser()\n"
        "assert not {'torch', 'numpy', 'huggingface_hub', 'safetensors', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_resume_goes_on_with_what_was_interrupted(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    request = [str(model), "--prompts", str(prompts), "--quiet", "--layers-per-visit", "1", "--loading", "stream"]
    assert main(["run", *request, "--out", str(whole)]) == 0
    visits: list[int] = []
    plain = engine._visit

    def visit(*given: Any) -> None:
        visits.append(len(visits))
        if len(visits) == 3:
            raise Interrupted(signal.SIGTERM)
        plain(*given)

    with monkeypatch.context() as patch:
        patch.setattr(commits, "AT_RISK_S", 0.0)
        patch.setattr(commits, "SHARE", float("inf"))
        patch.setattr(engine, "_visit", visit)
        assert main(["run", *request, "--out", str(out)]) == 143
        assert "the same command goes on" in capsys.readouterr().err
        every = len(visits)
        monkeypatch.chdir(tmp_path)
        assert main(["resume", "out"]) == 0
    assert "outputs" in capsys.readouterr().out
    assert every == 3
    for path in (whole / "activations").iterdir():
        assert path.read_bytes() == (out / "activations" / path.name).read_bytes()
    assert main(["resume", "out"]) == 0
    assert "nothing was computed" in capsys.readouterr().out


def test_resume_where_there_is_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(tmp_path / "nowhere")]) == 2
    assert "holds no run" in capsys.readouterr().err
    Sweep(model, [[1, 2, 3]], None, [RawActivations()], out=tmp_path / "out", progress=False).run()
    assert main(["resume", str(tmp_path / "out")]) == 2
    assert "a Python program asked for" in capsys.readouterr().err
