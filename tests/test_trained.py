"""Checkpoints with trained weights, whose activations are large and whose attention is far from uniform.

Made by ``tools/trained_checkpoints.py FOLDER``; run with ``FPWAP_TRAINED=FOLDER pytest -m trained``, or all at once by
``make test-trained``.
"""

import os
from pathlib import Path

import pytest
import torch
from harness import Keep, differences, keep, only

from fpwap.callbacks.common import RawActivations
from fpwap.sweep import Sweep
from fpwap.verify import verify

pytestmark = pytest.mark.trained
NAMES = ("smollm2-135m", "gemma3-270m")
TEXT = "The library of Alexandria held four hundred thousand scrolls, or so it is told; none of them is left. " * 3


def folder(name: str) -> Path:
    return Path(os.environ["FPWAP_TRAINED"]) / name


def ids(name: str) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(folder(name) / "tokenizer.json")).encode(TEXT).ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_equal(name: str, dtype: torch.dtype) -> None:
    text = ids(name)
    report = verify(str(folder(name)), [text, text[:40], text[5:17], text[:1]], dtype=dtype)
    assert report.passed, report.summary()
    assert {row.layer for row in report.rows} >= set(range(18))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_certified(name: str) -> None:
    text = ids(name)
    dataset = [text[start : start + length] for start, length in ((0, 60), (3, 50), (9, 33), (1, 33), (0, 7))]
    result = Sweep(
        folder(name), dataset, callbacks=[RawActivations([-1])], dtype="bfloat16", verify=True, progress=False
    ).run()
    assert len(result.manifest["certificate"]["layers"]) >= 18
    kept = keep(folder(name), dataset, Keep(("residual_post",)), dtype="bfloat16")
    assert not differences(only(kept, 2), keep(folder(name), dataset[2:3], Keep(("residual_post",)), dtype="bfloat16"))
