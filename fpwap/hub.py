"""A hub id or a path becomes a local folder that holds the files a run needs, and no others.

Downloads, cache, revisions, tokens and offline mode are huggingface_hub's (``HF_HOME``, ``HF_TOKEN``,
``HF_HUB_OFFLINE``, ``HF_ENDPOINT``). Nothing that a model repository brings is ever executed, and pickles are not
fetched. What the files mean is not known here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import HubError, ModelError

CONFIG = ("config.json", "model.safetensors.index.json")


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
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise ModelError(f"{path} is missing: a model folder holds config.json and *.safetensors") from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(config, dict):
            raise ModelError(f"{path} is not a JSON object")
        return config


def locate(model: str, revision: str | None = None) -> Model:
    """The model's folder with its config; the shards of a hub model are fetched by `fetch`.

    Raises `HubError` with what to do when the name is neither a folder nor a repository that can be had.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise HubError(f"{model} is a local folder: revision={revision!r} applies to hub models only")
        return Model(model, path.resolve(), None, None)
    if path.exists():
        raise HubError(f"{model} is a file: give the folder that holds config.json and the safetensors files")
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise HubError(f"{model} is not a folder, and not a hub id (owner/name)")
    return _snapshot(model, revision, CONFIG)


def fetch(model: Model, files: Sequence[str]) -> Model:
    """The same model with these files at hand; local folders are left as they are."""
    if model.commit is None or all((model.folder / name).exists() for name in files):
        return model
    return _snapshot(model.name, model.commit, (*CONFIG, *files))


def _snapshot(repo: str, revision: str | None, files: Sequence[str]) -> Model:
    at = f"{repo} at revision {revision!r}" if revision else repo
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except GatedRepoError as error:
        raise HubError(f"{at} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{at} is neither a folder nor a hub repository (or a private one: set HF_TOKEN)") from error
    except LocalEntryNotFoundError as error:
        raise HubError(f"{at} is not in the local cache and the hub cannot be reached: {_reason(error)}") from error
    except HFValidationError as error:
        raise HubError(f"{repo!r} is neither a folder nor a hub id (owner/name)") from error
    except (HfHubHTTPError, OSError) as error:
        raise HubError(f"{at} cannot be fetched from the hub: {_reason(error)}") from error
    return Model(repo, folder, folder.name, revision)


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
