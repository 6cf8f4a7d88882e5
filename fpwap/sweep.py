"""`Sweep`: what a user asks for, checked, planned and run.

Construction is cheap and touches nothing. `preflight` reads the config, the headers and the dataset, once, and returns
the plan; `run` opens the parts, hands them to the engine and closes them. Nothing here computes.
"""

import contextlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archs.batch import Attention

from . import identity
from .callbacks.base import Callback, unresumable
from .commits import Commits, Uncommitted
from .costs import Way
from .device import Device, open_device
from .engine import Parts, sweep
from .errors import RequestError, StoreError
from .folder import BEGIN_AGAIN, PROFILE, SCRATCH
from .interrupt import Interruptible
from .journal import Journal, Resume, is_finished
from .machine import kept_pages, many_files
from .meter import Meter
from .outbox import RING, Outbox
from .plan import Plan
from .prepare import COMPUTED, FOLLOWED, Prepared, Request, fetch, learn, pad_token, prepare, to_device
from .profile import Recorder
from .progress import Progress, ProgressEvent
from .prompts import Prompts, TokenTable, ingest
from .reference import HFLayers
from .residual import open_residual
from .result import Result
from .schedule import START
from .store import Record, Store
from .taps import Blame, Taps
from .watch import Unwatched, Watch, choose
from .weights import Decoded, Weights

CHOICES: Mapping[str, tuple[str, ...]] = {
    "batching": ("packed", "padded"),
    "truncation": ("error", "left", "right"),
    "residual": ("auto", "device", "ram", "disk"),
    "loading": ("auto", "resident", "stream"),
    "resume": ("auto", "never", "require"),
}
MICROBATCH_SIZE = 16


class Sweep:
    """Activations of ``dataset`` in ``model``: one pass over the weights, all prompts through each layer in turn.

    model: hub id or local folder of safetensors. dataset: any iterable of dicts with "input_ids" (list, numpy or torch;
    optionally "attention_mask"; other keys are the sample's metadata) or of lists of ids. It is iterated once.
    seq_len: the longest prompt allowed; longer ones are an error, or cut on the side that ``truncation`` names.
    callbacks: what to do with the activations, called in this order at one site.

    revision: of a hub model. dtype: a torch dtype or its name; "auto" is the checkpoint's own. device: "auto" takes the
    accelerator if there is one. out: the result's folder; None is a temporary one, gone with the result.
    batching: "packed" (no padding; a prompt's bits depend on the prompt alone) or "padded" (bit-equal to Hugging Face
    on the same padded batches, ``microbatch_size`` rows in dataset order). microbatch_tokens: size of a packed
    microbatch. memory, device_memory, disk: what the run may take of each, in bytes or as "8GB"; by default what is
    free. They choose where things lie and what is streamed, and never a bit of the result. loading: "resident" keeps
    all weights where they are computed with (on the CPU as maps of the files), "stream" reads each layer when its turn
    comes. residual: where the residual stream lives between layers. layers_per_visit: how many layers are resident
    together while the weights are streamed. Left at "auto", the plan chooses all three by what is free and what it
    takes. attn_implementation: "sdpa", "eager", None: the family's default. verify: compare with Hugging Face at every
    layer while it runs, on a few prompts (`fpwap.watch`); needs transformers. progress: a bar, nothing, or a callable
    that gets `ProgressEvent`s. resume: an unfinished run of this request in ``out`` is gone on with ("auto"), begun
    again ("never"), or has to be there ("require"). allow: what of the environment may differ from that run's: "torch",
    "device", "processor", "cpu_capability", "threads"; bits may then differ from those of an undisturbed run.

    Raises `RequestError` for arguments that are wrong in themselves; `preflight` and `run` raise the other
    `FpwapError`s.
    """

    def __init__(
        self,
        model: str | Path,
        dataset: Iterable[Any],
        seq_len: int | None = None,
        callbacks: Sequence[Callback] = (),
        *,
        revision: str | None = None,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device = "auto",
        out: str | Path | None = None,
        batching: Literal["packed", "padded"] = "packed",
        microbatch_size: int | None = None,
        microbatch_tokens: int | None = None,
        memory: int | str | None = None,
        device_memory: int | str | None = None,
        disk: int | str | None = None,
        truncation: Literal["error", "left", "right"] = "error",
        loading: Literal["auto", "resident", "stream"] = "auto",
        residual: Literal["auto", "device", "ram", "disk"] = "auto",
        layers_per_visit: int | Literal["auto"] = "auto",
        attn_implementation: Attention | None = None,
        verify: bool = False,
        progress: bool | Callable[[ProgressEvent], None] = True,
        resume: Resume = "auto",
        allow: Collection[str] = (),
    ) -> None:
        given = {
            "batching": batching,
            "truncation": truncation,
            "residual": residual,
            "loading": loading,
            "resume": resume,
        }
        for name, value in given.items():
            if value not in CHOICES[name]:
                raise RequestError(f"{name} must be one of {', '.join(CHOICES[name])}, not {value!r}")
        sizes = {"seq_len": seq_len, "microbatch_size": microbatch_size, "microbatch_tokens": microbatch_tokens}
        together = None if layers_per_visit == "auto" else layers_per_visit
        for name, count in {**sizes, "layers_per_visit": together}.items():
            if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
                raise RequestError(f"{name} must be a positive integer, not {count!r}")
        if batching == "packed" and microbatch_size is not None:
            raise RequestError("microbatch_size counts rows of a padded batch; packed mode has microbatch_tokens")
        if batching == "padded" and microbatch_tokens is not None:
            raise RequestError("microbatch_tokens belongs to packed mode; padded mode has microbatch_size")
        if isinstance(dataset, str | bytes):
            raise RequestError("dataset must be an iterable of prompts (token ids), not a string: tokenise first")
        self._callbacks = tuple(callbacks)
        for callback in self._callbacks:
            if not isinstance(callback, Callback):
                raise RequestError(f"callbacks must be instances of fpwap.Callback, not {callback!r}")
        if len({id(callback) for callback in self._callbacks}) < len(self._callbacks):
            raise RequestError("the same callback object is given twice; make two")
        if not self._callbacks:
            raise RequestError("no callbacks: a sweep computes what callbacks ask for; try RawActivations(layers=[-1])")
        if not (isinstance(progress, bool) or callable(progress)):
            raise RequestError(f"progress must be True, False or a callable, not {progress!r}")
        if not isinstance(verify, bool):
            raise RequestError(f"verify must be True or False, not {verify!r}")
        self._dataset, self._progress, self._verify = dataset, progress, verify
        self._ingested: Prompts | Exception | None = None
        self._out = None if out is None else Path(out)
        if resume == "require" and out is None:
            raise RequestError("resume='require' needs the out= of the run to go on with")
        unknown = [allow] if isinstance(allow, str) else [name for name in allow if name not in identity.ENVIRONMENT]
        if unknown:
            raise RequestError(f"allow lists some of {', '.join(identity.ENVIRONMENT)}, not {unknown[0]!r}")
        self._resume, self._allow = resume, tuple(allow)
        self._request = Request(
            model=str(model),
            seq_len=seq_len,
            revision=revision,
            dtype=as_dtype(dtype),
            device=device,
            batching=batching,
            microbatch_size=microbatch_size or MICROBATCH_SIZE,
            microbatch_tokens=microbatch_tokens,
            memory=_bytes("memory", memory),
            device_memory=_bytes("device_memory", device_memory),
            disk=_bytes("disk", disk),
            truncation=truncation,
            loading=loading,
            residual=residual,
            attention=attn_implementation,
            layers_per_visit=together,
            verify=verify,
        )

    def preflight(self) -> Plan:
        """Everything that can be known before computing: the plan, feasible or with its blockers.

        Reads config, headers and the dataset (once, also if `run` follows); allocates nothing on the device.
        """
        return self._prepared.plan

    def run(self, *, command: Mapping[str, Any] | None = None) -> Result:
        """Executes the plan. A finished identical run in ``out`` is opened instead, an unfinished one is gone on with.

        command: JSON, kept in ``run.json`` for ``fpwap resume``. Raises `RequestError` if the plan is not feasible,
        `StoreError` if ``out`` belongs to another run, `Interrupted` on SIGINT or SIGTERM.
        """
        device = open_device(to_device(self._request.device))
        recorder = Recorder(device)
        with recorder.span("plan"):
            ready = fetch(self._prepared)
            own = identity.identity(self._request, ready, self._callbacks)
            finished = self._out is not None and is_finished(self._out, own, allow=self._allow)
        if self._out is not None and finished:
            unknown = identity.opaque(own)
            if unknown is not None:
                raise RequestError(f"whether {self._out} holds this run cannot be told: {unknown}; give another out=")
            return self._opened(self._out)
        if self._out is not None:
            self._run_in(self._out, ready, own, device, recorder, command)
            return self._opened(self._out)
        folder = Path(tempfile.mkdtemp(prefix="fpwap-"))
        try:
            self._run_in(folder, ready, own, device, recorder, None)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Result.adopt(Result.open(folder))

    def _opened(self, folder: Path) -> Result:
        """A finished run, certified if that was asked for."""
        result = Result.open(folder)
        if self._verify and result.manifest.get("certificate") is None:
            raise RequestError(f"{folder} holds this run, made without verify=True; give another out=")
        return result

    @cached_property
    def _prepared(self) -> Prepared:
        return prepare(self._request, self._ingest, self._callbacks, self._out)

    def _ingest(self, **limits: Any) -> Prompts:
        """The dataset, read once: a generator refused half-way is refused again, and not begun in its middle."""
        if self._ingested is None:
            try:
                self._ingested = ingest(self._dataset, **limits)
            except Exception as error:
                self._ingested = error
        if isinstance(self._ingested, Exception):
            raise self._ingested
        return self._ingested

    def _watch(self, ready: Prepared) -> Watch:
        """Hugging Face beside the run, on a few prompts; of the last wave, behind which each layer ends."""
        plan, model = ready.plan, ready.model
        last = plan.schedule.waves[-1]
        samples = [
            sample
            for microbatch in ready.table.microbatches[last.start : last.stop]
            for view in microbatch.views
            for sample in view.sample_ids.tolist()
        ]
        lengths = ready.prompts.lengths
        chosen = [samples[place] for place in choose([int(lengths[sample]) for sample in samples])]
        bound = zip(self._callbacks, ready.targets.bound, strict=True)
        stored = model.quantisation
        decoded = None if stored is None else Decoded(ready.checkpoint, stored, plan.dtype)
        return Watch(
            HFLayers(ready.checkpoint.folder, plan.dtype, plan.attention, plan.device, decoded),
            model.family,
            model.config,
            plan.attention,
            {sample: torch.from_numpy(ready.prompts.tokens(sample).astype("int64")) for sample in chosen},
            pad=pad_token(model),
            dtype=plan.dtype,
            device=plan.device,
            written={
                layer
                for callback, own in bound
                for layer, hook in own
                if callback.phase == "write" and (layer is not None or hook == "embedding")
            },
        )

    def _run_in(
        self,
        folder: Path,
        ready: Prepared,
        own: dict[str, Any],
        device: Device,
        recorder: Recorder,
        command: Mapping[str, Any] | None,
    ) -> None:
        """Leaves a finished run of this identity in ``folder``."""
        whole = self._why_whole(own)
        if whole is not None and self._resume == "require":
            raise RequestError(f"resume='require' cannot be had: {whole}")
        resume: Resume = self._resume if whole is None else "never"
        with Interruptible() as stop, contextlib.ExitStack() as opened:
            with recorder.span("plan"):
                held = opened.enter_context(Journal.open(folder, own, resume=resume, allow=self._allow))
                if held.finished:  # by another process, since `run` looked
                    return
                if held.records:
                    before = Way.from_json(held.records[0]["way"])
                    ready = replace(ready, plan=ready.plan.like(before))
            if not ready.plan.feasible:
                raise RequestError("; ".join(ready.plan.blockers))
            with recorder.span("verify"):
                watcher = self._watch(ready) if self._verify else Unwatched()
            for callback in self._callbacks:
                with recorder.span("callback"), Blame(callback, "on_sweep_start"):
                    callback.on_sweep_start(ready.context)
            lasting = self._out is not None and self._is_lasting(held, ready, own)
            with recorder.span("commit"):
                held.begin(command)
            try:
                self._sweep(held, ready, own, device, recorder, watcher, stop, lasting=lasting)
            except StoreError as error:
                error.args = (_advised(error, held),)
                raise
        for callback in self._callbacks:  # the result is complete, whatever happens here
            with Blame(callback, "on_sweep_end"):
                callback.on_sweep_end()

    def _is_lasting(self, held: Journal, ready: Prepared, own: dict[str, Any]) -> bool:
        """Whether the run can be gone on with if it is interrupted; says so if a callback is why it cannot.

        A run that goes on does not give up what is committed because the disk has less room by now.
        """
        asked = (unresumable(callback, ready.context) for callback in self._callbacks)
        reasons = [reason for reason in asked if reason is not None]
        reasons += [reason] if (reason := identity.opaque(own)) is not None else []
        for reason in reasons[:1]:
            warnings.warn(f"this run cannot be gone on with if it is interrupted: {reason}", stacklevel=4)
        room = bool(held.records) or ready.plan.unsaved is None
        return not reasons and self._why_whole(own) is None and room

    def _why_whole(self, own: dict[str, Any]) -> str | None:
        """Why this request is always run from its beginning to its end, in words; None if it may go on."""
        return FOLLOWED if self._verify else identity.opaque(own)

    def _sweep(
        self,
        held: Journal,
        ready: Prepared,
        own: dict[str, Any],
        device: Device,
        recorder: Recorder,
        watcher: Watch | Unwatched,
        stop: Interruptible,
        *,
        lasting: bool,
    ) -> None:
        """From what the journal holds to a finished run. lasting: what is done is committed on the way."""
        plan, model, folder = ready.plan, ready.model, held.folder
        with contextlib.ExitStack() as opened:
            with recorder.span("finish"):  # opening and closing the parts
                opened.enter_context(kept_pages())
                opened.enter_context(many_files())
                meter = Meter(device.torch, folder)
                widths, scratch = {"residual": model.config.hidden}, folder / SCRATCH
                residual = open_residual(plan.tier, plan.residual_rows, widths, plan.dtype, device, scratch, stop.check)
                opened.callback(residual.close)
                store = Store.open(folder, ready.prompts.lengths, ram=plan.pooled_bytes, check=stop.check)
                opened.callback(store.close)
                opened.callback(residual.give_up)  # what the store's thread waits for must not hold up its end

                def write(record: Record, values: Tensor, sample_ids: Tensor) -> None:
                    recorder.count("outputs", values.nbytes)
                    store.write(record, values, sample_ids)

                outbox = Outbox(write, device, ring_bytes=RING, check=stop.check)
                opened.callback(outbox.close)
                table, rows = _by_rows(ready)
                taps = Taps(
                    self._callbacks,
                    ready.targets.bound,
                    prompts=plan.prompts,
                    last=ready.targets.last,
                    declare=store.declare,
                    write=outbox.put,
                    span=recorder.span,
                    check=stop.check,
                    device=device,
                )
                commits = Commits(
                    journal=held,
                    store=store,
                    taps=taps,
                    residual=residual,
                    callbacks=self._callbacks,
                    way=plan.way,
                    flush=outbox.flush,
                    expected_s=plan.commit_s,
                )
                start = commits.restore()
                if not lasting:
                    held.forget()
                weights = Weights(
                    ready.checkpoint,
                    ready.layout,
                    plan.schedule.loads(start),
                    loading=plan.loading,
                    ring=plan.ring,
                    streamed=plan.schedule.streamed,
                    rows=rows,
                    dtype=plan.dtype,
                    device=device,
                    check=stop.check,
                    span=recorder.span,
                    moved=lambda size, seconds: recorder.count("weights", size, seconds),
                )
                opened.callback(weights.close)
                progress = Progress(self._progress, len(plan.schedule), plan.schedule.behind(start))
                opened.callback(progress.close)
            sweep(
                Parts(
                    plan=plan,
                    family=model.family,
                    config=model.config,
                    table=table,
                    weights=weights,
                    residual=residual,
                    taps=taps,
                    store=store,
                    flush=outbox.flush,
                    recorder=recorder,
                    progress=progress,
                    watcher=watcher,
                    commits=commits if lasting else Uncommitted(),
                    start=start,
                )
            )
            with recorder.span("commit"):
                weights.check_files()
                store.settle()
            with recorder.span("finish"):
                peaks = meter.peaks(
                    memory=plan.memory_bytes + plan.mapped_bytes, device=plan.device_bytes, disk=plan.disk_bytes
                )
                for part in (progress, weights, residual, outbox):
                    part.close()
            profile = recorder.finish(
                prompts=plan.prompts,
                tokens=plan.tokens,
                predicted=plan.phases if start == START else None,
                peaks=peaks,
                share=1 - plan.schedule.behind(start) / len(plan.schedule),
            )
            store.put_json(PROFILE, profile.to_json())
            store.finish(identity.manifest(held.identity, plan, own) | watcher.certificate(), ready.prompts.ids)
            if start == START:
                learn(plan, profile, whole=ready.targets.ends_a_stage)


def _advised(error: StoreError, held: Journal) -> str:
    """What it says, and what is left of the run, unless that is what is damaged."""
    if not held.records or BEGIN_AGAIN in str(error):
        return str(error)
    _, group, done = held.records[-1]["point"]
    groups = Way.from_json(held.records[0]["way"]).schedule.groups
    layers = [stage.label for stages in groups[:group] for stage in stages if stage.kind == "layer"]
    words = f"up to {f'layer {layers[-1]}' if layers else f'{done} microbatches of the first layers'}"
    return f"{error}; what is committed, {words}, is kept: run again to go on from there"


def _by_rows(ready: Prepared) -> tuple[TokenTable, NDArray[np.int64] | None]:
    """The table whose ids are places among the ids that occur, and these; as it is where the embedding stays whole."""
    compacted = ready.table.compact(ready.model.config.vocab) if ready.plan.by_rows else None
    return compacted or (ready.table, None)


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _bytes(name: str, asked: int | str | None) -> int | None:
    """A size in bytes, or in words such as "8GB"."""
    if asked is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(asked))
    if isinstance(asked, bool) or found is None or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise RequestError(f"{name} must be bytes, or a size such as '8GB' or '512MiB', not {asked!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def as_dtype(asked: torch.dtype | str) -> torch.dtype | None:
    """A dtype or its name; None for "auto"."""
    names = {str(dtype).removeprefix("torch."): dtype for dtype in COMPUTED}
    if asked == "auto":
        return None
    dtype = names.get(asked) if isinstance(asked, str) else asked
    if dtype not in COMPUTED:
        raise RequestError(f"dtype must be 'auto' or one of {', '.join(names)}, not {asked!r}")
    return dtype
