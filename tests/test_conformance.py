"""The conformance suite: every family of the table, every variant of its checkpoints, against Hugging Face.

A family that is added to ``archs.FAMILIES`` is under test by that alone; ``variants/<family>.py`` says how its config
and files can look. Padded sweeps must have HF's bits at every place that HF can show; packed ones give a prompt the
same bits alone and in a dataset, and are as near to an fp64 forward as HF is.

By default each variant is run in one dtype, in turn; ``make test-full`` runs all dtypes of all variants. What was run
and what was not is said at the end.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CHECKS, LONGEST, REFUSED, VARIANTS, tensors
from harness import DTYPES, Keep, Kept, Reference, Sample, differences, given, keep, only, prompts
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

import archs
from archs.contract import MODEL_HOOKS
from fpwap.prepare import open_model

FIRST = [next(name for name, variant in VARIANTS.items() if variant.family == family) for family in CHECKS]
"""One variant of each family."""
PADDED: list[Sample] = [
    *prompts([LONGEST] * 3),
    *given(prompts([LONGEST, 5, 13], seed=1), "right"),
    *given(prompts([9, LONGEST, 1], seed=2), "left"),
    *prompts([3, 2, 3], seed=3),
]
"""In microbatches of three: equal lengths, padded right, padded left, and shorter than any window."""
PACKED = prompts([LONGEST, LONGEST, 13, 9, 9, 9, 3, 1], seed=4)
SIZE = 3


def attentions(name: str) -> tuple[str, ...]:
    """The implementations to compare a variant with."""
    variant = VARIANTS[name]
    if variant.attention:
        return variant.attention
    family = archs.family(variant.values)
    return family.attention if isinstance(family.attention, tuple) else ("sdpa", "eager")


def grid() -> Iterator[Any]:
    """(variant, dtype, attention): a family's first variant with each attention in a dtype, others with one of them,
    all in turn; the rest is marked ``full``.
    """
    for turn, name in enumerate(VARIANTS):
        implementations = attentions(name)
        for number, attention in enumerate(implementations):
            for place, dtype in enumerate(DTYPES):
                chosen = name in FIRST or number == turn % len(implementations)
                marks = [] if chosen and place == (turn + number) % len(DTYPES) else [pytest.mark.full]
                label = f"{name}-{str(dtype).removeprefix('torch.')}-{attention}"
                yield pytest.param(name, dtype, attention, marks=marks, id=label)


def shown(folder: Path, name: str) -> tuple[str, ...]:
    """The hooks at which HF's modules show what ours do."""
    checks = VARIANTS[name].checks
    model = [hook for hook in MODEL_HOOKS if hook != "final_norm" or checks.norm is not None]
    ours = open_model(str(folder), None)
    own = {hook for layer in range(ours.config.layers) for hook in ours.family.hooks(ours.config, layer)}
    layer = [hook for hook in (*checks.points, "residual_pre", "residual_post") if hook in own]
    assert set(checks.points) <= own, "a point that the family does not show"
    return (*model, *layer)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_tensor_is_constant(name: str, checkpoint: Callable[[str], Path]) -> None:
    for key, tensor in tensors(checkpoint(name)).items():
        assert tensor.numel() == 1 or tensor.float().std() > 0.01, key


@pytest.mark.parametrize(("name", "dtype", "attention"), list(grid()))
def test_padded_has_the_bits_of_hugging_face(
    name: str, dtype: torch.dtype, attention: str, checkpoint: Callable[[str], Path]
) -> None:
    folder, variant = checkpoint(name), VARIANTS[name]
    hooks = shown(folder, name)
    request = {"dtype": dtype, "attn_implementation": attention, "batching": "padded", "microbatch_size": SIZE}
    found = keep(folder, PADDED, Keep(hooks), **request)
    expected = Reference.load(folder, dtype, attention, checks=variant.checks).kept(PADDED, SIZE)
    assert {hook for _, hook in found} == set(hooks)
    assert all(torch.isfinite(value).all() for rows in found.values() for value in rows.values())
    wrong = differences(found, {site: rows for site, rows in expected.items() if site[1] in hooks})
    assert not wrong, f"{len(wrong)} sites and prompts differ, first {wrong[0]}"


def once() -> Iterator[Any]:
    """(variant, dtype, attention): each variant once, in turn of both; two of three are marked ``full``."""
    for turn, name in enumerate(VARIANTS):
        choices = attentions(name)
        marks = [] if name in FIRST or turn % 3 == 0 else [pytest.mark.full]
        yield pytest.param(name, DTYPES[turn % 3], choices[turn // 3 % len(choices)], marks=marks, id=name)


@pytest.mark.parametrize(("name", "dtype", "attention"), list(once()))
def test_hooks_have_their_shapes_and_equations(
    name: str, dtype: torch.dtype, attention: str, checkpoint: Callable[[str], Path]
) -> None:
    folder, checks = checkpoint(name), VARIANTS[name].checks
    model = open_model(str(folder), None)
    by_layer = [model.family.hooks(model.config, layer) for layer in range(model.config.layers)]
    every = tuple(dict.fromkeys(hook for hooks in by_layer for hook in hooks))
    kept = keep(folder, PACKED, Keep(every), dtype=dtype, attn_implementation=attention)
    for layer, hooks in enumerate(by_layer):
        shown = [hook for at, hook in kept if at == layer and hook != "attn_pattern"]
        assert shown == [hook for hook in hooks if hook != "attn_pattern"]
        for hook in hooks:
            for sample, value in kept[layer, hook].items():
                length = len(PACKED[sample])
                square = hook == "attn_pattern"
                assert value.shape == ((*hooks[hook], length, length) if square else (length, *hooks[hook])), hook
                if square:
                    assert (value.float().sum(-1) <= 1.01).all() and (value >= 0).all()
        at = {hook: torch.cat(list(kept[layer, hook].values())) for hook in hooks if hook != "attn_pattern"}
        if checks.sums is not None:
            if "residual_mid" in at:
                assert torch.equal(at["residual_mid"], at["residual_pre"] + at["attn_out"])
            words = {"x": at["residual_pre"], "a": at["attn_out"], "m": at["mlp_out"], "mid": at.get("residual_mid")}
            assert torch.equal(at["residual_post"], eval(checks.sums, {}, words)), layer


@pytest.mark.parametrize("sample", [4, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize(("name", "dtype", "attention"), list(once()))
def test_packed_gives_a_prompt_the_same_bits_alone(
    name: str, dtype: torch.dtype, attention: str, sample: int, checkpoint: Callable[[str], Path]
) -> None:
    """Also of routed models: experts run in tiles of a fixed height of their own."""
    request = {"dtype": dtype, "attn_implementation": attention}
    hooks = ("residual_post", "logits")
    together = keep(checkpoint(name), PACKED, Keep(hooks), **request)
    alone = keep(checkpoint(name), [PACKED[sample]], Keep(hooks), **request)
    assert not differences(only(together, sample), alone)


def understood(hf: dict[str, Any]) -> Any:
    """The config that a family makes of it, if every layer has its hooks."""
    family = archs.family(hf)
    config = family.config(archs.text_config(hf))
    assert config.layers > 0 and all(family.hooks(config, layer) for layer in range(config.layers))
    return config


@pytest.mark.parametrize(("family", "changes", "named"), REFUSED)
def test_what_is_not_computed_is_refused_by_name(family: str, changes: dict[str, Any], named: str) -> None:
    hf = CHECKS[family].config | changes
    with pytest.raises(archs.ArchError, match=named):
        understood(hf)


@pytest.mark.parametrize("family", CHECKS)
def test_an_unknown_key_is_refused_by_name(family: str) -> None:
    hf = archs.text_config(CHECKS[family].config)
    with pytest.raises(archs.ArchError, match="'surprise' = 1"):
        archs.family(CHECKS[family].config).config({**hf, "surprise": 1})


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.floats()
    | st.sampled_from(["", "yarn", "silu", "full_attention"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "factor", "x"]), inner),
    max_leaves=4,
)
KEYS = sorted({key for variant in VARIANTS.values() for key in variant.values} | {"rope_scaling", "layer_types", "x"})


@settings(deadline=None, max_examples=400)
@drawn(st.sampled_from(sorted(VARIANTS)), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_any_config_is_understood_or_refused(name: str, changes: dict[str, Any]) -> None:
    hf = VARIANTS[name].values | changes
    try:
        understood(hf)
    except archs.ArchError:
        return
    assert "x" not in changes


# --- the distance from the truth ------------------------------------------------------------------------------------


class InDouble(TorchFunctionMode):
    """Makes whatever asks for fp32 use fp64: norms, softmax and rope of HF's own forward become exact."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def exact(folder: Path, name: str, dtype: torch.dtype, attention: str) -> Kept:
    """HF's forward in fp64 on weights rounded to ``dtype``, each prompt alone."""
    reference = Reference.load(folder, dtype, attention, checks=VARIANTS[name].checks)
    model: Any = reference.model.double()
    model.set_experts_implementation("eager")
    with InDouble():
        for module in model.modules():
            rope = getattr(module, "rotary_emb", None)
            if isinstance(rope, torch.nn.Module):
                module.rotary_emb = type(rope)(rope.config)
        return reference.kept(PACKED, 1)


def distance(found: Kept, truth: Kept) -> float:
    """Relative root mean square over all real tokens of what leaves the last layer."""
    site = max(site for site in truth if site[1] == "residual_post")

    def rows(kept: Kept) -> Tensor:
        return torch.cat([kept[site][sample] for sample in range(len(PACKED))]).double()

    return float((rows(found) - rows(truth)).norm() / rows(truth).norm())


def is_routed(name: str) -> bool:
    values = VARIANTS[name].values
    family = archs.family(values)
    config = family.config(archs.text_config(values))
    return any("router_logits" in family.hooks(config, layer) for layer in range(config.layers))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in FIRST] + [(name, torch.bfloat16) for name in FIRST if not is_routed(name)],
)
def test_packed_is_as_near_to_the_truth_as_hugging_face(
    name: str, dtype: torch.dtype, checkpoint: Callable[[str], Path]
) -> None:
    """Routed models in fp32 only, where they choose the experts that they choose in fp64."""
    folder, variant = checkpoint(name), VARIANTS[name]
    attention = attentions(name)[0]
    truth = exact(folder, name, dtype, attention)
    ours = keep(folder, PACKED, Keep(("residual_post",)), dtype=dtype, attn_implementation=attention)
    theirs = Reference.load(folder, dtype, attention, checks=variant.checks).kept(PACKED, len(PACKED))
    near, far = distance(ours, truth), distance(theirs, truth)
    assert far < 100 * torch.finfo(dtype).eps, "the reference itself is not near"
    assert near <= 1.05 * far
