"""Trains the byte-level Llama that the demo runs on, from nothing but the standard library of the Python at hand.

    python tools/train_demo.py --out fpwap/demo_model --minutes 18
    python tools/train_demo.py --out fpwap/demo_model --steps 2500

A token is a byte (id 256 opens every sequence). The text is the "train" part of `fpwap.demo_text`, the loss on the side
is measured on its "held_out" part, so the demo's own prompts are text that the model has not seen. AdamW, linear
warm-up, cosine to zero; weights are kept in fp32, computed with in bf16, and saved as bf16.

`--steps` alone repeats bit for bit on one machine, Python and torch; `--minutes` stretches the schedule over the time
given, so there the number of steps depends on the machine.

Writes `config.json` and `model.safetensors` into `--out`, at every evaluation and at the end, and the curve (step, mean
train loss since the row before, held-out loss, both in nats per byte) into `--curve`.

Does not know: fpwap's engine or `archs`. It defines the model with `transformers`, as any user's checkpoint would be.
"""

import argparse
import copy
import csv
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from fpwap.demo_text import BOS, Part, prompts, sources

CONTEXT = 256
EVALUATION_WINDOWS = 128


class Text:
    """A part of the library as one row of bytes, with the places where a line begins."""

    def __init__(self, part: Part) -> None:
        joined = "\n".join(source for _, source in sources(part)).encode()
        self.bytes = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
        begins = (self.bytes == ord("\n")).nonzero().flatten() + 1
        self.begins = begins[begins + CONTEXT <= len(self.bytes)]

    def windows(self, picked: Tensor) -> Tensor:
        """[windows, CONTEXT] ids that open with BOS, each from the beginning of a line."""
        rows = self.begins[picked].unsqueeze(1) + torch.arange(CONTEXT - 1)
        return F.pad(self.bytes[rows].long(), (1, 0), value=BOS)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Endless; every line begins a window once before any does so twice."""
        while True:
            for picked in torch.split(torch.randperm(len(self.begins), generator=generator), size):
                yield self.windows(picked)


def new_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=BOS + 1,
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.04,
            bos_token_id=BOS,
            eos_token_id=None,
        )
    )


def loss_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte, in nats."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, windows: Tensor) -> float:
    losses = [float(loss_of(model, part)) * len(part) for part in torch.split(windows, 32)]
    return sum(losses) / len(windows)


def save(model: LlamaForCausalLM, out: Path) -> None:
    """The weights rounded to bf16, and nothing but what fpwap reads."""
    copy.deepcopy(model).bfloat16().save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)


@torch.no_grad()
def sample(model: LlamaForCausalLM, length: int, generator: torch.Generator) -> str:
    """Text drawn at temperature 0.7, from nothing but BOS."""
    ids = torch.tensor([[BOS]])
    for _ in range(length):
        logits = model(input_ids=ids, use_cache=False).logits[0, -1, :BOS].float()
        ids = torch.cat([ids, torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)[None]], dim=1)
    return bytes(ids[0, 1:].tolist()).decode(errors="replace")


def learning_rate(progress: float, peak: float, warm_up: float = 0.03) -> float:
    """At `progress`, the share of the training that is done: up in a line, then down a cosine to zero."""
    if progress < warm_up:
        return peak * max(progress, 1e-3) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm_up) / (1 - warm_up))))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's byte-level Llama on the standard library's sources.")
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json and model.safetensors")
    parser.add_argument("--curve", type=Path, default=Path(__file__).with_name("train_demo_loss.csv"))
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimizer steps")
    length.add_argument("--minutes", type=float, help="wall time instead of steps")
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {CONTEXT} ids per step (default %(default)s)")
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=100, help="steps between rows of the curve (default %(default)s)")
    args = parser.parse_args()

    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    text, unseen = Text("train"), Text("held_out")
    evaluation = unseen.windows(torch.linspace(0, len(unseen.begins) - 1, EVALUATION_WINDOWS).long())

    model = new_model()
    # Norms have one dimension and are not decayed.
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    print(f"{model.num_parameters():,} parameters; {len(text.bytes):,} bytes to train on, {len(unseen.bytes):,} not")

    args.out.mkdir(parents=True, exist_ok=True)
    with args.curve.open("w", newline="") as file:
        curve = csv.writer(file, lineterminator="\n")
        curve.writerow(["step", "train_loss", "held_out_loss"])
        start = time.perf_counter()
        losses: list[float] = []
        for step, ids in enumerate(text.batches(args.batch, generator), start=1):
            seconds = time.perf_counter() - start
            progress = step / args.steps if args.steps else seconds / (60 * args.minutes)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, args.peak)
            loss = loss_of(model, ids)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step % args.every == 0 or progress >= 1:
                seen, held_out = sum(losses) / len(losses), evaluate(model, evaluation)
                curve.writerow([step, f"{seen:.4f}", f"{held_out:.4f}"])
                file.flush()
                save(model, args.out)
                print(f"step {step}: train {seen:.4f}, held out {held_out:.4f}, {seconds:.0f} s", flush=True)
                losses.clear()
            if progress >= 1:
                break

    saved = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"saved: {size:,} bytes, held out {evaluate(saved, evaluation):.4f} nats/byte as bf16")
    losses = [loss_of(saved, torch.tensor([p["input_ids"]])).item() for p in prompts(64, split="held_out")]
    print(f"on the demo's held-out prompts {sum(losses) / len(losses):.4f} nats/byte; from nothing it writes:")
    print(sample(saved, 200, generator))


if __name__ == "__main__":
    main()
