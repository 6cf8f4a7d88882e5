"""A hub id or a path becomes a local folder that holds the files a run needs, and no others.

Downloads, cache, revisions, tokens and offline mode are huggingface_hub's (``HF_HOME``, ``HF_TOKEN``,
``HF_HUB_OFFLINE``, ``HF_ENDPOINT``). Nothing that a model repository brings is ever executed, and pickles are not
fetched. What the files mean is not known here.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_session, get_token, hf_hub_url, hf_raise_for_status, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import HubError, ModelError
from .foreign import MOST_JSON, one_line, read_json

CONFIG = ("config.json", "model.safetensors.index.json")
FIRST = 2**14
"""Bytes of a shard that are asked for to find its header."""
TIMEOUT_S, PARTIAL_CONTENT = 30, 206


@dataclass(frozen=True)
class Model:
    """Where a model lies: as the user named it, its folder, and the commit if it came from the hub."""

    name: str
    folder: Path
    commit: str | None
    revision: str | None

    def config(self) -> dict[str, Any]:
        """``config.json``. Raises `ModelError` if it is missing or no JSON object."""
        path = self.folder / "config.json"
        if not os.path.exists(path):
            raise ModelError(f"{path} is missing: a model folder holds config.json and *.safetensors")
        config = read_json(path)
        if not isinstance(config, dict):
            raise ModelError(f"{path} is not a JSON object")
        return config


def locate(model: str, revision: str | None = None) -> Model:
    """The model's folder with its config; the shards of a hub model are fetched by `fetch`.

    Raises `HubError` with what to do when the name is neither a folder nor a repository that can be had.
    """
    path = Path(model).expanduser()
    if "\0" in model:
        raise HubError(f"{model!r} is neither a folder nor a hub id (owner/name)")
    if os.path.isdir(path):
        if revision is not None:
            raise HubError(f"{model} is a local folder: revision={revision!r} applies to hub models only")
        return Model(model, path.resolve(), None, None)
    if os.path.exists(path):
        raise HubError(f"{model} is a file: give the folder that holds config.json and the safetensors files")
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise HubError(f"{model} is not a folder, and not a hub id (owner/name)")
    return _snapshot(model, revision, CONFIG)


def fetch(model: Model, files: Sequence[str]) -> Model:
    """The same model with these files at hand; local folders are left as they are."""
    if model.commit is None or all((model.folder / name).exists() for name in files):
        return model
    return _snapshot(model.name, model.commit, (*CONFIG, *files))


def header(model: Model, shard: str) -> tuple[bytes, int | None]:
    """What a shard that is not at hand begins with, up to the end of its header, and its size if the hub says it.

    Nothing else of the shard is transferred. Raises `HubError`, and `ModelError` if there is no such file.
    """
    with _said(model.name, model.commit):
        try:
            head, size = _part(model, shard, 0, FIRST)
        except EntryNotFoundError as error:
            raise ModelError(
                f"{model.name} has no {shard} on the hub: only safetensors are read, pickles (.bin, .pt) are never "
                "opened; convert it to safetensors first"
            ) from error
        end = 8 + int.from_bytes(head[:8], "little")
        if len(head) < end <= 8 + MOST_JSON:
            head += _part(model, shard, len(head), end)[0]
    return head[:end], size


def _part(model: Model, shard: str, begin: int, end: int) -> tuple[bytes, int | None]:
    """Bytes ``begin`` to ``end`` of a file, or up to its end, and its size; also of a server that knows no ranges."""
    url = hf_hub_url(model.name, shard, revision=model.commit)
    token = get_token()
    headers = {"range": f"bytes={begin}-{end - 1}"} | ({"authorization": f"Bearer {token}"} if token else {})
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response:
        hf_raise_for_status(response)
        skip, got = (0 if response.status_code == PARTIAL_CONTENT else begin), bytearray()
        for block in response.iter_bytes():
            got += block
            if len(got) >= skip + end - begin:
                break
        whole = re.fullmatch(r"bytes \d+-\d+/(\d{1,18})", response.headers.get("content-range", ""))
    return bytes(got[skip : skip + end - begin]), int(whole[1]) if whole else None


def _snapshot(repo: str, revision: str | None, files: Sequence[str]) -> Model:
    with _said(repo, revision):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    return Model(repo, folder, folder.name, revision)


@contextmanager
def _said(repo: str, revision: str | None) -> Iterator[None]:
    """What the client raises, in one sentence with what to do."""
    at = f"{repo} at revision {revision!r}" if revision else repo
    try:
        yield
    except GatedRepoError as error:
        raise HubError(f"{at} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{at} is neither a folder nor a hub repository (or a private one: set HF_TOKEN)") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(f"{at} is not in the local cache and the hub cannot be reached: {_reason(error)}") from error
    except HFValidationError as error:
        raise HubError(f"{repo!r} is neither a folder nor a hub id (owner/name)") from error
    except ModelError:
        raise
    except Exception as error:  # the client's transport has errors of its own, which it does not name
        raise HubError(f"{at} cannot be fetched from the hub: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__
