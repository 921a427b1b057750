"""Small stores of two generations, everything that can be read of one, and lies with right checksums."""

import hashlib
import json
import shutil

import numpy as np

from brainflow.storage import BoldStore, Segment, StoreWriter
from brainflow.storage.layout import crc32c, to_compact_json
from brainflow.storage.tables import RUN_STRINGS

NETWORKS, CHUNK, SHARD = 4, 8, 64
KINDS = {"float16": {}, "int8": {"dtype": "int8"}, "zstd": {"compression": "zstd"}}


def write_store(path, commits=(4, 3), *, kind="float16", **options):
    """A store with one generation a commit, of so many runs each, with labels and censored time points."""
    rng = np.random.default_rng(0)
    options = {"networks": NETWORKS, "chunk_rows": CHUNK, "shard_rows": SHARD, **KINDS[kind], **options}
    for number, runs in enumerate(commits):
        with StoreWriter.append_to(path) if number else StoreWriter.create(path, **options) as writer:
            for i in range(runs):
                bold = rng.standard_normal((int(rng.integers(10, 30)), options["networks"]))
                writer.append(
                    bold,
                    t_r=2.0,
                    dataset="d",
                    subject=f"{number}{i}",
                    censor=rng.random(len(bold)) < 0.2,
                    segments=[Segment(onset=2 * k, length=3, labels={"s": "né"[k], "n": k}) for k in (0, 1)],
                )
    return path


def everything(store):
    """All that can be read of a store, as values that can be compared."""
    runs, segments = store.runs, store.segments
    return {
        "snapshot": store.snapshot,
        "attributes": store.attributes,
        "bold": [store.run(i).tobytes() for i in range(len(runs))],
        "statistics": [{k: v.tobytes() for k, v in store.statistics(i).items()} for i in range(len(runs))],
        "censor": [None if (c := runs.censor(i)) is None else c.tobytes() for i in range(len(runs))],
        "runs": [getattr(runs, n).tolist() for n in ("start", "length", "t_r", "slot", *RUN_STRINGS)],
        "segments": [getattr(segments, n).tolist() for n in ("run", "onset", "length")],
        "labels": {name: values.tolist() for name, values in segments.columns.items()},
    }


def read_all(path, **options):
    """Open a store and read all of it."""
    return everything(BoldStore.open(path, **options))


def rewrite(file, data):
    """Put other bytes into a file; not in place, where a reader's map of it may still be in use."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def root_of(path):
    """The root's zarr.json as JSON."""
    return json.loads((path / "zarr.json").read_bytes())


def seal(path, root):
    """Write the root's zarr.json and its copy with the digest that fits: a lie that no checksum finds."""
    attributes = root["attributes"]
    attributes.pop("snapshot", None)
    attributes["snapshot"] = hashlib.sha256(to_compact_json(attributes)).hexdigest()
    data = to_compact_json(root)
    for file in (path / "zarr.json", *path.glob("index/g*/manifest.json")):
        rewrite(file, data)


def lie_in_file(path, relative, data):
    """Put `data` into a file of the index, with the size and checksum that fit."""
    (path / relative).parent.mkdir(parents=True, exist_ok=True)
    rewrite(path / relative, data)
    root = root_of(path)
    root["attributes"]["manifest"]["files"][relative] = [len(data), crc32c(data)]
    seal(path, root)


def index_of(path):
    return f"index/g{root_of(path)['attributes']['manifest']['generation']:08d}"


def lie_in_column(path, group, name, change):
    """Change a column of the index, shape and type included, with checksums that fit."""
    folder = f"{index_of(path)}/{group}/{name}"
    metadata = json.loads((path / folder / "zarr.json").read_bytes())
    chunk = f"{folder}/c/" + "/".join("0" * len(metadata["shape"]))
    values = np.frombuffer((path / chunk).read_bytes(), metadata["data_type"]).reshape(metadata["shape"])
    values = np.ascontiguousarray(change(values.copy()))
    shutil.rmtree(path / folder / "c")
    metadata |= {"shape": list(values.shape), "data_type": values.dtype.name}
    chunk = f"{folder}/c/" + "/".join("0" * values.ndim)
    lie_in_file(path, f"{folder}/zarr.json", json.dumps(metadata).encode())
    lie_in_file(path, chunk, values.tobytes())


def lie_in_chunk(path, stored):
    """Put other bytes into the first chunk of a store's only shard, with checksums that fit."""
    file = path / "bold/c/0/0"
    chunks = SHARD // CHUNK
    data, size = file.read_bytes(), 16 * chunks + 4
    entries = np.frombuffer(data[-size:-4], "<u8").reshape(chunks, 2).astype(object)
    body, grown = stored + data[int(entries[0, 1]) : -size], len(stored) - int(entries[0, 1])
    present = entries[:, 0] != 2**64 - 1
    entries[0, 1] = len(stored)
    entries[1:][present[1:], 0] += grown
    tail = entries.astype("<u8").tobytes()
    rewrite(file, body + tail + crc32c(tail).to_bytes(4, "little"))
    lie_in_column(path, "checksums", "bold", lambda sums: np.r_[np.uint32(crc32c(stored)), sums[1:]])
