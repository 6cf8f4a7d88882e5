"""The maths of `archs` alone, without the engine: against Hugging Face, against itself, against fp64.

Padded form (natural height) must have the bits of HF's forward at every hook that HF can show; packed form (fixed
height) must give a prompt the same bits whatever runs beside it; and its distance from the truth is that of HF.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CORE, FAULTS, LONGEST, VARIANTS, VOCAB, tensors
from harness import TRIED
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

import archs
from archs import ops
from archs.batch import GRAIN, VECTOR, Attention, Batch, Group, fixed_height
from archs.contract import READ_ONLY_HOOKS, ArchError, Keys, stored
from archs.ops import ACTIVATIONS

Site = tuple[int | None, str]
Seen = dict[Site, Tensor]
MATHS = [
    name for name in CORE if not any(word in name for word in ("tied", "prefix", "legacy", "buffers", "other_head"))
]
"""The variants that differ in more than how their files look."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ATTENTION: list[Attention] = ["sdpa", "eager"]


def in_turn(cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Each case with every dtype, of which one by turns is run by default and the others under ``full``."""
    return [
        pytest.param(*case, dtype, marks=[] if turn % 3 == place else [pytest.mark.full])
        for turn, case in enumerate(cases)
        for place, dtype in enumerate(DTYPES)
    ]


# --- checkpoints and models -----------------------------------------------------------------------------------------


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test with the number of threads that it is parametrised with."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [ops.rms_norm, ops.rms_norm_late, ops.rms_norm_gemma])
def test_a_norm_by_parts_has_the_bits_of_a_whole_one(
    norm: Callable[..., Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in ((2 * ops.PART, 192), (ops.PART + 1, 576), (3 * ops.PART - 5, 7), (ops.PART + 9, 3, 64)):
        x, weight = 3 * torch.randn(shape).to(dtype), 1 + torch.rand(shape[-1]).to(dtype)
        parts = norm(x, weight, 1e-5)
        with monkeypatch.context() as whole:
            whole.setattr(ops, "PART", len(x))
            assert torch.equal(parts, norm(x, weight, 1e-5))


@pytest.mark.parametrize("name", CORE)
def test_no_tensor_of_a_checkpoint_is_constant(name: str, checkpoint: Callable[[str], Path]) -> None:
    for key, tensor in tensors(checkpoint(name)).items():
        assert tensor.float().std() > 0.05, key


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
    first = family.layer_prefix.format(i=0)
    prefix = next(prefix for prefix, _ in family.prefixes if any(name.startswith(prefix + first) for name in held))
    if prefix + family.embedding not in held:
        held[prefix + family.embedding] = held[family.head]
    held.setdefault(family.head, held[prefix + family.embedding])

    def take(weights: type, where: str) -> Any:
        sources = stored(weights, config)
        for src in sources.values():
            assert held[where + src.names[0]].shape == src.shape(config)
        absent = dict.fromkeys(field.name for field in dataclasses.fields(weights))
        return weights(**absent | {key: held[where + src.names[0]] for key, src in sources.items()})

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


@dataclass
class Blind(Recorder):
    """Looks at nothing but what is between the layers."""

    def wants(self, hook: str) -> bool:
        return False


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
        prompts, width = self.ids.shape
        group = Group(0, prompts, width, longest=int(self.mask.sum(-1).max()), mask=mask)
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


MIX = draw_prompts([LONG] * 10 + [13] + [9] * 40 + [7] * 12 + [SHORT] * 2 + [1] * 5)
"""Several groups, of one prompt and of many; more rows than one tile, and more elements than one thread takes."""
ALONE = [0, 9, 10, 11, 32, 50, 51, 62, 63, 64, 65, 69]
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
    core: Any = hf.base_model
    if family == "llama":
        core.rotary_emb = type(core.rotary_emb)(hf.config)  # dynamic rope remembers the longest prompt it has seen
    for layer, module in enumerate(core.layers if family == "llama" else core.h):
        for hook, (path, side) in POINTS[family].items():

            def keep(_: Any, given: Any, out: Any = None, site: Site = (layer, hook)) -> None:
                value = given[0] if out is None else out
                seen[site] = (value if isinstance(value, Tensor) else value[0]).flatten(0, 1)

            point = module.get_submodule(path)
            handles.append(point.register_forward_pre_hook(keep) if side == "in" else point.register_forward_hook(keep))

    rotated: list[tuple[Tensor, Tensor]] = []
    original = modeling_llama.apply_rotary_pos_emb

    def rotate(*args: Any) -> tuple[Tensor, Tensor]:
        rotated.append(original(*args))
        return rotated[-1]

    patch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)
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


@pytest.mark.parametrize(
    ("name", "attention", "dtype"),
    in_turn([(name, kind) for name in CORE for kind in ATTENTION if kind == "sdpa" or name in MATHS]),
)
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
    """What was seen of one prompt of `MIX`, alone in its batch or with all others."""
    length = len(MIX[prompt])
    start = 0 if batch.tokens == length else sum(len(other) for other in MIX[:prompt])
    index = next(i for i, group in enumerate(batch.groups) if group.start <= start < group.rows.stop)
    inside = (start - batch.groups[index].start) // length
    seen = {site: value[start : start + length] for site, value in recorder.seen.items()}
    return seen | {(layer, "attn_pattern"): found[index][inside] for layer, found in recorder.patterns.items()}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(
    ("name", "threads", "dtype"),
    in_turn([(name, 2) for name in MATHS] + [(name, 1) for name in ("llama_gqa", "llama_head_dim", "gpt2")]),
    indirect=["threads"],
)
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


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how many rows every product and activation function works on, and how many prompts every attention call."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: dict[str, set[int]] = {}
        self.sequences: dict[str, set[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "silu", "gelu", "tanh", "relu"):
            self.rows.setdefault(name, set()).add(len(args[name == "addmm"]))
        if name == "bmm" or name.startswith("_scaled_dot_product"):
            self.sequences.setdefault(name[:12], set()).add(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", ["llama_gqa", "llama_mlp_bias", "llama_gelu", "gpt2", "gpt2_relu"])
def test_every_call_of_a_packed_batch_has_one_size(
    name: str, attention: Attention, checkpoint: Callable[[str], Path]
) -> None:
    """On many processors the bits of these widths are the same at any size; that they are on all is by construction."""
    model = load(checkpoint(name), torch.float32)
    batch = packed(MIX[8:20], 64, attention)
    with Calls() as blind:
        run(model, batch, Blind())
    with Calls() as seen:
        run(model, batch)
    for calls in (seen, blind):
        assert set().union(*calls.rows.values()) == {64}, calls.rows
        product = "addmm" if "gpt2" in name or "bias" in name else "mm"
        assert product in calls.rows and len(calls.rows) >= 2
    heads = {"bmm": {model.config.heads}, "_scaled_dot_": {1}}
    assert seen.sequences == heads if attention == "sdpa" else seen.sequences == {"bmm": heads["bmm"]}


PERIOD = 61
"""Coprime to the vector length, so that a periodic tensor has every value in every lane, and in every tail."""


@pytest.mark.parametrize("threads", [1, 2, 3, 8], indirect=True)
@pytest.mark.parametrize("dtype", TRIED)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_in_a_tile_of_fixed_height_an_activation_depends_on_its_argument_alone(
    act: str, dtype: torch.dtype, threads: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    for width in (101, 257, 313, 1001):
        size = fixed_height(64, (width,), threads) * width
        for _ in range(3):
            values = (3 * torch.randn(PERIOD, generator=generator)).to(dtype)
            got = ACTIVATIONS[act](values.repeat(size // PERIOD + 1)[:size].view(-1, width)).flatten()
            assert torch.equal(got, got[:PERIOD].repeat(size // PERIOD + 1)[:size]), f"width {width}"


@settings(deadline=None)
@given(
    minimum=st.integers(1, 3000),
    widths=st.lists(st.integers(32, 30000), min_size=1, max_size=3),
    threads=st.integers(1, 32),
)
def test_fixed_height_leaves_no_tail(minimum: int, widths: list[int], threads: int) -> None:
    def parts(size: int, grain: int) -> set[int]:
        """Sizes of the parts into which `at::parallel_for` cuts an element-wise call."""
        chunk = -(-size // min(threads, -(-size // grain)))
        return {min(chunk, size - start) for start in range(0, size, chunk)}

    def safe(height: int) -> bool:
        sizes = [height * width for width in widths]
        cuts = [part for size in sizes for grain in (GRAIN, max(size // threads, 1)) for part in parts(size, grain)]
        return all(part % VECTOR == 0 for part in cuts)

    height = fixed_height(minimum, tuple(widths), threads)
    assert height >= minimum and height % VECTOR == 0 and safe(height)
    assert not any(safe(lower) for lower in range(-(-minimum // VECTOR) * VECTOR, height, VECTOR))


# --- what a tap sees and does ---------------------------------------------------------------------------------------

WITH_TAPS = ["llama_gqa", "llama_attention_bias", "gpt2", "gpt2_upcast"]
BATCHES: Mapping[str, Callable[[Attention], Batch]] = {
    "padded": PADDED["padded left"].batch,
    "packed": lambda attention: packed(MIX, fixed_height(64, (101, 240), 2), attention),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", TRIED)
@pytest.mark.parametrize("name", WITH_TAPS)
def test_residual_equations_hold_and_looking_changes_nothing(
    name: str, dtype: torch.dtype, attention: Attention, batch: str, checkpoint: Callable[[str], Path]
) -> None:
    model = load(checkpoint(name), dtype)
    recorder = run(model, BATCHES[batch](attention))
    seen = recorder.seen
    before = seen[None, "embedding"]
    for layer in range(model.config.layers):
        hooks = ("residual_pre", "attn_out", "residual_mid", "mlp_out", "residual_post")
        pre, a, mid, m, post = (seen[layer, hook] for hook in hooks)
        assert torch.equal(pre, before)
        assert torch.equal(mid, pre + a)
        assert torch.equal(post, mid + m)
        before = post
    shapes = model.family.hooks(model.config, 0)
    for (place, hook), value in seen.items():
        assert place is None or value.shape[1:] == shapes[hook]
    assert [hook for place, hook in seen if place == 0] == [
        hook for hook in model.family.hooks(model.config, 0) if hook != "attn_pattern"
    ]

    blind = run(model, BATCHES[batch](attention), Blind())
    assert not blind.patterns
    for site, value in blind.seen.items():
        assert torch.equal(seen[site], value), site


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", WITH_TAPS)
def test_a_value_put_in_place_is_what_the_rest_is_computed_from(
    name: str, batch: str, checkpoint: Callable[[str], Path]
) -> None:
    model = load(checkpoint(name), torch.float32)
    plain = run(model, BATCHES[batch]("sdpa")).seen
    order = [hook for hook in model.family.hooks(model.config, 1) if hook not in READ_ONLY_HOOKS]
    for hook in order:
        written = run(model, BATCHES[batch]("sdpa"), Recorder(at=(1, hook))).seen
        assert all(torch.equal(written[0, earlier], plain[0, earlier]) for earlier in order)
        assert torch.equal(written[1, hook], plain[1, hook]), "a tap shows the value before it is replaced"
        assert not torch.equal(written[1, "residual_post"], plain[1, "residual_post"]) or hook == "residual_post"
        assert not torch.equal(written[2, "residual_pre"], plain[2, "residual_pre"])
        if hook in ("attn_out", "mlp_out"):
            into = {"attn_out": "residual_mid", "mlp_out": "residual_post"}[hook]
            start = {"attn_out": "residual_pre", "mlp_out": "residual_mid"}[hook]
            assert torch.equal(written[1, into], plain[1, start])


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2_by_layer"])
def test_pattern_under_sdpa_is_the_softmax_of_the_scores(name: str, checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint(name), torch.float32)
    (group,) = (batch := packed(MIX[:2], 64, "sdpa")).groups
    recorder = run(model, batch)
    for layer in range(model.config.layers):
        q, k = (group.sequences(recorder.seen[layer, hook]).double() for hook in ("q_rot", "k_rot"))
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        if name == "gpt2_by_layer":
            scores = scores / (layer + 1)
        hidden = torch.ones(LONG, LONG).triu(1).bool()
        (pattern,) = recorder.patterns[layer]
        assert pattern.dtype == torch.float32
        torch.testing.assert_close(
            pattern.double(), scores.masked_fill(hidden, -math.inf).softmax(-1), rtol=1e-4, atol=1e-6
        )
        assert pattern.masked_select(hidden).count_nonzero() == 0
        assert pattern.max(-1).values.mean() > 0.35, "attention of the test models is far from uniform"


# --- against the truth ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """Llama and GPT-2 in fp64, norms, softmax and rope included; written from the papers, one prompt at a time."""

    hf: Mapping[str, Any]
    held: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.held[name].double()

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The last ``residual_post [s, hidden]`` and the logits ``[s, vocab]``."""
        return self.llama(ids) if self.hf["model_type"] == "llama" else self.gpt2(ids)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[s, heads, d] x 3 -> [s, heads * d]``"""
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        future = torch.ones(len(q), len(q)).triu(1).bool()
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -math.inf).softmax(-1), v).flatten(1)

    def rope(self, x: Tensor) -> Tensor:
        """Turns the pairs (x[i], x[i + d/2]), taken as complex numbers; llama3 frequencies as Meta wrote them."""
        half = x.shape[-1] // 2
        parameters = self.hf["rope_parameters"]
        turned = []
        for i in range(half):
            frequency = float(parameters["rope_theta"]) ** (-i / half)
            if parameters["rope_type"] == "llama3":
                low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
                turns = parameters["original_max_position_embeddings"] * frequency / (2 * math.pi)
                blend = min(max((turns - low) / (high - low), 0.0), 1.0)
                frequency *= (1 - blend) / parameters["factor"] + blend
            turned.append(frequency)
        angles = torch.outer(torch.arange(len(x)).double(), torch.tensor(turned, dtype=torch.float64))
        pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    def llama(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        def norm(x: Tensor, name: str) -> Tensor:
            return self[name] * x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.hf["rms_norm_eps"])

        def linear(x: Tensor, name: str) -> Tensor:
            out = x @ self[name + ".weight"].T
            return out + self[name + ".bias"] if name + ".bias" in self.held else out

        x = self["model.embed_tokens.weight"][ids]
        for layer in range(self.hf["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            a = norm(x, at + "input_layernorm.weight")
            q, k, v = (
                linear(a, f"{at}self_attn.{p}_proj").view(len(ids), -1, self.hf["head_dim"]) for p in ("q", "k", "v")
            )
            x = x + linear(self.attend(self.rope(q), self.rope(k), v), at + "self_attn.o_proj")
            m = norm(x, at + "post_attention_layernorm.weight")
            gate = linear(m, at + "mlp.gate_proj")
            x = x + linear(gate * gate.sigmoid() * linear(m, at + "mlp.up_proj"), at + "mlp.down_proj")
        return x, norm(x, "model.norm.weight") @ self["lm_head.weight"].T

    def gpt2(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        def norm(x: Tensor, name: str) -> Tensor:
            x = x - x.mean(-1, keepdim=True)
            x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.hf["layer_norm_epsilon"])
            return x * self[name + ".weight"] + self[name + ".bias"]

        def affine(x: Tensor, name: str) -> Tensor:
            return x @ self[name + ".weight"] + self[name + ".bias"]

        x = self["transformer.wte.weight"][ids] + self["transformer.wpe.weight"][: len(ids)]
        for layer in range(self.hf["n_layer"]):
            at = f"transformer.h.{layer}."
            q, k, v = affine(norm(x, at + "ln_1"), at + "attn.c_attn").chunk(3, dim=-1)
            q, k, v = (part.reshape(len(ids), self.hf["n_head"], -1) for part in (q, k, v))
            x = x + affine(self.attend(q, k, v), at + "attn.c_proj")
            m = affine(norm(x, at + "ln_2"), at + "mlp.c_fc")
            m = 0.5 * m * (1 + torch.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m**3)))
            x = x + affine(m, at + "mlp.c_proj")
        return x, norm(x, "transformer.ln_f") @ self["transformer.wte.weight"].T


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative root mean square over all real tokens."""
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", TRIED)
@pytest.mark.parametrize("name", ["llama_attention_bias", "llama_llama3", "gpt2_n_inner"])
def test_packed_is_as_near_to_the_truth_as_hugging_face(
    name: str,
    dtype: torch.dtype,
    attention: Attention,
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoint(name)
    held = {key: tensor.to(dtype) for key, tensor in tensors(folder).items()}
    exact = Exact(json.loads((folder / "config.json").read_text()), held)
    truths = [torch.cat(parts) for parts in zip(*map(exact, MIX), strict=True)]

    model = load(folder, dtype)
    batch = packed(MIX, fixed_height(64, (model.config.mlp_width,), torch.get_num_threads()), attention)
    ours = run(model, batch).seen
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    padded = Padded.of(MIX)
    theirs = reference(hf, VARIANTS[name].family, padded, monkeypatch)

    for site, truth in zip([(model.config.layers - 1, "residual_post"), (None, "logits")], truths, strict=True):
        near = distance(ours[site][: batch.tokens], truth)
        assert near <= 1.05 * distance(theirs[site][padded.mask.bool().flatten()], truth), site
        assert near < 8 * torch.finfo(dtype).eps, site


# --- configs --------------------------------------------------------------------------------------------------------

LLAMA = {
    "model_type": "llama",
    "hidden_size": 60,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": VOCAB,
}
GPT2 = {"model_type": "gpt2", "n_embd": 60, "n_head": 5}


def config(hf: Mapping[str, Any]) -> Any:
    return archs.family(hf).config(hf)


@pytest.mark.parametrize(
    ("hf", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({}, "model_type"),
        (LLAMA | {"sliding_window": 4096}, "sliding_window"),
        (LLAMA | {"hidden_act": "gelu_10"}, "gelu_10"),
        (LLAMA | {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        (LLAMA | {"rope_scaling": {"type": "su", "factor": 2.0}}, "longrope"),
        (LLAMA | {"rope_scaling": {"type": "mrope", "factor": 2.0}}, "mrope"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "factor"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (LLAMA | {"rope_parameters": {"rope_type": "default", "mscale": 1.0}}, "mscale"),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "finetuned": True}}, "finetuned"),
        (LLAMA | {"rope_parameters": 7}, "rope_parameters"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (LLAMA | {"is_encoder_decoder": True}, "is_encoder_decoder"),
        (LLAMA | {"num_key_value_heads": 4}, "num_key_value_heads"),
        (LLAMA | {"hidden_size": 61}, "num_attention_heads"),
        (LLAMA | {"head_dim": 7}, "head_dim"),
        (LLAMA | {"hidden_size": None}, "hidden_size"),
        (LLAMA | {"hidden_size": "60"}, "hidden_size"),
        (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers"),
        (LLAMA | {"vocab_size": True}, "vocab_size"),
        (LLAMA | {"rms_norm_eps": math.inf}, "rms_norm_eps"),
        (LLAMA | {"attention_bias": 1}, "attention_bias"),
        ({key: LLAMA[key] for key in LLAMA if key != "intermediate_size"}, "intermediate_size"),
        (GPT2 | {"n_head": 7}, "n_head"),
        (GPT2 | {"activation_function": "swiglu"}, "swiglu"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2 | {"scale_attn_weights": "yes"}, "scale_attn_weights"),
        (GPT2 | {"rotary_dim": 64}, "rotary_dim"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_by_name(hf: dict[str, Any], named: str) -> None:
    with pytest.raises(ArchError, match=named):
        config(hf)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "factor", "x"]), inner),
)
WORDS = """hidden_size num_attention_heads num_key_value_heads head_dim hidden_act rms_norm_eps rope_scaling rope_theta
    rope_parameters max_position_embeddings original_max_position_embeddings tie_word_embeddings mlp_bias dtype n_embd
    n_head n_inner activation_function n_positions quantization_config model_type surprise""".split()


@settings(deadline=None)
@given(base=st.sampled_from([LLAMA, GPT2]), changes=st.dictionaries(st.sampled_from(WORDS), JSON, max_size=3))
def test_any_config_is_understood_or_refused(base: dict[str, Any], changes: dict[str, Any]) -> None:
    try:
        understood = config(base | changes)
    except ArchError:
        return
    assert not {"surprise"} & set(changes)
    assert understood.layers > 0 and understood.heads > 0


def test_what_old_files_lack_has_its_default() -> None:
    c = config(LLAMA)
    assert (c.kv_heads, c.head_dim, c.act, c.eps, c.tied) == (6, 10, "silu", 1e-6, False)
    assert (c.rope.kind, c.rope.theta, c.rope.max_positions, c.max_positions) == ("default", 10000.0, 2048, None)
    g = config({"model_type": "gpt2"})
    assert (g.layers, g.hidden, g.heads, g.mlp_width, g.max_positions, g.act) == (12, 768, 12, 3072, 1024, "gelu_new")
    assert g.tied and g.scale(3) == 0.125


def test_a_rope_means_the_same_in_old_words_and_new() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16}
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **yarn}}
    new = LLAMA | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **yarn}}
    both = new | {"rope_scaling": {}}
    assert config(old).rope == config(new).rope == config(both).rope
    above = LLAMA | {"original_max_position_embeddings": 256, "rope_parameters": {"rope_type": "yarn", **yarn}}
    assert config(above).rope.original == 256, "a value at the top level wins"


def test_keys_remembers_what_was_read() -> None:
    keys = Keys({"a": 1, "b": None, "c": {"d": 2.5, "e": 3}, "use_cache": True, "pruned_heads": {}})
    assert keys.size("a") == 1
    assert keys.size("b", 7) == 7, "null counts as absent"
    assert "a" in keys and "b" not in keys
    nested = keys.nested("c")
    assert nested.number("d") == 2.5
    keys.finish()
    with pytest.raises(ArchError, match=r"'c'.*'e' = 3"):
        nested.finish()
    nested.finish({"e"})
    assert Keys({}).nested("absent").number("x", 1.5) == 1.5
    with pytest.raises(ArchError, match=r"lacks 'x'"):
        Keys({}).number("x")
    with pytest.raises(ArchError, match=r"'x' = 1, 'y' = 2"):
        Keys({"y": 2, "x": 1}).finish()


def test_every_seeded_fault_can_still_be_put_in() -> None:
    """``tools/seeded_faults.py`` takes an hour of processors, so what makes it stop has to be seen here."""
    folder = Path(archs.__file__).parent
    lost = [fault for fault in FAULTS if (folder / fault[0]).read_text().count(fault[1]) != 1 or fault[1] == fault[2]]
    assert FAULTS and not lost
    assert {variant for *_, variant in FAULTS} <= set(VARIANTS)


def test_shapes_are_in_words_of_the_config() -> None:
    c = config(LLAMA | {"num_key_value_heads": 2, "mlp_bias": True})
    layer = stored(archs.llama.Layer, c)
    assert layer["k"].shape(c) == (20, 60)
    assert layer["gate_bias"].shape(c) == (101,)
    assert "q_bias" not in layer, "a bias that the config denies must not be looked for"
