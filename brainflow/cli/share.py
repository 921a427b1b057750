"""Upload configuration, weights and a card to the Hugging Face hub.

First says what is about to be published. Paths of this machine are removed; names of people are replaced by
salted hashes unless told otherwise: these hide a name from a reader, not from whoever can guess it. A card
(README.md) that was written by hand is left alone and goes up as it is.

Examples
--------
  brainflow share run owner/name --dry-run
  brainflow share run owner/name --subjects drop --license cc-by-4.0
  brainflow share decoding/decoder owner/name --public
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from brainflow.sharing import Upload


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow share`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of a trained model or a saved decoder."""
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    """Repository on the hub; made if absent."""
    public: bool = False
    """Make a new repository public, or upload to one that is; by default it is private, or refused."""
    subjects: Literal["keep", "hash", "drop"] = "hash"
    """Names of the people in the training data: as they are, as salted hashes, or only how many."""
    license: Annotated[str, tyro.conf.arg(metavar="NAME")] = "unknown"
    """Licence of the weights as the hub abbreviates it, e.g. cc-by-4.0."""
    dry_run: bool = False
    """Say what would be published and print the card; upload nothing, write nothing."""


def run(args: Args) -> int:
    """Say what is published, upload it, and return the exit code."""
    from brainflow.pretrained.format import CARD
    from brainflow.sharing import push_to_hub
    from brainflow.storage.text import printable

    def said(upload: Upload) -> None:
        print(f"to {args.repository}, {'public' if args.public else 'private'}:")
        print(upload.describe(), flush=True)
        if args.dry_run and CARD in upload.texts:
            print("\n".join(["", *map(printable, upload.texts[CARD].splitlines()), ""]))

    names = push_to_hub(
        args.model,
        args.repository,
        private=not args.public,
        dry_run=args.dry_run,
        subjects=args.subjects,
        license=args.license,
        said=said,
    )
    done = "would be uploaded" if args.dry_run else "uploaded"
    print(f"{done} to {args.repository}: {', '.join(names)}")
    return 0
