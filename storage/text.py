"""Texts of strangers on their way to a terminal or a table."""

from __future__ import annotations

import re

# C0, DEL, C1, line and paragraph separators, marks that turn the direction of writing, halves of surrogates
# (which no terminal can encode)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def printable(text: str) -> str:
    r"""Text with its control characters written out: it can neither steer a terminal nor break its line.

    Examples
    --------
    >>> printable("sub-\x1b[2J01")
    'sub-\\x1b[2J01'
    """
    return _CONTROL.sub(_written_out, text)


def csv_cell(text: str) -> str:
    """Text for a cell of a CSV or TSV file that no spreadsheet takes for a formula; numbers stay numbers.

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
