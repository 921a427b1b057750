"""List the parcellations that `--atlas` knows by name, in which templates, and what they are.

Names may be joined, as in `schaefer-400+tian-s3`; capitals do not matter.

Examples
--------
  brainflow atlases
  brainflow atlases --json
"""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow atlases`."""

    json: bool = False
    """Print a JSON list with all names."""


def run(args: Args) -> int:
    """Print the table."""
    from brainflow.prepare.named import catalogue

    rows = catalogue()
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        print(" … ".join(dict.fromkeys((row["names"][0], row["names"][-1]))))
        print(f"    {row['about']}\n    {', '.join(row['templates'])}")
    return 0
