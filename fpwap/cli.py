"""The command line: ``fpwap run``, ``resume``, ``plan``, ``inspect``, ``verify``, ``models``, ``demo``.

Options become the arguments of a `fpwap.Sweep`, and what the library raises becomes one line on stderr and an exit
status: 0 done, 1 the plan is not feasible, 2 an error, 128 + n stopped by signal n. Heavy modules are imported by the
commands that use them, so that ``--help`` answers at once. Nothing is decided here that a Python caller could not ask.
"""

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__, text
from .errors import FpwapError, Interrupted, RequestError

if TYPE_CHECKING:
    from .sweep import Sweep

INFEASIBLE, FAILED = 1, 2
ALLOW = "what may differ from the machine that began: torch, device, processor, cpu_capability, threads"

EXAMPLE = """\
example: the last token's residual stream after three layers, for every line of a file

  fpwap run meta-llama/Llama-3.1-8B --prompts prompts.jsonl --layers 4,8,-1 --out acts

  each line of prompts.jsonl is a prompt, {"input_ids": [1, 15043, ...]} or, with pip install 'fpwap[text]',
  {"text": "Hello ..."}; in Python, fpwap.Result.open("acts").activations(layer=4) is [lines, hidden]
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. argv: without the program's name, None for ``sys.argv``. Returns the exit status."""
    try:
        try:
            return _command(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's own flush would complain
        return 128 + signal.SIGPIPE


def _command(argv: Sequence[str]) -> int:
    try:
        options = _parser().parse_args(_joined(argv))
        status: int = options.command(options)
    except FpwapError as error:
        print(f"fpwap: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as error:
        signum = error.signum if isinstance(error, Interrupted) else signal.SIGINT
        name = signal.Signals(signum).name
        print(
            f"fpwap: stopped by {name} before it was done; the same command goes on from what was committed",
            file=sys.stderr,
        )
        return 128 + signum
    return status


# --- the options ----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Errors as all others of this program, without the page of usage."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fpwap",
        description="Activations from transformer language models that are larger than the accelerator, or than RAM.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fpwap {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="sweep a model over a prompt file and keep activations in a folder")
    _add_request(run, out_required=True)
    run.add_argument("--quiet", action="store_true", help="print nothing but errors")
    run.set_defaults(command=_run)

    resume = commands.add_parser("resume", help="go on with a run that was interrupted, as it was asked for")
    resume.add_argument("folder", metavar="DIR", help="the --out of that run")
    resume.add_argument("--memory", metavar="SIZE", help="RAM that it may take from now on; default: as before")
    resume.add_argument("--allow", metavar="NAME,...", type=_names, default=(), help=ALLOW)
    resume.add_argument("--quiet", action="store_true", help="print nothing but errors")
    resume.set_defaults(command=_resume)

    plan = commands.add_parser("plan", help="say what a run would take, and whether it fits; exit status 1 if not")
    _add_request(plan, out_required=False)
    plan.add_argument(
        "--calibrate", action="store_true", help="measure this machine first, a few seconds, and keep what was found"
    )
    plan.set_defaults(command=_plan)

    inspect = commands.add_parser("inspect", help="say what a finished run holds")
    inspect.add_argument("folder", metavar="DIR", help="the --out of a run")
    inspect.add_argument("--verify", action="store_true", help="read every file and compare it with its digest")
    inspect.add_argument("--json", action="store_true", help="print manifest and profile as JSON")
    inspect.set_defaults(command=_inspect)

    verify = commands.add_parser(
        "verify", help="compare a model with transformers, layer by layer; exit status 1 if a bit differs"
    )
    add = verify.add_argument
    add("model", metavar="MODEL", help="a hub id or a folder of safetensors")
    add("--layers", metavar="LIST", type=_layers, default="all", help='which, such as 0,1,-1; default: "all"')
    add("--prompts", metavar="FILE", type=Path, help="JSONL prompts for the batch; default: four of random tokens")
    add("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    add("--dtype", default="auto", help="bfloat16, float16 or float32; default: the checkpoint's own")
    add("--attn-implementation", metavar="NAME", help="sdpa or eager; default: as Hugging Face")
    add("--device", default="cpu", help="where both are computed; default: cpu")
    add("--draft", action="store_true", help="print a draft of a new family's weights section and stop")
    verify.set_defaults(command=_verify)

    models = commands.add_parser("models", help="list the families of models that are computed")
    models.set_defaults(command=_models)

    demo = commands.add_parser("demo", help="find a direction in a small model that comes along, and steer with it")
    demo.add_argument("--model", metavar="ID", help="another model: a hub id or a folder")
    demo.add_argument("--out", metavar="DIR", help="keep the runs and the picture there")
    demo.set_defaults(command=_demo)
    return parser


def _add_request(parser: argparse.ArgumentParser, *, out_required: bool) -> None:
    """The arguments of a `Sweep`, with its defaults."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub id, or a folder with config.json and safetensors files")
    add("--prompts", metavar="FILE", required=True, type=Path, help="JSONL: a row a prompt, with input_ids or text")
    add("--out", metavar="DIR", required=out_required, help="the folder that will hold the results")

    what = parser.add_argument_group("what is kept")
    add = what.add_argument
    add("--layers", metavar="L,L,...", default="all", type=_layers, help="such as 4,8,-1; default: all")
    add("--hooks", metavar="H,H,...", default="residual_post", type=_hooks, help="default: residual_post")
    add(
        "--positions",
        metavar="P,P,...",
        default="last",
        type=_positions,
        help="last (default), all, or places counted over a prompt's tokens, such as 0,5,-1; one place alone makes "
        "[prompts, width], several make [prompts, places, width]",
    )

    prompts = parser.add_argument_group("prompts")
    add = prompts.add_argument
    add("--seq-len", metavar="N", type=int, help="the longest prompt allowed, in tokens")
    add("--truncation", choices=("error", "left", "right"), default="error", help="longer ones: an error, or cut")

    numbers = parser.add_argument_group("numbers")
    add = numbers.add_argument
    add("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    add("--dtype", default="auto", help="bfloat16, float16 or float32; default: the checkpoint's own")
    add("--attn-implementation", metavar="NAME", help="sdpa or eager; default: as Hugging Face")
    add(
        "--batching",
        choices=("packed", "padded"),
        default="packed",
        help="packed: a prompt's bits depend on the prompt alone; padded: bit-equal to Hugging Face on padded batches",
    )
    add("--microbatch-tokens", metavar="N", type=int, help="tokens of a packed microbatch")
    add("--microbatch-size", metavar="N", type=int, help="rows of a padded one")

    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add("--device", default="auto", help="cpu, cuda, ...; default: the accelerator if there is one")
    add("--verify", action="store_true", help="compare with transformers at every layer while it runs")
    add("--memory", metavar="SIZE", help="RAM that the run may take, such as 8GB; default: what is free")
    add("--device-memory", metavar="SIZE", help="the same of the accelerator's memory")
    add("--disk", metavar="SIZE", help="the same of the disk")
    add(
        "--residual",
        choices=("auto", "device", "ram", "disk"),
        default="auto",
        help="where the residual stream lies between layers",
    )
    add(
        "--loading",
        choices=("auto", "resident", "stream"),
        default="auto",
        help="resident: all weights stay in memory; stream: a few layers at a time; default: what is faster and fits",
    )
    add(
        "--layers-per-visit",
        metavar="N",
        type=_count_or_auto,
        default="auto",
        help="layers that stand in memory together where they are streamed; default: auto, as few as cost no time",
    )

    again = parser.add_argument_group("a run in --out that was interrupted")
    add = again.add_argument
    add(
        "--resume",
        choices=("auto", "never", "require"),
        default="auto",
        help="auto: it is gone on with; never: begun again; require: it has to be there",
    )
    add("--allow", metavar="NAME,...", type=_names, default=(), help=ALLOW)


def _joined(argv: Sequence[str]) -> list[str]:
    """``--layers -1,4`` as ``--layers=-1,4``: argparse takes a value that begins with a dash for an option."""
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1].startswith("--") and re.fullmatch(r"-\d+(,-?\d+)*", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _integers(value: str, otherwise: str) -> list[int]:
    try:
        return [int(word) for word in value.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is neither {otherwise} nor integers such as 0,5,-1") from None


def _layers(value: str) -> str | list[int]:
    return value if value == "all" else _integers(value, "'all'")


def _positions(value: str) -> str | list[int]:
    return value if value in ("all", "last") else _integers(value, "'last' nor 'all'")


def _count_or_auto(value: str) -> str | int:
    if value != "auto" and not re.fullmatch(r"\d+", value):
        raise argparse.ArgumentTypeError(f"{value!r} is neither 'auto' nor a number of layers such as 4")
    return value if value == "auto" else int(value)


def _names(value: str) -> tuple[str, ...]:
    return tuple(value.split(","))


def _hooks(value: str) -> list[str]:
    return list(dict.fromkeys(value.split(",")))


# --- the commands ---------------------------------------------------------------------------------------------------


def _tokenizer_folder(options: argparse.Namespace) -> Path:
    """Where the model's ``tokenizer.json`` is, fetched if it is a hub model's."""
    from . import hub

    return hub.fetch(hub.locate(options.model, options.revision), [text.TOKENIZER]).folder


@contextmanager
def _asked(options: argparse.Namespace, *, progress: bool) -> Iterator["Sweep"]:
    """The sweep that the options ask for, while its prompt file is open."""
    from .callbacks.common import RawActivations
    from .sweep import Sweep

    match options.positions:
        case "last" | "all":
            which: dict[str, Any] = {"last_token_only": options.positions == "last"}
        case [single]:
            which = {"positions": single}
        case several:
            which = {"positions": several}

    with text.open_prompts(options.prompts, partial(_tokenizer_folder, options)) as prompts:
        yield Sweep(
            options.model,
            prompts,
            options.seq_len,
            [RawActivations(options.layers, hook, **which) for hook in options.hooks],
            revision=options.revision,
            dtype=options.dtype,
            device=options.device,
            out=options.out,
            batching=options.batching,
            microbatch_size=options.microbatch_size,
            microbatch_tokens=options.microbatch_tokens,
            memory=options.memory,
            device_memory=options.device_memory,
            disk=options.disk,
            truncation=options.truncation,
            loading=options.loading,
            residual=options.residual,
            attn_implementation=options.attn_implementation,
            layers_per_visit=options.layers_per_visit,
            resume=options.resume,
            allow=options.allow,
            verify=options.verify,
            progress=progress,
        )


def _run(options: argparse.Namespace) -> int:
    from .folder import MANIFEST
    from .plan import size

    if options.quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    before = (Path(options.out) / MANIFEST).exists()
    with _asked(options, progress=not options.quiet) as sweep:
        plan = sweep.preflight()
        if not options.quiet:
            print(plan.summary(), flush=True)
        result = sweep.run(command=_kept(options))
    if not options.quiet:
        records, profile = result.manifest["records"], result.profile
        print(f"result     {result.path}: {len(records)} outputs, {size(sum(e['bytes'] for e in records))}")
        if before:
            print("           finished by an earlier run of the same request; nothing was computed")
        else:
            print(
                f"speed      {round(profile.share * profile.tokens):,} tokens in {profile.wall_s:,.1f} s, "
                f"{profile.throughput_tok_per_s():,.0f} tokens/s; fpwap inspect {result.path} shows where it went"
            )
    return 0


def _kept(options: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON, for `_resume`: paths from the root, since it may be asked from another folder."""
    local = Path(options.model).exists()
    paths = {"prompts": str(options.prompts.absolute())}
    paths |= {"model": str(Path(options.model).absolute())} if local else {}
    left_out = ("command", "out", "quiet", "resume", "allow")
    return {name: value for name, value in vars(options).items() if name not in left_out} | paths


def _resume(options: argparse.Namespace) -> int:
    from .journal import command_of

    kept = dict(command_of(Path(options.folder)))
    kept["prompts"] = Path(kept["prompts"])
    for name, value in {"memory": options.memory, "quiet": options.quiet, "allow": options.allow}.items():
        kept[name] = kept.get(name) if value is None else value
    return _run(argparse.Namespace(**kept, out=options.folder, resume="require"))


def _plan(options: argparse.Namespace) -> int:
    with _asked(options, progress=False) as sweep:
        plan = sweep.preflight()
    if options.calibrate:
        from .calibrate import calibrate

        plan = plan.again(rates=calibrate(plan))
    print(plan.summary())
    return 0 if plan.feasible else INFEASIBLE


def _inspect(options: argparse.Namespace) -> int:
    from .result import Result

    result = Result.open(options.folder)
    if options.verify:
        result.verify()
    manifest, profile = result.manifest, result.profile
    if options.json:
        print(json.dumps({"path": str(result.path), **manifest, "profile": profile.to_json()}, indent=1))
        return 0
    model, prompts, numerics = manifest["model"], manifest["dataset"], manifest["numerics"]
    limit = "" if prompts["seq_len"] is None else f", seq_len {prompts['seq_len']} ({prompts['truncation']})"
    print(f"run        {result.path}")
    print(f"model      {model['name']}" + (f" @ {model['commit']}" if model["commit"] else ""))
    print(
        f"           {model['family']}, {manifest['layers']} layers, {numerics['dtype']}, {numerics['attention']}, "
        f"{numerics['batching']} by {numerics['microbatch']}, on {manifest['environment']['device']}"
    )
    print(f"dataset    {prompts['prompts']:,} prompts, {prompts['tokens']:,} tokens{limit}")
    if "certificate" in manifest:
        print(f"verified   {_certified(manifest['certificate'])}")
    print("written by " + ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()))
    _print_table("outputs", [(*_site(e), _shape(e), *_file(e)) for e in manifest["records"]])
    _print_table("artifacts", [(*_site(e), *_file(e)) for e in manifest["artifacts"]])
    if options.verify:
        print("\nverified: every file is what the run wrote")
    print(f"\n{profile.summary()}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from .draft import draft
    from .sweep import as_dtype
    from .verify import verify

    if options.draft:
        print(draft(options.model, options.revision))
        return 0
    prompts = None
    if options.prompts is not None:
        with text.open_prompts(options.prompts, partial(_tokenizer_folder, options)) as rows:
            prompts = [row["input_ids"] for row in rows]
    report = verify(
        options.model,
        prompts,
        layers=None if options.layers == "all" else options.layers,
        dtype=as_dtype(options.dtype),
        attention=options.attn_implementation,
        device=options.device,
        revision=options.revision,
    )
    print(report.summary())
    return 0 if report.passed else 1


def _models(options: argparse.Namespace) -> int:
    import archs

    rows = [(row.name, ", ".join(row.model_types), row.about, row.since) for row in archs.supported()]
    _print_table("families: name, model_type, what is special, the transformers they were first proved with", rows)
    print(f"\nand the language models within {', '.join(sorted(archs.WRAPPERS))} checkpoints")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo import run

    return run(options.model, options.out)


# --- tables ---------------------------------------------------------------------------------------------------------


def _certified(found: Mapping[str, Any]) -> str:
    """A run's certificate in words."""
    exact, near, followed = (len(found[key]) for key in ("layers", "near_layers", "followed_layers"))
    words = [
        f"{exact} layers and {', '.join(found['parts'])} equal to transformers {found['versions']['transformers']} on "
        f"prompts {', '.join(map(str, found['prompts']))} ({found['tokens']} tokens, one padded batch)"
    ]
    if near:
        words.append(
            f"in {near} layers the run's rows at most {found['nearness']} times as far from it as rounding allows"
        )
    if near < exact:
        words.append(f"not in {exact - near} that end early or in which callbacks write")
    words.append(f"followed from the tokens on through {followed} layers")
    if found["other_experts"]:
        words.append(f"{found['other_experts']} tokens whose experts tie left out")
    return "; ".join(words)


def _site(entry: Mapping[str, Any]) -> tuple[str, str]:
    where = "model" if entry["layer"] is None else f"layer {entry['layer']}"
    return where, entry["hook"] + (f" {entry['name']}" if entry["name"] else "")


def _shape(entry: Mapping[str, Any]) -> str:
    ragged = ", every token" if entry["per"] == "token" else ""
    return f"{[entry['rows'], *entry['rest']]} {entry['dtype']}{ragged}"


def _file(entry: Mapping[str, Any]) -> tuple[str, str]:
    from .plan import size

    return size(entry["bytes"]), entry["file"]


def _print_table(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}")
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
