"""What of a model's `config.json` may be published: no paths of a machine, no names of people."""

from __future__ import annotations

import copy
import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal

HASHED = "sha256:"
Subjects = Literal["keep", "hash", "drop"]
# A slash behind a letter or a colon is that of `owner/name` or of a URL, which may stay.
_PATH = re.compile(r"(?<![\w.:/~-])(?:~?/(?!/)[^\s/,;:'\"()]+/|[A-Za-z]:[\\/]|\\\\|file:/)[^\s,;'\"()]*")
# Settings that name files of whoever trained, relative or not.
_OWN_FILES = (
    ("pretrain", "store"),
    ("pretrain", "out"),
    ("pretrain", "train", "init"),
    ("pretrain", "data", "split"),
    ("estimator", "checkpoint"),
)
# Names that a store is compared with, or that a decoder answers with, are no paths whatever they look like.
_VOCABULARY = (("data", "network_names"), ("decoder", "classes"), ("legacy", "names"), ("legacy", "missing"))
_PEOPLE = (("data", "training_subjects"), ("decoding", "subjects"))


@dataclass(frozen=True, kw_only=True)
class Published:
    """A configuration that may be published, and what was taken out of it.

    Attributes
    ----------
    config
        The configuration.
    paths
        Names of the settings from which a path was removed.
    people
        Number of people whose names were in it.
    """

    config: dict[str, Any]
    paths: list[str]
    people: int


def published(config: dict[str, Any], subjects: Subjects = "hash") -> Published:
    """Return a model's configuration without paths, and without the names of people unless these are kept.

    Parameters
    ----------
    config
        `config.json` of a saved model; not changed.
    subjects
        `keep` names; `hash` replaces each by a salted SHA-256, so that whoever holds a store can say which of
        its subjects the model saw; `drop` leaves their number. The salt is drawn for each call and published.
    """
    shown = copy.deepcopy(config)
    paths: list[str] = []
    for place in _OWN_FILES:
        owner, name = _owner(shown, place)
        # What the hub calls the model that training began from is no path.
        if owner and owner.get(name) and owner[name] != config.get("base_model"):
            owner[name] = None if place[0] == "estimator" else ""
            paths.append(".".join(place))
    shown = _without_paths(shown, (), paths)
    everybody = {person for place in _PEOPLE for person in _listed(config, place)}
    # Names that were hashed already are compared under the salt that they have.
    salt = _salt(config) or secrets.token_hex(16)
    for place in _PEOPLE:
        names = _listed(shown, place)
        owner, name = _owner(shown, place)
        if owner and names and subjects == "drop":
            owner[name] = []
            owner["people"] = len(names)  # the card says how many
        elif owner and names and subjects == "hash":
            owner[name] = sorted(p if p.startswith(HASHED) else hashed(p, salt) for p in names)
            shown["data"] = {**(shown.get("data") or {}), "subjects_salt": salt}
    counted = [owner.get("people") or 0 for place in _PEOPLE if (owner := _owner(config, place)[0])]
    return Published(config=shown, paths=sorted(paths), people=max([len(everybody), *counted]))


def hashed(person: str, salt: str) -> str:
    """Return what stands for a person, named as "dataset/subject", in a published configuration."""
    return HASHED + hashlib.sha256(f"{salt}\0{person}".encode()).hexdigest()[:32]


def seen(data: dict[str, Any], people: Iterable[str]) -> list[str]:
    """Return those of some people, named as "dataset/subject", whom a model was trained on.

    Parameters
    ----------
    data
        Section `data` of the model's `config.json`, its subjects by name or hashed.
    people
        Names.
    """
    known, salt = set(data.get("training_subjects") or []), data.get("subjects_salt")
    return sorted(one for one in set(people) if one in known or (salt and hashed(one, salt) in known))


def _salt(config: dict[str, Any]) -> str | None:
    """Return the salt of names that were hashed already, in a model that was shared and adapted."""
    data = config.get("data")
    return data.get("subjects_salt") if isinstance(data, dict) else None


def without_paths(text: str) -> str | None:
    """Return a text without absolute paths; one that is a path becomes its file's name, a folder None.

    Examples
    --------
    >>> without_paths("/home/ann/atlas.nii.gz"), without_paths("/home/ann"), without_paths("of /home/ann/a")
    ('atlas.nii.gz', None, 'of (a path)')
    """
    if text.startswith(("/", "~/", "file:/", "\\\\")) or re.match(r"[A-Za-z]:[\\/]", text):
        name = (PureWindowsPath(text) if "\\" in text else PurePosixPath(text)).name
        return name if "." in name.strip(".") else None
    return _PATH.sub("(a path)", text)


def paths_in(facts: dict[str, Any]) -> list[str]:
    """Return the names of a record's entries that hold an absolute path, such as `preprocessing.mask`."""
    found: list[str] = []
    _without_paths(facts, (), found)
    return sorted(set(found))


def _without_paths(value: Any, place: tuple[str, ...], removed: list[str]) -> Any:
    if place in _VOCABULARY:
        return value
    if isinstance(value, dict):
        return {
            _without_paths(key, place, removed) or "(a path)": _without_paths(item, (*place, key), removed)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_without_paths(item, place, removed) for item in value]
    if not isinstance(value, str) or place in _PEOPLE:
        return value
    found = without_paths(value)
    if found != value:
        removed.append(".".join(place))
    return found


def _owner(config: dict[str, Any], place: tuple[str, ...]) -> tuple[dict[str, Any] | None, str]:
    """Return the table that a setting stands in, None if there is none, and the setting's name in it."""
    table: Any = config
    for name in place[:-1]:
        table = table.get(name) if isinstance(table, dict) else None
    return (table if isinstance(table, dict) else None), place[-1]


def _listed(config: dict[str, Any], place: tuple[str, ...]) -> list[str]:
    owner, name = _owner(config, place)
    return list(owner.get(name) or []) if owner else []
