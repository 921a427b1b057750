"""Mutated pickles of arrays, numbers and texts: a value or a StoreError, nothing executed, bounded memory."""

import itertools
import os
import pickle  # noqa: TID251  the tests write what the reader must refuse
import subprocess
import sys
import tracemalloc
import warnings

import mutate
import numpy as np
import pytest

from brainflow.storage import StoreError
from brainflow.storage.ingest.unpickle import restricted_loads

CANARY = "fuzz-canary"


class Gadget:
    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


def seeds():
    bold = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    values = (
        bold,
        np.asfortranarray(bold),
        bold.astype(">f8"),
        bold > 0,
        np.float64(0.72),
        np.int64(3),
        2.0,
        -(2**70),
        "a text",
        "é\U0001f600",
        np.arange(5, dtype="u1"),
        bold[:0],
    )
    for value, protocol in itertools.product(values, range(6)):
        data = pickle.dumps(value, protocol)
        yield data
        if b"numpy._core" in data and protocol < 4:  # a length stands before the name from protocol 4 on
            yield data.replace(b"numpy._core", b"numpy.core")
    for protocol in range(6):
        yield pickle.dumps(Gadget(), protocol)
        yield pickle.dumps([bold, Gadget()], protocol)


SEEDS = list(seeds())


def spliced(rng):
    """Mutated bytes of one seed, or a head of one before a tail of another."""
    one = rng.choice(SEEDS)
    if rng.random() < 0.3:
        other = rng.choice(SEEDS)
        one = one[: rng.randrange(len(one) + 1)] + other[rng.randrange(len(other)) :]
    return mutate.mutated_bytes(one, rng)


def test_a_huge_slot_is_refused_in_a_short_line():
    """Found by the rounds below, after a million."""
    assert len(value_or_reason(b"Np" + b"1" * 2000 + b"\n.")[1]) < 200


def value_or_reason(data):
    try:
        return restricted_loads(data, "member.pyd"), ""
    except StoreError as error:
        return None, str(error)


def test_mutated_pickles_are_values_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forbidden = {
        "os.system",
        "os.exec",
        "subprocess.Popen",
        "socket.connect",
        "ctypes.dlopen",
        "shutil.rmtree",
    }
    audited, live = [], [True]  # an audit hook cannot be removed
    sys.addaudithook(lambda event, _: audited.append(event) if live[0] and event in forbidden else None)
    read = refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes in damaged texts
        for number, rng in mutate.rounds(10_000):
            value, reason = value_or_reason(spliced(rng))
            if reason:
                refused += 1
                assert reason.startswith("member.pyd: "), number
                assert len(reason) < 600, number
            else:
                read += 1
                assert isinstance(value, np.ndarray | int | float | str), number
                assert not isinstance(value, np.ndarray) or value.dtype.kind in "fiub", number
    live[0] = False
    assert min(read, refused) > 500
    assert audited == []
    assert os.listdir(tmp_path) == []


def test_the_canary_sings(tmp_path):
    """Python's own unpickler runs the command that the seeds hold."""
    script = f"import pickle; pickle.loads({pickle.dumps(Gadget())!r})"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert os.listdir(tmp_path) == [CANARY]


@pytest.mark.parametrize("size", [10**5, 3 * 10**6])
def test_memory_stays_a_small_multiple_of_the_pickle(size):
    """Of pickles with one long text, mutated; traced are all copies that Python and numpy make."""
    array = np.zeros(size, np.uint8)
    long = [pickle.dumps(array, 2), pickle.dumps(array, 5), pickle.dumps("a" * size)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, rng in itertools.islice(mutate.rounds(20), 20):
            data = rng.choice(long)
            head, tail = mutate.mutated_bytes(data[:200], rng), mutate.mutated_bytes(data[-200:], rng)
            data = head + data[200:-200] + tail
            tracemalloc.start()
            value_or_reason(data)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 4 * len(data) + 2**20, number
