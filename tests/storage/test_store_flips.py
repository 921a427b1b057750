"""One flipped bit, anywhere in a store: `verify` finds it, and nothing wrong is ever read.

BRAINFLOW_FLIPS=1000 makes it a thousand.
"""

import os
import random
import warnings

import pytest
from stores import KINDS, everything, read_all, rewrite, write_store

from brainflow.storage import BoldStore, StoreError, verify

FLIPS = int(os.environ.get("BRAINFLOW_FLIPS", 300))


def places(path, rng, count):
    """(file, byte, bit): half of them drawn by file, so that small files have their share, half by byte."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    sizes = [file.stat().st_size for file in files]
    for i in range(count):
        file = rng.choice(files) if i % 2 else rng.choices(files, sizes)[0]
        yield file, rng.randrange(file.stat().st_size), rng.randrange(8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_found_and_never_read(tmp_path, kind):
    first = read_all(write_store(tmp_path / "first", commits=(4,), kind=kind))
    path = write_store(tmp_path / "s", kind=kind)
    both = read_all(path)
    assert verify(path).ok
    assert verify(path).notes == []
    missed, wrong, fell_back = [], [], 0
    for file, byte, bit in places(path, random.Random(0), -(-FLIPS // len(KINDS))):
        good = file.read_bytes()
        flipped = bytearray(good)
        flipped[byte] ^= 1 << bit
        rewrite(file, flipped)
        where = (file.relative_to(path).as_posix(), byte, bit)
        if verify(path).ok:
            missed.append(where)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                store = BoldStore.open(path)
                expected = first if store.generation == 0 else both
                assert (store.damage is not None) == bool(warned), where
                assert store.generation == 1 or store.damage, where
                fell_back += store.damage is not None
                if everything(store) != expected:
                    wrong.append(where)
            except StoreError:
                pass
        rewrite(file, good)
    assert not missed
    assert not wrong
    assert fell_back > FLIPS // 20
    assert verify(path).ok
