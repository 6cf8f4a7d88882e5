"""Stored weight formats: against arithmetic on single bytes, and against Hugging Face's own dequantisation."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fpwap.errors import ModelError
from fpwap.formats import Quantisation, fp8_blocks, mxfp4, quantisation

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Equal to the sign of a zero; one NaN is as good as another."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    whole = torch.int32 if found.dtype == torch.float32 else torch.int16
    same = found.contiguous().view(whole) == expected.contiguous().view(whole)
    assert bool((same | (found.isnan() & expected.isnan())).all())


def random_bytes(seed: int, *shape: int, below: int = 256) -> Tensor:
    return torch.randint(below, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# --- fp8 blocks -----------------------------------------------------------------------------------------------------


def e4m3(byte: int) -> float:
    """One sign bit, four of exponent (bias 7), three of mantissa; all ones is NaN, and there is no infinity."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    return sign * (math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10))


def scale_factors(seed: int, *shape: int) -> Tensor:
    """Of many magnitudes and of all 24 bits, so that rounding them before the product shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) * torch.randint(-12, 4, shape, generator=generator).float().exp2()


def one_by_one(stored: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Each value times the scale of its block, rounded to fp32, then to dtype."""
    factors = scales.numpy()
    made = [
        [np.float32(e4m3(byte)) * factors[i // block[0], j // block[1]] for j, byte in enumerate(row)]
        for i, row in enumerate(stored.tolist())
    ]
    return torch.from_numpy(np.array(made, dtype=np.float32)).to(dtype)


def decoded_fp8(stored: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    out = torch.full(stored.shape, math.nan, dtype=dtype)
    fp8_blocks(stored.view(torch.float8_e4m3fn), scales, block, out)
    return out


@given(st.tuples(*[st.integers(1, 23)] * 2), st.tuples(*[st.integers(1, 9)] * 2), dtypes, seeds)
def test_fp8_is_each_value_times_its_blocks_scale(
    shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    stored = random_bytes(seed, *shape)
    scales = scale_factors(seed, -(-shape[0] // block[0]), -(-shape[1] // block[1]))
    assert_same_bits(decoded_fp8(stored, scales, block, dtype), one_by_one(stored, scales, block, dtype))


def test_fp8_bytes_are_exact() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(16, 16)
    expected = torch.tensor([e4m3(byte) for byte in range(256)]).view(16, 16)
    assert_same_bits(decoded_fp8(every, torch.ones(1, 1), (16, 16), torch.float32), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_short_last_blocks_as_in_deepseek_v3(dtype: torch.dtype) -> None:
    stored, scales = random_bytes(0, 576, 200), scale_factors(0, 5, 2)
    found = decoded_fp8(stored, scales, (128, 128), dtype)
    assert_same_bits(found, one_by_one(stored, scales, (128, 128), dtype))


@given(st.tuples(*[st.integers(1, 5)] * 2), st.tuples(*[st.integers(1, 9)] * 2), dtypes, seeds)
def test_fp8_is_what_hugging_face_makes_of_whole_blocks(
    grid: tuple[int, int], block: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    stored, scales = random_bytes(seed, grid[0] * block[0], grid[1] * block[1]), scale_factors(seed, *grid)
    theirs = Fp8Dequantize(None)  # type: ignore[no-untyped-call]
    expected = theirs._dequantize_one(stored.view(torch.float8_e4m3fn), scales, dtype)
    assert_same_bits(decoded_fp8(stored, scales, block, dtype), expected)


def test_fp8_writes_into_a_part_of_a_buffer_and_nowhere_else() -> None:
    stored, scales, buffer = random_bytes(1, 6, 7), scale_factors(1, 2, 2), torch.full((10, 12), 5.0)
    fp8_blocks(stored.view(torch.float8_e4m3fn), scales, (4, 4), buffer[2:8, 3:10])
    assert_same_bits(buffer[2:8, 3:10], one_by_one(stored, scales, (4, 4), torch.float32))
    buffer[2:8, 3:10] = 5.0
    assert bool((buffer == 5.0).all())


# --- mxfp4 ----------------------------------------------------------------------------------------------------------


def nibble(bits: int) -> float:
    return math.copysign(MAGNITUDES[bits & 7], -1.0 if bits & 8 else 1.0)


def four_bits(blocks: Tensor, scales: Tensor) -> list[list[float]]:
    """``[rows, groups * 32]`` by exact arithmetic: of each byte the low half first, times 2 ** (scale - 127)."""

    def row(bytes_of: Sequence[Sequence[int]], exponents: Sequence[int]) -> list[float]:
        return [
            math.ldexp(nibble(bits), exponent - 127)
            for group, exponent in zip(bytes_of, exponents, strict=True)
            for byte in group
            for bits in (byte & 15, byte >> 4)
        ]

    return [row(*pair) for pair in zip(blocks.tolist(), scales.tolist(), strict=True)]


def decoded_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.full((blocks.shape[0], blocks.shape[1] * 32), math.nan, dtype=dtype)
    mxfp4(blocks, scales, out)
    return out


@given(st.integers(1, 9), st.integers(1, 5), dtypes, seeds)
def test_mxfp4_is_exact_in_the_range_of_the_dtype(rows: int, groups: int, dtype: torch.dtype, seed: int) -> None:
    blocks, scales = random_bytes(seed, rows, groups, 16), random_bytes(seed + 1, rows, groups, below=253)
    if dtype == torch.float16:
        scales = 108 + scales % 30
    expected = torch.tensor(four_bits(blocks, scales), dtype=torch.float64)
    found = decoded_mxfp4(blocks, scales, dtype)
    assert torch.equal(found.double(), expected)
    assert torch.equal(found.signbit(), expected.signbit())


def every_byte_under_every_scale() -> tuple[Tensor, Tensor]:
    """blocks ``[256, 16, 16]``, scales ``[256, 16]``: a row for each scale, 255 (NaN in the standard) included."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(256, 1, 1)
    return blocks, torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)


def test_mxfp4_bytes_are_exact_in_bf16_under_every_scale_that_fits() -> None:
    blocks, scales = (part[:253] for part in every_byte_under_every_scale())
    expected = torch.tensor(four_bits(blocks, scales), dtype=torch.float64)
    assert torch.equal(decoded_mxfp4(blocks, scales, torch.bfloat16).double(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4_is_what_hugging_face_makes_of_every_byte_and_scale(dtype: torch.dtype) -> None:
    blocks, scales = every_byte_under_every_scale()
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0]
    assert_same_bits(decoded_mxfp4(blocks, scales, dtype).t(), expected)


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), dtypes, seeds)
def test_mxfp4_experts_fill_the_transposed_matrix_that_hugging_face_holds(
    experts: int, rows: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    blocks, scales = random_bytes(seed, experts, rows, groups, 16), random_bytes(seed + 1, experts, rows, groups)
    out = torch.full((experts, groups * 32, rows), math.nan, dtype=dtype)
    for index in range(experts):
        mxfp4(blocks[index], scales[index], out[index].t())
    assert_same_bits(out, convert_moe_packed_tensors(blocks, scales, dtype=dtype))


# --- quantization_config --------------------------------------------------------------------------------------------

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {}}, None),
        ({"quantization_config": FP8}, Quantisation("fp8", (128, 128))),
        ({"quantization_config": FP8 | {"weight_block_size": (1, 64)}}, Quantisation("fp8", (1, 64))),
        (
            {"quantization_config": FP8 | {"fmt": "e4m3", "activation_scheme": "dynamic"}},
            Quantisation("fp8", (128, 128)),
        ),
        ({"quantization_config": FP8 | {"modules_to_not_convert": ["lm_head"]}}, Quantisation("fp8", (128, 128))),
        (
            {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}},
            Quantisation("mxfp4"),
        ),
        ({"quantization_config": {"quant_method": "mxfp4", "dequantize": True}}, Quantisation("mxfp4")),
    ],
)
def test_a_supported_config_is_read(raw: dict[str, Any], expected: Quantisation | None) -> None:
    assert quantisation(raw) == expected


METHODS = ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "hqq", "torchao", "FP8"]


@pytest.mark.parametrize("method", METHODS)
def test_another_method_is_refused_by_name(method: str) -> None:
    with pytest.raises(ModelError, match=f"'{method}' are not supported; supported: fp8 and mxfp4"):
        quantisation({"quantization_config": {"quant_method": method, "bits": 4}})


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"bits": 4}, "must be a mapping with 'quant_method'"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq' are not supported; supported: fp8 and mxfp4"),
        (FP8 | {"activation_scheme": "static"}, "holds 'activation_scheme' = 'static'"),
        ("fp8", "'quantization_config' must be a mapping"),
        ({"quant_method": "fp8"}, "'weight_block_size', two positive integers, not None"),
        (FP8 | {"weight_block_size": None}, "'weight_block_size', two positive integers, not None"),
        (FP8 | {"weight_block_size": 128}, "'weight_block_size', two positive integers, not 128"),
        (FP8 | {"weight_block_size": [128]}, "'weight_block_size', two positive integers"),
        (FP8 | {"weight_block_size": [128, 0]}, "'weight_block_size', two positive integers"),
        (FP8 | {"weight_block_size": [128, -1]}, "'weight_block_size', two positive integers"),
        (FP8 | {"weight_block_size": [128, 1.0]}, "'weight_block_size', two positive integers"),
        (FP8 | {"weight_block_size": [128, True]}, "'weight_block_size', two positive integers"),
        (FP8 | {"weight_block_size": "ab"}, "'weight_block_size', two positive integers"),
        (FP8 | {"fmt": "e5m2"}, "holds 'fmt' = 'e5m2'"),
        (FP8 | {"surprise": 1}, "'quantization_config' of fp8 holds 'surprise'"),
        ({"quant_method": "mxfp4", "surprise": 1}, "'quantization_config' of mxfp4 holds 'surprise'"),
        ({"quant_method": "mxfp4", "weight_block_size": [1, 32]}, "of mxfp4 holds 'weight_block_size'"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_by_name(found: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        quantisation({"quantization_config": found})
