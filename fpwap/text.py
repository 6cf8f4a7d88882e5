"""Prompt files: JSONL, one prompt a line: ``input_ids``, or ``text`` that the model's own tokenizer turns into ids.

Rows are read one at a time, when they are asked for. Special tokens (BOS) are those that the post-processor in
``tokenizer.json`` adds, as in Hugging Face; truncation and padding that the file may ask for are not applied, since a
sweep has its own. What else a prompt must be (the vocabulary, a mask) is not known here, nor where a model lies.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import DatasetError, ModelError
from .foreign import one_line, opened, read_part

TOKENIZER = "tokenizer.json"
MOST = 1 << 28
"""Bytes of a tokenizer; the largest have forty million."""
INSTALL = "pip install 'fpwap[text]'"

Encode = Callable[[str], list[int]]


@contextmanager
def open_prompts(path: Path, folder: Callable[[], Path]) -> Iterator[Iterator[dict[str, Any]]]:
    """The rows of a prompt file, as dicts with ``input_ids`` and whatever else a row holds; valid inside the ``with``.

    Row i is line i + 1: a blank line is an error, except at the end. folder: asked for the folder that holds
    ``tokenizer.json`` at the first row that has text and no ids. A `DatasetError` that is raised inside, here or by who
    takes the rows, gets the file's name, and the line's while one is being taken.
    """
    place = str(path)
    encode: Encode | None = None

    def rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
        nonlocal place, encode
        blank = 0
        for number, line in enumerate(file, 1):
            if not line.strip():
                blank = blank or number
                continue
            place = f"{path}, line {blank or number}"
            if blank:
                raise DatasetError("the line is blank: one prompt a line, so that the rows of a result are the lines")
            row = _row(line)
            if "input_ids" not in row:
                encode = encode or encoder(folder)
                row["input_ids"] = _ids(row["text"], encode)
            yield row
        place = str(path)

    try:
        file = path.open("rb")
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        try:
            yield rows(file)
        except DatasetError as error:
            raise DatasetError(f"{place}: {error}") from error


def encoder(folder: Callable[[], Path]) -> Encode:
    """text -> ids, by the ``tokenizer.json`` in ``folder()``.

    Raises `DatasetError` where the tokenizers package is missing, `ModelError` where the file is, or is damaged.
    """
    try:
        from tokenizers import Tokenizer  # an extra
    except ImportError as error:
        raise DatasetError(f"text needs the tokenizers package: {INSTALL}, or give 'input_ids'") from error
    path = folder() / TOKENIZER
    if not path.exists():
        raise ModelError(f"{path} is missing, so text cannot be tokenised; give 'input_ids'")
    with opened(path) as file:
        raw = read_part(file, 0, MOST + 1)
    if len(raw) > MOST:
        raise ModelError(f"{path} is larger than {MOST} bytes: no tokenizer is")
    try:
        tokenizer = Tokenizer.from_buffer(raw)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the bindings raise nothing narrower, and a panic of theirs is no Exception
        raise ModelError(f"{path} is not a tokenizer: {one_line(error)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> list[int]:
        try:
            ids: list[int] = tokenizer.encode(text).ids
        except (KeyboardInterrupt, SystemExit, TypeError):
            raise
        except BaseException as error:
            raise ModelError(f"{path} does not tokenise 'text': {one_line(error)}") from error
        return ids

    return encode


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig").strip())
    except UnicodeDecodeError as error:
        raise DatasetError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise DatasetError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DatasetError("nested too deeply") from error
    if not isinstance(row, dict):
        raise DatasetError(f"a row is a JSON object with 'input_ids' or 'text', not {_kind(row)}")
    if "input_ids" not in row and "text" not in row:
        raise DatasetError(f"a row has 'input_ids' or 'text'; this one has {', '.join(map(repr, row)) or 'nothing'}")
    return row


def _ids(text: object, encode: Encode) -> list[int]:
    if not isinstance(text, str):
        raise DatasetError(f"'text' is {_kind(text)}; it must be a string")
    try:
        ids = encode(text)
    except TypeError as error:  # JSON can spell half of a surrogate pair
        raise DatasetError("'text' is not Unicode: it holds half of a surrogate pair") from error
    if not ids:
        raise DatasetError("'text' has no tokens; a prompt has one or more: leave the row out")
    return ids


def _kind(value: object) -> str:
    """What JSON calls it."""
    kinds = {list: "an array", dict: "an object", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
