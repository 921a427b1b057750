"""Parcellations by name: `atlases.toml` says which there are, in which template, and where they come from.

nilearn downloads its own. TemplateFlow's files are taken from its folder; its client, if installed, downloads
what is missing. All others have a URL each, and are kept in `atlas_home()`.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import re
import tomllib
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from brainflow.optional import need
from brainflow.prepare.files import parse_name
from brainflow.storage.files import replacing

_MOST_BYTES = 256 * 2**20
_SECONDS = 60.0
_IMAGES = (b"\x1f\x8b", b"\x5c\x01\x00\x00", b"\x1c\x02\x00\x00")
"""How gzip, NIfTI-1 and NIfTI-2 files begin."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """What a name stands for in a template.

    Parameters
    ----------
    path
        The image.
    label
        Of the atlas, letters and digits.
    template
        That the image is in.
    names
        {label value or map index: name}, as far as nilearn says them.
    table
        File with the names, where there is one.
    """

    path: Path
    label: str
    template: str
    names: Mapping[int, str] = field(default_factory=dict)
    table: Path | None = None


def catalogue() -> list[dict[str, Any]]:
    """Return families of parcellations: their names, what they are, and their templates, as JSON values."""
    return [
        {
            "names": [_filled(entry["name"], n) for n in entry.get("n", [None])],
            "about": entry["about"],
            "templates": [source["template"] for source in entry["from"]],
        }
        for entry in _table()
    ]


def find(text: str, template: str) -> Named | None:
    """Look a name up, and fetch what it stands for.

    Parameters
    ----------
    text
        Such as "schaefer-400"; capitals do not matter, and dashes may be left out or be underscores.
    template
        In which it is wanted; "" for the first in the table.

    Returns
    -------
    None if there is no such name

    Raises
    ------
    ValueError
        If it does not come in that size or template.
    ConnectionError
        If it cannot be downloaded.
    """
    sizes: list[str] = []
    for entry in _table():
        # `escape` would change {n}: \0 stands for it meanwhile.
        pattern = (
            re.escape(entry["name"].replace("{n}", "\0")).replace(r"\-", "[-_]?").replace("\0", r"(\d+)")
        )
        match = re.fullmatch(pattern, text.lower())
        if match is None:
            continue
        n = int(match[1]) if match.groups() else None
        if n in entry.get("n", [None]):
            return _fetch(entry, n, _source(entry, n, template))
        sizes += map(str, entry["n"])
    if sizes:
        raise ValueError(f"atlas {text}: has no such size, expected one of {', '.join(dict.fromkeys(sizes))}")
    return None


def templateflow_home() -> Path:
    """Return the folder in which TemplateFlow's client keeps its files."""
    return Path(os.environ.get("TEMPLATEFLOW_HOME", _cache() / "templateflow"))


def atlas_home() -> Path:
    """Return the folder for atlases of neither nilearn nor TemplateFlow: BRAINFLOW_ATLASES, if set."""
    return Path(os.environ.get("BRAINFLOW_ATLASES") or _cache() / "brainflow" / "atlases")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


@cache
def _table() -> list[dict[str, Any]]:
    text = files("brainflow.prepare").joinpath("atlases.toml").read_text(encoding="utf-8")
    return list(tomllib.loads(text)["atlas"])


def _source(entry: Mapping[str, Any], n: int | None, template: str) -> dict[str, Any]:
    """Return the source of an atlas in a template."""
    sources = [source for source in entry["from"] if n in source.get("n", [n])]
    for source in sources:
        if template in ("", source["template"]):
            return dict(source)
    there = " and ".join(source["template"] for source in sources)
    raise ValueError(
        f"atlas {_filled(entry['name'], n)}: is known in {there}, the images are in {template}; take images "
        "in that template, the atlas by path, or accept the other template with --allow-space-mismatch"
    )


def _fetch(entry: Mapping[str, Any], n: int | None, source: Mapping[str, Any]) -> Named:
    name, label, template = _filled(entry["name"], n), _filled(entry["label"], n), source["template"]
    if "nilearn" in source:
        path, names = _from_nilearn(name, source["nilearn"], _filled(source["arguments"], n))
        return Named(path=path, label=label, template=template, names=names)
    special = {key: source[key][str(n)] for key in ("id", "commit") if key in source}
    table = _filled(source.get("names", ""), n, **special)
    if "templateflow" in source:
        path = _from_templateflow(name, _filled(source["templateflow"], n), table)
        beside = templateflow_home() / table.partition("_")[0] / table
        return Named(path=path, label=label, template=template, table=beside if _is_there(beside) else None)
    path = atlas_home() / _filled(source["file"], n)
    _download(name, _filled(source["url"], n, **special), path)
    if not table:
        return Named(path=path, label=label, template=template)
    beside = path.with_name(f"{path.name.partition('.')[0]}{Path(table).suffix}")
    _download(name, table, beside)
    return Named(path=path, label=label, template=template, table=beside)


def _filled(value: Any, n: int | None, **more: str) -> Any:
    """Return a value of the table with the size in place of `{n}`."""
    if isinstance(value, dict):
        return {key: _filled(one, n, **more) for key, one in value.items()}
    # nilearn wants a number here; a format would make a text of it.
    if value == "{n}":
        return n
    return value.format(n=n, **more) if isinstance(value, str) else value


def _from_templateflow(name: str, file: str, table: str) -> Path:
    parsed = parse_name(Path(file))
    assert parsed is not None  # the table's own
    template = parsed.entities["tpl"]
    path = templateflow_home() / f"tpl-{template}" / file
    if not _is_there(path) and importlib.util.find_spec("templateflow") is not None:
        client = need("templateflow.api", "fetching an atlas", "bids")
        try:
            for one in (file, table):
                client.get(**_query(one))
        except Exception as error:  # requests and the client raise many kinds when there is no network
            raise _not_downloaded(name, "TemplateFlow", "TEMPLATEFLOW_HOME", error) from error
    if not _is_there(path):
        raise ValueError(
            f"atlas {name}: is not in TemplateFlow's folder ({templateflow_home()}) in {template}, in which "
            "the images are: the extra `bids` fetches it from TemplateFlow if that has it, TEMPLATEFLOW_HOME "
            "names another folder, --allow-space-mismatch takes nilearn's, as the published models did"
        )
    return path


def _query(file: str) -> dict[str, Any]:
    """Return a file name of TemplateFlow's as arguments of its client."""
    parsed = parse_name(Path(file))
    assert parsed is not None  # the table's own
    wanted: dict[str, Any] = {k: v for k, v in parsed.entities.items() if k not in ("tpl", "res")}
    wanted |= {"template": parsed.entities["tpl"], "suffix": parsed.suffix, "extension": parsed.extension}
    if "res" in parsed.entities:
        # The client's index has resolutions as numbers, without leading zeros.
        wanted["resolution"] = int(parsed.entities["res"])
    return wanted


def _is_there(path: Path) -> bool:
    """Whether a file has been downloaded: TemplateFlow puts empty ones where none has been yet."""
    return path.is_file() and path.stat().st_size > 0


def _from_nilearn(name: str, function: str, arguments: Mapping[str, Any]) -> tuple[Path, dict[int, str]]:
    datasets = need("nilearn.datasets", "fetching an atlas", "bids")
    try:
        bunch = getattr(datasets, function)(**arguments)
        # DiFuMo's labels are a table, those of others a list.
        labels = getattr(bunch.labels, "difumo_names", bunch.labels)
        names = [one.decode() if isinstance(one, bytes) else str(one) for one in labels]
    except Exception as error:  # nilearn, requests and urllib raise many kinds when there is no network
        raise _not_downloaded(name, "nilearn", "NILEARN_DATA", error) from error
    # Of Harvard-Oxford nilearn returns an image in memory, and the path beside it.
    path = bunch.maps if isinstance(bunch.maps, str | os.PathLike) else bunch.filename
    # Some of nilearn's lists begin with the background, which is 0.
    first = 0 if names and names[0].lower() == "background" else 1
    # AAL's labels are not 1, 2, …: nilearn lists them, as texts.
    values = map(int, bunch.get("indices") or range(first, first + len(names)))
    return Path(path), {value: text for value, text in zip(values, names, strict=True) if value}


def _download(name: str, url: str, path: Path) -> None:
    """Fetch a file once."""
    if _is_there(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            # One byte more than allowed tells that a file is larger.
            data = answer.read(_MOST_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _not_downloaded(name, url, "BRAINFLOW_ATLASES", error) from error
    # A server that wants a login answers with a page.
    if len(data) > _MOST_BYTES or (".nii" in path.suffixes and not data.startswith(_IMAGES)):
        raise ConnectionError(
            f"atlas {name}: {url} answered with something that is no image; fetch it in another way, and put "
            f"it at {path}"
        )
    with replacing(path) as file:
        file.write(data)


def _not_downloaded(name: str, who: str, variable: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"atlas {name}: {who} could not download it ({type(error).__name__}); fetch it where there is "
        f"internet and set {variable} to its folder, or give the path of its image"
    )
