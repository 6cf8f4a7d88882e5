"""Wrappers: their text models with the names of the hub and of transformers 5, ties, and what text configs omit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from checkpoints import Checks, Tensors, Variant
from transformers import AutoModelForImageTextToText

from . import gemma3, llama, llama4, mistral

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = {"image_size": 8, "patch_size": 4}
TOWERS: dict[str, dict[str, Any]] = {
    "gemma3": {"model_type": "siglip_vision_model", **TOWER, **IMAGE},
    "llava": {"model_type": "clip_vision_model", **TOWER, **IMAGE, "projection_dim": 16},
    "mistral3": {"model_type": "pixtral", **TOWER, **IMAGE, "head_dim": 8},
    "llama4": {
        "model_type": "llama4_vision_model",
        **TOWER,
        **IMAGE,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    },
}


def around(text: Checks, outer: str, body: str = "model.language_model.", **own: Any) -> Checks:
    """A wrapper's checks from those of its text model."""
    config = {"model_type": outer, "text_config": text.config, "vision_config": TOWERS[outer], "image_token_index": 1}
    return dataclasses.replace(
        text,
        config=config | own,
        root="language_model.model.",
        head="language_model.lm_head.weight",
        layers=f"{body}layers",
        norm=f"{body}norm",
        auto=AutoModelForImageTextToText,
    )


TEXTS = {
    "gemma3": gemma3.CHECKS["gemma3"],
    "llava": llama.CHECKS["llama"],
    "mistral3": mistral.CHECKS["mistral"],
    "llama4": llama4.CHECKS["llama4"],
}
CHECKS = {
    "wrapped_gemma3": around(TEXTS["gemma3"], "gemma3", mm_tokens_per_image=1, tie_word_embeddings=False),
    "wrapped_llava": around(TEXTS["llava"], "llava"),
    "wrapped_mistral3": around(TEXTS["mistral3"], "mistral3", tie_word_embeddings=False),
    "wrapped_llama4": around(TEXTS["llama4"], "llama4", "language_model.model."),
}


def text(outer: str, **changes: Any) -> dict[str, Any]:
    return {"text_config": TEXTS[outer].config | changes}


def omits(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Without these keys of the text config, and with the dtype on the outside only, under its old name."""

    def change(config: dict[str, Any]) -> dict[str, Any]:
        config["text_config"] = {key: value for key, value in config["text_config"].items() if key not in keys}
        return config | {"torch_dtype": config.pop("dtype")}

    return change


def without_tie(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "tie_word_embeddings"}


def nested(held: Tensors) -> Tensors:
    """The names of the modules of transformers 5."""
    names = {name: name.replace("language_model.model.", "model.language_model.") for name in held}
    names |= {name: f"model.{name}" for name in held if name.startswith(("vision_tower.", "multi_modal_projector."))}
    return {names[name].replace("language_model.lm_head", "lm_head"): tensor for name, tensor in held.items()}


VARIANTS = {
    "wrapped_gemma3": Variant(family="wrapped_gemma3", config=text("gemma3", final_logit_softcapping=3.0)),
    "wrapped_gemma3_tied": Variant(
        family="wrapped_gemma3",
        config=text("gemma3", query_pre_attn_scalar=256, rms_norm_eps=1e-6, head_dim=256, num_key_value_heads=3),
        gain=1.0,
        head="tied",
        legacy=lambda config: without_tie(
            omits("model_type", "query_pre_attn_scalar", "rms_norm_eps", "head_dim", "tie_word_embeddings")(config)
        ),
    ),
    "wrapped_llava": Variant(family="wrapped_llava", shard="60KB"),
    "wrapped_llava_omits": Variant(
        family="wrapped_llava",
        config=text("llava", hidden_size=64, num_attention_heads=32),
        legacy=omits("model_type", "num_attention_heads", "num_key_value_heads", "head_dim"),
        dtype=torch.float16,
    ),
    "wrapped_llava_mistral": Variant(
        family="wrapped_llava", config={"text_config": TEXTS["mistral3"].config}, rename=nested
    ),
    "wrapped_llava_tied_text": Variant(family="wrapped_llava", config=text("llava", tie_word_embeddings=True)),
    "wrapped_mistral3": Variant(family="wrapped_mistral3"),
    "wrapped_mistral3_ties": Variant(family="wrapped_mistral3", head="tied", rename=nested, legacy=without_tie),
    "wrapped_mistral3_other_head": Variant(family="wrapped_mistral3", head="other", legacy=without_tie),
    "wrapped_llama4": Variant(family="wrapped_llama4", config={"tie_word_embeddings": True}),
    "wrapped_llama4_tied": Variant(family="wrapped_llama4", config=text("llama4", tie_word_embeddings=True)),
}

FAULTS: list[tuple[str, str, str]] = [
    ('text["final_logit_softcapping"] = None', "pass", "wrapped_gemma3"),
    ('text["tie_word_embeddings"] = tied', "pass", "wrapped_mistral3_ties"),
    ('keys.flag("tie_word_embeddings", outer in ("gemma3", "mistral3"))', "False", "wrapped_mistral3_ties"),
    ('"num_attention_heads": 32', '"num_attention_heads": 16', "wrapped_llava_omits"),
    ('("model.language_model.", "")', '("model.language_model.", "model.")', "wrapped_llava_mistral"),
    ("|multi_modal_projector", "", "wrapped_llava"),
    ('outer == "llava" and tied', 'outer == "llama4"', "wrapped_llama4_tied"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("wrapped_gemma3", {"text_config": TEXTS["llava"].config}, "llama"),
    ("wrapped_llava", {"text_config": {"model_type": "qwen2_audio"}}, "qwen2_audio"),
    ("wrapped_llava", {"text_config": None}, "text_config"),
    ("wrapped_mistral3", {"adapter": "lora"}, "adapter"),
    ("wrapped_llama4", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("wrapped_mistral3", text("mistral3", use_bidirectional_attention=True), "use_bidirectional_attention"),
]
