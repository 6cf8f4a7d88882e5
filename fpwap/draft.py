"""A first draft of a new family's weights section, from the headers of a checkpoint that nobody reads yet.

Tensors that are named alike but for a layer's or an expert's number become one field; the sizes are said in words of
``config.json`` where one fits. A draft is to be read and renamed: which word is meant, where several fit, is a guess.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import hub
from .checkpoint import INDEX, SINGLE, Checkpoint, Entry, shard_names

LAYER = re.compile(r"(?P<head>.*?(?:layers|h|blocks|layer)\.)(?P<i>\d+)\.(?P<rest>.*)")
EXPERT = re.compile(r"(?P<head>.*experts\.)(?P<e>\d+)\.(?P<rest>.*)")


def draft(name: str, revision: str | None = None) -> str:
    """Python text of the weights section. Raises `HubError` or `ModelError`."""
    files = hub.locate(name, revision)
    indexed = (files.folder / INDEX).is_file()
    files = hub.fetch(files, shard_names(files.folder, present=False)[0] if indexed else [SINGLE])
    raw = files.config()
    words = {key: value for key, value in raw.items() if type(value) is int and value > 1}
    layers: dict[str, list[tuple[int, Entry]]] = {}
    others: list[Entry] = []
    prefix = ""
    for entry in Checkpoint.open(files.folder).entries.values():
        found = LAYER.fullmatch(entry.name)
        if found is None:
            others.append(entry)
        else:
            prefix = found["head"] + "{i}."
            layers.setdefault(found["rest"], []).append((int(found["i"]), entry))
    count = 1 + max((index for places in layers.values() for index, _ in places), default=-1)
    return "\n".join(
        [
            f"# {name}: model_type {raw.get('model_type')!r}, {count} layers below {prefix!r}",
            "",
            *_weights("Model", ((entry.name, entry, "") for entry in others), words),
            "",
            "",
            *_weights("Layer", _by_name(layers, count), words),
        ]
    )


def _by_name(layers: Mapping[str, Sequence[tuple[int, Entry]]], count: int) -> Iterator[tuple[str, Entry, str]]:
    """(name below the layer, one of its tensors, a remark), experts as one."""
    seen: set[str] = set()
    for rest, places in layers.items():
        found = EXPERT.fullmatch(rest)
        rest = f"{found['head']}{{e}}.{found['rest']}" if found else rest
        if rest in seen:
            continue
        seen.add(rest)
        some = sorted({index for index, _ in places})
        remark = "" if len(some) == count else f"  # {len(some)} of {count} layers, first {some[0]}, last {some[-1]}"
        yield rest, places[0][1], remark


def _weights(title: str, fields: Iterator[tuple[str, Entry, str]], words: Mapping[str, int]) -> Iterator[str]:
    yield "@dataclass(frozen=True)"
    yield f"class {title}:"
    for name, entry, remark in fields:
        dims = ", ".join(_word(size, words) for size in entry.shape)
        field = re.sub(r"\W+", "_", re.sub(r"\.(weight|bias)$", lambda end: "_bias" if "bias" in end[0] else "", name))
        stored = "" if entry.dtype in ("BF16", "F16", "F32") else f"  # stored as {entry.dtype}"
        yield f'    {field.strip("_")}: Tensor = source("{name}", {dims}){stored}{remark}'


def _word(size: int, words: Mapping[str, Any]) -> str:
    """A key of the config with this value, or a product of two, or the number itself."""
    for key, value in words.items():
        if value == size:
            return f'"{key}"'
    for a, first in words.items():
        for b, second in words.items():
            if first * second == size:
                return f'"{a} * {b}"'
    return str(size)
