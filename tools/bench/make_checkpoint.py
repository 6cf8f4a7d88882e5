"""Write a checkpoint of random weights, of any size, straight to safetensors shards: a Llama, or a Mixtral.

    python -m tools.bench.make_checkpoint M /data/M
    python -m tools.bench.make_checkpoint S /data/tiny --layers 2 --hidden 256 --dtype f32
    python -m tools.bench.make_checkpoint X /data/X --experts 32
    python -m tools.bench.make_checkpoint L /data/hollow --layers 126 --hidden 16384 --hollow

Speed depends on the shapes of weights and not on their values, as long as the numbers stay ordinary. So every linear
has variance 1 / fan-in, which keeps what it puts out at the scale of what it gets; q and k are larger by `GAIN`, so
that attention scores have a standard deviation of ``GAIN ** 2`` and attention is far from uniform; norms lie around 1.
Each block then adds less than a unit of variance to the residual stream: after 100 layers it is at most ten times what
it was after the embedding. Routers are random too, so that experts are chosen about equally often.

Drawing numbers is slower than any disk. So `POOL` normal values are drawn once and scaled once for each kind of tensor,
and a tensor is pieces of that pool from random places: what is written lies in memory, and the disk is the limit.

A tensor's bits depend on the seed, its name, shape and dtype alone, not on the shards or on the threads that write
them. No tensor is ever whole in memory. Hollow: the shards have their headers and sizes and hold no bytes, for a plan
of what no disk here could hold.
"""

import argparse
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch

GAIN = 1.6
POOL = 1 << 22
"""Values that are drawn."""
PIECE = 1 << 20
"""Values of one stretch of the pool that a tensor takes."""
DTYPES = {"bf16": "BF16", "f32": "F32"}
"""Names that the command line and `write` know -> safetensors' own."""
STORED = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
HEADROOM = 1.02
"""What has to be free, as a multiple of what will be written."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama; with experts of a Mixtral, where ``mlp`` is the width of one and ``chosen`` see a token.

    tied: the head is the embedding, and only one of them is stored.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool
    experts: int = 0
    chosen: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.chosen <= self.experts or bool(self.experts) != bool(self.chosen):
            raise ValueError(f"{self.chosen} of {self.experts} experts cannot be chosen: give both, or neither")


SHAPES = {
    "S": Shape(layers=8, hidden=1024, heads=16, kv_heads=4, head_dim=64, mlp=4096, vocab=16384, tied=True),
    "M": Shape(layers=16, hidden=2048, heads=32, kv_heads=8, head_dim=64, mlp=8192, vocab=128256, tied=True),
    "L": Shape(layers=64, hidden=4096, heads=32, kv_heads=8, head_dim=128, mlp=14336, vocab=32000, tied=False),
    "X": Shape(
        layers=8,
        hidden=1024,
        heads=16,
        kv_heads=4,
        head_dim=64,
        mlp=1408,
        vocab=16384,
        tied=True,
        experts=16,
        chosen=2,
    ),
}
"""In bf16: S 0.28 GB. M 2.5 GB, 1.24e9 parameters: Llama-3.2-1B's shape. L 28 GB: 64 of Llama-3-8B's layers. X 1.2 GB,
0.6e9 parameters, of which a token meets 0.1e9 in the layers."""


class Parameter(NamedTuple):
    """One tensor to be: its values have this mean and standard deviation. dtype: safetensors' name of it."""

    name: str
    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 1.0
    dtype: str = "BF16"

    @property
    def size(self) -> int:
        return STORED[self.dtype].itemsize * math.prod(self.shape)


def parameters(shape: Shape, dtype: str = "bf16") -> list[Parameter]:
    """Every tensor of the checkpoint, in the order of the forward."""

    def linear(name: str, out: int, into: int, gain: float = 1.0) -> Parameter:
        return Parameter(f"{name}.weight", (out, into), 0.0, gain / math.sqrt(into), DTYPES[dtype])

    def norm(name: str) -> Parameter:
        return Parameter(f"{name}.weight", (shape.hidden,), 1.0, 0.1, DTYPES[dtype])

    queries, keys, hidden = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden
    found = [Parameter("model.embed_tokens.weight", (shape.vocab, hidden), dtype=DTYPES[dtype])]
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        found += [
            norm(f"{at}.input_layernorm"),
            linear(f"{at}.self_attn.q_proj", queries, hidden, GAIN),
            linear(f"{at}.self_attn.k_proj", keys, hidden, GAIN),
            linear(f"{at}.self_attn.v_proj", keys, hidden),
            linear(f"{at}.self_attn.o_proj", hidden, queries),
            norm(f"{at}.post_attention_layernorm"),
        ]
        if shape.experts:
            found.append(linear(f"{at}.block_sparse_moe.gate", shape.experts, hidden))
        for expert in range(shape.experts):
            own = f"{at}.block_sparse_moe.experts.{expert}"
            found += [
                linear(f"{own}.w1", shape.mlp, hidden),
                linear(f"{own}.w3", shape.mlp, hidden),
                linear(f"{own}.w2", hidden, shape.mlp),
            ]
        if not shape.experts:
            found += [
                linear(f"{at}.mlp.gate_proj", shape.mlp, hidden),
                linear(f"{at}.mlp.up_proj", shape.mlp, hidden),
                linear(f"{at}.mlp.down_proj", hidden, shape.mlp),
            ]
    found.append(norm("model.norm"))
    return found if shape.tied else [*found, linear("lm_head", shape.vocab, hidden)]


def config(shape: Shape, dtype: str = "bf16") -> dict[str, object]:
    """``config.json``, in the keys that every release of transformers reads."""
    dense = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}
    routed = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.chosen,
        "sliding_window": None,
    }
    return {
        **(routed if shape.experts else dense),
        "torch_dtype": str(STORED[DTYPES[dtype]]).removeprefix("torch."),
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
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def write(folder: Path, shape: Shape, *, dtype: str = "bf16", **how: Any) -> int:
    """Make the checkpoint of this shape in ``folder``: `write_tensors`, which see."""
    return write_tensors(folder, parameters(shape, dtype), config(shape, dtype), **how)


def write_tensors(
    folder: Path,
    tensors: Sequence[Parameter],
    config: Mapping[str, object],
    *,
    seed: int = 0,
    shard_bytes: int = 4 * 10**9,
    threads: int = 1,
    hollow: bool = False,
) -> int:
    """Make a checkpoint of these tensors in ``folder``, which must not exist; returns the bytes of all tensors.

    Raises FileExistsError, and OSError if the disk has not enough room for it.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: remove it or choose another folder")
    shards = split(tensors, shard_bytes)
    total = sum(parameter.size for parameter in tensors)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if total * HEADROOM > free and not hollow:
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
    pool = None if hollow else Pool(seed)
    with ThreadPoolExecutor(threads) as workers:
        tasks = [workers.submit(_write_shard, partial / n, s, pool) for n, s in zip(names, shards, strict=True)]
        for done in tasks:
            done.result()
    if count > 1:
        places = {parameter.name: name for name, shard in zip(names, shards, strict=True) for parameter in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    partial.rename(folder)
    return total


class Pool:
    """Normal values, drawn once, and their bytes at every mean, standard deviation and dtype that was asked for."""

    def __init__(self, seed: int) -> None:
        self._seed, self._lock = seed, Lock()
        self._values = torch.empty(POOL).normal_(generator=torch.Generator().manual_seed(seed))
        self._scaled: dict[tuple[float, float, str], memoryview] = {}

    def pieces(self, parameter: Parameter) -> list[memoryview]:
        """A tensor's bytes, in order: stretches of the pool that its name and the seed choose."""
        generator = torch.Generator().manual_seed(zlib.crc32(parameter.name.encode(), self._seed))
        left = math.prod(parameter.shape)
        starts = torch.randint(POOL - PIECE + 1, (-(-left // PIECE),), generator=generator).tolist()
        scaled, itemsize = self._bytes(parameter), STORED[parameter.dtype].itemsize
        sizes = [min(PIECE, left - index * PIECE) for index in range(len(starts))]
        return [scaled[at * itemsize : (at + size) * itemsize] for at, size in zip(starts, sizes, strict=True)]

    def _bytes(self, parameter: Parameter) -> memoryview:
        key = parameter.mean, parameter.std, parameter.dtype
        with self._lock:
            if key not in self._scaled:
                values = (self._values * parameter.std + parameter.mean).to(STORED[parameter.dtype])
                self._scaled[key] = values.view(torch.uint8).numpy().data
            return self._scaled[key]


def split(tensors: Sequence[Parameter], most: int) -> list[list[Parameter]]:
    """Shards of at most ``most`` bytes, a larger tensor being a shard of its own."""
    shards: list[list[Parameter]] = [[]]
    size = 0
    for parameter in tensors:
        if shards[-1] and size + parameter.size > most:
            shards.append([])
            size = 0
        shards[-1].append(parameter)
        size += parameter.size
    return shards


def _write_shard(path: Path, tensors: Sequence[Parameter], pool: Pool | None) -> None:
    """One file; without a pool only its header, and a hole of the size of the rest."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for parameter in tensors:
        begin, end = end, end + parameter.size
        header[parameter.name] = {"dtype": parameter.dtype, "shape": parameter.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # tensors start where a map of the file is aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if pool is None:
            file.truncate(8 + len(text) + end)
            return
        for parameter in tensors:
            for piece in pool.pieces(parameter):
                file.write(piece)


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
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--hollow", action="store_true", help="headers and sizes only, for plans")
    args = parser.parse_args()
    given = {field.name: getattr(args, field.name) for field in fields(Shape)}
    try:
        shape = replace(SHAPES[args.shape], **{name: value for name, value in given.items() if value is not None})
        total = write(
            args.folder,
            shape,
            dtype=args.dtype,
            seed=args.seed,
            shard_bytes=int(args.shard_gb * 1e9),
            threads=args.threads,
            hollow=args.hollow,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"make_checkpoint: {error}") from error
    count = sum(math.prod(parameter.shape) for parameter in parameters(shape, args.dtype))
    print(f"{args.folder}: {count:,} parameters, {total / 1e9:.2f} GB, {shape}")


if __name__ == "__main__":
    main()
