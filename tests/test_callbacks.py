"""The protocol and the four reference callbacks, driven by hand and compared with numpy in fp64.

The driver below plays the engine: batches of prompts of one length, odd sizes, layers interleaved, and ``acts`` in a
buffer that is overwritten after every call, as a borrowed view is.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpwap.callbacks import Callback, Context, Emit, LayerArtifact, WriteBack, moments
from fpwap.callbacks.base import Declared, Site
from fpwap.callbacks.common import DiffOfMeans, IncrementalPCA, RawActivations, SteerInBasis
from fpwap.callbacks.moments import Spread
from fpwap.errors import CallbackError, RequestError

POST = "residual_post"
CPU = torch.device("cpu")

# --- a small engine -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeContext:
    """Prompts of these lengths in a model of two layers; hook shapes as given."""

    lengths: Sequence[int]
    rest: tuple[int, ...] = (8,)
    samples: Sequence[Mapping[str, Any]] = ()
    layers: int = 2
    vocab: int = 50
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default=CPU)

    @property
    def hidden(self) -> int:
        return int(np.prod(self.rest))

    @property
    def n_prompts(self) -> int:
        return len(self.lengths)

    @property
    def total_tokens(self) -> int:
        return sum(self.lengths)

    def widths(self, hook: str) -> tuple[int, ...]:
        return self.rest

    def dtype_at(self, hook: str) -> torch.dtype:
        return self.dtype

    def sites(self, callback: Callback) -> tuple[Site, ...]:
        return tuple((layer, hook) for layer in range(self.layers) for hook in callback.target_hooks)

    def tokens(self, sample_id: int) -> Tensor:
        return torch.arange(self.lengths[sample_id], dtype=torch.int32) + sample_id

    def length(self, sample_id: int) -> int:
        return self.lengths[sample_id]

    def metadata(self, sample_id: int) -> Mapping[str, Any]:
        return self.samples[sample_id]


Acts = Sequence[Tensor]
"""Per prompt ``[length, *rest]``, or ``[heads, length, length]`` for attn_pattern."""


def batches(lengths: Sequence[int], size: int = 3) -> Iterator[list[int]]:
    """Sample ids of one length together, longest first, ``size`` at most at a time: never in the dataset's order."""
    for length in sorted(set(lengths), reverse=True):
        ids = [i for i, n in enumerate(lengths) if n == length]
        yield from (ids[start : start + size] for start in range(0, len(ids), size))


def selected(callback: Callback, acts: Tensor, axis: int) -> Tensor:
    if isinstance(callback.positions, str):
        return acts if callback.positions == "all" else acts.narrow(axis, acts.shape[axis] - 1, 1)
    return acts.index_select(axis, torch.tensor([p % acts.shape[axis] for p in callback.positions]))


def show(callback: Callback, site: Site, acts: Acts, ids: list[int], device: torch.device) -> Any:
    """One call of on_batch. What comes back is copied, then the buffer that ``acts`` lay in is filled with NaN."""
    layer, hook = site
    buffer = selected(callback, torch.stack([acts[i] for i in ids]), 2 if hook == "attn_pattern" else 1).to(device)
    shown = buffer.clone()
    answer = callback.on_batch(layer, hook, buffer, torch.tensor(ids))
    assert torch.equal(buffer.nan_to_num(), shown.nan_to_num()), "a borrower wrote into acts"
    if isinstance(answer, Emit):
        answer = Emit(answer.values.cpu().clone(), answer.per, answer.name, answer.dtype)
    buffer.fill_(torch.nan)
    return answer


def fold(callback: Callback, ctx: FakeContext, site: Site, acts: Acts, size: int = 3) -> list[tuple[list[int], Any]]:
    """All batches of a site: (sample ids, what on_batch returned)."""
    return [(ids, show(callback, site, acts, ids, ctx.device)) for ids in batches(ctx.lengths, size)]


def emitted(callback: Callback, ctx: FakeContext, acts: Acts, site: Site = (1, POST)) -> list[Tensor]:
    """Per prompt, in the dataset's order, what was emitted; as declared, every prompt once."""
    callback.on_sweep_start(ctx)
    declared = callback.declare(ctx)[site[1]]
    rows: dict[int, Tensor] = {}
    for ids, emit in fold(callback, ctx, site, acts):
        assert isinstance(emit, Emit)
        values = emit.values.to(emit.dtype or emit.values.dtype)
        lead = (len(ids),) if emit.per == "prompt" else (len(ids), ctx.length(ids[0]))
        assert declared == Declared(emit.per, tuple(values.shape[len(lead) :]), values.dtype, emit.name)
        assert values.shape[: len(lead)] == lead
        assert rows.keys().isdisjoint(ids)
        rows |= dict(zip(ids, values, strict=True))
    return [rows[i] for i in range(ctx.n_prompts)]


def artifact(callback: Callback, ctx: FakeContext, acts: Acts, site: Site = (1, POST), size: int = 3) -> LayerArtifact:
    """The artifact of one site, from start to end."""
    callback.on_sweep_start(ctx)
    callback.on_layer_start(site[0])
    assert all(answer is None for _, answer in fold(callback, ctx, site, acts, size))
    left = callback.on_layer_end(site[0])
    callback.on_sweep_end()
    assert isinstance(left, LayerArtifact)
    assert left.hook == site[1]
    json.dumps(left.meta)
    return left


def random_acts(lengths: Sequence[int], rest: tuple[int, ...], seed: int = 0, dtype: Any = torch.float32) -> Acts:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *rest, generator=generator).to(dtype) for n in lengths]


def refused(callback: Callback, ctx: FakeContext, message: str) -> None:
    """While the plan is made, and by who makes none at the start."""
    with pytest.raises(RequestError, match=message):
        callback.state_bytes(ctx, 0, POST)
    with pytest.raises(RequestError, match=message):
        callback.on_sweep_start(ctx)


def equal(a: LayerArtifact, b: LayerArtifact) -> bool:
    same = a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)
    return same and (a.name, a.meta, a.hook) == (b.name, b.meta, b.hook)


def last_rows(acts: Acts) -> np.ndarray[Any, Any]:
    return np.stack([a[-1].double().flatten().numpy() for a in acts])


def all_rows(acts: Acts) -> np.ndarray[Any, Any]:
    return np.concatenate([a.double().flatten(1).numpy() for a in acts])


def cut(rows: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    ends = np.cumsum(lengths).tolist()
    return [rows[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def singles(rows: Tensor) -> list[Tensor]:
    return [row[None] for row in rows]


RAGGED: tuple[int, ...] = (5, 1, 9, 5, 5, 2, 9, 5, 1, 5, 3)

# --- the protocol ---------------------------------------------------------------------------------------------------


class LastTokenLogNorm(Callback):
    target_layers = (32,)
    target_hooks = ("residual_post",)
    phase = "read"

    def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> Emit:
        return Emit(acts[:, -1, :].norm(dim=-1).log())


def test_a_subclass_needs_on_batch_and_nothing_else() -> None:
    ctx, callback = FakeContext((3, 4)), LastTokenLogNorm()
    callback.on_sweep_start(ctx)
    callback.on_layer_start(32)
    emit = callback.on_batch(32, POST, torch.ones(2, 3, 8), torch.tensor([1, 0]))
    assert (emit.per, emit.name, emit.dtype) == ("prompt", None, None)
    assert callback.on_layer_end(32) is None
    callback.on_sweep_end()
    assert not callback.borrows
    assert not callback.needs_metadata
    assert callback.positions == "all"
    assert callback.declare(ctx) == {}
    assert callback.state_bytes(ctx, 32, POST) == 0
    assert callback.state_dict(32, POST) == {}
    assert callback.config() == {
        "target_layers": [32], "target_hooks": ["residual_post"], "phase": "read", "positions": "all"
    }  # fmt: skip
    with pytest.raises(TypeError, match="on_batch"):
        Callback()  # type: ignore[abstract]


def test_emits_is_what_the_plan_counts() -> None:
    class Counted(LastTokenLogNorm):
        emits = {POST: ((3,), torch.float16)}  # noqa: RUF012

    assert Counted().declare(FakeContext((1,))) == {POST: Declared("prompt", (3,), torch.float16)}


def test_config_tells_two_callbacks_apart() -> None:
    class Custom(LastTokenLogNorm):
        def __init__(self, **attributes: Any) -> None:
            vars(self).update(attributes)

    def config(**attributes: Any) -> dict[str, Any]:
        made = Custom(**attributes).config()
        assert json.loads(json.dumps(made)) == made
        return made

    basis = torch.randn(4, 8)
    assert config(basis=basis) == config(basis=basis.clone())
    assert config(basis=basis) != config(basis=basis + 1)
    assert config(basis=basis) != config(basis=basis.view(8, 4))
    assert config(basis=basis.bfloat16())["basis"].startswith("torch.bfloat16 [4, 8]")
    assert config(f=np.mean)["f"].startswith("numpy.mean ")
    assert "<lambda>" in config(f=lambda: 0)["f"]
    assert config(f=lambda: 0) == config(f=lambda: 0) != config(f=lambda: 1)
    assert config(f=(lambda n: lambda: n)(0))["opaque"] == ["f"]  # two closures of one code cannot be told apart
    assert config(n=np.int64(3), x=np.float32(0.5), deep={"a": [range(2)]}, d=torch.bfloat16) == {
        **config(), "n": 3, "x": 0.5, "deep": {"a": [[0, 1]]}, "d": "torch.bfloat16"
    }  # fmt: skip
    assert config(target_layers=[-1])["target_layers"] == [-1]
    assert config(_private=1) == config()
    assert config(ok=1, b=object(), a={1: 2})["opaque"] == ["a", "b"]


def test_the_promised_calls() -> None:
    callbacks: list[Callback] = [
        RawActivations(layers=[40, 45, 50]),
        IncrementalPCA(layers="all", n_components=64),
        DiffOfMeans(layers="all", label_fn=lambda s: s["label"]),
        SteerInBasis(basis_artifact=torch.randn(8), direction_idx=0, alpha=2.0, layers=[45]),
    ]
    assert [c.target_layers for c in callbacks] == [[40, 45, 50], "all", "all", [45]]
    assert [c.phase for c in callbacks] == ["read", "read", "read", "write"]
    assert [c.positions for c in callbacks] == ["last", "last", "last", "all"]
    assert [c.needs_metadata for c in callbacks] == [False, False, True, False]
    assert all(c.borrows and c.target_hooks == (POST,) for c in callbacks)
    assert all(json.dumps(c.config()) for c in callbacks)


def test_readers_take_a_phase() -> None:
    readers: list[Callback] = [
        RawActivations(phase="read_after_write"),
        IncrementalPCA("all", 1, phase="read_after_write"),
        DiffOfMeans("all", len, phase="read_after_write"),
    ]
    assert {reader.phase for reader in readers} == {"read_after_write"}


# --- RawActivations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [(8,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_raw_last_token(rest: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    ctx = FakeContext(RAGGED, rest, dtype=dtype, device=torch.device(device))
    acts = random_acts(RAGGED, rest, dtype=dtype)
    got = emitted(RawActivations(), ctx, acts)
    assert all(torch.equal(row, a[-1]) for row, a in zip(got, acts, strict=True))


def test_raw_every_token() -> None:
    acts = random_acts(RAGGED, (8,))
    got = emitted(RawActivations(last_token_only=False), FakeContext(RAGGED), acts)
    assert all(torch.equal(rows, a) for rows, a in zip(got, acts, strict=True))


@pytest.mark.parametrize("position", [0, -1, 2, -3, np.int64(1)])
def test_raw_one_position(position: int) -> None:
    lengths = (4, 3, 7, 4, 3)
    acts = random_acts(lengths, (2, 3))
    callback = RawActivations(positions=position)
    assert all(
        torch.equal(row, a[position]) and row.shape == (2, 3)
        for row, a in zip(emitted(callback, FakeContext(lengths, (2, 3)), acts), acts, strict=True)
    )
    assert json.dumps(callback.config()["positions"]) == f"[{position}]"


@pytest.mark.parametrize("positions", [[0], [-1, 0], (2, -3, 2), range(2)])
def test_raw_several_positions(positions: Sequence[int]) -> None:
    lengths = (4, 3, 7, 4, 3)
    acts = random_acts(lengths, (8,))
    got = emitted(RawActivations(positions=positions), FakeContext(lengths), acts)
    assert all(torch.equal(rows, a[list(positions)]) for rows, a in zip(got, acts, strict=True))


def test_raw_name_and_dtype() -> None:
    ctx, acts = FakeContext(RAGGED), random_acts(RAGGED, (8,))
    callback = RawActivations(name="after", dtype=torch.float16)
    got = emitted(callback, ctx, acts)
    assert all(torch.equal(row, a[-1].half()) for row, a in zip(got, acts, strict=True))
    assert show(callback, (0, POST), acts, [1], CPU).name == "after"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({}, lambda p: p[:, -1]),
        ({"positions": 1}, lambda p: p[:, 1]),
        ({"positions": [2, -1]}, lambda p: p[:, [2, -1]]),
        ({"last_token_only": False}, lambda p: p),
    ],
)
def test_raw_attention_pattern(arguments: dict[str, Any], wanted: Callable[[Tensor], Tensor]) -> None:
    patterns = [torch.randn(2, 4, 4) for _ in range(5)]
    callback = RawActivations(hook="attn_pattern", **arguments)
    got = emitted(callback, FakeContext((4,) * 5, (2,)), patterns, (0, "attn_pattern"))
    assert all(torch.equal(row, wanted(pattern)) for row, pattern in zip(got, patterns, strict=True))


def test_raw_refuses_what_has_no_answer() -> None:
    with pytest.raises(RequestError, match="prompt 0 has 4 tokens, prompt 2 has 5"):
        RawActivations(hook="attn_pattern").declare(FakeContext((4, 4, 5), (2,)))
    with pytest.raises(RequestError, match="last_token_only=False"):
        RawActivations(positions=3, last_token_only=False)
    with pytest.raises(TypeError):
        RawActivations(positions=[1.5])  # type: ignore[list-item]


# --- IncrementalPCA -------------------------------------------------------------------------------------------------


def svd_reference(rows: np.ndarray[Any, Any], k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """components ``[k, H]`` with the largest coordinate positive, variances ``[k]``: one SVD of all rows in fp64."""
    _, scale, axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    axes = axes[:k]
    signs = np.sign(axes[np.arange(k), np.abs(axes).argmax(1)])
    return axes * signs[:, None], scale[:k] ** 2 / (len(rows) - 1)


def check_pca(got: LayerArtifact, rows: np.ndarray[Any, Any], k: int) -> None:
    components, variance = svd_reference(rows, k)
    assert got.name == "pca_basis"
    tensors = got.tensors
    assert {n: t.dtype for n, t in tensors.items()} == {
        "components": torch.float32, "mean": torch.float32, "explained_variance": torch.float32, "count": torch.int64
    }  # fmt: skip
    assert all(t.is_contiguous() for t in tensors.values())
    assert int(tensors["count"]) == len(rows)
    np.testing.assert_allclose(tensors["components"].cpu().numpy(), components, atol=2e-6)
    np.testing.assert_allclose(tensors["explained_variance"].cpu().numpy(), variance, rtol=1e-6)
    np.testing.assert_allclose(tensors["mean"].cpu().numpy(), rows.mean(0), rtol=1e-7, atol=1e-7)


def spread_out(n: int, width: int, seed: int = 0) -> Tensor:
    """fp32 ``[n, width]`` with well separated variances along random axes, and a mean."""
    rng = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(rng.standard_normal((width, width)))
    rows = rng.standard_normal((n, width)) * 1.4 ** -np.arange(width) @ axes + rng.standard_normal(width)
    return torch.from_numpy(rows.astype(np.float32))


@pytest.mark.parametrize("n", [6, 16, 17, 400, 2500])
def test_pca_of_last_tokens(n: int, device: str) -> None:
    rows, lengths = spread_out(n, 16), [1 + i * i % 3 for i in range(n)]
    acts = [
        torch.cat((torch.full((length - 1, 16), 7.0), row[None])) for row, length in zip(rows, lengths, strict=True)
    ]
    ctx = FakeContext(lengths, (16,), device=torch.device(device))
    check_pca(artifact(IncrementalPCA("all", 5), ctx, acts, size=7), rows.double().numpy(), 5)


@pytest.mark.parametrize("lengths", [(2, 3, 1), (5, 1, 9, 5, 5, 2, 9, 5, 1, 5, 3), (700, 3, 700, 650)])
def test_pca_of_all_tokens(lengths: tuple[int, ...]) -> None:
    acts = cut(spread_out(sum(lengths), 12), lengths)
    got = artifact(IncrementalPCA([0, 1], 4, last_token_only=False), FakeContext(lengths, (12,)), acts, size=2)
    check_pca(got, all_rows(acts), 4)


@pytest.mark.parametrize("n", [10, 300])
def test_pca_takes_every_dtype_as_it_is(n: int) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        acts = singles(spread_out(n, 16).to(dtype))
        check_pca(artifact(IncrementalPCA("all", 3), FakeContext((1,) * n, (16,), dtype=dtype), acts),
                  last_rows(acts), 3)  # fmt: skip


def outliers(n: int, width: int) -> Tensor:
    """A dimension of mean 1e4 whose spread of 0.01 is above that of the others: what massive activations look like."""
    rows = spread_out(n, width).double()
    rows = (rows - rows.mean(0)) * 1e-3
    rows[:, 3] = 1e4 + 0.01 * torch.from_numpy(np.random.default_rng(1).standard_normal(n))
    return rows.float()


@pytest.mark.parametrize("n", [12, 200, 3000])
def test_pca_of_outlier_dimensions(n: int) -> None:
    rows = outliers(n, 16)
    exact = rows.double().numpy()
    _, variance = svd_reference(exact, 4)
    if n > 16:  # the data is hard enough: the textbook formula fails on it, even in fp64
        naive = (exact.T @ exact / n - np.outer(exact.mean(0), exact.mean(0))) * n / (n - 1)
        assert not np.allclose(np.linalg.eigvalsh(naive)[::-1][:4], variance, rtol=1e-6, atol=0)
    check_pca(artifact(IncrementalPCA("all", 4), FakeContext((1,) * n, (16,)), singles(rows), size=5), exact, 4)


def test_pca_at_heads_is_of_flat_rows() -> None:
    acts = [a.reshape(-1, 3, 4) for a in cut(spread_out(sum(RAGGED), 12), RAGGED)]
    callback = IncrementalPCA("all", 4, hook="z", last_token_only=False)
    got = artifact(callback, FakeContext(RAGGED, (3, 4)), acts, (0, "z"))
    check_pca(got, all_rows(acts), 4)
    assert got.meta["rest"] == [3, 4]


def test_pca_of_a_model_level_hook() -> None:
    acts = random_acts(RAGGED, (8,))
    got = artifact(IncrementalPCA("all", 2, hook="final_norm"), FakeContext(RAGGED), acts, (None, "final_norm"))
    check_pca(got, last_rows(acts), 2)


@pytest.mark.parametrize(
    ("n", "rest", "k", "most"),
    [(5, (8,), 5, 4), (100, (8,), 9, 8), (100, (2, 3), 7, 6), (9, (8,), 0, 8), (1, (8,), 1, 0)],
)
def test_pca_refuses_more_components_than_there_are(n: int, rest: tuple[int, ...], k: int, most: int) -> None:
    refused(IncrementalPCA("all", k), FakeContext((3,) * n, rest), f"n_components={k} .* from 1 to {most}: {n} rows")
    if most:
        IncrementalPCA("all", most).on_sweep_start(FakeContext((3,) * n, rest))
        IncrementalPCA("all", most, last_token_only=False).on_sweep_start(FakeContext((3,) * n, rest))


def test_reducers_refuse_attention_patterns() -> None:
    with pytest.raises(RequestError, match=r"IncrementalPCA.*attn_pattern"):
        IncrementalPCA("all", 2, hook="attn_pattern")
    with pytest.raises(RequestError, match=r"DiffOfMeans.*attn_pattern"):
        DiffOfMeans("all", len, hook="attn_pattern")


# --- Spread: rows or moments ----------------------------------------------------------------------------------------


def test_both_regimes_agree() -> None:
    rows = outliers(40, 48)
    kept, absorbed = Spread(48, 40, CPU), Spread(48, 49, CPU)
    for part in cut(rows, [7] * 5 + [5]):
        kept.add(part)
        absorbed.add(part)
    absorbed.add(rows[:0])
    absorbed._absorb(absorbed._kept)  # what more rows than columns would do
    assert set(kept.state_dict()) == {"rows"}
    assert set(absorbed.state_dict()) == {"count", "mean", "scatter"}
    for a, b in zip(kept.principal(5), absorbed.principal(5), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 400), st.randoms(use_true_random=False))
def test_any_partition_merged_in_any_order(sizes: list[int], expected: int, random: Any) -> None:
    """Machines that each took a part of the dataset, and guessed wrongly how much it would be."""
    rows = outliers(max(3, sum(sizes)), 16)
    parts = cut(rows, [*sizes, len(rows) - sum(sizes)])
    states = []
    for part in parts:
        spread = Spread(16, random.choice((expected, len(part) or 1)), CPU)
        spread.add(part)
        states.append(spread.state_dict())
    random.shuffle(states)
    whole = Spread(16, expected, CPU)
    for state in states:
        whole.merge(state)
    assert whole.count == len(rows)
    components, mean, variance = whole.principal(2)
    exact = rows.double().numpy()
    wanted, wanted_variance = svd_reference(exact, 2)
    np.testing.assert_allclose(variance, wanted_variance, rtol=1e-8)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(components[:1], wanted[:1], atol=1e-5)


def test_rows_of_another_dtype_are_refused() -> None:
    spread = Spread(4, 10, CPU)
    spread.add(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"bfloat16 after rows of torch\.float32"):
        spread.add(torch.zeros(3, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("n", [10, 24, 25, 3000])
def test_state_bytes_are_what_is_held(n: int) -> None:
    ctx = FakeContext((1,) * n, (24,), dtype=torch.bfloat16)
    spread = Spread(24, n, CPU)
    held = 0
    for rows in cut(torch.zeros(n, 24, dtype=torch.bfloat16), [100] * (n // 100) + [n % 100]):
        spread.add(rows)
        tensors = [*spread._blocks, *([spread._moments.mean, spread._moments.scatter] if spread._moments else [])]
        held = max(held, sum(tensor.nbytes for tensor in tensors))
    assert n == 25 or held == IncrementalPCA("all", 2).state_bytes(ctx, 0, POST)
    assert held <= IncrementalPCA("all", 2).state_bytes(ctx, 0, POST)


# --- DiffOfMeans ----------------------------------------------------------------------------------------------------


def labelled(labels: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"label": label, "text": f"prompt {i}"} for i, label in enumerate(labels)]


def by_label(sample: dict[str, Any]) -> Any:
    return sample["label"]


@pytest.mark.parametrize(
    "classes", [(True, False), (1, 0), ("pos", "neg"), (3, -1, 20), ("a", "c", "b"), (np.int64(4), np.int64(2))]
)
@pytest.mark.parametrize("rest", [(8,), (2, 3)])
@pytest.mark.parametrize("last", [True, False])
def test_means_by_brute_force(classes: tuple[Any, ...], rest: tuple[int, ...], last: bool, device: str) -> None:
    labels = [classes[i % 7 % len(classes)] for i in range(len(RAGGED))]
    acts = random_acts(RAGGED, rest)
    ctx = FakeContext(RAGGED, rest, labelled(labels), device=torch.device(device))
    got = artifact(DiffOfMeans("all", by_label, last_token_only=last), ctx, acts)
    assert got.name == "diff_of_means"
    assert got.meta == {"labels": sorted(set(labels)), "rest": list(rest)}
    rows_of = last_rows if last else all_rows
    means, counts = [], []
    for label in sorted(set(labels)):
        rows = rows_of([a for a, own in zip(acts, labels, strict=True) if own == label])
        means.append(rows.mean(0))
        counts.append(len(rows))
    assert got.tensors["means"].dtype == torch.float32
    assert got.tensors["counts"].dtype == torch.int64
    assert got.tensors["counts"].tolist() == counts
    np.testing.assert_allclose(got.tensors["means"].cpu(), means, rtol=1e-6, atol=1e-7)
    assert ("direction" in got.tensors) == (len(classes) == 2)
    if len(classes) == 2:
        np.testing.assert_allclose(got.tensors["direction"].cpu(), means[1] - means[0], rtol=1e-6, atol=1e-7)


def test_direction_is_no_difference_of_rounded_means() -> None:
    n = 400
    labels = [i % 3 == 0 for i in range(n)]
    rows = outliers(n, 16)
    ctx = FakeContext((1,) * n, (16,), labelled(labels))
    got = artifact(DiffOfMeans("all", by_label), ctx, singles(rows), size=6).tensors
    exact, second = rows.double().numpy(), np.array(labels)
    wanted = exact[second].mean(0) - exact[~second].mean(0)
    np.testing.assert_allclose(got["direction"], wanted, rtol=1e-6, atol=1e-10)
    rounded = got["means"][1] - got["means"][0]
    assert not np.allclose(rounded, wanted, rtol=1e-6, atol=1e-10)  # the data is hard enough


def test_label_fn_sees_metadata_and_ids() -> None:
    seen: list[dict[str, Any]] = []

    def label_fn(sample: dict[str, Any]) -> Any:
        seen.append(sample)
        return torch.tensor(bool(sample["input_ids"][0] % 2))

    ctx = FakeContext((2, 1, 3), samples=labelled("xyz"))
    assert artifact(DiffOfMeans("all", label_fn), ctx, random_acts((2, 1, 3), (8,))).meta["labels"] == [False, True]
    assert [sample["label"] for sample in seen] == ["x", "y", "z"]
    assert seen[2]["input_ids"].tolist() == [2, 3, 4]
    assert seen[2]["input_ids"].dtype == torch.int32


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"label": 0}, {"label": 1}, {"lable": 1}], r"KeyError: 'label' on sample 2, whose keys are lable, input_ids"),
        (labelled([True, False, 1]), "sample 2 is 1, of type int; before it came bool"),
        (labelled([1, "1", 0]), "sample 1 is '1', of type str; before it came int"),
        (labelled([0, 1, None]), "sample 2 is None"),
        (labelled([0, 0.5, 1]), "sample 1 is 0.5; a label is a bool, an int or a str"),
        (labelled([0, 1, [1]]), r"sample 2 is \[1\]"),
        (labelled([torch.zeros(2), 1, 0]), "RuntimeError.* on sample 0"),
        (labelled(["a", "a", "a"]), "every prompt the label 'a'"),
        (labelled(range(1001)), "more than 1000 distinct labels up to sample 1000"),
    ],
)
def test_labels_that_are_refused_before_any_work(samples: list[dict[str, Any]], message: str) -> None:
    ctx = FakeContext((3,) * len(samples), samples=samples)
    refused(DiffOfMeans("all", by_label), ctx, message)


def test_a_nan_stays_in_its_class() -> None:
    acts = [torch.full((2, 8), float(i)) for i in range(4)]
    acts[1][-1] = torch.nan
    got = artifact(DiffOfMeans("all", by_label), FakeContext((2,) * 4, samples=labelled([0, 1, 0, 1])), acts, size=4)
    assert got.tensors["means"][0].eq(1.0).all()
    assert got.tensors["means"][1].isnan().all()


def test_labels_are_part_of_the_identity() -> None:
    def config(labels: Sequence[Any]) -> dict[str, Any]:
        callback = DiffOfMeans("all", by_label)
        callback.on_sweep_start(FakeContext((1,) * len(labels), samples=labelled(labels)))
        made = callback.config()
        assert json.loads(json.dumps(made)) == made
        return made

    assert config([0, 1, 1]) == config([0, 1, 1])
    assert config([0, 1, 1]) != config([0, 1, 0])
    assert config([0, 1, 1]) != config([0, 2, 2])
    assert config([0, 1])["labels"] == [0, 1]
    again = DiffOfMeans("all", by_label)
    for labels in ([0, 1, 1], [0, 1, 0]):  # one callback, another dataset: known as soon as the plan is made
        again.state_bytes(FakeContext((1,) * 3, samples=labelled(labels)), 0, POST)
        assert again.config() == config(labels)


def test_prompts_are_labelled_once_a_sweep() -> None:
    calls: list[dict[str, Any]] = []

    def label_fn(sample: dict[str, Any]) -> Any:
        calls.append(sample)
        return sample["label"]

    ctx, callback = FakeContext((1,) * 4, samples=labelled("abab")), DiffOfMeans("all", label_fn)
    for layer in (0, 1):
        callback.state_bytes(ctx, layer, POST)
    callback.on_sweep_start(ctx)
    assert len(calls) == 4


def test_parts_of_a_dataset_may_hold_other_classes() -> None:
    acts, labels = random_acts(RAGGED, (8,)), ["abcab"[i % 5] for i in range(len(RAGGED))]
    whole = artifact(DiffOfMeans("all", by_label), FakeContext(RAGGED, samples=labelled(labels)), acts)
    parts = []
    for part in (slice(0, 2), slice(2, None)):
        callback = DiffOfMeans("all", by_label)
        ctx = FakeContext(RAGGED[part], samples=labelled(labels[part]))
        callback.on_sweep_start(ctx)
        fold(callback, ctx, (1, POST), acts[part])
        parts.append(callback)
    assert parts[0].state_dict(1, POST)["labels"] == ["a", "b"]
    parts[0].merge(1, POST, parts[1].state_dict(1, POST))
    merged = parts[0].on_layer_end(1)
    assert merged.meta == whole.meta
    assert torch.equal(merged.tensors["counts"], whole.tensors["counts"])
    torch.testing.assert_close(merged.tensors["means"], whole.tensors["means"])

    other = DiffOfMeans("all", lambda sample: len(sample["label"]) + sample["input_ids"][0].item())
    ctx = FakeContext(RAGGED, samples=labelled(labels))
    other.on_sweep_start(ctx)
    fold(other, ctx, (1, POST), acts)
    with pytest.raises(CallbackError, match="cannot be merged"):
        parts[1].merge(1, POST, other.state_dict(1, POST))


def test_state_bytes_of_means() -> None:
    ctx = FakeContext((1,) * 6, (2, 3), labelled("abcabc"))
    assert DiffOfMeans("all", by_label).state_bytes(ctx, 0, POST) == 3 * 6 * 8


# --- state of both --------------------------------------------------------------------------------------------------

STATEFUL: dict[str, Callable[[], Callback]] = {
    "pca, few rows": lambda: IncrementalPCA("all", 3),
    "pca, many rows": lambda: IncrementalPCA("all", 3, last_token_only=False),
    "means": lambda: DiffOfMeans("all", by_label),
    "means of tokens": lambda: DiffOfMeans("all", by_label, last_token_only=False),
}
LENGTHS = tuple(1 + i * 37 % 5 for i in range(11))


@pytest.fixture(params=STATEFUL)
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Callback]:
    monkeypatch.setattr(moments, "BLOCK", 4)  # several blocks, the last one not full
    return STATEFUL[request.param]


@pytest.fixture
def ctx(device: str) -> FakeContext:
    return FakeContext(LENGTHS, (16,), labelled(["xy"[i % 2] for i in range(11)]), device=torch.device(device))


@pytest.fixture
def acts() -> Acts:
    return cut(spread_out(sum(LENGTHS), 16), LENGTHS)


def test_twice_is_the_same(make: Callable[[], Callback], ctx: FakeContext, acts: Acts) -> None:
    callback = make()
    first = artifact(callback, ctx, acts)
    assert equal(first, artifact(callback, ctx, acts))
    callback.on_sweep_start(ctx)
    show(callback, (1, POST), acts, [0], ctx.device)  # a sweep that broke off
    assert equal(first, artifact(callback, ctx, acts))


def test_layers_that_interleave_give_the_same_bytes(make: Callable[[], Callback], ctx: FakeContext, acts: Acts) -> None:
    by_layer: list[Acts] = [acts, [a * 2 + 1 for a in acts]]
    alone = [artifact(make(), ctx, by_layer[layer], (layer, POST)) for layer in (0, 1)]
    together = make()
    together.on_sweep_start(ctx)
    for ids in batches(ctx.lengths):
        for layer in (0, 1):
            show(together, (layer, POST), by_layer[layer], ids, ctx.device)
    for layer in (0, 1):
        left = together.on_layer_end(layer)
        assert isinstance(left, LayerArtifact)
        assert equal(left, alone[layer])


@pytest.mark.parametrize("done", [0, 1, 4])
def test_a_loaded_state_goes_on_to_the_same_bytes(
    make: Callable[[], Callback], ctx: FakeContext, acts: Acts, done: int
) -> None:
    whole = artifact(make(), ctx, acts)
    steps = list(batches(ctx.lengths))
    first, second = make(), make()
    first.on_sweep_start(ctx)
    second.on_sweep_start(ctx)
    for ids in steps[:done]:
        show(first, (1, POST), acts, ids, ctx.device)
    show(second, (1, POST), acts, steps[-1], ctx.device)  # to be forgotten
    state = first.state_dict(1, POST)
    assert json.dumps([value for value in state.values() if not isinstance(value, Tensor)])
    show(first, (1, POST), acts, steps[-1], ctx.device)  # a snapshot does not see what comes after it
    second.load_state_dict(1, POST, state)
    for value in state.values():
        if isinstance(value, Tensor):
            value.zero_()  # nor does who loaded it
    for ids in steps[done:]:
        show(second, (1, POST), acts, ids, ctx.device)
    left = second.on_layer_end(1)
    assert isinstance(left, LayerArtifact)
    assert equal(left, whole)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_merged_parts_are_the_whole(
    make: Callable[[], Callback], ctx: FakeContext, acts: Acts, order: tuple[int, ...]
) -> None:
    whole = artifact(make(), ctx, acts)
    parts = [make() for _ in range(3)]
    for part in parts:
        part.on_sweep_start(ctx)
    for number, ids in enumerate(batches(ctx.lengths)):
        show(parts[number % 3], (1, POST), acts, ids, ctx.device)
    total = make()
    total.on_sweep_start(ctx)
    for number in order:
        total.merge(1, POST, parts[number].state_dict(1, POST))
    left = total.on_layer_end(1)
    assert isinstance(left, LayerArtifact)
    assert left.tensors.keys() == whole.tensors.keys()
    for name, tensor in left.tensors.items():
        torch.testing.assert_close(tensor, whole.tensors[name], rtol=1e-5, atol=1e-6)


# --- SteerInBasis ---------------------------------------------------------------------------------------------------


def steered(callback: SteerInBasis, ctx: FakeContext, acts: Acts, site: Site = (1, POST)) -> list[Tensor]:
    callback.on_sweep_start(ctx)
    rows: dict[int, Tensor] = {}
    for ids, answer in fold(callback, ctx, site, acts):
        assert isinstance(answer, WriteBack)
        rows |= dict(zip(ids, answer.values.cpu(), strict=True))
    return [rows[i] for i in range(ctx.n_prompts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rest", [(8,), (2, 4)])
def test_steering_adds_in_fp32_and_rounds_once(dtype: torch.dtype, rest: tuple[int, ...], device: str) -> None:
    ctx = FakeContext(RAGGED, rest, dtype=dtype, device=torch.device(device))
    acts, basis = random_acts(RAGGED, rest, dtype=dtype), torch.randn(3, 8)
    got = steered(SteerInBasis(basis, 2, 2.5, layers=[1]), ctx, acts)
    step = np.float32(2.5) * basis[2].numpy().reshape(rest)
    for a, values in zip(acts, got, strict=True):
        assert values.dtype == dtype
        assert torch.equal(values, torch.from_numpy(a.float().numpy() + step).to(dtype))


def test_steering_takes_artifacts_and_tensors() -> None:
    n = 30
    rows, labels = spread_out(n, 8), [i % 2 for i in range(n)]
    ctx, acts = FakeContext((1,) * n, samples=labelled(labels)), singles(spread_out(n, 8))
    pca = artifact(IncrementalPCA("all", 4), ctx, acts)
    means = artifact(DiffOfMeans("all", by_label), ctx, acts)
    for basis, index, row in (
        (pca, 3, pca.tensors["components"][3]),
        (means, 0, means.tensors["direction"]),
        (rows[0], 0, rows[0]),
        (rows[:5].bfloat16(), 4, rows[4].bfloat16().float()),
    ):
        got = steered(SteerInBasis(basis, index, -1.5, layers="all"), ctx, acts)
        assert all(torch.equal(values, a - 1.5 * row) for values, a in zip(got, acts, strict=True))
    # and it does what it is for: the first class moved along the direction has the second one's mean
    moved = torch.cat(steered(SteerInBasis(means, layers=[0]), ctx, acts))[::2]
    torch.testing.assert_close(moved.mean(0), means.tensors["means"][1])


def test_steering_keeps_its_own_basis() -> None:
    basis = torch.ones(1, 8)
    callback = SteerInBasis(basis, layers=[0])
    before = callback.config()
    basis.zero_()
    assert callback.config() == before
    assert steered(callback, FakeContext((1,)), [torch.zeros(1, 8)])[0].eq(1).all()


def test_steering_refuses_what_does_not_fit() -> None:
    ctx = FakeContext((3,) * 4, (8,), labelled("abca"))
    refused(SteerInBasis(torch.zeros(7), layers=[0]), ctx, "width 7, hook 'residual_post' has 8")
    for index in (3, -1):
        message = f"direction_idx={index} must be from 0 to 2: the basis has 3 directions"
        refused(SteerInBasis(torch.zeros(3, 8), index, layers=[0]), ctx, message)
    refused(SteerInBasis(torch.zeros(8), 1, layers=[0]), ctx, "from 0 to 0: the basis has 1 direction$")
    three = artifact(DiffOfMeans("all", by_label), ctx, random_acts(ctx.lengths, (8,)))
    with pytest.raises(RequestError, match=r"this LayerArtifact has \['counts', 'means'\]"):
        SteerInBasis(three, layers=[0])
    with pytest.raises(RequestError, match="this list has none"):
        SteerInBasis([0.0] * 8, layers=[0])  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"not \[1, 3, 8\]"):
        SteerInBasis(torch.zeros(1, 3, 8), layers=[0])
    with pytest.raises(RequestError, match="layers="):
        SteerInBasis(torch.zeros(8))
    assert SteerInBasis(torch.zeros(8), hook="final_norm").target_layers == "all"
    assert SteerInBasis(torch.zeros(8), layers=[]).target_layers == []


def test_identity_of_a_steer() -> None:
    basis = torch.randn(2, 8)
    configs = [
        SteerInBasis(basis, layers=[1]).config(),
        SteerInBasis(basis, 1, layers=[1]).config(),
        SteerInBasis(basis, alpha=2.0, layers=[1]).config(),
        SteerInBasis(basis + 1e-6, layers=[1]).config(),
        SteerInBasis(basis, layers=[0]).config(),
        SteerInBasis(basis, layers=[1], hook="z").config(),
    ]
    assert len({json.dumps(config) for config in configs}) == 6
    assert SteerInBasis(basis.clone(), layers=[1]).config() == configs[0]


def test_the_context_of_this_file_is_one(ctx: FakeContext) -> None:
    checked: Context = ctx
    assert checked.sites(RawActivations()) == ((0, POST), (1, POST))
