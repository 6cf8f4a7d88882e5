"""The contenders of `bench`, each a whole function: what one does to get the residual stream of every layer at the last
token of every prompt.

    python tools/bench/contenders.py TASK.json

One contender, once, in a process of its own, which `bench` starts. The file stands alone and imports what a contender
needs inside of it, so that it also runs in an environment that holds another package of the same name.

What is measured is the work on prompts with the model at hand. Hugging Face's contenders load it before the clock
starts, and run one short prompt to touch every weight and to let the matrix library set itself up; fpwap has no such
moment, since reading weights is part of its work: its clock covers all of `Sweep.run()`, from opening the checkpoint to
the finished result folder. How long the whole process took stands beside both.

``hidden_states[l + 1]`` is layer l's residual stream, but for the last layer's, which Hugging Face puts through the
final norm: that one layer is not compared.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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
    threads: int
    answer: str
    captured: str

    def ids(self) -> list[list[int]]:
        """The prompts as lists of token ids, from an ``.npz`` file of flat ids and offsets."""
        with np.load(self.prompts) as file:
            ids, offsets = file["ids"], file["offsets"].tolist()
        return [ids[start:stop].tolist() for start, stop in pairwise(offsets)]


@dataclass
class Sample:
    """What came of it. Seconds and bytes; cpu_s: of all threads of the process, during the ``wall_s``.

    weights: bytes of weights that were read, from wherever they lay. from_disk: bytes that the kernel fetched from
    storage for this process, in all. rest: what one contender knows of itself and others do not.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    weights: int = 0
    from_disk: int = 0
    peak_rss: int = 0
    rest: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def clock(self) -> Iterator[None]:
        wall, cpu = perf_counter(), process_time()
        yield
        self.wall_s, self.cpu_s = perf_counter() - wall, process_time() - cpu


Contender = Callable[..., Tensor]
"""``(task, sample, **options)``: fills in the sample, returns ``[layers, prompts, hidden]``."""


def fpwap(task: Task, sample: Sample, **options: Any) -> Tensor:
    """This project; options are `Sweep`'s."""
    from fpwap import Sweep
    from fpwap.callbacks.common import RawActivations

    sweep = Sweep(task.model, task.ids(), callbacks=[RawActivations(layers="all")], progress=False, **options)
    with sample.clock():
        result = sweep.run()
    profile = result.profile
    sample.weights = profile.bytes_moved()["weights"]
    sample.rest = {"profile_s": profile.wall_s, "phases": profile.by_phase(), "moved": profile.bytes_moved()}
    layers = max(int(span.layer) for span in profile.spans if span.layer.isdigit()) + 1
    return torch.stack([torch.as_tensor(result.activations(layer=layer)) for layer in range(layers)])


def fpwap_padded(task: Task, sample: Sample, **options: Any) -> Tensor:
    """This project, reproducing Hugging Face on the padded batches of `hf_order` bit for bit."""
    return fpwap(task, sample, batching="padded", **{"microbatch_size": BATCH, **options})


def hf_order(task: Task, sample: Sample, batch: int = BATCH, *, by_length: bool = False) -> Tensor:
    """Hugging Face in memory, batches in dataset order, each padded to its longest prompt."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(task.model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    prompts = task.ids()
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) if by_length else range(len(prompts))
    captured = torch.empty(model.config.num_hidden_layers, len(prompts), model.config.hidden_size, dtype=model.dtype)
    sample.weights = sum(weight.nbytes for weight in model.parameters())
    with torch.inference_mode():
        model(torch.tensor([prompts[0][:16]]), use_cache=False)
        with sample.clock():
            for start in range(0, len(order), batch):
                chosen = [order[place] for place in range(start, min(start + batch, len(order)))]
                lengths = torch.tensor([len(prompts[i]) for i in chosen])
                mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
                ids = torch.zeros_like(mask)
                ids[mask.bool()] = torch.tensor([token for i in chosen for token in prompts[i]])
                states = model(ids, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states
                for layer, state in enumerate(states[1:]):
                    captured[layer, chosen] = state[torch.arange(len(chosen)), lengths - 1]
    return captured


def hf_sorted(task: Task, sample: Sample, batch: int = BATCH) -> Tensor:
    """Hugging Face in memory, batches of prompts sorted by length: about as little padding as batches can have."""
    return hf_order(task, sample, batch, by_length=True)


CONTENDERS: Mapping[str, Contender] = {
    "fpwap": fpwap,
    "fpwap-padded": fpwap_padded,
    "hf-sorted": hf_sorted,
    "hf-order": hf_order,
}


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
    sample = Sample()
    captured = CONTENDERS[task.contender](task, sample, **task.options)
    sample.peak_rss, sample.from_disk = peak_rss(), from_disk()
    save_file({"captured": captured.contiguous()}, task.captured)
    Path(task.answer).write_text(json.dumps(asdict(sample)))


if __name__ == "__main__":
    main()
