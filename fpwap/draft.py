"""A first draft of a new family's weights section, from the headers of a checkpoint that nobody reads yet.

Tensors that are named alike but for a layer's or an expert's number become one field; the sizes are said in words of
``config.json`` where one fits. A draft is to be read and renamed: which word is meant, where several fit, is a guess.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

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
    text = raw.get("text_config")
    words = {key: value for key, value in (text if isinstance(text, Mapping) else raw).items() if type(value) is int}
    layers: dict[str, dict[str, list[tuple[int, Entry]]]] = {}
    others: list[Entry] = []
    for entry in Checkpoint.open(files.folder).entries.values():
        found = LAYER.fullmatch(entry.name)
        if found is None:
            others.append(entry)
        else:
            layers.setdefault(found["head"], {}).setdefault(found["rest"], []).append((int(found["i"]), entry))
    lines = [f"# {name}: model_type {raw.get('model_type')!r}", ""]
    lines += _weights("Model", ((entry.name, entry, "") for entry in others), words)
    for head, table in layers.items():
        count = 1 + max(index for places in table.values() for index, _ in places)
        lines += ["", "", f"# {count} layers below {head + '{i}.'!r}"]
        lines += _weights("Layer", _by_name(table, count), words)
    return "\n".join(lines)


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


def _word(size: int, words: Mapping[str, int]) -> str:
    """A key of the config with this value, or a product of two, or the number itself."""
    for key, value in words.items():
        if value == size > 1:
            return f'"{key}"'
    for a, first in words.items():
        for b, second in words.items():
            if first > 1 < second and first * second == size:
                return f'"{a} * {b}"'
    return str(size)
