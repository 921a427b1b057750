"""One HTML page with everything inside: pictures as data URIs, interactive views in frames, nothing fetched.

The page's own Content-Security-Policy forbids network access, so that "self-contained" is enforced by the
browser, also in the frames, which inherit it. Scripts are allowed where there are interactive views, and run
in their sandboxed frames alone: the page has none, and all text is escaped by jinja2.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brainflow.optional import requires
from brainflow.report.template import TEMPLATE
from brainflow.storage.files import output_folder, replace_durably, write_text

with requires("the report", "report"):
    from jinja2 import Environment, StrictUndefined


def number(value: float | None) -> str:
    """Return a number with three decimals, nothing for None."""
    return "" if value is None else f"{value:.3f}"


def signed(value: float) -> str:
    """Return a number with its sign and three decimals."""
    return f"{value:+.3f}"


def ends(value: dict[str, Any]) -> str:
    """Return the ends of an interval, as results hold it."""
    return "one group" if value["low"] is None else f"[{value['low']:.3f}, {value['high']:.3f}]"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture: `name` is its file name without suffix, `png` its bytes, `alt` what it shows in words."""

    name: str
    png: bytes
    alt: str
    caption: str

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the PNG's header."""
        return int.from_bytes(self.png[16:20], "big"), int.from_bytes(self.png[20:24], "big")


@dataclass(frozen=True, kw_only=True)
class View:
    """An interactive view: a whole HTML page that fetches nothing, shown in a frame `height` pixels high."""

    title: str
    html: str
    height: int = 260


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first column holds names, `prose` are columns of text. Rows in `strong` stand out."""

    header: list[str]
    rows: list[list[str]]
    strong: tuple[int, ...] = ()
    prose: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with sentences, a table, pictures and views, in this order.

    `volumes` are images with `to_filename`, by the name under which they are saved beside the page.
    """

    title: str
    text: list[str] = field(default_factory=list)
    table: Table | None = None
    notes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    volumes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page says. `facts` are (figure, what it is) pairs in a row under the lead."""

    title: str
    lead: str
    facts: list[tuple[str, str]]
    sections: list[Section]
    footer: list[str]

    @property
    def interactive(self) -> bool:
        """Whether some section has an interactive view, which needs scripts."""
        return any(section.views for section in self.sections)


def render(page: Page) -> str:
    """Return the page as HTML."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE).render(page=page)


def write_page(page: Page, folder: str | Path) -> Path:
    """Write `index.html`, and beside it every picture as a PNG and every volume; return the page's path."""
    target = output_folder(Path(folder), "page")
    for section in page.sections:
        for picture in section.pictures:
            replace_durably(target / f"{picture.name}.png", picture.png)
        for name, volume in section.volumes.items():
            (target / name).unlink(missing_ok=True)  # a link would be followed
            volume.to_filename(target / name)
    path = target / "index.html"
    write_text(path, render(page))
    return path
