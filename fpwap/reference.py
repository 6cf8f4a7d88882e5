"""Hugging Face's own forward, one decoder layer at a time, of a checkpoint that is never held as a whole.

`HFLayers` builds the checkpoint's ``...ForCausalLM`` class from transformers, in which only one part is real: the
embeddings, one layer, or the final norm with the head. Everything else is cut out before a tensor is loaded. Loading is
the library's ``from_pretrained``, so renamed tensors, fused experts, tensors kept in fp32 and computed buffers are what
they are in the whole model; and each call runs the model's own ``forward``, so masks, position embeddings and alibi
reach the layer as they do there.

This module knows nothing of `archs` or of the engine: it is what they are measured against. It needs transformers,
which fpwap itself does not.
"""

import copy
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import ModelError, RequestError

Part = Literal["embed", "head"] | int
"""What of a model is real: all before the layers, all behind them, or the layer of that index."""


class HFLayers:
    """The layers of one checkpoint as transformers computes them; holds the weights of one part at a time.

    dtype: of weights and computation, as in ``from_pretrained(dtype=...)``. attention: "eager" or "sdpa". device: where
    all tensors that are given must lie, and where the results lie. tensors: the weights under the names that they have
    in an unquantised checkpoint, by default those of the folder's safetensors files; a checkpoint with a
    quantization_config needs them dequantised here. Of a multimodal checkpoint the text model is taken.

    ids, mask and positions are what input_ids, attention_mask and position_ids ``[b, s]`` are to the model's
    ``forward``, which is called with use_cache=False; they may be None where they may there. No call depends on the one
    before, also with a dynamic rope.

    Raises `RequestError` without transformers, `ModelError` for a checkpoint that is quantised or lacks tensors, and
    what transformers raises for a model or an attention that it does not have.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        attention: str,
        device: torch.device | str = "cpu",
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        with _transformers() as hf, torch.device("meta"):
            config = hf.AutoConfig.from_pretrained(folder)
            text = config.get_text_config(decoder=True)
            if config.model_type != "llama4":  # there the text model decides
                text.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
            if config.model_type == "gemma3":  # the head of the wrapper has no cap, whatever its config says
                text.final_logit_softcapping = None
            for each in (config, text):
                if getattr(each, "quantization_config", None) is not None:
                    if tensors is None:
                        raise ModelError(f"{folder} is quantised: give its dequantised tensors as tensors=")
                    del each.quantization_config
            shell = hf.AutoModelForCausalLM.from_config(copy.deepcopy(text), attn_implementation=attention)
        self._config, self._attention, self._dtype, self._device = text, attention, dtype, device
        self._class, self._tied = type(shell), bool(shell.all_tied_weights_keys)
        paths = {module: path for path, module in shell.named_modules()}
        self._embedding, self._head = paths[shell.get_input_embeddings()], paths[shell.get_output_embeddings()]
        lists = (module for module in paths if isinstance(module, nn.ModuleList) and len(module) == self.layers)
        self._layers = paths[next(lists)]
        self._root = self._layers.partition(".")[0] + "."
        self._tensors, self._places = tensors, _places(Path(folder)) if tensors is None else {}
        self._names = self._full_names(wrapped=text is not config)
        self._part: Part | None = None
        self._model: Any = None
        self._rotary: dict[str, nn.Module] = {}

    @property
    def layers(self) -> int:
        """How many decoder layers the model has."""
        return int(self._config.num_hidden_layers)

    def embed(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """The input of layer 0, ``[b, s, hidden]``."""
        with self._layer("embed", 0).register_forward_pre_hook(
            lambda module, args, kwargs: _reach(_input(args, kwargs)), with_kwargs=True
        ):
            hidden: Tensor = self._forward("embed", ids, mask, positions)
        return hidden

    def layer(
        self,
        index: int,
        hidden: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        ids: Tensor | None = None,
        watch: Mapping[str, str] | None = None,
    ) -> dict[str, Tensor]:
        """What layer ``index`` makes of its input ``hidden [b, s, hidden]``: "residual_post", and what ``watch`` names.

        watch: name -> "path in" or "path out", the first input or the output of the module at that path of the layer,
        such as "self_attn.o_proj in"; "path out 1" is item 1 of an output that is a tuple, item 0 if none is said. The
        tensors have the module's own shapes. ids matter only to a model whose layers look at them. Raises
        `RequestError` for an index or a path that does not exist, and for a module that the layer did not call.
        """
        if not 0 <= index < self.layers:
            raise RequestError(f"layer {index} does not exist: the model has {self.layers} layers")
        layer, seen, watch = self._layer(index, index), dict[str, Tensor](), watch or {}
        with ExitStack() as hooks:
            for name, place in watch.items():
                hooks.enter_context(_watch(layer, place, name, seen))
            hooks.enter_context(_entering(layer, hidden))
            hooks.enter_context(layer.register_forward_hook(lambda module, args, output: _reach(_output(output))))
            seen["residual_post"] = self._forward(index, _any_ids(hidden) if ids is None else ids, mask, positions)
        for name, place in watch.items():
            if name not in seen:
                raise RequestError(f"{name}: layer {index} did not call the module of {place!r}")
        return seen

    def everything(
        self, index: int, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, ids: Tensor
    ) -> dict[str, Tensor]:
        """ "residual_post", and all tensors that the modules of layer ``index`` take and give, by place.

        Places are ``"path in"``, ``"path out"``, and ``"path out 1"`` for item 1 of several.
        """
        layer, seen = self._layer(index, index), dict[str, Tensor]()

        def keep(path: str, side: str, values: Any) -> None:
            items = values if isinstance(values, tuple) else (values,)
            for item, value in enumerate(items):
                if isinstance(value, Tensor):
                    seen.setdefault(f"{path} {side}" + (f" {item}" if item else ""), value.clone())

        with ExitStack() as hooks:
            for path, module in layer.named_modules():
                if path:
                    enter, leave = partial(_entered, keep, path), partial(_left, keep, path)
                    hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
                    hooks.enter_context(module.register_forward_hook(leave))
            return seen | self.layer(index, hidden, mask, positions, ids)

    def norm_and_logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """From the last layer's output ``[b, s, hidden]``: what enters the head, and the logits ``[b, s, vocab]``."""
        normed: list[Tensor] = []
        head = self._load("head").get_submodule(self._head)
        with (
            _entering(self._layer("head", self.layers - 1), hidden),
            head.register_forward_pre_hook(lambda module, args: normed.append(args[0])),
        ):
            logits = self._forward("head", _any_ids(hidden), None, None).logits
        return normed[0].reshape(*hidden.shape[:2], -1), logits.reshape(*hidden.shape[:2], -1)

    @torch.no_grad()
    def _forward(self, part: Part, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Any:
        """The output of the model's forward, or the value at which a hook ended it."""
        model = self._load(part)
        for path, fresh in self._rotary.items():  # a dynamic rope remembers the longest sequence it has seen
            model.set_submodule(path, copy.deepcopy(fresh))
        given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
        known = inspect.signature(model.forward).parameters
        try:
            return model(input_ids=ids, **{key: value for key, value in given.items() if key in known})
        except _Reached as reached:
            return reached.value

    def _layer(self, part: Part, index: int) -> nn.Module:
        module: nn.Module = self._load(part).get_submodule(f"{self._layers}.{index}")
        return module

    def _load(self, part: Part) -> Any:
        """The model of which only ``part`` is real."""
        if part == self._part:
            return self._model
        self._part = self._model = None  # frees the part before
        self._rotary = {}
        cut, full = self._cut, self._class

        def init(model: Any, config: Any) -> None:
            full.__init__(model, config)
            cut(model, part)

        kept = type(full.__name__, (full,), {"__init__": init, "__module__": full.__module__})
        with _transformers():
            model, report = kept.from_pretrained(  # type: ignore[attr-defined]
                None,
                config=self._config,
                state_dict=self._read(dict(self._wanted(part))),
                dtype=self._dtype,
                attn_implementation=self._attention,
                ignore_mismatched_sizes=True,  # reported below, like those that are missing
                output_loading_info=True,
            )
        for key in sorted(report["missing_keys"]):
            raise ModelError(f"the checkpoint lacks {key}")
        for key, found, expected in sorted(report["mismatched_keys"]):
            raise ModelError(f"{key} has shape {list(found)} in the checkpoint, and {list(expected)} in the config")
        model.to(self._device)
        self._part, self._model = part, model
        self._rotary = {p: m for p, m in model.named_modules() if "RotaryEmbedding" in type(m).__name__}
        return model

    def _stubbed(self, part: Part) -> list[str]:
        """The paths of embedding and head that a part does without; a tied pair is one tensor and stays together."""
        if isinstance(part, int):
            return [self._embedding, self._head]
        return [] if self._tied else [self._head if part == "embed" else self._embedding]

    def _wanted(self, part: Part) -> Iterator[tuple[str, str]]:
        """(name in the model, name in the file) of the tensors of a part."""
        layer, stubbed = re.compile(re.escape(self._layers) + r"\.(\d+)\."), self._stubbed(part)
        for name, stored in self._names.items():
            if found := layer.match(name):
                wanted = int(found[1]) == part
            elif name.startswith(self._root):
                wanted = self._embedding not in stubbed or not name.startswith(f"{self._embedding}.")
            else:
                wanted = self._head not in stubbed
            if wanted:
                yield name, stored

    def _read(self, wanted: dict[str, str]) -> dict[str, Tensor]:
        if self._tensors is not None:
            return {name: self._tensors[stored] for name, stored in wanted.items()}
        read: dict[str, Tensor] = {}
        for place in {self._places[stored] for stored in wanted.values()}:
            with _opened(place) as file:
                read |= {name: file.get_tensor(at) for name, at in wanted.items() if self._places[at] == place}
        return read

    def _cut(self, model: Any, part: Part) -> None:
        """Replaces what ``part`` does without, in a model on the meta device."""
        for path in self._stubbed(part):
            module = model.get_submodule(path)
            weight = torch.zeros((), dtype=self._dtype, device=self._device).expand(module.weight.shape)  # one element
            forward = partial(nn.functional.embedding, weight=weight) if path == self._embedding else nn.Identity()
            model.set_submodule(path, _stub(module, forward, weight=weight))
            model.all_tied_weights_keys = {}
        layers = model.get_submodule(self._layers)
        for index, layer in enumerate(layers):
            if index != part:
                layers[index] = _stub(layer, _pass)

    def _full_names(self, wrapped: bool) -> dict[str, str]:
        """Name in the text model -> stored name, of the tensors that belong to it."""
        root, head = self._root, f"{self._head}."
        names = {name: name for name in (self._places if self._tensors is None else self._tensors)}
        if wrapped:
            text = re.compile(r"(model\.)?language_model\.")
            names = {text.sub("", n, count=1): n for n in names if text.match(n) or n.startswith(head)}
        if not any(name.startswith(root) for name in names):  # written by the model without a head
            names = {name if name.startswith(head) else root + name: stored for name, stored in names.items()}
        return names


def _places(folder: Path) -> dict[str, Path]:
    """Stored name -> file."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.exists():
        raise ModelError(f"{folder} holds neither {single.name} nor {index.name}")
    return {name: folder / place for name, place in json.loads(index.read_text())["weight_map"].items()}


@contextmanager
def _opened(place: Path) -> Iterator[Any]:
    """As transformers opens it: on private maps, whose bits are those of the file's own alignment."""
    try:
        file = safe_open(place, framework="pt")
    except RuntimeError as error:
        raise ModelError(
            f"{place} cannot be mapped as transformers maps it, with which it is compared: {error}; save it in shards "
            "that are smaller than memory"
        ) from error
    with file as opened:
        yield opened


class _Reached(Exception):
    """Ends a forward at the point of interest, with the value found there."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def _reach(value: Tensor) -> None:
    raise _Reached(value)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any], item: int = 0) -> Tensor:
    value: Tensor = (*args, *kwargs.values())[item]
    return value


def _output(output: Any, item: int = 0) -> Tensor:
    value: Tensor = output[item] if isinstance(output, tuple) else output
    return value


def _entered(keep: Any, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    keep(path, "in", (*args, *kwargs.values())[:1])


def _left(keep: Any, path: str, module: nn.Module, args: Any, output: Any) -> None:
    keep(path, "out", output)


def _any_ids(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)


def _stub(module: nn.Module, forward: Any, **attributes: Any) -> nn.Module:
    """A module without parameters that keeps the plain attributes, which a model's forward may read."""
    stub = nn.Module()
    plain = {key: value for key, value in vars(module).items() if key not in vars(stub)}
    vars(stub).update(plain, forward=forward, **attributes)
    return stub


def _pass(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In the place of a layer. Some models take item 0 of what a layer returns and some take all of it: a leading axis
    of 1 is right for both, and the stubs, the norm and the head behind see through it."""
    return hidden_states[None] if hidden_states.ndim == 3 else hidden_states


def _entering(layer: nn.Module, hidden: Tensor) -> RemovableHandle:
    """Puts ``hidden`` in the place of the layer's input."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    return layer.register_forward_pre_hook(enter, with_kwargs=True)


def _watch(layer: nn.Module, place: str, name: str, seen: dict[str, Tensor]) -> RemovableHandle:
    """Puts a copy of what passes at ``place`` into ``seen[name]``."""
    found, modules = re.fullmatch(r"(\S+) (in|out)(?: (\d+))?", place), dict(layer.named_modules())
    if found is None:
        raise RequestError(f"{name}: {place!r} is not of the form 'path in' or 'path out'")
    path, side, item = found[1], found[2], int(found[3] or 0)
    if path not in modules:
        raise RequestError(f"{name}: the layer has no module {path!r}, but {', '.join(filter(None, modules))}")

    def keep(value: Tensor) -> None:
        seen[name] = value.clone()

    handle: RemovableHandle
    if side == "out":
        handle = modules[path].register_forward_hook(lambda module, args, output: keep(_output(output, item)))
    else:
        handle = modules[path].register_forward_pre_hook(
            lambda module, args, kwargs: keep(_input(args, kwargs, item)), with_kwargs=True
        )
    return handle


@contextmanager
def _transformers() -> Iterator[Any]:
    """The library, without its progress bars and loading reports: what matters in them is raised as an error."""
    try:
        import transformers as hf
    except ImportError as error:
        raise RequestError("the Hugging Face reference needs transformers: pip install transformers") from error
    log: Any = hf.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield hf
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
