"""What tests of whole sweeps share: prompts, a callback that keeps everything, and Hugging Face as the reference.

`Reference` runs ``from_pretrained(folder)`` and shows the value at every site that its modules let one see; an edit
puts another value there, in place, so that whatever HF computes from it comes out changed. A site's values are `Kept`
as prompt -> ``[tokens, *rest]`` on the CPU, pads removed; `differences` compares two of these bit by bit.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from checkpoints import CHECKS, VOCAB, Checks
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from archs.contract import MODEL_HOOKS, READ_ONLY_HOOKS, dense_hooks, layer_hooks
from fpwap import Callback, Result, Sweep
from fpwap.callbacks.base import Layers, Phase, Site
from fpwap.result import Ragged

SEQUENTIAL_HOOKS = tuple(layer_hooks(hidden=1, heads=1, kv_heads=1, head_dim=1, mlp=dense_hooks(1)))
"""The hooks of a dense block whose MLP comes after its attention, in the order in which they are shown."""
HOOKS = (*SEQUENTIAL_HOOKS, *MODEL_HOOKS)
WRITABLE = tuple(hook for hook in HOOKS if hook not in READ_ONLY_HOOKS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRIED: list[Any] = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)]
"""As parameters of a test: fp16 in the long grid alone; the conformance suite has it in turn."""

Kept = dict[Site, dict[int, Tensor]]
Request = dict[str, Any]
"""Arguments of a `Sweep`."""
Edit = Callable[[Tensor], Tensor]
Sample = dict[str, Any] | list[int]

# --- prompts --------------------------------------------------------------------------------------------------------


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random prompts; id 0, the pad, is in none of them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def given(rows: Sequence[list[int]], side: Literal["left", "right"], width: int = 0) -> list[Sample]:
    """The same prompts as a tokenizer pads them to one width, except that pads are arbitrary ids."""
    width = width or max(map(len, rows))
    samples: list[Sample] = []
    for index, row in enumerate(rows):
        (pads,) = prompts([width - len(row)], seed=1000 + index)
        ones, zeros = [1] * len(row), [0] * len(pads)
        ids, mask = (row + pads, ones + zeros) if side == "right" else (pads + row, zeros + ones)
        samples.append({"input_ids": ids, "attention_mask": mask})
    return samples


def rectangle(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """ids and mask ``[prompts, width]`` of one padded microbatch, as SEMANTICS of padded batching have it."""
    dicts = [sample if isinstance(sample, dict) else {"input_ids": sample} for sample in samples]
    if all("attention_mask" in row for row in dicts) and len({len(row["input_ids"]) for row in dicts}) == 1:
        return torch.tensor([row["input_ids"] for row in dicts]), torch.tensor([row["attention_mask"] for row in dicts])
    bare = [unpadded(row) for row in dicts]
    width = max(map(len, bare))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in bare])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in bare])


def unpadded(sample: Sample) -> list[int]:
    if isinstance(sample, list):
        return sample
    mask = sample.get("attention_mask", [1] * len(sample["input_ids"]))
    return [token for token, real in zip(sample["input_ids"], mask, strict=True) if real]


# --- sweeps ---------------------------------------------------------------------------------------------------------


class Keep(Callback):
    """Keeps the values of every prompt at its sites, as they were given."""

    def __init__(
        self,
        hooks: Sequence[str] = ("residual_post",),
        layers: Layers = "all",
        phase: Phase = "read",
        positions: Literal["all", "last"] | Sequence[int] = "all",
    ) -> None:
        self.target_hooks, self.target_layers, self.phase, self.positions = tuple(hooks), layers, phase, positions

    def on_sweep_start(self, ctx: object) -> None:
        self._kept: Kept = {}

    def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> None:
        at = self._kept.setdefault((layer_idx, hook), {})
        assert not at.keys() & set(sample_ids.tolist()), "a prompt was shown twice"
        at.update(zip(sample_ids.tolist(), acts, strict=True))

    def state_dict(self, layer: int | None, hook: str) -> dict[str, Any]:
        rows = self._kept.get((layer, hook), {})
        return {"ids": list(rows), "rows": [row.clone() for row in rows.values()]}

    def load_state_dict(self, layer: int | None, hook: str, state: Mapping[str, Any]) -> None:
        self._kept[layer, hook] = dict(zip(state["ids"], state["rows"], strict=True))

    @property
    def kept(self) -> Kept:
        return {site: {i: value.cpu() for i, value in sorted(rows.items())} for site, rows in self._kept.items()}


def keep(folder: Path, dataset: Sequence[Sample], callback: Keep | None = None, **request: Any) -> Kept:
    """One quiet sweep; what ``callback`` kept of it, by default all tokens at every hook of every layer."""
    callback = callback or Keep(HOOKS)
    run(folder, dataset, callback, **request)
    return callback.kept


def run(folder: Path, dataset: Any, *callbacks: Callback, **request: Any) -> Result:
    return Sweep(folder, dataset, callbacks=callbacks, **{"progress": False, **request}).run()


def flat(result: Result, layer: int | None, hook: str = "residual_post", name: str | None = None) -> Tensor:
    """All tokens' rows of a per-token output ``[T, *rest]``."""
    ragged = result.activations(layer, hook, name)
    assert isinstance(ragged, Ragged)
    return ragged.flat


def pooled(result: Result, layer: int | None, hook: str = "residual_post", name: str | None = None) -> Tensor:
    """A per-prompt output ``[N, *rest]``."""
    rows = result.activations(layer, hook, name)
    assert isinstance(rows, Tensor)
    return rows


def only(kept: Kept, sample: int) -> Kept:
    """One prompt's part, as if it had been the only one."""
    return {site: {0: rows[sample]} for site, rows in kept.items()}


def differences(found: Kept, expected: Kept) -> list[str]:
    """Where two records of the same sites and prompts differ in a bit; the shape behind a token may be folded."""
    lines = [
        f"{site}: {len(found.get(site, {}))} prompts"
        for site in expected
        if found.get(site, {}).keys() != expected[site].keys()
    ]
    lines += [f"{site} was not expected" for site in found.keys() - expected.keys()]
    for site in found.keys() & expected.keys():
        for sample in found[site].keys() & expected[site].keys():
            a, b = found[site][sample], expected[site][sample]
            if a.dtype != b.dtype or a.numel() != b.numel() or not torch.equal(a.reshape(b.shape), b):
                lines.append(f"{site} of prompt {sample}: {tuple(a.shape)} {a.dtype}, {tuple(b.shape)} {b.dtype}")
    return sorted(lines)


# --- Hugging Face ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """A checkpoint as Hugging Face loads it."""

    model: PreTrainedModel
    checks: Checks

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype,
        attention: str = "sdpa",
        device: str = "cpu",
        *,
        checks: Checks | None = None,
    ) -> "Reference":
        """checks: where its modules are; by default those of the first family of its model type."""
        auto: Any = checks.auto if checks else AutoModelForCausalLM
        model: Any = auto.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
        model_type = model.config.model_type
        found = (known for known in CHECKS.values() if known.config["model_type"] == model_type)
        return cls(model.to(device), checks or next(found))

    @property
    def layers(self) -> Sequence[torch.nn.Module]:
        layers: Any = self.model.get_submodule(self.checks.layers)
        return list(layers)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor, **more: Any) -> Any:
        """HF's own output object. The positions are those that `generate` would pass."""
        core: Any = self.model.base_model
        device = self.model.device
        if getattr(getattr(core, "rotary_emb", None), "rope_type", "") == "dynamic":  # remembers the longest batch
            core.rotary_emb = type(core.rotary_emb)(self.model.config).to(device)
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        if not self.checks.positions:
            del given["position_ids"]
        return self.model(**{key: value.to(device) for key, value in given.items()}, use_cache=False, **more)

    def kept(self, samples: Sequence[Sample], size: int, edits: Mapping[Site, Edit] | None = None) -> Kept:
        """All sites, microbatch by microbatch of ``size`` rows, with ``edits`` made on the way."""
        kept: Kept = {}
        for first in range(0, len(samples), size):
            ids, mask = rectangle(samples[first : first + size])
            seen: dict[Site, Tensor] = {}
            with self._watched(seen, edits or {}):
                out = self.forward(ids, mask, output_attentions=self.model.config._attn_implementation == "eager")
            seen[None, "logits"] = out.logits
            for row, real in enumerate(mask.bool()):
                for site, value in seen.items():
                    value = value if value.shape[:2] == mask.shape else value.view(*mask.shape, *value.shape[1:])
                    kept.setdefault(site, {})[first + row] = value[row].cpu()[real]
                for layer, pattern in enumerate(out.attentions or ()):
                    square = pattern[row].cpu()[:, real][:, :, real]
                    kept.setdefault((layer, "attn_pattern"), {})[first + row] = square
        return kept

    @contextlib.contextmanager
    def _watched(self, seen: dict[Site, Tensor], edits: Mapping[Site, Edit]) -> Iterator[None]:
        def visit(site: Site, value: Tensor) -> None:
            if site in edits:
                value.copy_(edits[site](value))
            seen[site] = value.clone()

        def watch(module: torch.nn.Module, side: str, site: Site, which: str = "[0]") -> Any:
            def look(_: object, arguments: tuple[Any, ...], keywords: dict[str, Any], returned: Any = None) -> None:
                value = (*arguments, *keywords.values()) if side == "in" else returned
                value = value if isinstance(value, Tensor) else value[int(which[1]) if which[0] == "[" else 0]
                if which[0] != "[":
                    part, parts = map(int, which.split("/"))
                    value = value.chunk(parts, dim=-1)[part]
                visit(site, value)

            if side == "in":
                return module.register_forward_pre_hook(look, with_kwargs=True)
            return module.register_forward_hook(look, with_kwargs=True)

        rotate, turns = modeling_llama.apply_rotary_pos_emb, iter(range(len(self.layers)))

        def rotated(*arguments: Any) -> tuple[Tensor, Tensor]:
            both: tuple[Tensor, Tensor] = rotate(*arguments)
            layer = next(turns)
            for hook, value in zip(("q_rot", "k_rot"), both, strict=True):
                visit((layer, hook), value.transpose(1, 2))
            return both

        handles = [watch(self.layers[0], "in", (None, "embedding"))]
        for layer, module in enumerate(self.layers):
            handles.append(watch(module, "in", (layer, "residual_pre")))
            for hook, point in self.checks.points.items():
                path, side, *which = point.split(" ")
                with contextlib.suppress(AttributeError):  # layers of one model may differ
                    handles.append(watch(module.get_submodule(path), side, (layer, hook), *which))
            handles.append(watch(module, "out", (layer, "residual_post")))
        if self.checks.norm is not None:
            handles.append(watch(self.model.get_submodule(self.checks.norm), "out", (None, "final_norm")))
        llama = self.model.config.model_type == "llama"
        with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", rotated) if llama else contextlib.nullcontext():
            yield
        for handle in handles:
            handle.remove()


# --- checkpoints, changed -------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of ``config.json``; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
