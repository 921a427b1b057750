"""Command lines that cannot be right, whatever the files hold."""

from __future__ import annotations

import dataclasses
import shlex
import types
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin, get_type_hints

MANY = 1_000_000


class WrongUsage(ValueError):
    """Arguments are missing or do not go together: the exit code is 2, as after an unknown option."""


def check_words(prog: str, args: Any, words: list[str]) -> None:
    """Refuse words in front of all options that no positional argument takes.

    A parser calls such a word an unknown option, and where others are missing speaks of these first.

    Parameters
    ----------
    prog
        The command, as "brainflow split".
    args
        The verb's dataclass, or a union of them: its subcommands.
    words
        Its command line.

    Raises
    ------
    WrongUsage
        Naming the first of them, and what the command takes.
    """
    leading = words[: next((i for i, word in enumerate(words) if word.startswith("-")), len(words))]
    # `|` makes a UnionType of classes, and a Union where they are Annotated.
    if get_origin(args) in (Union, types.UnionType) and not {*leading[:1]} & {*_subcommands(args)}:
        return  # the parser names the subcommands
    room = _usage(prog, args, words)[1]
    if len(leading) > room:
        refuse(prog, args, words, leading[room])


def refuse(prog: str, args: Any, words: list[str], word: str) -> NoReturn:
    """Raise a WrongUsage that says that a word is one too many, and what the command takes."""
    usage, _ = _usage(prog, args, words)
    raise WrongUsage(f"unexpected {shlex.quote(word)}; expected `{usage}`, and the options of --help")


def _usage(prog: str, args: Any, words: list[str]) -> tuple[str, int]:
    """Return how a command is written, and how many words it takes in front of its options."""
    from tyro.conf import Positional  # 0.2 s that `brainflow --help` need not pay

    positional, options, room = [prog], [], 0
    if get_origin(args) in (Union, types.UnionType):
        args, room = _subcommands(args)[words[0]], 1
        positional.append(words[0])
    hints = get_type_hints(args, include_extras=True)
    for field in dataclasses.fields(args):
        hint = hints[field.name]
        kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        shown = next((note.metavar for note in notes if getattr(note, "metavar", None)), field.name.upper())
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if Positional in notes:
            room += MANY if get_origin(kind) in (tuple, list) else 1
            positional.append(shown if needed else f"[{shown}]")
        elif needed:
            name = next((note.name for note in notes if getattr(note, "name", None)), field.name)
            options.append(f"--{name.replace('_', '-')} {shown}")
    return " ".join([*positional, *options]), room


def _subcommands(args: Any) -> dict[str, Any]:
    """Return name → dataclass of the members of a union."""
    found = {}
    for one in get_args(args):
        kind, *notes = get_args(one)
        found[next(note.name for note in notes if hasattr(note, "name"))] = kind
    return found
