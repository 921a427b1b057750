"""Disturbs every single call by which a writer changes the disk, and looks at the store after each.

Run with faults.c preloaded: `LD_PRELOAD=faults.so python commit_faults.py OPERATION FOLDER [EVERY]`. For
n = 1, 2, … (with EVERY 4 every fourth n, another one of four by each fault, so that all n are disturbed) the
operation runs while its n-th write, fsync, mkdir, rename or unlink fails with EIO, or all that want room
fail from there on with ENOSPC, or while SIGINT or (in a fork) SIGTERM comes there. Prints one line of JSON.
"""

import ctypes
import errno
import itertools
import json
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

import numpy as np

from brainflow.storage import BoldStore, Segment, StoreError, StoreWriter, gather, verify, write_part
from brainflow.storage.files import Lock
from brainflow.storage.ingest.arrays import ingest_arrays

FAULTS = {
    "EIO": errno.EIO,
    "ENOSPC": errno.ENOSPC,
    "SIGINT": -signal.SIGINT,
    "SIGTERM": -signal.SIGTERM,
}
SHAPE = {"networks": 3, "chunk_rows": 4, "shard_rows": 16}
library = ctypes.CDLL(None)
library.faults_arm.argtypes = [ctypes.c_long, ctypes.c_int]
library.faults_calls.restype = ctypes.c_long


def bold(number):
    return np.random.default_rng(number).standard_normal((6 + number, 3)).astype(np.float32)


def write(writer, *numbers):
    for number in numbers:
        segments = [Segment(onset=1, length=2, labels={"state": f"s{number}"})]
        writer.append(bold(number), t_r=2.0, dataset="d", subject=str(number), segments=segments)


def make(path, *numbers):
    with StoreWriter.create(path, **SHAPE) as writer:
        write(writer, *numbers)


def create(path):
    make(path, 7, 8)


def append(path):
    with StoreWriter.append_to(path) as writer:
        write(writer, 7, 8)


def overwrite(path):
    with StoreWriter.create(path, **SHAPE, overwrite=True) as writer:
        write(writer, 7, 8)


def overwrite_by_two_renames(path):
    """As on a file system that cannot exchange two names, such as NFS."""
    library.faults_exchange(0)
    overwrite(path)


def ingest(path):
    ingest_arrays(path.with_name("source") / "runs.toml", path)


def collect(path):
    gather(path.with_name("source"), path)


# operation → (what does it, runs of the store before it or None, runs after it)
OPERATIONS = {
    "create": (create, None, [7, 8]),
    "append": (append, [1, 2], [1, 2, 7, 8]),
    "overwrite": (overwrite, [1, 2], [7, 8]),
    # until shortly before the move it is as `overwrite`
    "overwrite-nfs": (overwrite_by_two_renames, [1, 2], [7, 8]),
    "ingest": (ingest, [1, 2], [1, 2, 7, 8]),
    "gather": (collect, [1, 2], [1, 2, 7, 8]),
}


def sources(folder, operation):
    folder.mkdir()
    for number in (7, 8):
        if operation == "gather":
            write_part(folder, bold(number), t_r=2.0, dataset="d", subject=str(number))
        else:
            np.save(folder / f"sub-{number}.npy", bold(number))
    (folder / "runs.toml").write_text('[defaults]\ndataset = "d"\nt_r = 2.0\n[[files]]\nglob = "*.npy"\n')


def held(path):
    """Numbers of the runs of a store that is whole, None if there is none; anything else is an error."""
    if not os.path.lexists(path):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # falling back would be a warning
        store = BoldStore.open(path)
    numbers = [int(subject) for subject in store.runs.subject]
    for i, number in enumerate(numbers):
        assert np.array_equal(store.run(i), bold(number).astype(np.float16)), "a run has other values"
    report = verify(path)
    assert report.ok, report.errors
    return numbers


def attempt(work, path, n, fault):
    """Do `work` with its n-th call disturbed.

    Returns what is wrong with how it ended, or nothing, and whether it made fewer calls than n.
    """
    said, calls = "", n
    try:
        library.faults_arm(n, FAULTS[fault])
        try:
            work(path)
            calls = library.faults_calls()
        finally:
            library.faults_arm(0, 0)
    except KeyboardInterrupt:
        pass
    except StoreError as error:
        if not ("run the same command again" in str(error) and "/" in str(error)):
            said = f"names no file or remedy: {error}"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    for place in (path, path.with_name(".store.partial")):
        if place.exists():
            try:
                Lock(place).release()
            except StoreError as error:
                said = said or f"keeps its lock: {error}"
    return said, calls < n


def attempt_in_fork(work, path, n, fault):
    """As `attempt`, of a signal that ends the process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said, done = attempt(work, path, n, fault)
        os.write(writer, f"{int(done)}{said}".encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer[1:], answer[:1] == "1"


def looked_at(work, path, fault, before, after, *, go_on):
    """Which generation is there, "old" or "new"; and whether the next writer can go on from there."""
    if not path.exists() and path.with_name(".store.old").exists():  # between two renames
        assert fault == "SIGTERM"
        assert held(path.with_name(".store.old")) == before
        now = before
    else:
        now = held(path)
    assert now in (before, after), f"holds {now}"
    if fault == "ENOSPC":
        assert not others(path), f"left behind: {others(path)}"
    if not go_on:
        pass
    elif now != after or work in (overwrite, overwrite_by_two_renames):
        work(path)
        assert held(path) == after
        assert not others(path), f"left behind for good: {others(path)}"
    else:
        append_one(path)
        assert held(path) == [*after, 3]
    return "old" if now == before else "new"


def others(path):
    return {entry.name for entry in path.parent.iterdir()} - {"source", "pristine", path.name}


def append_one(path):
    with StoreWriter.append_to(path) as writer:
        write(writer, 3)


def fingerprint(folder):
    """Name and size of every file below a folder, and the content of those that a commit replaces."""
    found = []
    for entry in os.scandir(folder):
        if entry.is_dir():
            found += [entry.path, *fingerprint(entry.path)]
        else:
            found += [entry.path, entry.stat().st_size]
            if entry.name == "zarr.json" and f"{os.sep}index{os.sep}" not in entry.path:
                found.append(Path(entry.path).read_bytes())
    return found


def main(operation, folder, every="1"):
    work, before, after = OPERATIONS[operation]
    folder = Path(folder)
    pristine, path = folder / "pristine", folder / "store"
    sources(folder / "source", operation)
    if before is not None:
        make(pristine, *before)
    if operation == "append":  # in one case with a generation that the commit removes
        shutil.rmtree(pristine)
        make(pristine, before[0])
        with StoreWriter.append_to(pristine) as writer:
            write(writer, *before[1:])
    first = 180 if operation == "overwrite-nfs" else 1
    broken, seen, trials, ended, fresh = [], {}, dict.fromkeys(FAULTS, 0), None, None
    for number, fault in enumerate(FAULTS):
        for n in itertools.count(first + number % int(every), int(every)):
            if ended is None or ended != fresh:
                for left in folder.iterdir():
                    if left.name not in ("source", "pristine"):
                        shutil.rmtree(left)
                if before is not None:
                    shutil.copytree(pristine, path)
                fresh = tuple(fingerprint(folder))
            run = attempt_in_fork if fault == "SIGTERM" else attempt
            said, done = run(work, path, n, fault)
            trials[fault] += 1
            try:
                assert not said, said
                ended = tuple(fingerprint(folder))
                if (fault, ended) not in seen:  # most calls leave the very same files
                    go_on = len(seen) % 4 == 0
                    seen[fault, ended] = looked_at(work, path, fault, before, after, go_on=go_on)
                    ended = None if go_on else ended
            except (AssertionError, StoreError, OSError, Warning) as error:
                ended = None
                broken.append(f"{fault} at call {n}: {type(error).__name__}: {error}")
            if done:
                break
    outcomes = {"ended": len(seen), "old": list(seen.values()).count("old")}
    print(json.dumps({"operation": operation, "trials": trials, **outcomes, "broken": broken}))


if __name__ == "__main__":
    main(*sys.argv[1:])
