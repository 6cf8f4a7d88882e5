"""Write a Llama-shaped checkpoint of random bf16 weights, of any size, straight to safetensors shards.

    python -m tools.bench.make_checkpoint M /data/M
    python -m tools.bench.make_checkpoint S /data/tiny --layers 2 --hidden 256

Speed depends on the shapes of weights and not on their values, as long as the numbers stay ordinary. So every linear is
drawn with variance 1 / fan-in, which keeps what it puts out at the scale of what it gets; q and k are larger by `GAIN`,
so that attention scores have a standard deviation of ``GAIN ** 2`` and attention is far from uniform; norms lie around
1. Each block then adds less than a unit of variance to the residual stream: after 100 layers it is at most ten times
what it was after the embedding.

A tensor's bits depend on the seed, its name and its shape alone, not on the shards or on the threads that write them.
No tensor is ever whole in memory.
"""

import argparse
import json
import math
import os
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

GAIN = 1.6
CHUNK = 1 << 24
"""Elements drawn and written at a time."""
BYTES = 2
HEADROOM = 1.02
"""What has to be free, as a multiple of what will be written."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama. tied: the head is the embedding, and only one of them is stored."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool


SHAPES = {
    "S": Shape(layers=8, hidden=1024, heads=16, kv_heads=4, head_dim=64, mlp=4096, vocab=16384, tied=True),
    "M": Shape(layers=16, hidden=2048, heads=32, kv_heads=8, head_dim=64, mlp=8192, vocab=128256, tied=True),
    "L": Shape(layers=64, hidden=4096, heads=32, kv_heads=8, head_dim=128, mlp=14336, vocab=32000, tied=False),
}
"""S 0.28 GB. M 2.5 GB, 1.24e9 parameters: Llama-3.2-1B's shape. L 28 GB: 64 of Llama-3-8B's layers."""


class Parameter(NamedTuple):
    """One tensor to be: its values are drawn around ``mean`` with standard deviation ``std``."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def size(self) -> int:
        return BYTES * math.prod(self.shape)


def parameters(shape: Shape) -> list[Parameter]:
    """Every tensor of the checkpoint, in the order of the forward."""

    def linear(name: str, out: int, into: int, gain: float = 1.0) -> Parameter:
        return Parameter(f"{name}.weight", (out, into), 0.0, gain / math.sqrt(into))

    def norm(name: str) -> Parameter:
        return Parameter(f"{name}.weight", (shape.hidden,), 1.0, 0.1)

    queries, keys, hidden = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden
    found = [Parameter("model.embed_tokens.weight", (shape.vocab, hidden), 0.0, 1.0)]
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        found += [
            norm(f"{at}.input_layernorm"),
            linear(f"{at}.self_attn.q_proj", queries, hidden, GAIN),
            linear(f"{at}.self_attn.k_proj", keys, hidden, GAIN),
            linear(f"{at}.self_attn.v_proj", keys, hidden),
            linear(f"{at}.self_attn.o_proj", hidden, queries),
            norm(f"{at}.post_attention_layernorm"),
            linear(f"{at}.mlp.gate_proj", shape.mlp, hidden),
            linear(f"{at}.mlp.up_proj", shape.mlp, hidden),
            linear(f"{at}.mlp.down_proj", hidden, shape.mlp),
        ]
    found.append(norm("model.norm"))
    return found if shape.tied else [*found, linear("lm_head", shape.vocab, hidden)]


def config(shape: Shape) -> dict[str, object]:
    """``config.json``, in the keys that every release of transformers reads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.mlp,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def write(folder: Path, shape: Shape, *, seed: int = 0, shard_bytes: int = 4 * 10**9, threads: int = 1) -> int:
    """Make the checkpoint in ``folder``, which must not exist; returns the bytes of all tensors.

    Raises FileExistsError, and OSError if the disk has not enough room for it.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: remove it or choose another folder")
    shards = _split(parameters(shape), shard_bytes)
    total = sum(parameter.size for shard in shards for parameter in shard)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if total * HEADROOM > free:
        raise OSError(
            f"{folder} needs {total * HEADROOM / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} GB free"
        )

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    count = len(shards)
    names = [f"model-{index:05}-of-{count:05}.safetensors" for index in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(_write_shard, partial / name, s, seed) for name, s in zip(names, shards, strict=True)]:
            done.result()
    if count > 1:
        places = {parameter.name: name for name, shard in zip(names, shards, strict=True) for parameter in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    (partial / "config.json").write_text(json.dumps(config(shape), indent=2))
    partial.rename(folder)
    return total


def _split(tensors: list[Parameter], most: int) -> list[list[Parameter]]:
    """Shards of at most ``most`` bytes, a larger tensor being a shard of its own."""
    shards: list[list[Parameter]] = [[]]
    for parameter in tensors:
        if shards[-1] and sum(p.size for p in shards[-1]) + parameter.size > most:
            shards.append([])
        shards[-1].append(parameter)
    return shards


def _write_shard(path: Path, tensors: list[Parameter], seed: int) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for parameter in tensors:
        begin, end = end, end + parameter.size
        header[parameter.name] = {"dtype": "BF16", "shape": parameter.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # tensors start where a map of the file is aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for parameter in tensors:
            generator = torch.Generator().manual_seed(zlib.crc32(parameter.name.encode(), seed))
            left = math.prod(parameter.shape)
            while left:
                values = torch.empty(min(left, CHUNK), dtype=torch.bfloat16)
                values.normal_(parameter.mean, parameter.std, generator=generator)
                file.write(values.view(torch.uint8).numpy().data)
                left -= len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, help="where the sizes start from")
    parser.add_argument("folder", type=Path, help="is made, and must not exist")
    for field in fields(Shape):
        flag = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(flag, type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    given = {field.name: getattr(args, field.name) for field in fields(Shape)}
    shape = replace(SHAPES[args.shape], **{name: value for name, value in given.items() if value is not None})
    try:
        total = write(args.folder, shape, seed=args.seed, shard_bytes=int(args.shard_gb * 1e9), threads=args.threads)
    except OSError as error:
        raise SystemExit(f"make_checkpoint: {error}") from error
    print(f"{args.folder}: {total // BYTES:,} parameters, {total / 1e9:.2f} GB, {shape}")


if __name__ == "__main__":
    main()
