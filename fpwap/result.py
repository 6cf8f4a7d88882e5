"""A finished run, in the process that made it or in any later one: activations, artifacts, prompts, profile.

`Result.open` needs the folder only: no model, tokenizer or device. It refuses what is not complete. Values come over
private maps of the files: editing a tensor never reaches the disk, and a tensor stays valid when its `Result` is gone.
The module does not know how the values were computed.
"""

import json
import mmap
import os
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from xxhash import xxh3_128, xxh3_128_digest, xxh3_128_hexdigest

from .errors import RequestError, StoreError, reported
from .files import sealed, sync_folder
from .folder import FORMAT, FORMAT_VERSION, MANIFEST, PROFILE
from .journal import tidy
from .profile import Profile
from .store import Record, Tensors, layout, prompt_tensors

_Key = tuple[str, int | None, str]

# Without MAP_NORESERVE Linux refuses a private map that is larger than the machine's memory. mmap has no name for it.
_PRIVATE = mmap.MAP_PRIVATE | (0x4000 if os.uname().sysname == "Linux" else 0)


@dataclass(frozen=True, eq=False)
class Ragged:
    """Values of every token of prompts of different lengths: ``len()`` prompts, of which ``[i]`` is ``[len_i, *rest]``.

    flat: ``[T, *rest]``, prompts in input order. offsets: int64 ``[N + 1]``: where each begins, and the end.
    """

    flat: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        start, stop = self.offsets[index % len(self) :][:2].tolist()
        return self.flat[start:stop]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def padded(self, side: Literal["right", "left"] = "right", value: float = 0.0) -> Tensor:
        """A new tensor ``[N, longest, *rest]``, with ``value`` to the right or to the left of each prompt's rows."""
        if side not in ("right", "left"):
            raise RequestError(f"side is 'right' or 'left', not {side!r}")
        lengths = self.offsets.diff()[:, None]
        longest = int(lengths.max())
        place = torch.arange(longest)
        out = self.flat.new_full((len(self), longest, *self.flat.shape[1:]), value)
        out[place < lengths if side == "right" else place >= longest - lengths] = self.flat
        return out

    def __repr__(self) -> str:
        return f"Ragged({len(self)} prompts, flat {tuple(self.flat.shape)} {self.flat.dtype})"


@dataclass(frozen=True, eq=False)
class Artifact:
    """What a callback left at one site: named tensors, in memory, and JSON about them."""

    name: str
    layer: int | None
    hook: str
    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def __getitem__(self, tensor: str) -> Tensor:
        try:
            return self.tensors[tensor]
        except KeyError:
            raise RequestError(f"artifact {self.name} holds {', '.join(self.tensors)}, not {tensor!r}") from None

    def keys(self) -> Iterable[str]:
        return self.tensors.keys()

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.tensors.items())
        return f"Artifact({self.name}, layer={self.layer}, hook={self.hook!r}: {shapes})"


class _Artifacts(Mapping[_Key, Artifact]):
    """(name, layer, hook) -> `Artifact`, read when asked for."""

    def __init__(self, result: "Result") -> None:
        self._result = result  # keeps a temporary folder alive
        self._entries = {(e["name"], e["layer"], e["hook"]): e for e in result.manifest["artifacts"]}

    def __getitem__(self, key: _Key) -> Artifact:
        entry = self._entries[key]
        path = self._result.path / entry["file"]
        with reported(path):
            raw = path.read_bytes()
        if xxh3_128_hexdigest(raw) != entry["digest"]:
            raise StoreError(f"{path} is not what the run wrote: its digest differs")
        tensors = dict(sorted(safetensors.torch.load(raw).items()))
        return Artifact(*key, tensors, entry["meta"])

    def __iter__(self) -> Iterator[_Key]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Result:
    """A finished run. path: its folder. manifest: what ``manifest.json`` holds."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Result":
        """The run in folder ``path``.

        Raises `StoreError` where the run is not finished, of another format, edited, or one of its files is missing or
        of another size. The files' contents are compared by `verify`.
        """
        folder = Path(path)
        manifest = _manifest(folder)
        for entry in _entries(manifest):
            file = folder / entry["file"]
            if not file.is_file():
                raise StoreError(f"{file} is missing: the run is not complete")
            if file.stat().st_size != entry["bytes"]:
                raise StoreError(
                    f"{file} has {file.stat().st_size} bytes, not {entry['bytes']}: it was cut or replaced"
                )
        tidy(folder)
        return cls(folder, manifest)

    @classmethod
    def adopt(cls, result: "Result") -> "Result":
        """The same run as the owner of its folder, which is temporary: the folder is removed when the `Result` is gone.

        Tensors that were handed out stay valid; `save` keeps the run.
        """
        weakref.finalize(result, _remove, result.path, os.getpid())
        return result

    @property
    def _counts(self) -> tuple[int, int]:
        return self.manifest["prompts"]["count"], self.manifest["prompts"]["tokens"]

    def activations(
        self, layer: int | None = None, hook: str = "residual_post", name: str | None = None
    ) -> Tensor | Ragged:
        """An output of the run, prompts in input order, yours to edit.

        Per prompt: ``[N, *rest]``. Per token: `Ragged`. layer: negative from the end, None for the model's own hooks.
        Raises `RequestError` where the run has no such output.
        """
        site = self._layer(layer), hook, name
        for entry in self.manifest["records"]:
            if (entry["layer"], entry["hook"], entry["name"]) == site:
                record = Record.of(entry)
                tensors = _mapped(self.path / entry["file"], record.tensors(*self._counts))
                return tensors["values"] if record.per == "prompt" else Ragged(tensors["values"], tensors["offsets"])
        raise RequestError(
            f"{self.path} has no output at layer {layer}, hook {hook!r}, name {name!r}; "
            f"it has {_listing(self.manifest['records'])}"
        )

    def artifact(self, name: str, layer: int | None = None, hook: str | None = None) -> Artifact:
        """What a callback left; ``hook`` may be left out where only one fits. Raises `RequestError`."""
        wanted = name, self._layer(layer)
        keys = [key for key in self.artifacts if key[:2] == wanted and hook in (None, key[2])]
        if len(keys) == 1:
            return self.artifacts[keys[0]]
        if keys:
            hooks = ", ".join(key[2] for key in keys)
            raise RequestError(f"artifact {name!r} of layer {layer} exists at the hooks {hooks}; say which by hook=")
        at = f"layer {layer}" + (f", hook {hook!r}" if hook else "")
        raise RequestError(
            f"{self.path} has no artifact {name!r} at {at}; it has {_listing(self.manifest['artifacts'])}"
        )

    @property
    def artifacts(self) -> Mapping[_Key, Artifact]:
        """(name, layer, hook) -> `Artifact`; each is read when it is asked for."""
        return _Artifacts(self)

    @property
    def prompts(self) -> Ragged:
        """The token ids of every prompt, int32, as they were run."""
        tensors = _mapped(self.path / self.manifest["prompts"]["file"], prompt_tensors(*self._counts))
        return Ragged(tensors["ids"], tensors["offsets"])

    @property
    def profile(self) -> Profile:
        """Where the run's time went."""
        with reported(self.path / PROFILE):
            return Profile.from_json(json.loads((self.path / PROFILE).read_bytes()))

    def save(self, path: str | os.PathLike[str]) -> "Result":
        """Copy the run to the new (or empty) folder ``path``; returns the `Result` there. For runs without ``out=``."""
        target = Path(path).absolute()
        partial = target.with_name(target.name + ".partial")
        with reported(partial, sum(entry["bytes"] for entry in _entries(self.manifest))):
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise StoreError(f"{target} exists and is not an empty folder; save to another")
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            try:
                for folder in ("activations", "artifacts"):
                    (partial / folder).mkdir()
                for name in [*(entry["file"] for entry in _entries(self.manifest)), MANIFEST]:
                    shutil.copyfile(self.path / name, partial / name)
                    with (partial / name).open("rb") as file:
                        os.fsync(file.fileno())
                for folder in ("activations", "artifacts", "."):
                    sync_folder(partial / folder)
                partial.rename(target)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            sync_folder(target.parent)
        return Result.open(target)

    def verify(self) -> None:
        """Read every file and compare it with its digest. Raises `StoreError` that names the files that differ."""
        if _manifest(self.path) != self.manifest:
            raise StoreError(f"{self.path / MANIFEST} is not the one that was opened")
        files = [self.manifest["prompts"], *self.manifest["files"], *self.manifest["artifacts"]]
        bad = [entry["file"] for entry in files if _digest(self.path / entry["file"]) != entry["digest"]]
        if not bad:
            offsets = self.prompts.offsets.numpy()
            for entry in self.manifest["records"]:
                if not _is_intact(self.path / entry["file"], entry, offsets):
                    bad.append(entry["file"])
        if bad:
            raise StoreError(f"{self.path}: not what the run wrote, the digest differs: {', '.join(bad)}")

    def _layer(self, layer: int | None) -> int | None:
        return layer if layer is None or layer >= 0 else layer + int(self.manifest["layers"])

    def __repr__(self) -> str:
        prompts, tokens = self._counts
        parts = [f"{prompts} prompts, {tokens} tokens", _listing(self.manifest["records"])]
        if self.manifest["artifacts"]:
            parts.append(f"artifacts {_listing(self.manifest['artifacts'])}")
        return f"Result({str(self.path)!r}: {'; '.join(parts)})"


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    with reported(path):
        if not path.exists():
            raise StoreError(f"{folder} holds no finished run: there is no {MANIFEST} in it")
        raw = path.read_bytes()
    try:
        manifest: dict[str, Any] = json.loads(raw)
        found = manifest["format"], manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is not the manifest of a run: {error}") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise StoreError(f"{path} is of format {found}; this fpwap reads {(FORMAT, FORMAT_VERSION)}")
    if sealed(manifest) != raw:
        raise StoreError(f"{path} was edited: it does not have its own digest")
    return manifest


def _entries(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All that have "file", "bytes" and "digest"."""
    return [manifest["prompts"], *manifest["files"], *manifest["records"], *manifest["artifacts"]]


def _mapped(path: Path, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of a file that must begin with exactly the header of ``tensors``, over a private map."""
    plan = layout(tensors, str(path))
    with reported(path), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != plan.size or file.read(len(plan.header)) != plan.header:
            raise StoreError(f"{path} is not what the run wrote: its size or header differs")
        raw = mmap.mmap(file.fileno(), plan.size, flags=_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    data = torch.frombuffer(raw, dtype=torch.uint8)
    ends = [*plan.starts.values(), plan.size][1:]
    return {
        name: data[start:end].view(tensors[name][0]).reshape(tensors[name][1])
        for (name, start), end in zip(plan.starts.items(), ends, strict=True)
    }


def _digest(path: Path) -> str:
    digest = xxh3_128()
    with reported(path), path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _is_intact(path: Path, entry: Mapping[str, Any], offsets: np.ndarray) -> bool:
    """Whether an output has its header, the prompts' offsets, and its digest; read, not mapped: the disk may be bad."""
    record = Record.of(entry)
    prompts, tokens = len(offsets) - 1, int(offsets[-1])
    plan = layout(record.tensors(prompts, tokens), entry["file"])
    blocks = (np.diff(offsets) if record.per == "token" else np.ones(prompts, np.int64)) * record.row_bytes
    begin = plan.header + (offsets.tobytes() if record.per == "token" else b"")
    digest = xxh3_128()
    with reported(path), path.open("rb") as file:
        if file.read(len(begin)) != begin:
            return False
        for size in blocks.tolist():
            digest.update(xxh3_128_digest(file.read(size)))
        return not file.read(1) and digest.hexdigest() == entry["digest"]


def _listing(entries: Iterable[Mapping[str, Any]]) -> str:
    """What there is, hook by hook: "residual_post (layers 3, 5), logits"."""
    layers: dict[str, list[str]] = {}
    for entry in entries:
        what = entry["hook"] + (f" {entry['name']!r}" if entry["name"] else "")
        layers.setdefault(what, []).extend([] if entry["layer"] is None else [str(entry["layer"])])
    found = [what + (f" (layers {', '.join(at)})" if at else "") for what, at in layers.items()]
    return ", ".join(found) or "none"


def _remove(folder: Path, pid: int) -> None:
    """Remove a temporary run, in the process that made it: a forked child must not take it from its parent."""
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)
