"""Texts of strangers on their way to a terminal or a table."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

# C0, DEL, C1, line and paragraph separators, marks that turn the direction of writing, halves of surrogates
# (which no terminal can encode)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def printable(text: str) -> str:
    r"""Return a text with control characters written out: it can neither steer a terminal nor break its line.

    Examples
    --------
    >>> printable("sub-\x1b[2J01")
    'sub-\\x1b[2J01'
    """
    return _CONTROL.sub(_written_out, text)


def counted(count: int, one: str, many: str = "") -> str:
    """Return how many there are of what, in words that fit one of them, too.

    Examples
    --------
    >>> counted(1, "run"), counted(2, "run"), counted(1200, "person", "people")
    ('1 run', '2 runs', '1,200 people')
    """
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def html_table(header: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> str:
    """Return rows as an HTML table: what a notebook shows of an object.

    Examples
    --------
    >>> html_table(["run"], [["<a>"]])
    '<table><tr><th>run</th></tr><tr><td>&lt;a&gt;</td></tr></table>'
    """
    lines = [("th", header), *(("td", row) for row in rows)] if header else [("td", row) for row in rows]
    cells = (
        "".join(f"<{tag}>{html.escape(printable(str(cell)))}</{tag}>" for cell in line) for tag, line in lines
    )
    caption = f"<caption>{html.escape(printable(title))}</caption>" if title else ""
    return f"<table>{caption}{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def csv_cell(text: str) -> str:
    """Return a text for a cell of a CSV or TSV file that no spreadsheet takes for a formula; numbers stay.

    Examples
    --------
    >>> csv_cell("=1+1"), csv_cell("-1.5"), csv_cell("rest")
    ("'=1+1", '-1.5', 'rest')
    """
    return f"'{text}" if text.startswith(_FORMULA) and not _is_number(text) else text


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
