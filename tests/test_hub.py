"""A model by its hub id, through the real huggingface_hub client against a small server on the loopback.

The client reads its endpoint, cache and offline mode from the environment when it is imported, so each case is a
process of its own.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from checkpoints import Variant, write
from processes import python
from torch import Tensor

from fpwap import Result, Sweep
from fpwap.callbacks.common import RawActivations
from fpwap.errors import HubError, ModelError
from fpwap.prepare import fetch, open_model, survey
from fpwap.schedule import Stage

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
PLAN = f"""
import sys
from fpwap import FpwapError, Sweep
from fpwap.callbacks.common import RawActivations
sweep = Sweep(sys.argv[1], {PROMPTS}, callbacks=[RawActivations([int(sys.argv[2])])], progress=False, device="cpu")
try:
    plan = sweep.preflight()
    print(plan.weights_bytes, plan.loading, plan.feasible)
    if len(sys.argv) > 3:
        sweep.run()
        print("ran")
except FpwapError as error:
    print(type(error).__name__, error)
"""


class Hub(BaseHTTPRequestHandler):
    """The endpoints of a hub that the client asks for a snapshot; one repository, tests/model."""

    folder: Path
    asked: list[str]
    sent: dict[str, int]
    ranges: bool
    broken: set[str]

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
        body = (self.folder / parts[-1]).read_bytes()
        tag = f'"{hashlib.sha256(body).hexdigest()}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            self.asked.append(parts[-1])
            if self.command == "GET" and parts[-1] in self.broken:
                return self._answer(500, b"")
        status, part = 200, body
        if asked is not None and self.ranges:
            status, part = 206, body[int(asked[1]) : int(asked[2]) + 1]
        if self.command == "GET":
            self.sent[parts[-1]] = self.sent.get(parts[-1], 0) + len(part)
        return self._answer(status, part, ETag=tag)

    do_HEAD = do_GET  # noqa: N815


@contextmanager
def serving(
    folder: Path, *, ranges: bool = True, broken: Iterable[str] = ()
) -> Iterator[tuple[str, list[str], dict[str, int]]]:
    """Endpoint, the names of the files that were asked for whole, and bytes that were sent of each file.

    broken: files of which the server can send a part (a header), and fails with the whole.
    """
    asked: list[str] = []
    sent: dict[str, int] = {}
    served = {"folder": folder, "asked": asked, "sent": sent, "ranges": ranges, "broken": set(broken)}
    handler = type("Handler", (Hub,), served)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked, sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(params=["llama", pytest.param("llama_gqa", marks=pytest.mark.full)])
def hub(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Iterator[tuple[str, Path, list[str]]]:
    """Endpoint, the served folder, and the names of the files that were asked for."""
    folder = checkpoint(request.param)
    with serving(folder) as (endpoint, asked, _):
        yield endpoint, folder, asked


def run(endpoint: str, home: Path, *arguments: str, code: str = RUN, **env: str) -> str:
    names = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    status, out, err = python(code, *arguments, env={**clean, **names, **env})
    assert status == 0, err
    return out.strip()


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


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of which a header is a small part: 13 MB in six of them."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 1024}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    return write(Variant(config=sizes, shard="2500kB"), tmp_path_factory.mktemp("large"))


def shards_of(folder: Path, *parts: str) -> set[str]:
    """The shards that hold tensors with one of these in their names."""
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {shard for name, shard in places.items() if any(part in name for part in parts)}


def test_a_plan_takes_headers_only_and_a_run_the_shards_it_needs(large: Path, tmp_path: Path) -> None:
    """Up to layer 1 of four: the same plan as of the folder, for less than a megabyte."""
    needed = shards_of(large, "embed_tokens", "layers.0.", "layers.1.")
    every = {path.name for path in large.glob("*.safetensors")}
    assert len(needed) < len(every)
    here = Sweep(large, PROMPTS, callbacks=[RawActivations([1])], device="cpu").preflight()
    with serving(large) as (endpoint, asked, sent):
        words = run(endpoint, tmp_path / "home", "tests/model", "1", code=PLAN)
        assert words == f"{here.weights_bytes} stream True"
        assert not every & set(asked)
        assert needed == every & set(sent)
        assert sum(sent.values()) < 1_000_000 < sum(path.stat().st_size for path in large.iterdir())

        assert run(endpoint, tmp_path / "home", "tests/model", "1", "run", code=PLAN).endswith("ran")
        assert every & set(asked) == needed
        sent.clear()
        again = run(endpoint, tmp_path / "home", "tests/model", "1", "run", code=PLAN, HF_HUB_OFFLINE="1")
        assert again.endswith("ran") and not sent
        offline = run(endpoint, tmp_path / "home", "tests/model", "-1", code=PLAN, HF_HUB_OFFLINE="1")
        assert "is not in the local cache and the hub cannot be reached" in offline


def test_a_server_without_ranges_is_heard_no_longer_than_the_header(large: Path, tmp_path: Path) -> None:
    with serving(large, ranges=False) as (endpoint, asked, _):
        assert run(endpoint, tmp_path / "home", "tests/model", "0", code=PLAN).endswith("stream True")
        assert not any(name.endswith(".safetensors") for name in asked)


def test_a_snapshot_that_came_by_half_is_completed(large: Path, tmp_path: Path) -> None:
    """A server that fails with one shard; then no network; then one that has it: asked for what is missing alone."""
    needed = shards_of(large, "embed_tokens", "layers.0.", "layers.1.")
    home, (lost,) = tmp_path / "home", shards_of(large, "layers.1.mlp.up_proj")
    words = ("tests/model", "1", "run")
    with serving(large, broken={lost}) as (endpoint, _, _):
        said = run(endpoint, home, *words, code=PLAN).splitlines()[-1]
        assert said.startswith("HubError tests/model") and "cannot be fetched from the hub" in said and "500" in said
    offline = run(endpoint, home, *words, code=PLAN, HF_HUB_OFFLINE="1")
    assert "is not in the local cache and the hub cannot be reached" in offline
    with serving(large) as (endpoint, asked, _):
        assert run(endpoint, home, *words, code=PLAN).endswith("ran")
        assert lost in asked
    assert {path.name for path in home.rglob("*.safetensors")} == needed


def test_a_cache_that_lost_a_file_fetches_it_again(large: Path, tmp_path: Path) -> None:
    """The cache's entries are links to blobs; here the cache itself lies behind one too."""
    (tmp_path / "disk").mkdir()
    home = tmp_path / "home"
    home.symlink_to("disk")
    words = ("tests/model", "1", "run")
    (shard,) = shards_of(large, "layers.0.mlp.up_proj")
    with serving(large) as (endpoint, asked, _):
        assert run(endpoint, home, *words, code=PLAN).endswith("ran")
        (entry,) = home.rglob(shard)
        assert entry.is_symlink()
        entry.resolve().unlink()
        offline = run(endpoint, home, *words, code=PLAN, HF_HUB_OFFLINE="1")
        assert "is not in the local cache and the hub cannot be reached" in offline
        asked.clear()
        assert run(endpoint, home, *words, code=PLAN).endswith("ran")
        assert {name for name in asked if name.endswith(".safetensors")} == {shard}


@pytest.mark.parametrize("lost", ["config.json", "a shard"])
def test_a_repository_without_one_of_its_files(lost: str, large: Path, tmp_path: Path) -> None:
    folder = copied(large, tmp_path / "served")
    name = lost if lost == "config.json" else shards_of(large, "layers.0.").pop()
    (folder / name).unlink()
    with serving(folder) as (endpoint, _, _):
        said = run(endpoint, tmp_path / "home", "tests/model", "0", code=PLAN)
    assert said.startswith("ModelError") and name in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_headers_longer_than_the_first_part_are_read_whole(ranges: bool, tmp_path: Path) -> None:
    """The header of 300 layers in one file, without an index."""
    sizes = {"num_hidden_layers": 300, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    folder = tmp_path / "model"
    folder.mkdir()
    write(Variant(config={**sizes, "intermediate_size": 8}), folder)
    here = Sweep(folder, PROMPTS, callbacks=[RawActivations([7])], device="cpu").preflight()
    with serving(folder, ranges=ranges) as (endpoint, asked, sent):
        words = run(endpoint, tmp_path / "home", "tests/model", "7", code=PLAN)
        assert words.startswith(f"{here.weights_bytes} ")
        assert sent["model.safetensors"] > 2**14
        assert "model.safetensors" not in asked


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"short", "its header has no length"),
        (struct.pack("<Q", 2**60) + bytes(100), "its header has no length"),
        (struct.pack("<Q", 9) + b"not JSON!", "is not a readable safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "its header is no JSON object"),
        (struct.pack("<Q", 12) + b'{"a": [1,2]}', "is not described by"),
    ],
    ids=["short", "endless", "text", "list", "odd"],
)
def test_shards_that_are_none_are_refused(body: bytes, words: str, large: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    for path in large.iterdir():
        (folder / path.name).symlink_to(path)
    (shard, *_) = shards_of(large, "layers.0.")
    (folder / shard).unlink()
    (folder / shard).write_bytes(body)
    with serving(folder) as (endpoint, _, _):
        said = run(endpoint, tmp_path / "home", "tests/model", "0", code=PLAN)
    assert said.startswith("ModelError") and shard in said and words in said


def copied(folder: Path, where: Path) -> Path:
    return Path(shutil.copytree(folder, where))


def planned(folder: Path, layer: int = 1) -> Sweep:
    """A sweep whose plan has been made."""
    sweep = Sweep(folder, PROMPTS, callbacks=[RawActivations([layer])], device="cpu", progress=False)
    assert sweep.preflight().feasible
    return sweep


def rewritten(path: Path) -> None:
    """Another file of this name, as it is saved by who has another order of tensors."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    one, other = next(
        pair
        for pair in itertools.combinations([name for name in header if name != "__metadata__"], 2)
        if header[pair[0]]["shape"] == header[pair[1]]["shape"]
    )
    header[one]["data_offsets"], header[other]["data_offsets"] = (header[n]["data_offsets"] for n in (other, one))
    text = json.dumps(header).encode()
    path.with_suffix(".new").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize("model", ["large", "single"])
def test_a_shard_that_was_replaced_behind_the_plan_is_an_error(
    model: str, large: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copied(large if model == "large" else checkpoint("llama"), tmp_path / "model")
    sweep, shard = planned(folder), "model.safetensors"
    if model == "large":
        (shard,) = shards_of(folder, "layers.0.mlp.up_proj")
    rewritten(folder / shard)
    with pytest.raises(ModelError, match=rf"{shard} is not the file whose header the plan was made of"):
        sweep.run()


def test_a_shard_that_is_gone_is_an_error(large: Path, tmp_path: Path) -> None:
    folder = copied(large, tmp_path / "model")
    sweep, (shard,) = planned(folder), shards_of(folder, "layers.0.mlp.up_proj")
    (folder / shard).rename(folder / "elsewhere")
    with pytest.raises(ModelError, match=rf"{shard} is missing"):
        sweep.run()
    with pytest.raises(ModelError, match=rf"{shard} cannot be read: No such file"):
        sweep._prepared.checkpoint.content({shard})


def test_what_the_run_does_not_need_may_change(large: Path, tmp_path: Path) -> None:
    folder = copied(large, tmp_path / "model")
    needed = shards_of(folder, "embed_tokens", "layers.0.", "layers.1.")
    sweep = planned(folder)
    for path in folder.glob("*.safetensors"):
        if path.name not in needed:
            path.unlink()
    assert sweep.run().manifest["layers"] == 4


def test_what_comes_from_the_hub_must_be_what_was_planned(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = planned(large)._prepared
    there = replace(ready, model=replace(ready.model, files=replace(ready.model.files, commit=COMMIT)))
    empty = replace(there.checkpoint, folder=tmp_path)
    monkeypatch.setattr("fpwap.hub.fetch", lambda model, files: model)
    assert fetch(replace(there, checkpoint=empty)).checkpoint == there.checkpoint
    entries = dict(empty.entries)
    name = next(name for name, entry in entries.items() if entry.shard in empty.needed)
    entries[name] = replace(entries[name], start=entries[name].start + 8)
    with pytest.raises(ModelError, match="is not the file whose header the plan was made of"):
        fetch(replace(there, checkpoint=replace(empty, entries=entries)))


def test_the_first_header_that_fails_ends_a_plan(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are not waited for: here they come when the plan has failed, or never."""
    first, failed = min(path.name for path in large.glob("*.safetensors")), Event()
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(large / name, folder)

    def header(model: object, shard: str) -> None:
        if shard != first:
            assert failed.wait(60), "the failure has waited for the others"
        raise HubError(f"{shard} cannot be had")

    monkeypatch.setattr("fpwap.hub.header", header)
    monkeypatch.setattr("fpwap.prepare.AT_ONCE", 3)
    opened = open_model(str(folder), None)
    with pytest.raises(HubError, match=first):
        survey(replace(opened, files=replace(opened.files, commit=COMMIT)), [Stage("embed"), Stage("layer", 3)])
    failed.set()


def test_a_repository_of_pickles_is_told_to_convert_them(large: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(large / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    with serving(folder) as (endpoint, asked, _):
        said = run(endpoint, tmp_path / "home", "tests/model", "0", code=PLAN)
    assert said.startswith("ModelError tests/model has no model.safetensors on the hub")
    assert "convert it to safetensors first" in said
    assert set(asked) == {"config.json"}
