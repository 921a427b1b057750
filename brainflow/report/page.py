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
from brainflow.storage.files import output_folder, replace_durably, write_text

# An icon of nothing: browsers would ask for favicon.ico. Without allow-same-origin a view's
# scripts cannot reach the page. Widths are halved: pictures have two pixels for one.
TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'\
{% if page.interactive %}; script-src 'unsafe-inline'{% endif %}">
<link rel="icon" href="data:,">
<title>{{ page.title }}</title>
<style>
:root { --ink: #1c2430; --muted: #667085; --line: #e4e7ec; --paper: #ffffff; --ground: #f6f7f9;
  --accent: #2f6fdf; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);

    font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  }
main { max-width: 1120px; margin: 0 auto; padding: 48px 20px 64px; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 12px; text-wrap: balance; }
h2 { font-size: 1.25rem; line-height: 1.3; letter-spacing: -0.01em; margin: 0 0 8px; }
p { margin: 0 0 12px; max-width: 68ch; }
.lead { font-size: 1.1rem; color: #3d4757; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px;
  margin: 28px 0; padding: 0; }
.facts div { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; }
.facts dd { margin: 0; font-size: 1.45rem; font-weight: 650; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; }
.facts dt { color: var(--muted); font-size: 0.85rem; line-height: 1.35; }
.facts div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 24px;
  margin: 0 0 20px; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.95rem; }
th, td { text-align: right; padding: 7px 6px; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--muted); font-weight: 500; font-size: 0.85rem; border-bottom: 1px solid #c9ced8; }
tbody th { font-weight: 400; }
.prose { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 16ch; }
tr.strong td, tr.strong th { font-weight: 650; color: var(--accent); }
figure { margin: 20px 0 0; }
iframe { display: block; width: 100%; border: 0; }
figure img { display: block; width: 100%; height: auto; margin: 0 auto; }
figcaption, .notes { color: var(--muted); font-size: 0.88rem; line-height: 1.5; margin-top: 8px; }
figcaption { max-width: 76ch; }
.notes { padding-left: 18px; }
footer { color: var(--muted); font-size: 0.85rem; padding: 8px 4px; }
@media (max-width: 560px) { .facts { grid-template-columns: 1fr 1fr; }
  main { padding: 28px 12px 40px; } section { padding: 18px 14px;
  border-radius: 10px; } h1 { font-size: 1.6rem; } }
@media print { body { background: none; } section { break-inside: avoid; border: 0; padding: 0; } }
</style>
</head>
<body>
<main>
<header>
<h1>{{ page.title }}</h1>
<p class="lead">{{ page.lead }}</p>
<dl class="facts">
{% for figure, meaning in page.facts %}
<div><dt>{{ meaning }}</dt><dd>{{ figure }}</dd></div>
{% endfor %}
</dl>
</header>
{% for section in page.sections %}
<section>
<h2>{{ section.title }}</h2>
{% for paragraph in section.text %}
<p>{{ paragraph }}</p>
{% endfor %}
{% if section.table %}
<div class="scroll"><table>
<thead><tr>{% for cell in section.table.header %}<th scope="col"\
{% if loop.index0 in section.table.prose %} class="prose"{% endif %}>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in section.table.rows %}
<tr{% if loop.index0 in section.table.strong %} class="strong"{% endif %}>{% for cell in row %}\
{% if loop.first %}<th scope="row">{{ cell }}</th>\
{% elif loop.index0 in section.table.prose %}<td class="prose">{{ cell }}</td>\
{% else %}<td>{{ cell }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endif %}
{% if section.notes %}
<ul class="notes">
{% for note in section.notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
{% endif %}
{% for picture in section.pictures %}
<figure>
<img src="{{ picture.uri }}" alt="{{ picture.alt }}" \
width="{{ picture.size[0] }}" height="{{ picture.size[1] }}" \
style="max-width: {{ picture.size[0] // 2 }}px">
<figcaption>{{ picture.caption }}</figcaption>
</figure>
{% endfor %}
{% for view in section.views %}
<figure>
<iframe sandbox="allow-scripts" title="{{ view.title }}" srcdoc="{{ view.html }}" \
style="height: {{ view.height }}px"></iframe>
<figcaption>{{ view.title }}</figcaption>
</figure>
{% endfor %}
</section>
{% endfor %}
<footer>
{% for line in page.footer %}
<p>{{ line }}</p>
{% endfor %}
</footer>
</main>
</body>
</html>
"""


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
    # A name that is mistyped in the template is an error, not an empty place.
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
    # Last: there is no page before its pictures.
    path = target / "index.html"
    write_text(path, render(page))
    return path
