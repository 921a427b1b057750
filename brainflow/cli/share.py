"""Write a model's card and upload configuration, weights and card to the Hugging Face hub.

Examples
--------
  brainflow share run owner/name --dry-run
  brainflow share decoding/decoder owner/name --public
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow share`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of a trained model or a saved decoder."""
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    """Repository on the hub; made if absent."""
    public: bool = False
    """Make a new repository public; private by default."""
    dry_run: bool = False
    """Write the card, name the files, upload nothing."""


def run(args: Args) -> int:
    """Upload, say what was shared, and return the exit code."""
    from brainflow.sharing import push_to_hub

    names = push_to_hub(args.model, args.repository, private=not args.public, dry_run=args.dry_run)
    done = "would be uploaded" if args.dry_run else "uploaded"
    print(f"{done} to {args.repository}: {', '.join(names)}")
    return 0
