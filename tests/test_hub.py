"""A model by its hub id, through the real huggingface_hub client against a small server on the loopback.

The client reads its endpoint, cache and offline mode from the environment when it is imported, so each case is a
process of its own.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import Tensor

from fpwap import Result, Sweep
from fpwap.callbacks.common import RawActivations

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5]]
RUN = f"""
import sys
from fpwap import FpwapError, Sweep
from fpwap.callbacks.common import RawActivations
try:
    result = Sweep(sys.argv[1], {PROMPTS}, callbacks=[RawActivations()], progress=False, out=sys.argv[2],
                   revision=sys.argv[3] if len(sys.argv) > 3 else None).run()
    print("ran at", result.manifest["model"]["commit"])
except FpwapError as error:
    print(type(error).__name__, error)
"""


class Hub(BaseHTTPRequestHandler):
    """The endpoints of a hub that the client asks for a snapshot; one repository, tests/model."""

    folder: Path
    asked: list[str]

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:  # the name that http.server asks for
        parts = self.path.split("?")[0].strip("/").split("/")
        names = sorted(path.name for path in self.folder.iterdir())
        if parts[:2] == ["api", "models"]:
            repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
        else:
            repo, revision = "/".join(parts[:2]), parts[3] if len(parts) > 3 else "main"
        if repo == "tests/gated":
            return self._answer(403, b"{}", X_Error_Code="GatedRepo")
        if repo != "tests/model":
            return self._answer(404, b"{}", X_Error_Code="RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._answer(404, b"{}", X_Error_Code="RevisionNotFound")
        if parts[0] == "api" and parts[4:5] == ["tree"]:
            sizes = {name: (self.folder / name).stat().st_size for name in names}
            tree = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in sizes.items()]
            return self._answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        if parts[0] == "api":
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self._answer(200, json.dumps(info).encode(), Content_Type="application/json")
        if parts[-1] not in names:
            return self._answer(404, b"", X_Error_Code="EntryNotFound")
        self.asked.append(parts[-1])
        body = (self.folder / parts[-1]).read_bytes()
        return self._answer(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"')

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture(params=["llama", "llama_gqa"])
def hub(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path: Path
) -> Iterator[tuple[str, Path, list[str]]]:
    """Endpoint, the served folder, and the names of the files that were asked for."""
    folder = checkpoint(request.param)
    asked: list[str] = []
    handler = type("Handler", (Hub,), {"folder": folder, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder, asked
    server.shutdown()
    thread.join()
    server.server_close()


def run(endpoint: str, home: Path, *arguments: str, **env: str) -> str:
    names = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], env={**clean, **names, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_hub_model_is_fetched_run_and_kept(hub: tuple[str, Path, list[str]], tmp_path: Path) -> None:
    endpoint, folder, asked = hub
    assert run(endpoint, tmp_path / "home", "tests/model", str(tmp_path / "out")) == f"ran at {COMMIT}"
    assert {Path(name).suffix for name in asked} <= {".json", ".safetensors"}
    assert not {"generation_config.json", "tokenizer.json"} & set(asked)
    here = Sweep(folder, PROMPTS, callbacks=[RawActivations()], progress=False).run()
    there = Result.open(tmp_path / "out")
    for layer in range(here.manifest["layers"]):
        mine, theirs = here.activations(layer=layer), there.activations(layer=layer)
        assert isinstance(mine, Tensor)
        assert isinstance(theirs, Tensor)
        assert torch.equal(mine, theirs)
    offline = run(endpoint, tmp_path / "home", "tests/model", str(tmp_path / "again"), HF_HUB_OFFLINE="1")
    assert offline == f"ran at {COMMIT}"


def test_what_cannot_be_had_is_one_sentence(hub: tuple[str, Path, list[str]], tmp_path: Path) -> None:
    endpoint, _, asked = hub
    out, home = str(tmp_path / "out"), tmp_path / "home"
    assert "tests/nothing is neither a folder nor a hub repository" in run(endpoint, home, "tests/nothing", out)
    assert "tests/gated is gated" in run(endpoint, home, "tests/gated", out)
    assert "has no revision 'v9'" in run(endpoint, home, "tests/model", out, "v9")
    assert "not in the local cache" in run(endpoint, home, "tests/model", out, HF_HUB_OFFLINE="1")
    assert not asked
    assert not Path(out).exists()
