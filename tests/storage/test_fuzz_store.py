"""Stores and parts that are wrong at random, behind right checksums: read, or refused by a StoreError.

Nothing else may come out. BRAINFLOW_FUZZ_SECONDS=600 goes on for ten minutes a test; see `mutate.rounds`.
"""

import io
import json
import os
import shutil
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutate import mutated_bytes, mutated_json, rounds
from numcodecs import Zstd
from stores import KINDS, index_of, lie_in_file, read_all, rewrite, root_of, seal, write_store

from brainflow.storage import Segment, StoreError, verify, write_part
from brainflow.storage.chunks import zstd_content_bytes
from brainflow.storage.layout import crc32c
from brainflow.storage.parts import read_part


@pytest.fixture(scope="module", params=KINDS)
def original(request, tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("fuzz") / "s", commits=(5,), kind=request.param)


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "s")


def attempt(path):
    """Verify a store, then read all of it, with checks and without."""
    verified = verify(path).ok
    read = []
    for check in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_all(path, check=check)
                read.append(check)
            except StoreError:
                pass
    assert not verified or True in read, "verify finds no fault in what cannot be read"
    return bool(read)


def test_manifests_and_attributes(copy):
    good, outcomes = root_of(copy), set()
    for number, rng in rounds(60):
        root = mutated_json(good, rng)
        try:
            seal(copy, root)
        except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, or not a manifest at all
            text = json.dumps(root).encode(errors="surrogatepass")
            for file in (copy / "zarr.json", *copy.glob("index/*/manifest.json")):
                rewrite(file, text)
        try:
            outcomes.add(attempt(copy))
        except Exception as error:
            raise AssertionError(f"round {number}") from error
    assert False in outcomes


def test_columns_of_the_index(copy):
    names = list(root_of(copy)["attributes"]["manifest"]["files"])
    root, outcomes = root_of(copy), set()
    for number, rng in rounds(80):
        name = rng.choice(names)
        good = (copy / name).read_bytes()
        if name.endswith("zarr.json") and rng.random() < 0.7:
            data = json.dumps(mutated_json(json.loads(good), rng)).encode(errors="surrogatepass")
        else:
            data = mutated_bytes(good, rng)
        lie_in_file(copy, name, data)
        try:
            outcomes.add(attempt(copy))
        except Exception as error:
            raise AssertionError(f"round {number}: {name}") from error
        rewrite(copy / name, good)
        seal(copy, root)
    assert outcomes == {True, False}


def test_indexes_of_shards_and_compressed_chunks(copy):
    file = copy / "bold/c/0/0"
    good, size = file.read_bytes(), 16 * (64 // 8) + 4
    sums = f"{index_of(copy)}/checksums/bold/c/0"
    for number, rng in rounds(60):
        if rng.random() < 0.5:
            tail = mutated_bytes(good[-size:-4], rng)
            rewrite(file, good[:-size] + tail + crc32c(tail).to_bytes(4, "little"))
        else:
            first = int.from_bytes(good[-size + 8 : -size + 16], "little")
            chunk = mutated_bytes(good[:first], rng)[:first].ljust(first, b"\0")
            rewrite(file, chunk + good[first:])
            lie_in_file(copy, sums, crc32c(chunk).to_bytes(4, "little") + (copy / sums).read_bytes()[4:])
        try:
            attempt(copy)
        except Exception as error:
            raise AssertionError(f"round {number}") from error


def test_parts(tmp_path):
    segments = [Segment(onset=1, length=3, labels={"s": "né", "n": 3, "x": 0.5})]
    options = {"t_r": 2.0, "dataset": "d", "subject": "s", "segments": segments}
    write_part(tmp_path, np.ones((10, 4), "f4"), censor=np.zeros(10, bool), **options)
    path = next(tmp_path.glob("*.npz"))
    good, outcomes = path.read_bytes(), set()
    assert read_part(path)["segments"] == segments
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    begin = 10 + int.from_bytes(members["header.npy"][8:10], "little")
    for number, rng in rounds(1000):
        if number % 3:
            path.write_bytes(mutated_bytes(good, rng))
        else:  # checksums that fit
            changed = dict(members)
            name = rng.choice(list(members))
            changed[name] = mutated_bytes(members[name], rng)
            if number % 2:
                header = mutated_json(json.loads(members["header.npy"][begin:]), rng)
                text = json.dumps(header).encode()
                with io.BytesIO() as file:
                    np.lib.format.write_array(file, np.frombuffer(text, np.uint8))
                    changed["header.npy"] = file.getvalue()
            with zipfile.ZipFile(path, "w", rng.choice([0, 0, 0, 8])) as archive:
                for name, data in changed.items():
                    archive.writestr(name, data)
        try:
            part = read_part(path)
            outcomes.add(True)
            assert part["bold"].nbytes <= path.stat().st_size
        except StoreError as error:
            outcomes.add(os.fspath(path) not in str(error) and "unnamed")
        except Exception as error:
            raise AssertionError(f"round {number}") from error
    assert outcomes == {True, False}


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=70_000), st.integers(1, 19), st.integers(0, 5))
def test_the_size_that_a_zstd_frame_declares(data, level, cut):
    frame = Zstd(level=level).encode(data)
    assert zstd_content_bytes(frame[:18]) == len(data)
    assert zstd_content_bytes(frame[: min(cut, 5)]) is None
    assert zstd_content_bytes(b"\0" + frame) is None
