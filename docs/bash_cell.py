"""How `%%bash` cells run while the site is built: a startup file of its IPython.

IPython's own hands the output on in pieces of 100 bytes, between which myst-nb puts line breaks, and under
ipykernel programs are told to colour what is no terminal. Here the output is one piece, as a pipe gets it.
"""

import os
import subprocess

from IPython.core.magic import register_cell_magic


@register_cell_magic
def bash(line: str, cell: str) -> None:
    """Run a cell, print what it prints, and raise if it fails; `%%bash -e` stops at the first failure."""
    plain = {name: value for name, value in os.environ.items() if "COLOR" not in name} | {"NO_COLOR": "1"}
    command = ["bash", *line.split(), "-c", cell]
    done = subprocess.run(command, env=plain, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="")
    if done.returncode:
        raise RuntimeError(f"bash: exit code {done.returncode}")
