"""Upload of models and decoders to the hub.

What is uploaded is made anew from the model's folder, in which nothing is changed but a card of our own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainflow.files import open_regular
from brainflow.optional import need
from brainflow.pretrained import card
from brainflow.pretrained.format import CARD, CONFIG, HEAD, WEIGHTS, load_pretrained, read_config
from brainflow.pretrained.hub import SHARED
from brainflow.pretrained.privacy import Subjects, published
from brainflow.storage.files import write_text
from brainflow.storage.text import printable


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What is about to be published.

    Attributes
    ----------
    texts
        Files that are made for it: configuration, and the card unless it is somebody's own.
    files
        Files that go up as they are.
    paths
        Names of the settings from which a path of this machine was removed.
    people
        Number of people whose data the model saw.
    subjects
        What became of their names.
    own_card
        Whether the card was written by hand.
    """

    texts: dict[str, str]
    files: dict[str, Path]
    paths: list[str]
    people: int
    subjects: Subjects
    own_card: bool

    @property
    def names(self) -> list[str]:
        """Names of the files."""
        return [name for name in SHARED if name in self.texts or name in self.files]

    def describe(self) -> str:
        """Return in words what would be seen by whoever downloads it."""
        sizes = {name: len(text.encode()) for name, text in self.texts.items()}
        sizes |= {name: path.stat().st_size for name, path in self.files.items()}
        done = {"keep": "by name", "hash": "each name as a salted hash", "drop": "their number only"}
        lines = [f"  {name}: {sizes[name]:,} bytes" for name in self.names]
        lines.append(f"  people: {self.people}" + (f", {done[self.subjects]}" if self.people else ""))
        lines.append(f"  paths removed: {', '.join(self.paths) or 'none'}")
        if self.own_card:
            lines.append(f"  {CARD} was written by hand: it goes up as it is and is left alone")
        return "\n".join(lines)


def prepare_upload(
    folder: str | os.PathLike[str], *, subjects: Subjects = "hash", license: str = "unknown", name: str = ""
) -> Upload:
    """Check a saved model and make what of it is published; nothing is written.

    Parameters
    ----------
    folder
        Folder of a saved model or decoder.
    subjects
        What becomes of the names of people in configuration and card, see
        :func:`~brainflow.pretrained.privacy.published`.
    license
        Licence of the weights, as the hub abbreviates it (cc-by-4.0).
    name
        What the card calls the model.

    Raises
    ------
    ValueError
        If the model or its head cannot be loaded, or a file is a link that leads out of the folder.
    """
    source = Path(folder)
    config = read_config(source)
    files = {WEIGHTS: source / WEIGHTS}
    if config.get("decoder") is not None:
        files[HEAD] = source / HEAD
    own_card = card.own_card(source / CARD)
    if own_card:
        files[CARD] = source / CARD
    if HEAD in files:
        from brainflow.decoding.persist import load_decoder  # needs scikit-learn, a plain model does not

        load_decoder(source)
    else:
        load_pretrained(source)
    for path in (source / CONFIG, *files.values()):
        _stays(path)
    seen = published(config, subjects)
    texts = {CONFIG: json.dumps(seen.config, indent=2, ensure_ascii=False) + "\n"}
    if not own_card:
        texts[CARD] = card.model_card(
            seen.config,
            validation=card.last_validation(source),
            license=license,
            name=name or source.resolve().name,
        )
    return Upload(
        texts=texts, files=files, paths=seen.paths, people=seen.people, subjects=subjects, own_card=own_card
    )


def push_to_hub(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    subjects: Subjects = "hash",
    license: str = "unknown",
    said: Callable[[Upload], object] = lambda upload: None,
) -> list[str]:
    """Upload a saved model with its card.

    Parameters
    ----------
    folder
        Folder of a saved model or decoder.
    repository
        `owner/name` on the hub; made if absent.
    private
        Visibility of a repository that is made; one that is public already is refused.
    dry_run
        Upload nothing and write nothing.
    subjects, license
        See :func:`prepare_upload`.
    said
        Is told what is about to be published, before it is.

    Returns
    -------
    list of str
        Names of the files that are shared: configuration, weights, head, card; no optimizer states, no logs.

    Raises
    ------
    ValueError
        If `repository` is not of the form `owner/name`, is public and should not be, or the model cannot be
        loaded.
    ConnectionError
        If the hub refuses or is not reached.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        raise ValueError(f"repository: got {repository!r}, expected owner/name")
    name = repository.partition("/")[2]
    upload = prepare_upload(folder, subjects=subjects, license=license, name=name)
    said(upload)
    if not dry_run:
        _send(upload, repository, private=private)
        if CARD in upload.texts and not (Path(folder) / CARD).is_symlink():  # as the hub's cache has it
            write_text(Path(folder) / CARD, upload.texts[CARD])
    return upload.names


def _send(upload: Upload, repository: str, *, private: bool) -> None:
    client = need("huggingface_hub", "the hub", "hub")
    contents: dict[str, Any] = {name: text.encode() for name, text in upload.texts.items()} | upload.files
    parts = [
        client.CommitOperationAdd(path_in_repo=name, path_or_fileobj=contents[name]) for name in upload.names
    ]
    try:
        api = client.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        if private and api.repo_info(repository).private is not True:
            raise ValueError(
                f"repository: {repository} is there already and is public; choose another, or say --public "
                "(private=False) to publish there"
            )
        api.create_commit(repository, operations=parts, commit_message="Share a model of brainflow")
    except (ValueError, OSError):
        raise
    except Exception as error:  # of the client's own transport
        raise ConnectionError(f"hub: {repository}: {type(error).__name__}: {error}; try again") from error


def _stays(path: Path) -> None:
    """Refuse a link out of a folder; those of the hub's cache lead to its own blobs.

    Raises
    ------
    ValueError
        If the file is such a link, or no regular file.
    """
    open_regular(path).close()
    snapshot = path.parent.resolve()
    blobs = snapshot.parent.parent / "blobs"
    if path.is_symlink() and not (snapshot.parent.name == "snapshots" and path.resolve().parent == blobs):
        raise ValueError(
            f"{path}: is a link to {printable(os.fspath(path.resolve()))}, and only files of the folder "
            "itself are shared; put a copy of the file there, or delete the link"
        )
