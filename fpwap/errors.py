"""The exceptions a caller may want to catch. Each message is one sentence: what is wrong, where, and what to do.

What the system says of a file becomes one by `reported`.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FpwapError(Exception):
    """Anything that fpwap refuses or that stopped a run."""


class RequestError(FpwapError, ValueError):
    """The request cannot be carried out as asked: an unknown hook, a layer out of range, a plan that does not fit."""


class DatasetError(FpwapError, ValueError):
    """A prompt is not what it must be; the message names the sample and the key."""


class ModelError(FpwapError, ValueError):
    """The checkpoint's config or tensors are not what its family needs; the message names file, key or tensor."""


class HubError(FpwapError, OSError):
    """The model is not to be had: not a folder, not on the hub, gated, offline."""


class CallbackError(FpwapError, ValueError):
    """A callback raised, or returned what its site does not allow; names layer, hook, callback and sample ids."""


class NonFiniteError(FpwapError, ValueError):
    """A real token's activation is infinite or NaN."""


class VerificationError(FpwapError):
    """A run or a block differs from Hugging Face's forward; the message names layer, hook, prompt and size."""


class StoreError(FpwapError, OSError):
    """A result folder cannot be written, or what lies in it is not a finished run."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (SIGINT, SIGTERM) and did, between two operations; ``signum`` says by which signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum


@contextmanager
def reported(path: Path, needed: int = 0, what: str = "") -> Iterator[None]:
    """Turns an `OSError` into a `StoreError` that names ``path``, and on a full disk the bytes needed and free.

    what: the file is, in words before its path, where that does not tell.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        words = f"{what}{path}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            there = next(folder for folder in path.absolute().parents if folder.exists())
            free = shutil.disk_usage(there).free
            words += f": {needed} bytes needed, {free} bytes free; free space there or give another out="
        raise StoreError(words) from error
