"""Strangers' texts neither steer a terminal nor start a formula."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainflow.storage.text import counted, csv_cell, html_table, printable


@given(st.text(alphabet=st.characters()))
def test_what_is_printed_is_one_line_that_any_terminal_can_take(text):
    shown = printable(text)
    assert len(shown.encode().decode().splitlines()) <= 1
    assert not set(shown) & set("\x1b\x9b\n\r\u202e\u2066\u2028")
    assert printable(shown) == shown


def test_controls_are_written_out_and_letters_stay():
    assert printable("a\x1b]0;x\x07\x9b\u202eb\ud800\n") == "a\\x1b]0;x\\x07\\x9b\\u202eb\\ud800\\x0a"
    assert printable("Größe 脳 🧠 שלום") == "Größe 脳 🧠 שלום"


@pytest.mark.parametrize("text", ["=1+1", "+cmd|x", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "-", "+"])
def test_a_formula_becomes_text(text):
    assert csv_cell(text) == "'" + text


@given(st.floats() | st.integers())
def test_numbers_stay_numbers(number):
    assert csv_cell(str(number)) == str(number)


@given(st.text(st.sampled_from('=+-@\t\r 1a,"')))
def test_a_cell_that_begins_like_a_formula_is_a_number(text):
    cell = csv_cell(text)
    if cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        float(cell)
    assert cell.removeprefix("'") == text


@pytest.mark.parametrize(
    ("count", "words", "said"),
    [
        (0, ("run",), "0 runs"),
        (1, ("run",), "1 run"),
        (1, ("person", "people"), "1 person"),
        (1200, ("window is", "windows are"), "1,200 windows are"),
    ],
)
def test_of_one_there_are_not_several(count, words, said):
    assert counted(count, *words) == said


def test_a_table_for_a_notebook_escapes_what_strangers_wrote():
    table = html_table(["<b>"], [["<script>", 1], ["\x1b[2J", None]], title="a & b")
    assert "<script" not in table
    assert "\x1b" not in table
    assert table.startswith(
        "<table><caption>a &amp; b</caption><tr><th>&lt;b&gt;</th></tr><tr><td>&lt;script&gt;"
    )
    assert html_table([], [["a", "b"]]) == "<table><tr><td>a</td><td>b</td></tr></table>"
