"""The demo's text: two classes of short prompts out of the standard library of the Python that is running.

Every Python carries a few megabytes of English and of code: its own library. `prompts` cuts it into "prose"
(sentences out of docstrings) and "code" (source lines without comments and docstrings), as bytes: a token id is a
byte's value, and `BOS` comes first.

Each prompt ends with a single space after a word. Both classes thus share their last token, and nothing that
separates them there comes from the embedding: all of it was carried to the last position by attention.

Modules belong to one part for good, by a hash of their name: most to "train", which the demo's model was trained on,
and a tenth each to "fit" and "held_out", whose files it has not seen. Which prompts come out depends on the Python
version, since the files do; which part a name belongs to does not. (A module that another version names otherwise may
change its part, and a licence or an idiom may recur in a module that was trained on.)

Does not know: models, tokenizers, torch. Reads no files but the library's sources, and imports none of them.
"""

import ast
import hashlib
import io
import os
import re
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal, TypedDict

BOS = 256
"""The id before a prompt's first byte; ids below it are bytes."""

MIN_BYTES, MAX_BYTES = 48, 128
"""The length of a prompt's text; its `input_ids` are one longer."""

Part = Literal["train", "fit", "held_out"]
Split = Literal["fit", "held_out"]
Label = Literal["code", "prose"]

# Tests, tables and what is not the library's own: code that looks like no other, or that differs between installations.
_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "idlelib",
    "lib2to3",
    "msilib",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_SENTENCES = re.compile(r"[A-Z][A-Za-z ,.;'()\n-]+ ")
_LAST_SPACE = re.compile(r".*\S (?=\S)", re.DOTALL)


class Prompt(TypedDict):
    """One sample of a dataset: `text` is what `input_ids[1:]` spell."""

    input_ids: list[int]
    label: Label
    text: str


def part_of(module: str) -> Part:
    """The part that a module (dotted name) belongs to, on every Python alike."""
    bucket = hashlib.sha256(module.encode()).digest()[0] % 10
    return "fit" if bucket == 0 else "held_out" if bucket == 1 else "train"


def sources(part: Part) -> Iterator[tuple[str, str]]:
    """(dotted name, source text) of the part's modules, by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Path] = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in _SKIPPED_FOLDERS and not s.startswith("config-")]
        for file in files:
            # _sysconfigdata_*.py is a record of how this Python was built.
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = Path(folder, file)
                parts = path.relative_to(root).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for module in sorted(found):
        if part_of(module) == part:
            with tokenize.open(found[module]) as source:
                yield module, source.read()


def prompts(per_class: int, *, split: Split) -> list[Prompt]:
    """`per_class` prompts of each class, alternating "prose" and "code", always the same ones on one Python.

    No text occurs twice, neither in a split nor in both.

    Raises:
        ValueError: this Python's library does not hold that many.
    """
    columns: list[list[Prompt]] = []
    labels: tuple[Label, Label] = ("prose", "code")
    for label, texts in zip(labels, _texts(split), strict=True):
        if len(texts) < per_class:
            raise ValueError(
                f"{per_class} prompts of {label} asked for; the sources under {sysconfig.get_paths()['stdlib']} "
                f"hold {len(texts)} in the {split} split: ask for fewer, or use a Python that has its library's sources"
            )
        columns.append([{"input_ids": [BOS, *t.encode()], "label": label, "text": t} for t in texts[:per_class]])
    return [prompt for pair in zip(*columns, strict=True) for prompt in pair]


@cache
def _texts(split: Split) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All texts of the split: prose, code."""
    prose: set[str] = set()
    code: set[str] = set()
    for _, source in sources(split):
        tree = ast.parse(source)
        docstrings = list(_docstrings(tree))
        prose.update(_prose(docstrings))
        code.update(_code(source, docstrings))
    if split == "held_out":
        # Licences and idioms recur in other modules.
        fit_prose, fit_code = _texts("fit")
        prose.difference_update(fit_prose)
        code.difference_update(fit_code)
    return _shuffled(prose), _shuffled(code)


def _shuffled(texts: set[str]) -> tuple[str, ...]:
    """In the order of their digests, so that the first few come from all modules."""
    return tuple(sorted(texts, key=lambda t: hashlib.sha256(t.encode()).digest()))


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body[:1]:
                case [ast.Expr(value=ast.Constant(value=str()) as docstring)]:
                    yield docstring


def _prose(docstrings: list[ast.Constant]) -> Iterator[str]:
    for docstring in docstrings:
        # The first line starts behind the quotes, so it is dedented apart from the others.
        first, _, rest = str(docstring.value).partition("\n")
        for paragraph in re.split(r"\n\s*\n", f"{first.lstrip()}\n{textwrap.dedent(rest)}"):
            text = _cut(paragraph)
            if text and _SENTENCES.fullmatch(text) and "\n " not in text:
                yield text


def _code(source: str, docstrings: list[ast.Constant]) -> Iterator[str]:
    lines = source.split("\n")
    words = {line for d in docstrings for line in range(d.lineno, (d.end_lineno or d.lineno) + 1)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        # A string of several lines is a usage text or a template more often than not.
        if token.type == tokenize.COMMENT or token.start[0] < token.end[0]:
            words.update(range(token.start[0], token.end[0] + 1))
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip() and number not in words:
            block.append(line)
            continue
        text = _cut(textwrap.dedent("\n".join(block)))
        if text and not text.startswith(" "):
            yield text
        block.clear()


def _cut(text: str) -> str | None:
    """The text up to the last single space that leaves it within the bounds; None where there is none."""
    match = _LAST_SPACE.match(text[: MAX_BYTES + 1])
    if match is None or not MIN_BYTES <= match.end() <= MAX_BYTES or not text.isascii():
        return None
    return match.group()
