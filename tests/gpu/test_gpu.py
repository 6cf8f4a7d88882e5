"""On an accelerator: the two guarantees, through the public API. `make test-gpu`; deselected everywhere else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fpwap import Sweep
from fpwap.callbacks.common import RawActivations

pytestmark = pytest.mark.gpu
LENGTHS = (5, 31, 1, 64, 64, 17)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=199, num_hidden_layers=3, **sizes))  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1)
    model.save_pretrained(path)
    return path


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, 199, (length,), generator=draw).tolist() for length in LENGTHS]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_padded_equals_hugging_face(folder: Path, device: str, dtype: str) -> None:
    sweep = Sweep(folder, prompts(), callbacks=[RawActivations()], batching="padded", dtype=dtype, device=device)
    result = sweep.run()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.to(device)
    ids, mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long), torch.zeros(len(LENGTHS), max(LENGTHS))
    for row, prompt in enumerate(prompts()):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), 1
    mask = mask.long()
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        out = model(
            ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            output_hidden_states=True,
            use_cache=False,
        )
    last = (torch.arange(len(LENGTHS)), mask.sum(1) - 1)
    for layer in (0, 1):
        assert torch.equal(result.activations(layer=layer), out.hidden_states[layer + 1].cpu()[last])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_prompt_alone_equals_itself_in_the_dataset(folder: Path, device: str, dtype: str) -> None:
    mixed = Sweep(folder, prompts(), callbacks=[RawActivations()], dtype=dtype, device=device).run()
    for index, prompt in enumerate(prompts()):
        alone = Sweep(folder, [prompt], callbacks=[RawActivations()], dtype=dtype, device=device, progress=False).run()
        for layer in range(3):
            assert torch.equal(mixed.activations(layer=layer)[index], alone.activations(layer=layer)[0])


WAYS: dict[str, dict[str, Any]] = {
    "resident": {"loading": "resident"},
    "streamed": {"loading": "stream", "residual": "device"},
    "residual in RAM": {"loading": "stream", "residual": "ram", "layers_per_visit": 1},
    "residual on disk": {"loading": "stream", "residual": "disk", "layers_per_visit": 2},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_where_things_lie_changes_no_bit(folder: Path, device: str, way: str, dtype: str) -> None:
    def run(**request: Any) -> Any:
        everything = [RawActivations(last_token_only=False), RawActivations(hook="logits")]
        return Sweep(
            folder, prompts(), callbacks=everything, dtype=dtype, device=device, progress=False, **request
        ).run()

    expected, found = run(), run(microbatch_tokens=None, **WAYS[way])
    for layer in range(3):
        assert torch.equal(found.activations(layer=layer).flat, expected.activations(layer=layer).flat)
    assert torch.equal(found.activations(hook="logits"), expected.activations(hook="logits"))


def test_device_memory_stays_inside_the_plan(folder: Path, device: str) -> None:
    """What torch's allocator had at its peak, beyond what the libraries took in a sweep before."""
    request: dict[str, Any] = {
        "callbacks": [RawActivations()],
        "device": device,
        "loading": "stream",
        "progress": False,
    }
    Sweep(folder, prompts(), **request).run()
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    sweep = Sweep(folder, prompts() * 40, **request)
    plan = sweep.preflight()
    assert torch.accelerator.max_memory_allocated() == before, "preflight allocates nothing on the device"
    sweep.run()
    assert torch.accelerator.max_memory_allocated() - before <= plan.device_bytes


def test_phases_are_timed_by_events(folder: Path, device: str) -> None:
    result = Sweep(folder, prompts(), callbacks=[RawActivations()], device=device, progress=False).run()
    assert any(span.device_s for span in result.profile.spans if span.phase == "forward")
