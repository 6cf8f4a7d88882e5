"""The maths of `archs` alone, without the engine: against Hugging Face, against itself, against fp64.

Padded form (natural height) must have the bits of HF's forward at every hook that HF can show; packed form (fixed height)
must give a prompt the same bits whatever runs beside it; and its distance from the truth is that of HF.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LONGEST, VARIANTS, VOCAB, tensors, write
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

import archs
from archs.batch import GRAIN, VECTOR, Attention, Batch, Group, fixed_height
from archs.contract import READ_ONLY_HOOKS, ArchError, Keys, no_tap, stored
from archs.ops import ACTIVATIONS

Site = tuple[int | None, str]
Seen = dict[Site, Tensor]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ATTENTION: list[Attention] = ["sdpa", "eager"]

# --- checkpoints and models -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a variant, made at the first call."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = write(VARIANTS[name], tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Model:
    family: archs.Family
    config: Any
    embedding: Any
    layers: list[Any]
    norm: Any
    head: Any


def load(folder: Path, dtype: torch.dtype) -> Model:
    hf = json.loads((folder / "config.json").read_text())
    family = archs.family(hf)
    config = family.config(hf)
    held = {name: tensor.to(dtype) for name, tensor in tensors(folder).items()}
    prefix = next(p for p in family.prefixes if any(name.startswith(p + "layers.0.") for name in held)
                  or any(name.startswith(p + "h.0.") for name in held))
    if prefix + family.embedding not in held:
        held[prefix + family.embedding] = held[family.head]
    held.setdefault(family.head, held[prefix + family.embedding])

    def take(weights: type, where: str) -> Any:
        sources = stored(weights, config)
        for src in sources.values():
            assert held[where + src.name].shape == src.shape(config)
        fields = dict.fromkeys(weights.__dataclass_fields__) | {k: held[where + s.name] for k, s in sources.items()}
        return weights(**fields)

    layers = [
        take(family.layer_weights(config, i), prefix + family.layer_prefix.format(i=i)) for i in range(config.layers)
    ]
    return Model(
        family,
        config,
        take(family.embed_weights, prefix),
        layers,
        take(family.norm_weights, prefix),
        take(family.head_weights, ""),
    )


@dataclass
class Recorder:
    """A tap that keeps a copy of everything, and puts ``replace(value)`` in the place of one hook of one layer."""

    layer: int = 0
    seen: Seen = field(default_factory=dict)
    patterns: dict[int, list[Tensor]] = field(default_factory=dict)
    at: Site = (None, "")
    replace: Callable[[Tensor], Tensor] = torch.zeros_like

    def __call__(self, hook: str, value: Tensor, group: Group | None = None) -> Tensor:
        if group is not None:
            self.patterns.setdefault(self.layer, []).append(value.clone())
        else:
            self.seen[self.layer, hook] = value.clone()
        return self.replace(value) if (self.layer, hook) == self.at else value

    def wants(self, hook: str) -> bool:
        return True


@torch.no_grad()
def run(model: Model, batch: Batch, tap: Recorder | None = None) -> Recorder:
    """A whole forward pass; `Recorder.seen` holds flat rows ``[rows, *rest]`` of every site."""
    tap = tap or Recorder()
    x = model.family.embed(model.embedding, model.config, batch)
    tap.seen[None, "embedding"] = x.clone()
    for tap.layer, weights in enumerate(model.layers):
        x = model.family.block(x, weights, model.config, tap.layer, batch, tap)
    x = model.family.final_norm(x, model.norm, model.config, batch)
    tap.seen[None, "final_norm"] = x.clone()
    tap.seen[None, "logits"] = model.family.unembed(x, model.head, model.config, batch)
    return tap


# --- batches --------------------------------------------------------------------------------------------------------


def draw_prompts(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in lengths]


@dataclass(frozen=True)
class Padded:
    """A rectangle of prompts: ids, mask and positions ``[prompts, width]``."""

    ids: Tensor
    mask: Tensor
    positions: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Tensor], side: str = "right", width: int = 0) -> "Padded":
        width = width or max(len(prompt) for prompt in prompts)
        ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            place = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
            ids[row, place], mask[row, place] = prompt, 1
        return cls(ids, mask, (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1))

    def batch(self, attention: Attention) -> Batch:
        mask = None if self.mask.all() else self.mask.bool()
        group = Group(0, *self.ids.shape, longest=int(self.mask.sum(-1).max()), mask=mask)
        return Batch(self.ids.flatten(), self.positions.flatten(), (group,), height=None, attention=attention)


SHORT, LONG = 3, LONGEST
PADDED = {
    "equal": Padded.of(draw_prompts([LONG] * 3)),
    "equal, short": Padded.of(draw_prompts([SHORT] * 4)),
    "padded right": Padded.of(draw_prompts([LONG, 5, 13, LONG])),
    "padded left": Padded.of(draw_prompts([LONG, 5, 13, LONG]), "left"),
    "shortest first, right": Padded.of(draw_prompts([1, 9, LONG])),
    "shortest first, left": Padded.of(draw_prompts([1, 9, LONG]), "left"),
    "wider than the longest": Padded.of(draw_prompts([SHORT, 5]), "left", width=LONG),
    "one prompt": Padded.of(draw_prompts([13])),
    "one token": Padded.of(draw_prompts([1])),
    "one token each": Padded.of(draw_prompts([1] * 5)),
}


def packed(prompts: Sequence[Tensor], height: int, attention: Attention) -> Batch:
    """Prompts that are sorted by length, neighbours of one length in one group, filled up to whole tiles."""
    groups: list[Group] = []
    start = 0
    for prompt in prompts:
        if groups and groups[-1].length == len(prompt):
            last = groups.pop()
            groups.append(Group(last.start, last.prompts + 1, last.length, last.length))
        else:
            groups.append(Group(start, 1, len(prompt), len(prompt)))
        start += len(prompt)
    ids, positions = torch.zeros(2, -(-start // height) * height, dtype=torch.int64)
    ids[:start] = torch.cat(list(prompts))
    positions[:start] = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
    return Batch(ids, positions, tuple(groups), height=height, attention=attention)


MIX = draw_prompts([LONG] * 7 + [13] + [9] * 40 + [7] * 12 + [SHORT] * 2 + [1] * 5)
"""Several groups, of one prompt and of many; more rows than one tile, and more elements than one thread takes."""
ALONE = [0, 6, 7, 8, 29, 47, 48, 59, 60, 61, 62, 66]
"""The first and the last prompt of every group, and some inside."""

# --- against Hugging Face -------------------------------------------------------------------------------------------

POINTS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "llama": {
        "attn_out": ("self_attn", "out"),
        "residual_mid": ("post_attention_layernorm", "in"),
        "mlp_out": ("mlp", "out"),
        "residual_post": ("", "out"),
        "q": ("self_attn.q_proj", "out"),
        "k": ("self_attn.k_proj", "out"),
        "v": ("self_attn.v_proj", "out"),
        "z": ("self_attn.o_proj", "in"),
        "mlp_hidden": ("mlp.down_proj", "in"),
    },
    "gpt2": {
        "attn_out": ("attn", "out"),
        "residual_mid": ("ln_2", "in"),
        "mlp_out": ("mlp", "out"),
        "residual_post": ("", "out"),
        "qkv": ("attn.c_attn", "out"),
        "z": ("attn.c_proj", "in"),
        "mlp_hidden": ("mlp.c_proj", "in"),
    },
}
"""Hook -> the module of HF's layer at whose input or output the value can be seen."""


@torch.no_grad()
def reference(hf: PreTrainedModel, family: str, padded: Padded, patch: pytest.MonkeyPatch) -> Seen:
    """What HF computes at every site that it can show, flat rows; ``attn_pattern`` only under eager."""
    seen: Seen = {}
    handles: list[RemovableHandle] = []
    core = hf.base_model
    if family == "llama":
        core.rotary_emb = type(core.rotary_emb)(hf.config)  # dynamic rope remembers the longest prompt it has seen
    for layer, module in enumerate(core.layers if family == "llama" else core.h):
        for hook, (path, side) in POINTS[family].items():

            def keep(_: Any, given: Any, out: Any = None, site: Site = (layer, hook)) -> None:
                value = given[0] if out is None else out
                seen[site] = (value if isinstance(value, Tensor) else value[0]).flatten(0, 1)

            point = module.get_submodule(path)
            handles.append(
                point.register_forward_pre_hook(keep) if side == "in" else point.register_forward_hook(keep)
            )

    rotated: list[tuple[Tensor, Tensor]] = []
    rotate = modeling_llama.apply_rotary_pos_emb
    patch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *args: rotated.append(rotate(*args)) or rotated[-1])
    eager = hf.config._attn_implementation == "eager"
    out = hf(
        padded.ids,
        attention_mask=padded.mask,
        position_ids=padded.positions,
        use_cache=False,
        output_hidden_states=True,
        output_attentions=eager,
    )
    patch.undo()
    for handle in handles:
        handle.remove()

    for layer, (q, k) in enumerate(rotated):
        seen[layer, "q_rot"], seen[layer, "k_rot"] = (x.transpose(1, 2).flatten(0, 1).flatten(1) for x in (q, k))
    for site in [site for site in seen if site[1] == "qkv"]:
        q, k, v = seen.pop(site).chunk(3, dim=1)
        seen |= {(site[0], hook): part for hook, part in {"q": q, "k": k, "v": v, "q_rot": q, "k_rot": k}.items()}
    states = [state.flatten(0, 1) for state in out.hidden_states]
    seen |= {(layer, "residual_pre"): state for layer, state in enumerate(states[:-1])}
    seen |= {(None, "embedding"): states[0], (None, "final_norm"): states[-1]}
    seen[None, "logits"] = out.logits.flatten(0, 1)
    if eager:
        seen |= {(layer, "attn_pattern"): p for layer, p in enumerate(out.attentions)}
    return seen


def shown(family: str, layers: int, attention: Attention) -> set[Site]:
    hooks = {*POINTS[family], "residual_pre", "q", "k", "v", "q_rot", "k_rot"} - {"qkv"}
    hooks |= {"attn_pattern"} if attention == "eager" else set()
    return {(layer, hook) for layer in range(layers) for hook in hooks} | {
        (None, hook) for hook in ("embedding", "final_norm", "logits")
    }


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_padded_has_the_bits_of_hugging_face(
    name: str,
    dtype: torch.dtype,
    attention: Attention,
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, family = checkpoint(name), VARIANTS[name].family
    model = load(folder, dtype)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    for label, padded in PADDED.items():
        expected, ours = reference(hf, family, padded, monkeypatch), run(model, padded.batch(attention))
        assert set(expected) == shown(family, model.config.layers, attention)
        real = padded.mask.bool()
        for (layer, hook), value in expected.items():
            if hook == "attn_pattern":
                assert layer is not None
                (found,) = ours.patterns[layer]
                found, value = found.transpose(1, 2)[real], value.transpose(1, 2)[real]
            else:
                found, value = ours.seen[layer, hook].flatten(1)[real.flatten()], value[real.flatten()]
            assert torch.equal(found, value), f"{label}: layer {layer} {hook} differs by {(found - value).abs().max()}"


# --- packed ---------------------------------------------------------------------------------------------------------


def rows_of(recorder: Recorder, batch: Batch, prompt: int) -> Seen:
    """What was seen of one prompt of a packed batch."""
    start = sum(len(other) for other in MIX[:prompt]) if batch.tokens > len(MIX[prompt]) else 0
    rows = slice(start, start + len(MIX[prompt]))
    seen = {site: value[rows] for site, value in recorder.seen.items()}
    index = next(i for i, group in enumerate(batch.groups) if group.start <= start < group.rows.stop)
    inside = (start - batch.groups[index].start) // len(MIX[prompt])
    return seen | {(layer, "attn_pattern"): found[index][inside] for layer, found in recorder.patterns.items()}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_packed_bits_of_a_prompt_depend_on_the_prompt_alone(
    name: str, dtype: torch.dtype, attention: Attention, checkpoint: Callable[[str], Path], threads: int
) -> None:
    model = load(checkpoint(name), dtype)
    height = fixed_height(64, (model.config.mlp_width,), threads)
    mix = packed(MIX, height, attention)
    assert len(mix.ids) > 3 * height and len(mix.ids) * model.config.mlp_width > 2 * GRAIN
    together = run(model, mix)
    for prompt in ALONE:
        batch = packed([MIX[prompt]], height, attention)
        alone, mixed = rows_of(run(model, batch), batch, prompt), rows_of(together, mix, prompt)
        assert set(alone) == set(mixed)
        for site, value in alone.items():
            found = mixed[site]
            assert torch.equal(found, value), f"prompt {prompt}, {site} differs by {(found - value).abs().max()}"
