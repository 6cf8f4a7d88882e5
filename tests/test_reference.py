"""`HFLayers` against the whole model in memory: a chain of its parts is equal to ``from_pretrained``, bit for bit."""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpwap.errors import ModelError, RequestError
from fpwap.reference import HFLayers

VOCAB, LAYERS, WIDTH = 97, 3, 12
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
BOTH = ("sdpa", "eager")
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint: a config class by name, what it has beyond or instead of `SIZES`, and what is run with it."""

    config: str
    values: Mapping[str, Any] = field(default_factory=dict)
    attention: tuple[str, ...] = BOTH
    wraps: str | None = None


GPT2 = {"n_embd": 48, "n_layer": LAYERS, "n_head": 4, "n_positions": 32, "tie_word_embeddings": True}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CASES: Mapping[str, Case] = {
    "llama": Case("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": Case("LlamaConfig", {"tie_word_embeddings": True}),
    "gpt2": Case("GPT2Config", GPT2),
    "mistral": Case("MistralConfig", {"sliding_window": 4}),
    "qwen2": Case("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3_moe": Case(
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [1],
        },
    ),
    "mixtral": Case("MixtralConfig", {"num_local_experts": 5, "sliding_window": 5}),
    "gemma2": Case(
        "Gemma2Config",
        {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 20, "tie_word_embeddings": True},
        attention=("eager",),
    ),
    "gemma3_text": Case(
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 4, "sliding_window_pattern": 2, "tie_word_embeddings": True},
    ),
    "deepseek_v2": Case("DeepseekV2Config", MLA | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": Case("DeepseekV3Config", MLA | {"rope_interleave": True}),
    "gpt_oss": Case(
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
        attention=("eager",),
    ),
    "gpt_neox": Case("GPTNeoXConfig", {"rotary_pct": 0.5}),
    "bloom": Case("BloomConfig", {"n_layer": LAYERS, "n_head": 4, "tie_word_embeddings": True}, attention=("eager",)),
    "falcon": Case("FalconConfig", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": Case("FalconConfig", {"alibi": True, "multi_query": False, "bias": True, "parallel_attn": False}),
    "opt": Case("OPTConfig", {"ffn_dim": 64, "tie_word_embeddings": True}),
    "opt_projected": Case("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    "gptj": Case("GPTJConfig", {"n_embd": 48, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 6}, attention=("eager",)),
    "cohere": Case("CohereConfig", {"use_qk_norm": True, "logit_scale": 0.3, "tie_word_embeddings": True}),
    "phi3": Case("Phi3Config", {"sliding_window": 5}),
    "granite": Case("GraniteConfig", {"embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.7}),
    "llama4_text": Case(
        "Llama4TextConfig",
        {
            "head_dim": 16,
            "intermediate_size_mlp": 40,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 5,
            "no_rope_layers": [1, 1, 0],
        },
    ),
    "gemma3": Case("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 4}, wraps="Gemma3Config"),
    "mistral3": Case("MistralConfig", {"sliding_window": None, "head_dim": 16}, wraps="Mistral3Config"),
    "llava": Case("LlamaConfig", wraps="LlavaConfig"),
    "llama4": Case(
        "Llama4TextConfig",
        {"head_dim": 16, "intermediate_size_mlp": 40, "num_local_experts": 4, "attention_chunk_size": 5},
        wraps="Llama4Config",
    ),
}
RUNS = [
    pytest.param(name, attention, dtype, id=f"{name}-{attention}-{str(dtype).removeprefix('torch.')}")
    for place, (name, case) in enumerate(CASES.items())
    for turn, attention in enumerate(case.attention)
    for dtype in ((torch.float32, torch.bfloat16)[(place + turn) % 2],)
]


def draw(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Norms around 1, biases not 0, projections large enough that attention is far from uniform."""
    values = torch.randn(like.shape, generator=generator)
    if like.ndim < 2:
        return (0.0 if "bias" in name or "sinks" in name else 1.0) + 0.3 * values
    return values if "embed" in name else 1.5 * values * like.shape[-1] ** -0.5


def auto(case: Case) -> Any:
    return transformers.AutoModelForImageTextToText if case.wraps else transformers.AutoModelForCausalLM


def write(case: Case, folder: Path, shard: str = "5GB") -> Path:
    config = getattr(transformers, case.config)(**{**SIZES, **case.values})
    if case.wraps:
        config = getattr(transformers, case.wraps)(text_config=config.to_dict(), vision_config=VISION)
    model, generator = auto(case).from_config(config), torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        tensor.copy_(draw(name, tensor, generator))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = write(CASES[name], tmp_path_factory.mktemp(name))
        return made[name]

    return make


def batches() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, ids, mask, positions), each ``[3, WIDTH]``: equal lengths; 12, 7 and 3 tokens padded on either side."""
    ids = torch.randint(3, VOCAB, (3, WIDTH), generator=torch.Generator().manual_seed(5))
    right = torch.arange(WIDTH) < torch.tensor([[12], [7], [3]])
    for name, real in (("equal", torch.ones_like(right)), ("right", right), ("left", right.flip(1))):
        mask = real.long()
        yield name, ids * mask, mask, (mask.cumsum(-1) - 1).clamp(min=0)


class Whole:
    """The whole model in memory, with the inputs and outputs of its layers on record."""

    def __init__(self, folder: Path, attention: str, dtype: torch.dtype, case: Case) -> None:
        self.model = auto(case).from_pretrained(folder, dtype=dtype, attn_implementation=attention)
        self.seen: dict[str, Tensor] = {}
        self.layers = next(m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)
        first, head = self.layers[0], self.model.get_output_embeddings()
        first.register_forward_pre_hook(lambda m, a, k: self.keep("embed", a or k["hidden_states"]), with_kwargs=True)
        head.register_forward_pre_hook(lambda m, a: self.keep("normed", a))
        for index, layer in enumerate(self.layers):
            layer.register_forward_hook(lambda m, a, output, i=index: self.keep(str(i), output))

    def keep(self, name: str, value: Any) -> None:
        self.seen[name] = (value[0] if isinstance(value, tuple) else value).clone()

    def __call__(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> dict[str, Tensor]:
        given = {"attention_mask": mask, "position_ids": positions}
        known = inspect.signature(self.model.forward).parameters
        with torch.no_grad():
            output = self.model(input_ids=ids, **{key: value for key, value in given.items() if key in known})
        return self.seen | {"logits": output.logits}


def chain(hf: HFLayers, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> dict[str, Tensor]:
    hidden = hf.embed(ids, mask, positions)
    found = {"embed": hidden}
    for index in range(hf.layers):
        hidden = hf.layer(index, hidden, mask, positions)["residual_post"]
        found[str(index)] = hidden
    normed, logits = hf.norm_and_logits(hidden)
    return found | {"normed": normed, "logits": logits}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], where: str = "") -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, (where, name)
        assert torch.equal(found[name], tensor), (where, name, (found[name] - tensor).abs().max())


@pytest.mark.parametrize(("name", "attention", "dtype"), RUNS)
def test_a_chain_of_parts_is_the_whole_model(
    name: str, attention: str, dtype: torch.dtype, folder: Callable[[str], Path]
) -> None:
    whole = Whole(folder(name), attention, dtype, CASES[name])
    parts = HFLayers(folder(name), dtype, attention)
    for padding, ids, mask, positions in batches():
        assert_equal(chain(parts, ids, mask, positions), whole(ids, mask, positions), padding)


def rewrite(source: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of an unsharded checkpoint with other tensors or other names."""
    (target / "config.json").write_text((source / "config.json").read_text())
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    return target


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda held: {re.sub(old, new, name): tensor for name, tensor in held.items()}


def nested(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the wrapper's own modules, where hub files have those of the model it wraps."""
    own = renamed(r"^language_model\.model\.", "model.language_model.")
    return renamed(r"^language_model\.lm_head", "lm_head")(own(held))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("gpt2", renamed(r"^transformer\.", ""), id="gpt2-no-prefix"),
        pytest.param("llama_tied", renamed(r"^model\.", ""), id="llama-no-prefix"),
        pytest.param("llama_tied", renamed(r"^model\.embed_tokens", "lm_head"), id="llama-only-the-head-stored"),
        pytest.param("llama_tied", lambda t: t | {"lm_head.weight": torch.randn(VOCAB, 48)}, id="llama-another-head"),
        pytest.param("llava", nested, id="llava-nested"),
        pytest.param("gemma3", nested, id="gemma3-nested"),
    ],
)
def test_names_that_files_use(
    name: str, change: Callable[..., dict[str, Tensor]], folder: Callable[[str], Path], tmp_path: Path
) -> None:
    changed = rewrite(folder(name), tmp_path, change)
    whole, parts = Whole(changed, "sdpa", torch.float32, CASES[name]), HFLayers(changed, torch.float32, "sdpa")
    for padding, ids, mask, positions in batches():
        assert_equal(chain(parts, ids, mask, positions), whole(ids, mask, positions), padding)


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3", "gpt_neox"])
def test_only_the_part_at_work_is_held(name: str, tmp_path: Path) -> None:
    written = write(CASES[name], tmp_path, shard="40KB")
    assert len(list(written.glob("*.safetensors"))) > 3
    stored = {n: t for file in written.glob("*.safetensors") for n, t in load_file(file).items()}
    asked: list[str] = []

    class Recorded(dict[str, Tensor]):
        def __getitem__(self, key: str) -> Tensor:
            asked.append(key)
            return super().__getitem__(key)

    parts = HFLayers(written, torch.float32, "sdpa", tensors=Recorded(stored))
    _, ids, mask, positions = next(batches())
    hidden = parts.embed(ids, mask, positions)
    assert not any(".layers." in key or key.startswith(("lm_head", "embed_out")) for key in asked)
    for index in range(LAYERS):
        asked.clear()
        hidden = parts.layer(index, hidden, mask, positions)["residual_post"]
        own = {key for key in stored if f".layers.{index}." in key}
        assert own <= set(asked) and not any("embed" in key or "lm_head" in key for key in asked)
        assert not any(".layers." in key for key in set(asked) - own)
        held = [
            t for part in vars(parts).values() if isinstance(part, torch.nn.Module) for t in part.state_dict().values()
        ]
        assert sum(t.numel() for t in held) == sum(stored[key].numel() for key in asked)
        assert not any(t.is_meta for t in held)
    asked.clear()
    parts.norm_and_logits(hidden)
    assert not any(".layers." in key for key in asked)
    assert_equal(
        chain(HFLayers(written, torch.float32, "sdpa"), ids, mask, positions), chain(parts, ids, mask, positions)
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "falcon"])
def test_what_is_watched_is_what_the_layer_of_the_whole_model_shows(name: str, folder: Callable[[str], Path]) -> None:
    attn, mlp, router = {
        "llama": ("self_attn", "mlp", None),
        "gpt2": ("attn", "mlp", None),
        "mixtral": ("self_attn", "mlp", "mlp.gate"),
        "falcon": ("self_attention", "mlp", None),
    }[name]
    whole, parts = (
        Whole(folder(name), "sdpa", torch.float32, CASES[name]),
        HFLayers(folder(name), torch.float32, "sdpa"),
    )
    watch = {"attn_out": f"{attn} out", "mlp_out": f"{mlp} out", "mlp_in": f"{mlp} in"}
    module = whole.layers[1].get_submodule
    module(attn).register_forward_hook(lambda m, a, output: whole.keep("attn_out", output))
    module(mlp).register_forward_hook(lambda m, a, output: whole.keep("mlp_out", output))
    module(mlp).register_forward_pre_hook(lambda m, a: whole.keep("mlp_in", a))
    if router:
        watch |= {"router_logits": f"{router} out", "expert_ids": f"{router} out 2"}
        module(router).register_forward_hook(lambda m, a, output: whole.keep("router_logits", output))
        module(router).register_forward_hook(lambda m, a, output: whole.keep("expert_ids", output[2]))
    _, ids, mask, positions = list(batches())[-1]
    reference = whole(ids, mask, positions)
    found = parts.layer(1, reference["0"], mask, positions, watch=watch)
    assert_equal(found, {name: reference[name] for name in watch} | {"residual_post": reference["1"]})


def test_a_dynamic_rope_does_not_remember_the_call_before(tmp_path: Path) -> None:
    """The whole model does: what it makes of 8 tokens after 12 is not what it makes of them at first."""
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    case = Case("LlamaConfig", {"rope_parameters": rope, "max_position_embeddings": 6})
    parts = HFLayers(write(case, tmp_path), torch.float32, "sdpa")
    _, ids, mask, positions = next(batches())
    used = Whole(tmp_path, "sdpa", torch.float32, case)
    for width in (WIDTH, 8):
        batch = ids[:, :width], mask[:, :width], positions[:, :width]
        expected, after = dict(Whole(tmp_path, "sdpa", torch.float32, case)(*batch)), used(*batch)
        assert torch.equal(after["1"], expected["1"]) == (width == WIDTH), "the case shows no memory"
        assert torch.equal(parts.layer(1, expected["0"], *batch[1:], None)["residual_post"], expected["1"])


def test_mask_and_positions_may_be_absent(folder: Callable[[str], Path]) -> None:
    ids = next(batches())[1]
    for name in ("mistral", "gpt2", "gemma3_text"):
        whole, parts = (
            Whole(folder(name), "sdpa", torch.float32, CASES[name]),
            HFLayers(folder(name), torch.float32, "sdpa"),
        )
        assert_equal(chain(parts, ids, None, None), whole(ids, None, None), name)


def test_tensors_of_a_quantised_checkpoint_come_from_the_caller(folder: Callable[[str], Path], tmp_path: Path) -> None:
    config = json.loads((folder("llama") / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ModelError, match="quantised: give its dequantised tensors"):
        HFLayers(tmp_path, torch.float32, "sdpa")
    tensors = load_file(folder("llama") / "model.safetensors")
    _, ids, mask, positions = next(batches())
    expected = chain(HFLayers(folder("llama"), torch.float32, "sdpa"), ids, mask, positions)
    assert_equal(chain(HFLayers(tmp_path, torch.float32, "sdpa", tensors=tensors), ids, mask, positions), expected)


def test_extra_tensors_do_not_matter(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Buffers of old files, and a layer for the prediction of further tokens behind the last one (DeepSeek-V3)."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6), f"model.layers.{LAYERS}.x": torch.ones(2)}
    changed = rewrite(folder("llama"), tmp_path, lambda held: held | extra)
    _, ids, mask, positions = next(batches())
    expected = chain(HFLayers(folder("llama"), torch.float32, "sdpa"), ids, mask, positions)
    assert_equal(chain(HFLayers(changed, torch.float32, "sdpa"), ids, mask, positions), expected)


def test_refusals_say_what_is_wrong(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, mask, positions = next(batches())
    key = "model.layers.1.mlp.up_proj.weight"
    hidden = torch.randn(3, WIDTH, 48)
    lacking = rewrite(folder("llama"), tmp_path, lambda held: {n: t for n, t in held.items() if n != key})
    with pytest.raises(ModelError, match=f"lacks {key}"):
        HFLayers(lacking, torch.float32, "sdpa").layer(1, hidden, mask, positions)
    bent = rewrite(folder("llama"), tmp_path, lambda held: held | {key: held[key][:, 1:].clone()})
    with pytest.raises(ModelError, match=f"{key} has shape"):
        HFLayers(bent, torch.float32, "sdpa").layer(1, hidden, mask, positions)
    headless = rewrite(folder("llama"), tmp_path, lambda held: {n: t for n, t in held.items() if "lm_head" not in n})
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight"):
        HFLayers(headless, torch.float32, "sdpa").norm_and_logits(hidden)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds neither"):
        HFLayers(tmp_path, torch.float32, "sdpa")
    parts = HFLayers(folder("llama"), torch.float32, "sdpa")
    with pytest.raises(RequestError, match="layer 3 does not exist: the model has 3 layers"):
        parts.layer(3, hidden, mask, positions)
    with pytest.raises(RequestError, match="has no module 'attn', but self_attn"):
        parts.layer(0, hidden, mask, positions, watch={"attn_out": "attn out"})
    with pytest.raises(RequestError, match="is not of the form"):
        parts.layer(0, hidden, mask, positions, watch={"attn_out": "self_attn"})
    falcon = HFLayers(folder("falcon"), torch.float32, "sdpa")
    with pytest.raises(RequestError, match="layer 0 did not call the module of"):
        falcon.layer(0, hidden, mask, positions, watch={"pattern": "self_attention.attention_dropout out"})
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        HFLayers(folder("gptj"), torch.float32, "sdpa")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RequestError, match="needs transformers: pip install transformers"):
        HFLayers(folder("llama"), torch.float32, "sdpa")
