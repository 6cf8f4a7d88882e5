"""The main job from end to end, without a network: find a direction, steer along it, look at the effect.

Two classes of prompts, English and code, go through every layer of a small byte-level Llama that ships with the package
(``tools/train_demo.py`` made it). A difference of means is fitted at each layer; the layer where it separates the
classes best is steered; what happens to the next token is set beside a random direction of equal norm. The layer is
chosen on the prompts of the fit, every figure is from prompts held out of it.

A user of `fpwap.Sweep` like any other: it knows nothing that is not public.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import demo_text, hub, text
from .callbacks.common import DiffOfMeans, RawActivations, SteerInBasis
from .errors import RequestError
from .result import Result
from .sweep import Sweep

MODEL = Path(__file__).parent / "demo_model"
FIT, HELD_OUT = 200, 100
"""Prompts of each class."""
ALPHAS = (0.5, 1.0, 2.0)
LABELS = ("code", "prose")
"""Sorted, so that the direction points from code to prose."""

Dataset = list[dict[str, Any]]


def run(model: str | None = None, out: str | None = None) -> int:
    """Runs the demo on a model (None: the one in the package); a picture and figures go to folder ``out``."""
    name, encode = (str(MODEL), None) if model is None else (model, _encoder(model))
    fit, held = _dataset("fit", FIT, encode), _dataset("held_out", HELD_OUT, encode)
    print(f"{len(fit)} prompts to fit on, {len(held)} held out; two classes: English and code\n")

    sweep = Sweep(
        name,
        fit,
        callbacks=[
            RawActivations(layers="all"),
            DiffOfMeans(layers="all", label_fn=lambda sample: sample["label"]),
            RawActivations(hook="logits"),
        ],
    )
    print(sweep.preflight().summary(), "\n")
    fitted = sweep.run()
    print(f"\n{fitted.profile.summary()}\n")
    plain = Sweep(name, held, callbacks=[RawActivations(layers="all"), RawActivations(hook="logits")]).run()

    layers = range(fitted.manifest["layers"])
    on_fit = [separation(fitted, fitted, layer, _labels(fit)) for layer in layers]
    on_held = [separation(fitted, plain, layer, _labels(held)) for layer in layers]
    best = max(layers, key=lambda layer: on_fit[layer][0])
    print("layer   d' (fit)   d' (held out)   accuracy (held out)")
    for layer in layers:
        mark = "  <- steered" if layer == best else ""
        print(f"{layer:>5}   {on_fit[layer][0]:8.2f}   {on_held[layer][0]:13.2f}   {on_held[layer][1]:18.1%}{mark}")

    code = [sample for sample in held if sample["label"] == "code"]
    score = _score(_tensor(fitted, hook="logits"), _labels(fit))
    direction = fitted.artifact("diff_of_means", layer=best)["direction"]
    noise = torch.randn(direction.shape, generator=torch.Generator().manual_seed(0))
    noise *= direction.norm() / noise.norm()
    effect = _effect(name, code, best, score, {"direction": direction, "random": noise})
    held_logits, held_labels = _tensor(plain, hook="logits"), _labels(held)
    ends = {label: _mean_score(held_logits[held_labels == index], score) for index, label in enumerate(LABELS)}

    print(f"\nSteering {len(code)} held-out code prompts at layer {best} by alpha times a direction.")
    print("score: mean log-odds of the next token under prose against code, both as the model predicts them")
    print(f"unsteered code {ends['code']:+.2f}, unsteered prose {ends['prose']:+.2f}\n")
    print("alpha   score, steered   score, random   KL, steered   KL, random")
    for row in effect:
        print(
            "{alpha:>5}   {direction:+14.2f}   {random:+13.2f}   {kl_direction:11.2f}   {kl_random:10.2f}".format(**row)
        )
    figures = {"model": name, "best": best, "d_fit": on_fit, "d_held_out": on_held, "ends": ends, "effect": effect}
    _keep(Path(out or "."), figures, keep_figures=out is not None)
    return 0


def separation(fitted: Result, shown: Result, layer: int, labels: Tensor) -> tuple[float, float]:
    """d' and accuracy of the fit's direction at a layer, on the prompts of ``shown``.

    d' is the distance of the class means along the direction, in standard deviations within a class; the threshold of
    the accuracy lies half-way between the means of the fit.
    """
    artifact = fitted.artifact("diff_of_means", layer=layer)
    direction = artifact["direction"] / artifact["direction"].norm()
    along = _tensor(shown, layer=layer).float() @ direction
    first, second = along[labels == 0], along[labels == 1]
    spread = ((first.var() + second.var()) / 2).sqrt()
    threshold = (artifact["means"] @ direction).mean()
    correct = torch.cat((first < threshold, second >= threshold)).float().mean()
    return float((second.mean() - first.mean()) / spread), float(correct)


def _effect(
    name: str, prompts: Dataset, layer: int, score: Tensor, directions: dict[str, Tensor]
) -> list[dict[str, float]]:
    """Per alpha and direction: the mean score of the next token, and KL(steered || unsteered) in nats."""

    def log_p(*steering: SteerInBasis) -> Tensor:
        result = Sweep(name, prompts, callbacks=[*steering, RawActivations(hook="logits")], progress=False).run()
        return _tensor(result, hook="logits").float().log_softmax(-1)

    before = log_p()
    rows = []
    for alpha in ALPHAS:
        row = {"alpha": alpha}
        for kind, direction in directions.items():
            after = log_p(SteerInBasis(direction, alpha=alpha, layers=[layer]))
            row[kind] = float((after.exp() * score).sum(-1).mean())
            row[f"kl_{kind}"] = float((after.exp() * (after - before)).sum(-1).mean())
        rows.append(row)
    return rows


def _score(logits: Tensor, labels: Tensor) -> Tensor:
    """``[vocab]``: log-odds of each next token, prose against code, from the model's own mean predictions."""
    p = logits.float().softmax(-1)
    code, prose = (p[labels == index].mean(0).clamp_min(1e-6) for index in (0, 1))
    return (prose / code).log()


def _mean_score(logits: Tensor, score: Tensor) -> float:
    return float((logits.float().softmax(-1) * score).sum(-1).mean())


def _tensor(result: Result, **site: Any) -> Tensor:
    """A capture of one row a prompt, ``[N, width]``."""
    acts = result.activations(**site)
    assert isinstance(acts, Tensor)
    return acts


def _labels(dataset: Dataset) -> Tensor:
    return torch.tensor([LABELS.index(sample["label"]) for sample in dataset])


def _dataset(split: Any, per_class: int, encode: Callable[[str], list[int]] | None) -> Dataset:
    """The demo's prompts, as bytes or as another model's tokens."""
    try:
        prompts = demo_text.prompts(per_class, split=split)
    except ValueError as error:
        raise RequestError(f"the demo takes its prompts from Python's own library: {error}") from error
    return [{**prompt, "input_ids": encode(prompt["text"]) if encode else prompt["input_ids"]} for prompt in prompts]


def _encoder(model: str) -> Callable[[str], list[int]]:
    return text.encoder(lambda: hub.fetch(hub.locate(model), [text.TOKENIZER]).folder)


def _keep(folder: Path, figures: dict[str, Any], *, keep_figures: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if keep_figures:
        (folder / "fpwap-demo.json").write_text(json.dumps(figures, indent=1) + "\n")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nno picture: pip install 'fpwap[plot]'")
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([d for d, _ in figures["d_fit"]], "o-", label="fit")
    left.plot([d for d, _ in figures["d_held_out"]], "o-", label="held out")
    left.axvline(figures["best"], color="grey", linestyle=":")
    left.set(xlabel="layer", ylabel="d' along the difference of means", title="Where the classes part")
    left.legend()
    alphas = [0.0, *(row["alpha"] for row in figures["effect"])]
    ends = figures["ends"]
    for kind, label in (("direction", "difference of means"), ("random", "random, same norm")):
        right.plot(alphas, [ends["code"], *(row[kind] for row in figures["effect"])], "o-", label=label)
    right.axhline(ends["prose"], color="grey", linestyle="--", label="unsteered prose")
    right.axhline(ends["code"], color="grey", linestyle=":", label="unsteered code")
    right.set(
        xlabel="alpha", ylabel="next token: log-odds prose : code", title=f"Steering code at layer {figures['best']}"
    )
    right.legend()
    path = folder / "fpwap-demo.png"
    figure.savefig(path, dpi=120)
    print(f"\npicture: {path}")
