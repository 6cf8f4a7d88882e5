"""The two guarantees about numbers, through the public API.

Padded: every hook that Hugging Face can show has HF's bits. Packed: a prompt's bits depend on the prompt alone.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CORE, LONGEST
from harness import (
    DTYPES,
    HOOKS,
    SEQUENTIAL_HOOKS,
    TRIED,
    Keep,
    Kept,
    Reference,
    Request,
    Sample,
    differences,
    flat,
    given,
    keep,
    only,
    prompts,
    rectangle,
    run,
)
from torch import Tensor

from fpwap.callbacks.base import Site
from fpwap.callbacks.common import RawActivations

Checkpoint = Callable[[str], Path]
FAMILIES = ("llama_gqa", "gpt2")
ATTENTION = ("sdpa", "eager")

# --- padded: Hugging Face's bits ------------------------------------------------------------------------------------

SIZE = 3
PADDED: list[Sample] = [
    *prompts([1, 9, LONGEST], seed=1),  # the shortest first
    *given(prompts([1, LONGEST, 13], seed=2), "left"),
    *given(prompts([1, 20, LONGEST], seed=3), "right"),
    *given(prompts([5, 3, 8], seed=4), "left", width=LONGEST),  # wider than the longest
    *given(prompts([12], seed=5), "left", width=14),  # both sides in one microbatch
    *given(prompts([7, 14], seed=6), "right", width=14),
    *given(prompts([4], seed=7), "left", width=9),  # widths that differ: HF's collator pads them anew
    *given(prompts([11, 2], seed=8), "right", width=12),
    *prompts([16] * 3, seed=9),
    *prompts([1] * 3, seed=10),
    *prompts([6, 19], seed=11),  # a trailing microbatch that is not full
]
"""Microbatches of three rows."""

GRID = [(name, dtype, attention) for name in FAMILIES for dtype in DTYPES for attention in ATTENTION]
GRID += [
    (name, DTYPES[index % 3], ATTENTION[index % 2])
    for index, name in enumerate(
        """llama llama_attention_bias llama_dynamic llama_head_dim llama_llama3 llama_mlp_bias llama_mqa llama_no_prefix
        llama_tied_head_alone llama_tied_other_head llama_yarn gpt2_by_layer gpt2_n_inner gpt2_no_prefix gpt2_other_head
        gpt2_unscaled gpt2_untied""".split()
    )
]
GRID += [("gpt2_upcast", dtype, "eager") for dtype in DTYPES]


@pytest.mark.parametrize(("name", "dtype", "attention"), GRID)
def test_padded_equals_hugging_face_at_every_hook(
    name: str, dtype: torch.dtype, attention: str, checkpoint: Checkpoint, device: str
) -> None:
    folder = checkpoint(name)
    request: Request = {"batching": "padded", "microbatch_size": SIZE, "attn_implementation": attention}
    found = keep(folder, PADDED, dtype=dtype, device=device, **request)
    expected = Reference.load(folder, dtype, attention, device).kept(PADDED, SIZE)
    if attention == "sdpa":  # of which HF shows no probabilities
        found = {site: rows for site, rows in found.items() if site[1] != "attn_pattern"}
    assert differences(found, expected) == []


@pytest.mark.parametrize("dtype", TRIED)
@pytest.mark.parametrize("name", FAMILIES)
def test_padded_equals_hidden_states_and_the_bare_call(
    name: str, dtype: torch.dtype, checkpoint: Checkpoint, device: str
) -> None:
    """In HF's own words; under right padding without position_ids, at equal lengths without a mask."""
    folder, reference = checkpoint(name), Reference.load(checkpoint(name), dtype, "sdpa", device)
    for dataset in (prompts([4, LONGEST, 1, 9]), prompts([15] * 4)):
        result = run(
            folder,
            dataset,
            *(RawActivations(hook=hook, last_token_only=False) for hook in ("residual_post", "final_norm", "logits")),
            batching="padded",
            dtype=dtype,
            device=device,
        )
        ids, mask = (tensor.to(device) for tensor in rectangle(dataset))
        given_mask = {} if mask.all() else {"attention_mask": mask}
        with torch.no_grad():
            out = reference.model(ids, **given_mask, output_hidden_states=True)
        layers = len(reference.layers)
        expected: dict[Site, Tensor] = {
            (layer, "residual_post"): out.hidden_states[layer + 1] for layer in range(layers - 1)
        }
        expected |= {(None, "final_norm"): out.hidden_states[-1], (None, "logits"): out.logits}
        for (layer, hook), value in expected.items():
            assert torch.equal(flat(result, layer, hook), value[mask.bool()].cpu()), (layer, hook)
        assert not torch.equal(flat(result, -1), out.hidden_states[-1][mask.bool()].cpu())


@pytest.mark.parametrize("dtype", TRIED)
@pytest.mark.parametrize("name", FAMILIES)
def test_padded_logits_are_those_of_logits_to_keep(
    name: str, dtype: torch.dtype, checkpoint: Checkpoint, device: str
) -> None:
    folder, reference = checkpoint(name), Reference.load(checkpoint(name), dtype, "sdpa", device)
    equal, ragged = prompts([15] * 5), given(prompts([LONGEST, 2, 9, 1, 13]), "left")
    cases: list[tuple[Sequence[Sample], Any, Any]] = [
        (equal, "last", 1),
        (equal, [3], torch.tensor([3])),
        (equal, [0, -2], torch.tensor([0, 13])),
        (ragged, "last", 1),
    ]
    for dataset, positions, to_keep in cases:
        callback = Keep(["logits"], positions=positions)
        found = keep(folder, dataset, callback, batching="padded", microbatch_size=2, dtype=dtype, device=device)
        for first in range(0, 5, 2):
            expected = reference.forward(*rectangle(dataset[first : first + 2]), logits_to_keep=to_keep).logits
            for row, value in enumerate(expected.cpu()):
                assert torch.equal(found[None, "logits"][first + row], value), (positions, first + row)


@pytest.mark.parametrize("dtype", TRIED)
def test_padded_last_logits_under_right_padding(dtype: torch.dtype, checkpoint: Checkpoint, device: str) -> None:
    """HF cannot keep another position of each row; its head can be given those rows alone."""
    folder, reference = checkpoint("llama_gqa"), Reference.load(checkpoint("llama_gqa"), dtype, "sdpa", device)
    dataset = prompts([3, LONGEST, 9])
    found = keep(folder, dataset, Keep(["logits"], positions="last"), batching="padded", dtype=dtype, device=device)
    normed = reference.kept(dataset, 3)[None, "final_norm"]
    with torch.no_grad():
        expected = reference.model.lm_head(torch.stack([normed[i][-1:] for i in range(3)]).to(device)).cpu()
    assert all(torch.equal(found[None, "logits"][i], expected[i]) for i in range(3))


# --- packed: a prompt's bits depend on the prompt alone -------------------------------------------------------------

LENGTHS = [*range(1, LONGEST + 1), *[LONGEST] * 20, *[7] * 40, *[11] * 3, *[23] * 2, 1]
ORDER = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(5)).tolist()
MIX = prompts([LENGTHS[index] for index in ORDER])
"""More rows than one tile, groups of one prompt and of many, lengths on both sides of every vector width."""
assert sum(LENGTHS) > 1100
FEW = 25
"""Prompts of `MIX` where other prompts are not what is tested."""
ENDS = ("residual_pre", "attn_pattern", "residual_post", "logits")


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint, device: str) -> Callable[[str, torch.dtype, str], Kept]:
    """The sweep of `MIX` at every hook."""
    made: dict[Any, Kept] = {}

    def sweep(name: str, dtype: torch.dtype, attention: str = "sdpa") -> Kept:
        key = name, dtype, attention
        if key not in made:
            made[key] = keep(checkpoint(name), MIX, dtype=dtype, attn_implementation=attention, device=device)
        return made[key]

    return sweep


def first(rows: dict[int, Tensor]) -> dict[int, Tensor]:
    return {sample: rows[sample] for sample in range(FEW)}


Whole = Callable[..., Kept]
PACKED: list[Any] = [
    pytest.param(name, dtype, attention, marks=pytest.mark.full if dtype == torch.float16 else ())
    for name in FAMILIES
    for dtype in DTYPES
    for attention in ATTENTION
]
PACKED += [("llama", torch.float32, "sdpa"), ("gpt2_upcast", torch.float32, "eager")]
ALONE = (1, 7, 8, 11, 17, 23, LONGEST)
"""Lengths at which a batched product was seen to depend on how many prompts are in it, and the ends."""


@pytest.mark.parametrize(("name", "dtype", "attention"), PACKED)
def test_packed_prompt_alone_has_the_bits_it_has_in_the_dataset(
    name: str, dtype: torch.dtype, attention: str, whole: Whole, checkpoint: Checkpoint, device: str
) -> None:
    expected = whole(name, dtype, attention)
    for sample in [next(i for i, row in enumerate(MIX) if len(row) == length) for length in ALONE]:
        alone = keep(checkpoint(name), [MIX[sample]], dtype=dtype, attn_implementation=attention, device=device)
        assert differences(alone, only(expected, sample)) == []


NEIGHBOURS = {
    "reversed": range(len(MIX))[::-1],
    "every other": range(0, len(MIX), 2),
    "doubled": [*range(len(MIX)), *range(len(MIX))],
}


@pytest.mark.parametrize("dtype", TRIED)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("order", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_packed_bits_do_not_depend_on_the_other_prompts(
    name: str, dtype: torch.dtype, order: list[int], whole: Whole, checkpoint: Checkpoint, device: str
) -> None:
    found = keep(checkpoint(name), [MIX[index] for index in order], dtype=dtype, device=device)
    expected = whole(name, dtype)
    assert (
        differences(found, {site: {i: rows[s] for i, s in enumerate(order)} for site, rows in expected.items()}) == []
    )


REQUESTS: list[Request] = [
    {"layers_per_visit": 1, "residual": "disk"},
    {"layers_per_visit": 2, "residual": "ram"},
    {"layers_per_visit": 2, "residual": "disk", "microbatch_tokens": 300},
    {"layers_per_visit": 99},
    {"microbatch_tokens": 100},
    {"microbatch_tokens": 1024},
    {"microbatch_tokens": 100_000},
]


@pytest.mark.parametrize("dtype", TRIED)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_packed_bits_do_not_depend_on_tier_group_or_partition(
    name: str, dtype: torch.dtype, request_: Request, whole: Whole, checkpoint: Checkpoint, device: str
) -> None:
    found = keep(checkpoint(name), MIX, Keep(ENDS), dtype=dtype, device=device, **request_)
    expected = whole(name, dtype)
    assert differences(found, {site: expected[site] for site in found}) == []


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n, d in zip(FAMILIES * 2, DTYPES * 2, strict=False)])
def test_packed_bits_do_not_depend_on_the_hooks_asked_for_or_the_last_layer(
    name: str, dtype: torch.dtype, whole: Whole, checkpoint: Checkpoint, device: str
) -> None:
    expected = whole(name, dtype)
    for hook in HOOKS:
        found = keep(checkpoint(name), MIX[:FEW], Keep([hook], layers=[1]), dtype=dtype, device=device)
        site = (1 if hook in SEQUENTIAL_HOOKS else None, hook)
        assert differences(found, {site: first(expected[site])}) == []


@pytest.mark.parametrize("positions", ["last", [0], [-1, 0]], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_bits_do_not_depend_on_the_positions_asked_for(
    name: str, positions: Any, whole: Whole, checkpoint: Checkpoint, device: str
) -> None:
    chosen = [-1] if positions == "last" else positions
    for dtype in DTYPES:
        found = keep(checkpoint(name), MIX[:FEW], Keep(HOOKS, positions=positions), dtype=dtype, device=device)
        expected = {
            (at, hook): {i: v[:, chosen] if hook == "attn_pattern" else v[chosen] for i, v in first(rows).items()}
            for (at, hook), rows in whole(name, dtype).items()
        }
        assert differences(found, expected) == []


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", TRIED)
@pytest.mark.parametrize("name", FAMILIES)
def test_capturing_every_hook_leaves_the_residual_stream_as_it_was(
    name: str, dtype: torch.dtype, attention: Any, batching: Any, checkpoint: Checkpoint, device: str
) -> None:
    request = {"dtype": dtype, "attn_implementation": attention, "batching": batching, "device": device}
    data = MIX[:FEW]
    quiet = run(checkpoint(name), data, RawActivations(last_token_only=False), **request)
    watched = run(checkpoint(name), data, Keep(HOOKS), RawActivations(last_token_only=False), **request)
    for layer in range(3):
        assert torch.equal(flat(watched, layer), flat(quiet, layer))


@pytest.mark.parametrize("name", CORE)
def test_residual_equations_hold_exactly(name: str, checkpoint: Checkpoint, device: str) -> None:
    dtype = DTYPES[CORE.index(name) % 3]
    kept = keep(checkpoint(name), MIX[:FEW], dtype=dtype, device=device)
    for sample in range(FEW):
        stream = kept[None, "embedding"][sample]
        for layer in range(3):
            at = {hook: kept[layer, hook][sample] for hook in SEQUENTIAL_HOOKS}
            assert torch.equal(at["residual_pre"], stream)
            assert torch.equal(at["residual_mid"], at["residual_pre"] + at["attn_out"])
            assert torch.equal(at["residual_post"], at["residual_mid"] + at["mlp_out"])
            stream = at["residual_post"]
