"""Write a commented run.toml for `brainflow pretrain --config`: every setting, what it is, what it would be.

Examples
--------
  brainflow init
  brainflow init bert.toml --framework seq-bert --store store
  brainflow pretrain --config run.toml --out run
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import textwrap
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from brainflow.cli.usage import WrongUsage
from brainflow.frameworks import framework_spec
from brainflow.frameworks.settings import sections
from brainflow.recipes import today
from brainflow.storage.files import write_text

HEAD = """\
# Settings of `brainflow pretrain --config {name} --out RUN`; the command line wins over them.
# A comment says what a setting is if nobody gives it. Sizes, learning rate and steps are then chosen for
# the store and the machine, and `pretrain` says what it chose: take a # away only to choose yourself.

store = {store}
"""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow init`."""

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = "run.toml"
    """The file to write."""
    store: Annotated[str, tyro.conf.arg(metavar="STORE")] = "store"
    """Store to train on."""
    framework: Annotated[str, tyro.conf.arg(metavar="NAME")] = "csm"
    """Learning framework; its defaults are written."""
    overwrite: bool = False
    """Replace the file."""


def run(args: Args) -> int:
    """Write the file and say what to do with it."""
    try:
        framework_spec(args.framework)
    except ValueError as error:
        raise WrongUsage(str(error)) from error
    out = Path(args.out)
    # A link that leads nowhere is something, too.
    if os.path.lexists(out) and not args.overwrite:
        raise ValueError(f"out: {out} is there already; choose another file, or --overwrite to replace it")
    write_text(out, commented(args.store, args.framework, out.name))
    print(f"{out}: edit it, then: brainflow pretrain --config {out} --out run")
    return 0


def commented(store: str, framework: str, name: str = "run.toml") -> str:
    """Return the TOML text: store and framework stand, every other setting is a comment with its value.

    Raises
    ------
    ValueError
        If there is no such framework.
    """
    lines = [HEAD.format(name=name, store=json.dumps(store))]
    usual = today(framework)
    for section, config in sections(framework).items():
        lines.append(f"[{section}]")
        explained = _explained(config)
        for field in fields(config):
            if (section, field.name) == ("model", "networks"):  # the store says it
                continue
            value = usual.get(section, {}).get(field.name, field.default)
            mark = "" if (section, field.name) == ("model", "framework") else "# "
            value = framework if not mark else value
            lines += textwrap.wrap(
                explained.get(field.name, ""), 108, initial_indent="# ", subsequent_indent="# "
            )
            lines += [f"{mark}{field.name} = {json.dumps(value)}", ""]
    return "\n".join(lines)


def _explained(config: type[Any]) -> dict[str, str]:
    """Return field → the docstring under it in the source, of the class or of those above it, in one line."""
    found = {}
    # From the base down: what a class says itself wins.
    for one in filter(is_dataclass, reversed(config.__mro__)):
        # From the source: Python keeps no docstrings of fields.
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found
