"""The contenders of `bench`, each a whole function: what one does to get the residual stream of every layer at the last
token of every prompt.

    python tools/bench/contenders.py TASK.json

One contender, once, in a process of its own, which `bench` starts. The file stands alone and imports what a contender
needs inside of it, so that it also runs in an environment that holds another package of the same name: the public fpwap
of the package registry, from which this project took its idea and no code.

What is measured is the work on prompts with the model at hand. Hugging Face's contenders load it before the clock
starts, and run one short prompt to touch every weight and to let the matrix library set itself up; those that offload
their weights skip that, since it would be one more pass over the disk. Where the checkpoint is cold, loading is on the
clock. Both packages named fpwap have no moment between, since reading weights is part of their work: their clock covers
all of `Sweep.run()`, from opening the checkpoint to the finished result. Imports are never on the clock; how long the
whole process took stands beside it.

``hidden_states[l + 1]`` is layer l's residual stream, but for the last layer's, which Hugging Face puts through the
final norm: that one layer is not compared.
"""

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

BATCH = 16


@dataclass(frozen=True)
class Task:
    """What a contender is given. options: of the contender, as its name in `bench` spells them out."""

    contender: str
    options: Mapping[str, Any]
    model: str
    prompts: str
    dtype: str
    device: str
    threads: int
    cold: bool
    answer: str
    captured: str

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def ids(self) -> list[list[int]]:
        """The prompts as lists of token ids, from an ``.npz`` file of flat ids and offsets."""
        with np.load(self.prompts) as file:
            ids, offsets = file["ids"], file["offsets"].tolist()
        return [ids[start:stop].tolist() for start, stop in pairwise(offsets)]


@dataclass
class Sample:
    """What came of it. Seconds and bytes; cpu_s: of all threads of the process, during the ``wall_s``.

    foreign_s: processor time that others had meanwhile, in this machine or (steal) beside it. weights: bytes of weights
    that were read, from wherever they lay. from_disk: bytes that the kernel fetched from storage for this process, in
    all. peak_device: of the accelerator's memory. rest: what one contender knows of itself and others do not.
    """

    device: str = "cpu"
    wall_s: float = 0.0
    cpu_s: float = 0.0
    foreign_s: float = 0.0
    weights: int = 0
    from_disk: int = 0
    peak_rss: int = 0
    peak_device: int = 0
    rest: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def clock(self) -> Iterator[None]:
        self._settle()
        wall, cpu, busy = perf_counter(), process_time(), busy_s()
        yield
        self._settle()
        self.wall_s, self.cpu_s = perf_counter() - wall, process_time() - cpu
        self.foreign_s = max(0.0, busy_s() - busy - self.cpu_s)

    def _settle(self) -> None:
        if self.device != "cpu":
            torch.accelerator.synchronize()


Contender = Callable[..., Tensor]
"""``(task, sample, **options)``: fills in the sample, returns ``[layers, prompts, hidden]``."""


def fpwap(task: Task, sample: Sample, *, capture: int | None = None, **options: Any) -> Tensor:
    """This project; options are `Sweep`'s. capture: one layer instead of all."""
    from fpwap import Sweep
    from fpwap.callbacks.common import RawActivations

    asked: dict[str, Any] = {"dtype": task.dtype, "device": task.device, "progress": False} | options
    layers = range(json.loads((Path(task.model) / "config.json").read_text())["num_hidden_layers"])
    chosen = list(layers) if capture is None else [layers[capture]]
    sweep = Sweep(task.model, task.ids(), callbacks=[RawActivations(layers=chosen)], **asked)
    with sample.clock():
        result = sweep.run()
    profile, plan = result.profile, sweep.preflight()
    moved = profile.bytes_moved()
    sample.weights = moved.get("weights", 0)
    sample.rest = {
        "profile_s": profile.wall_s,
        "predicted_s": profile.predicted_s,
        "phases": profile.by_phase(),
        "moved": moved,
        "memory_bytes": plan.memory_bytes,
    }
    return torch.stack([torch.as_tensor(result.activations(layer=layer)) for layer in chosen])


def fpwap_padded(task: Task, sample: Sample, **options: Any) -> Tensor:
    """This project, reproducing Hugging Face on the padded batches of `hf_order` bit for bit."""
    return fpwap(task, sample, batching="padded", **{"microbatch_size": BATCH, **options})


def public(
    task: Task, sample: Sample, *, batch: int = BATCH, prefetch: bool = True, preloaded: bool = False, **options: Any
) -> Tensor:
    """The public fpwap 0.1.8 in the form in which it is fastest; other options are its `Sweep`'s.

    Prompts of one length go without a mask. Others are padded on the right, so that no mask reaches its attention, and
    bucketed; its RawActivations takes the last column, which then is padding, so that a callback of its own kind knows
    the lengths. prefetch: the next layer is read by a thread, which is off unless asked for. preloaded: Hugging Face's
    model is loaded before the clock starts. batch: rows of a microbatch, the whole dataset if nobody says.
    """
    demand("fpwap", "0.1.8")
    os.environ["FPWAP_PREFETCH_LOAD"] = "1" if prefetch else "0"
    from transformers import AutoModelForCausalLM

    peer: Any = importlib.import_module("fpwap")  # whose words are not those of the package beside this file
    prompts = [torch.tensor(ids) for ids in task.ids()]
    lengths = torch.tensor([len(ids) for ids in prompts])
    longest = int(lengths.max())
    ragged = bool((lengths != longest).any())
    config = json.loads((Path(task.model) / "config.json").read_text())
    captured = torch.empty(config["num_hidden_layers"], len(prompts), config["hidden_size"], dtype=task.torch_dtype)

    class LastToken(peer.Callback):  # type: ignore[misc]
        target_layers, target_hooks, phase = "all", ("residual_post",), "read"

        def on_batch(self, layer_idx: int, hook: str, acts: Tensor, sample_ids: Tensor) -> None:
            chosen = sample_ids.cpu()
            captured[layer_idx, chosen] = acts[torch.arange(len(chosen)), lengths[chosen] - 1].cpu()

    def item(ids: Tensor) -> dict[str, Tensor]:
        if not ragged:
            return {"input_ids": ids}
        padded = torch.nn.functional.pad(ids, (0, longest - len(ids)))
        return {"input_ids": padded, "attention_mask": (torch.arange(longest) < len(ids)).long()}

    if preloaded:
        model: Any = AutoModelForCausalLM.from_pretrained(task.model, dtype=task.torch_dtype, **SDPA)
        model.eval().to(task.device)
    else:
        model = task.model
        peer.Extractor.from_hf(task.model, dtype=task.torch_dtype)  # so that imports are not measured
    sweep = peer.Sweep(
        model,
        [item(ids) for ids in prompts],
        seq_len=longest,
        callbacks=[LastToken()],
        **{
            "transport_dtype": task.torch_dtype,
            "execution_device": task.device,
            "microbatch_size": batch,
            "padding": "bucketed" if ragged else "fixed",
            "apply_final_norm": False,
            "progress": False,
            **options,
        },
    )
    with torch.inference_mode(), sample.clock():
        result = sweep.run()
    sample.weights = sum(layer.bytes_weights for layer in result.profile.per_layer.values())
    return captured


SDPA: Mapping[str, Any] = {"attn_implementation": "sdpa"}


def hf_order(task: Task, sample: Sample, batch: int = BATCH) -> Tensor:
    """Hugging Face in memory, batches in dataset order, each padded to its longest prompt."""
    return forward(lambda: loaded(task), task, sample, batch, by_length=False)


def hf_sorted(task: Task, sample: Sample, batch: int = BATCH) -> Tensor:
    """Hugging Face in memory, batches of prompts sorted by length: about as little padding as batches can have."""
    return forward(lambda: loaded(task), task, sample, batch)


def hf_disk(task: Task, sample: Sample, batch: int = BATCH) -> Tensor:
    """Hugging Face with all layers on disk, each read in every forward; sorted by length, batches as large as asked."""
    demand("accelerate")
    from transformers import AutoConfig, AutoModel

    layers = AutoConfig.from_pretrained(task.model).num_hidden_layers
    places = dict.fromkeys(("embed_tokens", "rotary_emb", "norm"), task.device)
    places |= {f"layers.{layer}": "disk" for layer in range(layers)}
    with tempfile.TemporaryDirectory(prefix="bench-offload-") as folder:
        own = {"device_map": places, "offload_folder": folder, **SDPA}
        return forward(
            lambda: AutoModel.from_pretrained(task.model, dtype=task.torch_dtype, **own).eval(),
            task,
            sample,
            batch,
            warm=False,
        )


def cpu_offload(task: Task, sample: Sample, batch: int = BATCH) -> Tensor:
    """Hugging Face with its weights in RAM, each layer handed to the device in every forward by accelerate."""
    demand("accelerate")
    accelerate = importlib.import_module("accelerate")
    device = torch.device(task.device)
    return forward(
        lambda: accelerate.cpu_offload(loaded(task, "cpu"), execution_device=device), task, sample, batch, warm=False
    )


def loaded(task: Task, device: str | None = None) -> Any:
    """Hugging Face's base model, on the task's device or another."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(task.model, dtype=task.torch_dtype, **SDPA)
    return model.eval().to(device or task.device)


def forward(
    load: Callable[[], Any], task: Task, sample: Sample, batch: int, *, by_length: bool = True, warm: bool = True
) -> Tensor:
    """All prompts through Hugging Face's model, in padded batches and without a cache, on the clock."""
    from transformers import AutoConfig, AutoModel

    prompts, device = task.ids(), torch.device(task.device)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) if by_length else range(len(prompts))
    config = AutoConfig.from_pretrained(task.model)
    auto: Any = AutoModel
    with torch.device("meta"):
        auto.from_config(config)  # for its imports
    captured = torch.empty(config.num_hidden_layers, len(prompts), config.hidden_size, dtype=task.torch_dtype)
    with torch.inference_mode():
        model = None if task.cold else load()
        if warm and model is not None:
            model(torch.tensor([prompts[0][:16]], device=device), use_cache=False)
        with sample.clock():
            model = load() if model is None else model
            sample.weights = sum(weight.nbytes for weight in model.parameters())
            for start in range(0, len(order), batch):
                chosen = [order[place] for place in range(start, min(start + batch, len(order)))]
                lengths = torch.tensor([len(prompts[i]) for i in chosen])
                mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
                ids = torch.zeros_like(mask)
                ids[mask.bool()] = torch.tensor([token for i in chosen for token in prompts[i]])
                states = model(
                    ids.to(device), attention_mask=mask.to(device), use_cache=False, output_hidden_states=True
                ).hidden_states
                for layer, state in enumerate(states[1:]):
                    captured[layer, chosen] = state[torch.arange(len(chosen)), lengths - 1].cpu()
    return captured


def demand(package: str, needed: str = "") -> None:
    """Ends the process with one sentence if a package is not here, or is of another version than starts so."""
    try:
        found = version(package)
    except PackageNotFoundError:
        found = "none"
    if found == "none" or not found.startswith(needed):
        what = f"{package} {needed}" if needed else package
        raise SystemExit(
            f"needs {what} and this Python has {found}: make bench-peers, and pass --peer-python build/peers/bin/python"
        )


CONTENDERS: Mapping[str, Contender] = {
    "fpwap": fpwap,
    "fpwap-padded": fpwap_padded,
    "hf-sorted": hf_sorted,
    "hf-order": hf_order,
    "hf-disk": hf_disk,
    "cpu-offload": cpu_offload,
    "public": public,
}
PEERS = ("hf-disk", "cpu-offload", "public")
"""Those that need packages which this project does not: they run in an environment of their own, if there is one."""


def busy_s() -> float:
    """Seconds that the processors of this machine were busy since it began, other guests' time included."""
    user, nice, system, _, _, irq, softirq, steal, *_ = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")


def from_disk() -> int:
    """Bytes that the kernel fetched from storage for this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def peak_rss() -> int:
    """Bytes of this process's largest resident set: its own pages, and those of files that it maps.

    Not `getrusage`'s figure, which a child inherits from whoever started it.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def main() -> None:
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    torch.set_num_threads(task.threads)
    sample = Sample(device=task.device)
    captured = CONTENDERS[task.contender](task, sample, **task.options)
    sample.peak_rss, sample.from_disk = peak_rss(), from_disk()
    if task.device != "cpu":
        sample.peak_device = torch.accelerator.max_memory_allocated()
    save_file({"captured": captured.contiguous()}, task.captured)
    Path(task.answer).write_text(json.dumps(asdict(sample)))


if __name__ == "__main__":
    main()
