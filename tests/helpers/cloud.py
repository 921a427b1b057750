"""Stand-ins for `aws`, `hf` and `git clone` that copy from a folder, for the commands of recipes.

`aws s3 sync s3://BUCKET/PREFIX TO` copies from MIRROR/BUCKET/PREFIX and keeps to --exclude and --include as
the real one does: the last pattern that matches a path relative to PREFIX decides.
"""

import os
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from shutil import copyfile

VALUES = ("--exclude", "--include", "--repo-type", "--local-dir", "--depth")


def copy(source, target, filters):
    """Copy the files that the filters leave."""
    if not source.is_dir():
        sys.exit(f"{source}: nothing is published there")
    for path in source.rglob("*"):
        name = path.relative_to(source).as_posix()
        kept = [kind == "--include" for kind, pattern in filters if fnmatchcase(name, pattern)]
        if path.is_file() and (kept or [True])[-1]:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            copyfile(path, target / name)


def main(tool, words, mirror):
    """Do what the tool would."""
    options, rest = [], []
    words = iter(words)
    for word in words:
        if word in VALUES:
            options.append((word, next(words)))
        elif word != "--no-sign-request":
            rest.append(word)
    filters = [option for option in options if option[0] in ("--exclude", "--include")]
    if tool == "aws" and rest[:2] == ["s3", "sync"]:
        copy(mirror / rest[2].removeprefix("s3://"), Path(rest[3]), filters)
    elif tool == "hf" and rest[0] == "download" and ("--repo-type", "dataset") in options:
        copy(mirror / rest[1], Path(dict(options)["--local-dir"]), filters)
    elif tool == "git" and rest[0] == "clone":
        copy(mirror / rest[1].removeprefix("https://"), Path(rest[1].rpartition("/")[2]), filters)
    else:
        sys.exit(f"{tool}: {rest} is not known here")


def install(folder):
    """Put the stand-ins into a folder, for the PATH."""
    folder.mkdir()
    for tool in ("aws", "hf", "git"):
        script = folder / tool
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{__file__}" {tool} "$@"\n')
        script.chmod(0o755)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:], Path(os.environ["MIRROR"]))
