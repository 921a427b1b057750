"""Upload of models and decoders to the hub, and of stores to the hub or a bucket.

What is uploaded of a model is made anew from its folder, in which nothing is changed but a card of our own. A
store goes up as it is, because its checksums hold for the bytes that it has.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from brainflow.files import open_regular
from brainflow.optional import need
from brainflow.pretrained import card
from brainflow.pretrained.format import CARD, CONFIG, HEAD, WEIGHTS, load_pretrained, located, read_config
from brainflow.pretrained.hub import SHARED
from brainflow.pretrained.privacy import Subjects, paths_in, published
from brainflow.storage import BoldStore, StoreError, verify
from brainflow.storage.files import write_text
from brainflow.storage.manifest import MANIFEST, parse_manifest
from brainflow.storage.publishing import contents
from brainflow.storage.text import counted, printable


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
    source = located(folder)
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
            validation=card.last_validation(source, config.get("step")),
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
        `owner/name` or `hf://owner/name` on the hub; made if absent.
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
    repository = _repository(repository, "model")
    name = repository.partition("/")[2]
    upload = prepare_upload(folder, subjects=subjects, license=license, name=name)
    said(upload)
    if not dry_run:
        files = {name: text.encode() for name, text in upload.texts.items()} | upload.files
        _send({name: files[name] for name in upload.names}, repository, "model", private=private)
        shipped = located(folder) != Path(folder)
        if CARD in upload.texts and not shipped and not (Path(folder) / CARD).is_symlink():  # the hub's cache
            write_text(Path(folder) / CARD, upload.texts[CARD])
    return upload.names


def describe_store(path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> str:
    """Say in words what would be seen by whoever reads a store, after all of it has been read and compared.

    Parameters
    ----------
    path
        The store.
    progress
        Called with (bytes read, bytes in all).

    Raises
    ------
    StoreError
        If it is damaged.
    """
    report = verify(path, progress)
    if not report.ok:
        raise StoreError(
            f"{path}: is damaged, so it is not published: {report.errors[0]}; `brainflow verify` lists all"
        )
    # No older generation: this one was verified.
    store = BoldStore.open(path, fallback=False)
    people = {(str(d), str(s)) for d, s in zip(store.runs.dataset, store.runs.subject, strict=True)}
    paths = paths_in(store.attributes)
    return "\n".join(
        [
            f"  {counted(len(store.runs), 'run')}, {counted(report.chunks, 'chunk')}, "
            f"each compared with its checksum",
            f"  people: {len(people)}, by the names that the store has",
            f"  paths in its attributes: {printable(', '.join(paths)) or 'none'}",
        ]
    )


def push_store(
    path: str | os.PathLike[str], repository: str, *, private: bool = True, license: str = "unknown"
) -> int:
    """Upload a store as a data set of the hub, in one commit, and return the bytes of what it holds.

    Parameters
    ----------
    path
        The store.
    repository
        `owner/name` on the hub; made if absent.
    private
        Visibility of a repository that is made; one that is public already is refused.
    license
        Licence of the data, as the hub abbreviates it.

    Raises
    ------
    ValueError
        If `repository` is not of the form `owner/name`, is public and should not be, or holds another store.
    ConnectionError
        If the hub refuses or is not reached.
    """
    repository = _repository(repository, "dataset")
    # An older generation is not what somebody means to publish.
    store = BoldStore.open(path, fallback=False)
    data, last = contents(store, {})
    files: dict[str, bytes | Path] = {**data, **last}
    sizes = [f.stat().st_size if isinstance(f, Path) else len(f) for f in files.values()]
    files[CARD] = card.store_card(store, repository, license=license).encode()
    _send(files, repository, "dataset", private=private, check=partial(_check_older, store))
    return sum(sizes)


def _check_older(store: BoldStore, repository: str) -> None:
    """Refuse a repository that holds another store than an older generation of this one.

    Raises
    ------
    ValueError
        If it does.
    """
    client = need("huggingface_hub", "the hub", "hub")
    try:
        # Forced: what an earlier download left in the cache may stand in for a hub that does not answer.
        there = client.hf_hub_download(repository, MANIFEST, repo_type="dataset", force_download=True)
    except client.errors.EntryNotFoundError:
        return
    manifest, attributes, snapshot = parse_manifest(Path(there).read_bytes(), f"hf://datasets/{repository}")
    own = parse_manifest(store.manifest_bytes, str(store.path))[1]
    older = manifest.generation < store.generation and attributes == own
    # What is there already may be sent again.
    if not older and snapshot != store.snapshot:
        raise ValueError(
            f"repository: {repository} holds another store or a newer generation; choose another repository"
        )


def _repository(name: str, kind: str) -> str:
    """Return `owner/name` of a repository, given as such or as a URL of the hub.

    Raises
    ------
    ValueError
        If it is neither.
    """
    prefix = "hf://datasets/" if kind == "dataset" else "hf://"
    plain = name.removeprefix(prefix).removesuffix("/")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", plain):
        raise ValueError(f"repository: got {name!r}, expected owner/name or {prefix}owner/name for a {kind}")
    return plain


def _send(
    files: Mapping[str, bytes | Path],
    repository: str,
    kind: str,
    *,
    private: bool,
    check: Callable[[str], None] = lambda repository: None,
) -> None:
    client = need("huggingface_hub", "the hub", "hub")
    parts = [
        client.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in files.items()
    ]
    try:
        api = client.HfApi()
        # `private` changes nothing of a repository that is there.
        api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        if private and api.repo_info(repository, repo_type=kind).private is not True:
            raise ValueError(
                f"repository: {repository} is there already and is public; choose another, or say --public "
                "(private=False) to publish there"
            )
        check(repository)
        api.create_commit(
            repository, operations=parts, repo_type=kind, commit_message=f"Publish a {kind} of brainflow"
        )
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
