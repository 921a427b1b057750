"""Publish a model with its card on the Hugging Face hub, or a store on the hub or in a bucket.

First says what is about to be published; --dry-run stops there. Of a model paths of this machine are removed
and names of people replaced by salted hashes unless told otherwise: these hide a name from a reader, not from
whoever can guess it. A card (README.md) that was written by hand is left alone and goes up as it is. A store
is read whole and compared with its checksums first, then goes up as it is, names of people included; the same
command again sends what has been appended since.

Examples
--------
  brainflow publish run owner/name --dry-run
  brainflow publish run owner/name --subjects drop --license cc-by-4.0
  brainflow publish decoding/decoder owner/name --public
  brainflow publish store s3://bucket/store
  brainflow publish store hf://datasets/owner/name --license cc0-1.0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from brainflow.cli.usage import WrongUsage
from brainflow.progress import progress_bar

if TYPE_CHECKING:
    from brainflow.sharing import Upload


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow publish`."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of a trained model, a saved decoder, or a store."""
    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """Repository on the hub, made if absent: `owner/name` or `hf://owner/name` for a model,
    `hf://datasets/owner/name` for a store; or `s3://bucket/…`, `gs://bucket/…` for a store."""
    public: bool = False
    """Make a new repository public, or upload to one that is; by default it is private, or refused. A bucket
    is seen by whom its owner lets in."""
    subjects: Literal["keep", "hash", "drop"] | None = None
    """Names of the people whom a model was trained on: as they are, as salted hashes (the default), or only
    how many. A store has them as they are."""
    license: Annotated[str, tyro.conf.arg(metavar="NAME")] = "unknown"
    """Licence of the weights or the data as the hub abbreviates it, e.g. cc-by-4.0."""
    dry_run: bool = False
    """Say what would be published and print a model's card; upload nothing, write nothing."""


def run(args: Args) -> int:
    """Say what is published, upload it, and return the exit code."""
    from brainflow.pretrained.format import CONFIG, located
    from brainflow.storage.manifest import MANIFEST

    if (Path(args.source) / MANIFEST).is_file():
        return _store(args)
    if not (located(args.source) / CONFIG).is_file():
        raise FileNotFoundError(
            f"source: {args.source} holds neither a model ({CONFIG}) nor a store ({MANIFEST})"
        )
    return _model(args)


def _model(args: Args) -> int:
    from brainflow.pretrained.format import CARD
    from brainflow.sharing import push_to_hub
    from brainflow.storage.text import printable

    if "://" in args.url and not args.url.startswith("hf://"):
        raise WrongUsage(f"url: got {args.url}; a model goes to the hub, as owner/name")

    def said(upload: Upload) -> None:
        print(f"to {args.url}, {_seen_by(args)}:")
        # Seen before the upload begins.
        print(upload.describe(), flush=True)
        if args.dry_run and CARD in upload.texts:
            print("\n".join(["", *map(printable, upload.texts[CARD].splitlines()), ""]))

    names = push_to_hub(
        args.source,
        args.url,
        private=not args.public,
        dry_run=args.dry_run,
        subjects=args.subjects or "hash",
        license=args.license,
        said=said,
    )
    done = "would be uploaded" if args.dry_run else "uploaded"
    print(f"{done} to {args.url}: {', '.join(names)}")
    return 0


def _store(args: Args) -> int:
    from brainflow.sharing import describe_store, push_store
    from brainflow.storage import publish
    from brainflow.storage.remote import is_remote

    if args.subjects in ("hash", "drop"):
        raise WrongUsage(
            f"subjects: got {args.subjects}, but a store is published with the names that it has; ingest the "
            "runs under other names first"
        )
    hub = args.url.startswith("hf://")
    if not is_remote(args.url):
        raise WrongUsage(
            f"url: got {args.url}, expected hf://datasets/owner/name, s3://bucket/… or gs://bucket/… for a "
            "store"
        )
    print(f"to {args.url}, {_seen_by(args) if hub else 'seen by whom its owner lets in'}:")
    with progress_bar("verify") as progress:
        said = describe_store(args.source, progress)
    print(said, flush=True)
    if args.dry_run:
        print(f"would be uploaded to {args.url}")
        return 0
    if hub:
        sent = push_store(args.source, args.url, private=not args.public, license=args.license)
    else:
        with progress_bar("publish") as progress:
            sent = publish(args.source, args.url, progress)
    print(f"uploaded to {args.url}: {sent:,} bytes")
    return 0


def _seen_by(args: Args) -> str:
    return "public" if args.public else "private"
