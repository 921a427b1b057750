"""A model's folder on this machine: the one that is named, or what the hub has under that name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brainflow.optional import need
from brainflow.pretrained.format import CARD, CONFIG, HEAD, SHIPPED, WEIGHTS, load_pretrained, located

SHARED = (CONFIG, WEIGHTS, HEAD, CARD)
"""All of a repository that is up- or downloaded: nothing that could be executed."""

DOWNLOAD = ("cache_dir", "token", "local_files_only", "force_download")


def from_pretrained(name: str | os.PathLike[str], *, revision: str | None = None, **download: Any) -> Any:
    """Return a framework module, on the CPU and in evaluation mode.

    Parameters
    ----------
    name
        A folder, the name of a model that ships with the package, or a repository of the hub (`owner/name`).
    revision
        Branch, tag or commit of the repository.
    **download
        `cache_dir`, `token`, `local_files_only`, `force_download`, as in `from_pretrained` of the hub's
        `PyTorchModelHubMixin`.
    """
    return load_pretrained(fetch(name, revision=revision, **download))


def fetch(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    files: Sequence[str] = SHARED,
    ownerless: bool = False,
    argument: str = "",
    **download: Any,
) -> Path:
    """Return the folder of a model: `name` itself, or where the hub's files lie after download.

    Parameters
    ----------
    name
        A folder, the name of a model that ships with the package, or a repository of the hub (`owner/name`).
    revision
        Branch, tag or commit of the repository.
    files
        Names of what is downloaded.
    ownerless
        Whether the hub's first models, such as gpt2, are meant, too.
    argument
        What `name` was given as, for messages.
    **download
        See :func:`from_pretrained`.

    Raises
    ------
    FileNotFoundError
        If `name` is neither a model's folder nor to be had from the hub.
    ImportError
        If it can only be on the hub and huggingface_hub is not installed.
    """
    start = f"{argument}: {name}" if argument else str(name)
    unknown = sorted(download.keys() - DOWNLOAD)
    if unknown:
        raise TypeError(f"got {', '.join(unknown)}, expected some of revision, {', '.join(DOWNLOAD)}")
    folder = located(name)
    if (folder / CONFIG).is_file():
        return folder
    if not _may_be_a_repository(name, ownerless):
        raise FileNotFoundError(
            f"{start}: no {CONFIG} there; expected a model's folder, a repository of the hub as owner/name, "
            f"or a model that ships with the package ({', '.join(shipped())})"
        )
    client = need("huggingface_hub", "the hub", "hub")
    try:
        return Path(client.snapshot_download(name, revision=revision, allow_patterns=list(files), **download))
    # The client's HTTP errors are OSErrors; a name that it does not take is a ValueError.
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{start} is neither a model's folder here nor to be had from the hub ({error})"
        ) from error


def base_model(name: str | os.PathLike[str] | None) -> dict[str, str]:
    """Return what `config.json` records of a model that training began from: its name, if it is the hub's."""
    if not name or (Path(name) / CONFIG).is_file():
        return {}
    return {"base_model": str(name)}


def shipped() -> list[str]:
    """Return the names of the models that ship with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def _may_be_a_repository(name: str | os.PathLike[str], ownerless: bool) -> bool:
    """Whether a name is one of the hub and no mistyped path, such as one beside a folder that is there."""
    if not isinstance(name, str) or name.startswith((".", "/", "~")) or Path(name).is_dir():
        return False
    if "/" not in name:
        return ownerless
    return name.count("/") == 1 and not Path(name).parent.is_dir()
