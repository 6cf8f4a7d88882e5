"""Code in a process of its own, which does not wait until torch is imported: a server that has it forks one for each.

The package itself, and the hub's client, are imported in the new process: they read its environment.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "einops", "numpy", "pytest", "archs"])


def python(code: str, *arguments: str, env: Mapping[str, str]) -> tuple[int, str, str]:
    """What ``python -c code arguments`` does in this environment: status, stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "out"), Path(folder, "err")
        process = _SERVER.Process(target=_run, args=(code, arguments, dict(env), written))
        process.start()
        process.join()
        out, err = (path.read_text() for path in written)
    assert process.exitcode is not None
    return process.exitcode, out, err


def _run(code: str, arguments: tuple[str, ...], env: dict[str, str], written: tuple[Path, Path]) -> None:
    for number, path in enumerate(written, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})
