"""Checkpoints and datasets made to do harm: each is refused in one clear sentence, at once, and nothing else happens.

Every case is a good tiny Llama, or a good dataset, with one thing made wrong. The refusal is an `FpwapError` that names
the file, the key, the tensor or the sample; it comes before any output is made, in less than five seconds and with
less than a gigabyte of memory; no file anywhere has changed.
"""

import json
import os
import resource
import shutil
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Variant, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fpwap import Sweep
from fpwap.callbacks.common import RawActivations
from fpwap.errors import FpwapError
from fpwap.foreign import DEEPEST, MOST_JSON

SHARD, ONLY = "model.safetensors", "model-00001-of-00001.safetensors"
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
Change = Callable[[Path], None]
SECONDS, KILOBYTES = 5, 1_000_000


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(Variant(family="llama", config={"num_hidden_layers": 2}), tmp_path_factory.mktemp("good"))


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """A shard's header and its tensors' bytes."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def put(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# --- what is made wrong ---------------------------------------------------------------------------------------------


def entry(**words: Any) -> Change:
    """Words of one tensor's header entry."""

    def change(folder: Path) -> None:
        header, data = parts(folder / SHARD)
        name = next(name for name in header if name.endswith("q_proj.weight"))
        header[name] |= {key: word(header[name][key]) if callable(word) else word for key, word in words.items()}
        put(folder / SHARD, header, data)

    return change


def header(make: Callable[[dict[str, Any], bytes], tuple[Any, bytes]]) -> Change:
    """The whole header, or what is behind it."""
    return lambda folder: put(folder / SHARD, *make(*parts(folder / SHARD)))


def raw(make: Callable[[bytes], bytes]) -> Change:
    """The shard's bytes."""

    def change(folder: Path) -> None:
        (folder / SHARD).write_bytes(make((folder / SHARD).read_bytes()))

    return change


def config(**words: Any) -> Change:
    def change(folder: Path) -> None:
        found = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**found, **words}))

    return change


def text(name: str, content: str | bytes) -> Change:
    data = content if isinstance(content, bytes) else content.encode()

    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def index(make: Callable[[dict[str, str]], Any]) -> Change:
    """An index beside the shard, whose map is made from the right one."""

    def change(folder: Path) -> None:
        names, _ = parts(folder / SHARD)
        (folder / SHARD).rename(folder / ONLY)
        found = make({name: ONLY for name in names if name != "__metadata__"})
        (folder / INDEX).write_text(found if isinstance(found, str) else json.dumps({"weight_map": found}))

    return change


def instead(make: Callable[[Path], object]) -> Change:
    """Something else under the shard's name."""

    def change(folder: Path) -> None:
        (folder / SHARD).rename(folder.parent / "outside.safetensors")
        make(folder / SHARD)

    return change


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as here:
        cwd = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        here.bind(path.name)
        os.chdir(cwd)


def _linked_fifo(path: Path) -> None:
    os.mkfifo(path.parent / "fifo")
    path.symlink_to("fifo")


def _twice(found: dict[str, Any]) -> bytes:
    name = next(name for name in found if name != "__metadata__")
    again = f", {json.dumps(name)}: {json.dumps(found[name])}}}"
    return json.dumps(found)[:-1].encode() + again.encode()


def _without(found: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """The last tensor is gone, with its bytes."""
    last = max((name for name in found if name != "__metadata__"), key=lambda name: found[name]["data_offsets"])
    return {name: one for name, one in found.items() if name != last}, data[: found[last]["data_offsets"][0]]


def _more(found: dict[str, Any], end: int) -> dict[str, Any]:
    return found | {f"x{n}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for n in range(10_000)}


def place(name: str, make: Callable[[Path], object]) -> Change:
    """Something else under a file's name."""

    def change(folder: Path) -> None:
        if name == INDEX:
            index(lambda found: found)(folder)
        (folder / name).rename(folder.parent / "outside")
        make(folder / name)

    return change


def tensors(make: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **words: Any) -> Change:
    """Other tensors, in a file that is well made, beside words of the config."""

    def change(folder: Path) -> None:
        save_file(make(load_file(folder / SHARD)), folder / SHARD)
        config(**words)(folder)

    return change


def _fp8(scale: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    name = "model.layers.0.self_attn.q_proj.weight"
    return lambda found: {**found, name: found[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def _said_twice(folder: Path) -> None:
    """One tensor in two shards, of which the index names one."""
    index(lambda found: {**found, "model.norm.weight": "second.safetensors"})(folder)
    save_file({"model.norm.weight": load_file(folder / ONLY)["model.norm.weight"]}, folder / "second.safetensors")


def _unsaid(folder: Path) -> None:
    """A tensor that the index does not name."""
    index(lambda found: found)(folder)
    save_file({**load_file(folder / ONLY), "model.secret": torch.ones(3)}, folder / ONLY)


def wide(before: str, after: str = "") -> str:
    """JSON that takes a hundred times its size in memory."""
    return before + "[" + "[]," * (MOST_JSON // 4) + "1]" + after


def roped(**words: Any) -> Change:
    return config(rope_scaling=None, rope_parameters={"rope_theta": 500.0, **words})


def quantised(**words: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], **words}}


ODD: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a socket": lambda path: _socket(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link outside": lambda path: path.symlink_to(path.parent.parent / "outside"),
}


def named(found: dict[str, str], value: Any) -> dict[str, Any]:
    return {**found, "model.embed_tokens.weight": value}


CHECKPOINTS: dict[str, Change] = {
    "empty shard": raw(lambda data: b""),
    "seven bytes": raw(lambda data: data[:7]),
    "length of the header alone": raw(lambda data: data[:8]),
    "header cut": raw(lambda data: data[:100]),
    "data cut by one": raw(lambda data: data[:-1]),
    "data cut in half": raw(lambda data: data[: len(data) // 2]),
    "a byte too many": raw(lambda data: data + b"x"),
    "header of 2^63 bytes": raw(lambda data: struct.pack("<Q", 2**63) + data[8:]),
    "header of 2^40 bytes": raw(lambda data: struct.pack("<Q", 2**40) + data[8:]),
    "header of 100 MB": raw(lambda data: struct.pack("<Q", 10**8) + data[8:]),
    "header of no bytes": raw(lambda data: struct.pack("<Q", 0) + data[8:]),
    "header one too long": raw(lambda data: struct.pack("<Q", struct.unpack("<Q", data[:8])[0] + 1) + data[8:]),
    "zeros": raw(lambda data: bytes(len(data))),
    "a pickle": raw(lambda data: b"\x80\x04cos\nsystem\n(S'touch owned'\ntR."),
    "a zip": raw(lambda data: b"PK\x03\x04" + data),
    "header no JSON": header(lambda found, data: (b"{nonsense", data)),
    "header a list": header(lambda found, data: (b"[1, 2]", data)),
    "header a number": header(lambda found, data: (b"17", data)),
    "header null": header(lambda found, data: (b"null", data)),
    "header not UTF-8": header(lambda found, data: (b'{"\xff\xfe": 1}', data)),
    "header nested deep": header(lambda found, data: (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, data)),
    "header empty": header(lambda found, data: ({}, b"")),
    "header empty before data": header(lambda found, data: ({}, data)),
    "header with NaN": header(lambda found, data: (json.dumps({**found, "x": float("nan")}).encode(), data)),
    "header in UTF-16": header(lambda found, data: (json.dumps(found).encode("utf-16"), data)),
    "header with a BOM": header(lambda found, data: (b"\xef\xbb\xbf" + json.dumps(found).encode(), data)),
    "header with a minus zero": header(lambda found, data: (json.dumps(found).replace("[0,", "[-0,").encode(), data)),
    "header with an exponent": header(lambda found, data: (json.dumps(found).replace("[0,", "[0e0,").encode(), data)),
    "header behind a blank": header(lambda found, data: (b" " + json.dumps(found).encode(), data)),
    "header before a zero": header(lambda found, data: (json.dumps(found).encode() + b"\0", data)),
    "header of millions": header(lambda found, data: (wide('{"a":', "}").encode(), data)),
    "header of a long name": header(lambda found, data: ({f"{'a' * 10**6}{k}": v for k, v in found.items()}, data)),
    "half of a surrogate pair": header(lambda found, data: ({f"\ud800{k}": v for k, v in found.items()}, data)),
    "a number of thousands of digits": header(lambda found, data: (b'{"a":' + b"9" * 5000 + b"}", data)),
    "entry with another key": entry(requires="exec"),
    "entry without an end": entry(data_offsets=lambda at: [at[0], None]),
    "header twice": header(lambda found, data: (json.dumps(found).encode() * 2, data)),
    "a tensor twice": header(lambda found, data: (_twice(found), data)),
    "metadata of numbers": header(lambda found, data: ({**found, "__metadata__": {"a": 1}}, data)),
    "metadata a list": header(lambda found, data: ({**found, "__metadata__": []}, data)),
    "entry null": header(lambda found, data: ({**found, "model.norm.weight": None}, data)),
    "entry a list": header(lambda found, data: ({**found, "model.norm.weight": [1]}, data)),
    "entry empty": header(lambda found, data: ({**found, "model.norm.weight": {}}, data)),
    "a tensor missing": header(lambda found, data: _without(found, data)),
    "tensors of another model": header(lambda found, data: ({f"x.{k}": v for k, v in found.items()}, data)),
    "names with escapes": header(lambda found, data: ({f"\x1b[31m\n{k}": v for k, v in found.items()}, data)),
    "ten thousand more": header(lambda found, data: (_more(found, len(data)), data)),
    "dtype unknown": entry(dtype="F7"),
    "dtype a number": entry(dtype=4),
    "dtype null": entry(dtype=None),
    "dtype of half the size": entry(dtype="F16"),
    "dtype an integer's": entry(dtype="I32"),
    "dtype fp8": entry(dtype="F8_E4M3"),
    "shape negative": entry(shape=lambda shape: [-shape[0], -shape[1]]),
    "shape of floats": entry(shape=lambda shape: [float(n) + 0.5 for n in shape]),
    "shape of words": entry(shape=["a", "b"]),
    "shape null": entry(shape=None),
    "shape a number": entry(shape=4096),
    "shape empty": entry(shape=[]),
    "shape of bools": entry(shape=[True, True]),
    "shape turned": entry(shape=lambda shape: [shape[0] * 2, shape[1] // 2]),
    "shape flat": entry(shape=lambda shape: [shape[0] * shape[1]]),
    "shape with a third": entry(shape=lambda shape: [*shape, 1]),
    "shape of 2^64": entry(shape=[2**32, 2**32]),
    "shape of 2^70": entry(shape=[2**70]),
    "shape of a thousand": entry(shape=[1] * 1000),
    "offsets negative": entry(data_offsets=[-8, 8]),
    "offsets backwards": entry(data_offsets=lambda at: at[::-1]),
    "offsets of floats": entry(data_offsets=lambda at: [at[0] + 0.5, at[1]]),
    "offsets one": entry(data_offsets=[0]),
    "offsets three": entry(data_offsets=[0, 1, 2]),
    "offsets null": entry(data_offsets=None),
    "offsets beyond": entry(data_offsets=lambda at: [at[0], at[1] + 10**9]),
    "offsets at 2^64": entry(data_offsets=lambda at: [2**64 - 8, 2**64]),
    "offsets overlapping": entry(data_offsets=lambda at: [0, at[1] - at[0]]),
    "offsets shifted": entry(data_offsets=lambda at: [at[0] + 4, at[1] + 4]),
    "a folder for a shard": instead(lambda path: path.mkdir()),
    "a FIFO for a shard": instead(lambda path: os.mkfifo(path)),
    "a socket for a shard": instead(_socket),
    "a device for a shard": instead(lambda path: path.symlink_to("/dev/zero")),
    "a link to a FIFO": instead(_linked_fifo),
    "a link to nothing": instead(lambda path: path.symlink_to("nowhere")),
    "a link to itself": instead(lambda path: path.symlink_to(path.name)),
    "no shard": instead(lambda path: None),
    "pickles alone": instead(lambda path: (path.parent / "pytorch_model.bin").write_bytes(b"\x80\x04.")),
    **{f"{what} for the config": place(CONFIG, make) for what, make in ODD.items()},
    **{f"{what} for the index": place(INDEX, make) for what, make in ODD.items()},
    "a link outside for a shard": instead(lambda path: path.symlink_to(path.parent.parent / "outside.safetensors")),
    "a tensor in two shards": _said_twice,
    "a tensor that the index does not name": _unsaid,
    "tensors of numbers": tensors(lambda found: {name: one.to(torch.int32) for name, one in found.items()}),
    "a bias where there is none": tensors(lambda found: {**found, "model.layers.0.mlp.up_proj.bias": torch.ones(3)}),
    "another layer": tensors(lambda found: {**found, "model.layers.7.mlp.up_proj.weight": torch.ones(3)}),
    "scales of integers": tensors(_fp8(torch.ones(1, 1, dtype=torch.int64)), **quantised()),
    "scales of a byte": tensors(_fp8(torch.ones(1, 1, dtype=torch.uint8)), **quantised()),
    "scales of another shape": tensors(_fp8(torch.ones(2, 2)), **quantised()),
    "scales in blocks of 2^40": tensors(_fp8(torch.ones(1, 1)), **quantised(weight_block_size=[2**40, 2**40])),
    "index of millions": index(lambda found: wide('{"weight_map":', "}")),
    "index beyond its bound": index(lambda found: " " * (MOST_JSON + 1)),
    "index with a key twice": index(lambda found: '{"weight_map": {"a": "b", "a": "b"}}'),
    "index empty": index(lambda found: {}),
    "index with a pattern": index(lambda found: named(found, "*.safetensors")),
    "index with a backslash": index(lambda found: named(found, "..\\a.safetensors")),
    "index with escapes": index(lambda found: named(found, "\x1b[31m.safetensors")),
    "index with a line in a name": index(lambda found: {**found, "a\nb": ONLY}),
    "index with a long name": index(lambda found: named(found, "a" * 300 + ".safetensors")),
    "index with half of a surrogate pair": index(lambda found: named(found, "\ud800.safetensors")),
    "index no JSON": index(lambda found: "{"),
    "index a list": index(lambda found: "[]"),
    "index without a map": index(lambda found: "{}"),
    "index with a list for a map": index(lambda found: list(found)),
    "index with a number for a shard": index(lambda found: named(found, 7)),
    "index with a list for a shard": index(lambda found: named(found, [ONLY])),
    "index upwards": index(lambda found: named(found, "../outside.safetensors")),
    "index absolute": index(lambda found: named(found, "/etc/passwd")),
    "index with a zero byte": index(lambda found: named(found, "a\0b.safetensors")),
    "index with an empty name": index(lambda found: named(found, "")),
    "index with a dot": index(lambda found: named(found, ".")),
    "index to a missing shard": index(lambda found: named(found, "model-00002.safetensors")),
    "index to a pickle": index(lambda found: named(found, "pytorch_model.bin")),
    "index with a tensor that is not there": index(lambda found: {**found, "model.layers.9.x": ONLY}),
    "index nested deep": index(lambda found: '{"weight_map":' * 20_000 + "1" + "}" * 20_000),
    "config missing": lambda folder: (folder / CONFIG).unlink(),
    "config empty": text(CONFIG, ""),
    "config no JSON": text(CONFIG, "{'a': 1}"),
    "config a list": text(CONFIG, "[]"),
    "config a word": text(CONFIG, '"llama"'),
    "config not UTF-8": text(CONFIG, b"\xff\xfe{}"),
    "config nested deep": text(CONFIG, '{"a":' * 50_000 + "1" + "}" * 50_000),
    "config of millions": text(CONFIG, wide('{"prefix":', "}")),
    "config beyond its bound": text(CONFIG, " " * (MOST_JSON + 1)),
    "config with a BOM": text(CONFIG, b"\xef\xbb\xbf{}"),
    "config nested a little deep": config(prefix=json.loads("[" * DEEPEST + "]" * DEEPEST)),
    "config with half of a surrogate pair": config(prefix="\ud800"),
    "config with a long key": config(**{"k" * 10**6: 1}),
    "config with keys of escapes": config(**{"\x1b[31m\n": "\x1b[31m\n"}),
    "config with a thousand keys": config(**{f"key{n}": n for n in range(1000)}),
    "dtype a list of words": config(dtype=["float32"] * 100, torch_dtype=None),
    "model type of a megabyte": config(model_type="a" * 10**6),
    "more layers than tensors": config(num_hidden_layers=1_000),
    "a billion experts": config(model_type="mixtral", num_local_experts=2**30, num_experts_per_tok=1),
    "experts in all layers": config(
        model_type="mixtral", num_local_experts=4000, num_experts_per_tok=1, num_hidden_layers=1_000
    ),
    "eps negative": config(rms_norm_eps=-1e-5),
    "eps of thousands of digits": config(rms_norm_eps=10**4000),
    **{
        f"rope {words}": roped(**words)
        for words in (
            {"rope_theta": 0.0},
            {"rope_theta": -1e4},
            {"rope_theta": 1.0, "rope_type": "yarn", "factor": 2.0},
            {"rope_theta": 10**400},
            {"rope_theta": float("nan")},
            {"rope_type": "linear", "factor": 0.0},
            {"rope_type": "linear", "factor": -2.0},
            {"rope_type": "dynamic", "factor": float("inf")},
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0},
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 0.0, "high_freq_factor": 1.0},
            {"rope_type": "yarn", "factor": -1.0},
            {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": -30.0},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0},
            {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0},
            {"rope_type": "longrope", "short_factor": [0.0] * 5, "long_factor": [1.0] * 5},
            {"rope_type": "longrope", "short_factor": [float("nan")] * 5, "long_factor": [1.0] * 5},
            {"rope_type": "longrope", "short_factor": [10**400] * 5, "long_factor": [1.0] * 5},
            {"rope_type": "longrope", "short_factor": [1] * 10**6, "long_factor": [1] * 10**6},
            {"rope_type": ["yarn"]},
        )
    },
    "model type unknown": config(model_type="owned"),
    "model type a number": config(model_type=1),
    "model type null": config(model_type=None),
    "model type a path": config(model_type="../../llama"),
    **{
        f"{key} {value!r}": config(**{key: value})
        for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
        for value in (0, -1, 1.5, "32", True, None, 10**18, [2])
        if (key, value) != ("num_hidden_layers", True)
    },
    "heads that do not divide": config(num_attention_heads=3),
    "more heads of keys": config(num_key_value_heads=64),
    "eps a word": config(rms_norm_eps="small"),
    "eps not a number": config(rms_norm_eps=float("nan")),
    "activation unknown": config(hidden_act="exec"),
    "rope of no kind": config(
        rope_scaling={"rope_type": "owned", "factor": 2.0}, rope_parameters={"rope_type": "owned"}
    ),
    "quantised by nobody": config(quantization_config={"quant_method": "owned"}),
    "quantised by a list": config(quantization_config=[1]),
    "a key that nobody knows": config(secret_mixing=True),
}
"""What is wrong -> how it is made so."""

Made = Callable[[], Any]
ROW = [1, 2, 3]


def samples(*rows: Any) -> Made:
    return lambda: [{"input_ids": ROW}, *rows]


def masked(mask: Any) -> Made:
    return samples({"input_ids": ROW, "attention_mask": mask})


def ids(value: Any) -> Made:
    return samples({"input_ids": value})


class Lying(list[Any]):
    def __iter__(self) -> Any:
        return iter(())


class Endless(Sequence[int]):
    """Says that it has three entries."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, place: Any) -> Any:
        return 1


class Raising(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise OSError("\x1b[31mthe disk is gone\n")

    def __iter__(self) -> Iterator[str]:
        return iter(["input_ids"])

    def __len__(self) -> int:
        return 1

    def __repr__(self) -> str:
        raise RuntimeError("no words")


def breaking() -> Iterator[dict[str, Any]]:
    yield {"input_ids": ROW}
    raise ConnectionError("the network is gone")


def _in_itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


DATASETS: dict[str, Made] = {
    "one that breaks off": breaking,
    "one that cannot be iterated": lambda: Raising(),
    "a sample that raises": samples(Raising()),
    "a sample of a million keys": samples({str(n): n for n in range(10**6)}),
    "a sample of words without end": samples({"text": "a" * 10**7}),
    "ids that raise": ids(Raising()),
    "ids without end": ids(Endless()),
    "ids a range of 2^40": ids(range(2**40)),
    "ids a range of 2^100": ids(range(2**100)),
    "ids a range of ranges": ids([range(2**40)]),
    "ids one number, 2^40 times": ids(np.broadcast_to(np.int64(1), 2**40)),
    "ids one tensor, 2^40 times": ids(torch.ones(1, dtype=torch.int64).expand(2**40)),
    "ids one row, 2^40 times": ids(np.broadcast_to(np.int64(1), (1, 2**40))),
    "ids nowhere": ids(torch.ones(3, dtype=torch.int64, device="meta")),
    "ids sparse": ids(torch.ones(3, dtype=torch.int64).to_sparse()),
    "ids masked": ids(np.ma.array([1, 2], mask=[False, True])),
    "ids of times": ids(np.array([1, 2], "datetime64[s]")),
    "ids of records": ids(np.array([(1, 2)] * 2, [("a", int), ("b", int)])),
    "ids of a gradient": ids(torch.ones(3, requires_grad=True)),
    "ids within themselves": lambda: [{"input_ids": ROW}, {"input_ids": _in_itself()}],
    "mask one number, 2^40 times": masked(np.broadcast_to(np.int64(1), 2**40)),
    "mask that raises": masked(Raising()),
    "mask without end": masked(Endless()),
    "nothing": list,
    "None": lambda: None,
    "a number": lambda: 7,
    "a dict": lambda: {"input_ids": [ROW]},
    "one that lies about its length": lambda: Lying([{"input_ids": ROW}]),
    "a sample that is None": samples(None),
    "a sample that is a word": samples("hello"),
    "a sample that is a number": samples(3),
    "a sample of text": samples({"text": "hello"}),
    "a sample without ids": samples({}),
    "ids None": ids(None),
    "ids a word": ids("123"),
    "ids a number": ids(5),
    "ids empty": ids([]),
    "ids empty array": ids(np.array([], np.int64)),
    "ids of floats": ids([1.0, 2.0]),
    "ids of halves": ids([1.5]),
    "ids of NaN": ids(np.array([np.nan])),
    "ids of bools": ids([True, False]),
    "ids of a bool array": ids(np.array([True])),
    "ids of words": ids(["1", "2"]),
    "ids of None": ids([1, None]),
    "ids of lists": ids([[1, 2], [3]]),
    "ids in two dimensions": ids(np.ones((2, 3), np.int64)),
    "ids in no dimension": ids(np.array(3)),
    "ids a float tensor": ids(torch.ones(3)),
    "ids a bool tensor": ids(torch.ones(3, dtype=torch.bool)),
    "ids a tensor in two dimensions": ids(torch.ones(2, 3, dtype=torch.int64)),
    "ids of objects": ids(np.array([1, object()], object)),
    "ids complex": ids(np.array([1j])),
    "ids a dict": ids({"a": 1}),
    "ids negative": ids([1, -1]),
    "ids beyond the vocabulary": ids([1, 10**6]),
    "ids of 2^31": ids([2**31]),
    "ids of 2^32 + 1": ids([2**32 + 1]),
    "ids of 2^63": ids([2**63]),
    "ids of 2^70": ids([2**70]),
    "ids of -2^63": ids(np.array([-(2**63)])),
    "ids unsigned and huge": ids(np.array([2**64 - 1], np.uint64)),
    "mask too short": masked([1, 1]),
    "mask too long": masked([1] * 4),
    "mask empty": masked([]),
    "mask of zeros": masked([0, 0, 0]),
    "mask with a hole": masked([1, 0, 1]),
    "mask of twos": masked([2, 2, 2]),
    "mask negative": masked([1, -1, 1]),
    "mask of words": masked(["1", "1", "1"]),
    "mask of halves": masked([0.5, 1, 1]),
    "mask None within": masked([1, None, 1]),
    "mask in two dimensions": masked([[1, 1, 1]] * 2),
    "mask a number": masked(1),
    "longer than allowed": samples({"input_ids": [1] * 65}),
}


@pytest.fixture
def bounded(tmp_path: Path) -> Any:
    """Soon, in little memory, and no file has changed but those that the test made."""
    before = _listing(tmp_path.parent)
    memory, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()

    def judge(error: FpwapError, own: Path) -> None:
        assert time.monotonic() - began < SECONDS
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < KILOBYTES
        assert isinstance(error, ValueError | OSError)
        assert len(str(error)) > 20
        assert str(error).isprintable(), "escapes reach the terminal"
        assert len(str(error)) < 4000
        after = {path: seen for path, seen in _listing(tmp_path.parent).items() if not path.startswith(str(own))}
        assert {path: seen for path, seen in before.items() if not path.startswith(str(own))} == after
        assert not Path("owned").exists()

    return judge


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for at, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(at, name))
            found[os.path.join(at, name)] = status.st_size, status.st_mtime_ns
    return found


@contextmanager
def no_longer() -> Iterator[None]:
    """What waits for ever is found too."""

    def end(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(model: Path, dataset: Any, out: Path) -> FpwapError:
    with pytest.raises(FpwapError) as caught, no_longer():
        Sweep(model, dataset, 64, [RawActivations()], out=out, progress=False).run()
    assert not out.exists()
    return caught.value


@pytest.mark.parametrize("what", list(CHECKPOINTS))
def test_a_checkpoint_made_to_do_harm(what: str, good: Path, tmp_path: Path, bounded: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    CHECKPOINTS[what](folder)
    bounded(refused(folder, [{"input_ids": ROW}], tmp_path / "out"), tmp_path)


@pytest.mark.parametrize("what", list(DATASETS))
def test_a_dataset_made_to_do_harm(what: str, good: Path, tmp_path: Path, bounded: Any) -> None:
    error = refused(good, DATASETS[what](), tmp_path / "out")
    bounded(error, tmp_path)
    if what.split()[0] in ("ids", "mask"):
        assert "1" in str(error), "the sample is named"


def test_code_in_a_model_folder_is_not_run(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    for name in ("modeling_owned.py", "configuration_owned.py", "__init__.py", "conftest.py", "sitecustomize.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    config(auto_map={"AutoModelForCausalLM": "modeling_owned.Owned", "AutoConfig": "configuration_owned.Owned"})(folder)
    Sweep(folder, [{"input_ids": ROW}], 64, [RawActivations()], dtype="float32", progress=False).run()
    assert not (tmp_path / "owned").exists()


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_safetensors_refuses_is_refused(data: st.DataObject, good: Path, tmp_path: Path) -> None:
    """Bytes of the header changed at random: who reads them at all reads what safetensors reads."""
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    plain = bytearray((folder / SHARD).read_bytes())
    (size,) = struct.unpack("<Q", plain[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, 7 + size))
        plain[place] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'0123456789"[]{},:-e. ')))
    (folder / SHARD).write_bytes(plain)
    try:
        with safe_open(folder / SHARD, "pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError):
        names = None
    try:
        Sweep(folder, [{"input_ids": ROW}], 64, [RawActivations()], dtype="float32", progress=False).preflight()
    except FpwapError:
        return
    assert names is not None, "safetensors refuses it, and we do not"
