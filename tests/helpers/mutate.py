"""Mutations of bytes and of JSON values, for fuzzing what reads strangers' files.

`rounds()` is short in the test command; BRAINFLOW_FUZZ_SECONDS=600 makes each fuzz test go on for ten
minutes, and BRAINFLOW_FUZZ_SEED starts it elsewhere. Each round has a generator of its own, so a failure is
repeated by its number.
"""

import copy
import itertools
import math
import os
import random
import time

ODD_VALUES = (
    None, True, False, 0, 1, -1, 2**31, 2**53 + 1, 2**63, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e308,
    math.inf, -math.inf, math.nan, "", "\0", "..", "../../x", "/dev/zero", "\ud800", "a" * 70_000, "[/x]",
    "\x1b[31m", "1", "nan", [], [[]], {}, {"": 0}, [None], [1, "a", {}], {"a": {"b": {"c": []}}},
)  # fmt: skip


def rounds(default: int):
    """Numbered generators: `default` of them, or as many as fit into BRAINFLOW_FUZZ_SECONDS."""
    seconds = float(os.environ.get("BRAINFLOW_FUZZ_SECONDS", 0))
    first = int(os.environ.get("BRAINFLOW_FUZZ_SEED", 0))
    end = time.monotonic() + seconds
    for number in itertools.count(first):
        if time.monotonic() >= end if seconds else number - first >= default:
            return
        yield number, random.Random(number)


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few flips, cuts, repeats, insertions and overwritten lengths."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.choice([1, 2, 4, 64, len(data)])]
        elif kind == 2:
            data[at:at] = data[at : at + rng.choice([1, 4, 32])] * rng.choice([1, 2, 50])
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice([1, 2, 4, 8]))
        elif kind == 4:
            data[at : at + 4] = rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 0x7FFFFFFF]).to_bytes(
                4, "little"
            )
        else:
            data[at : at + 8] = rng.choice([0, 2**63 - 1, 2**63, 2**64 - 1, 2**40]).to_bytes(8, "little")
    return bytes(data)


def mutated_json(value, rng: random.Random):
    """A copy of a JSON value in which a few places hold something odd, are gone, or are there twice."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = list(_places(value))
        if not places:
            return rng.choice(ODD_VALUES)
        container, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif kind == 1:
            container[rng.choice(["unknown", "", "manifest", "x" * 300])] = container[key]
        elif kind == 2 and type(container[key]) in (int, float) and abs(container[key]) < 2**64:
            container[key] = container[key] * rng.choice([-1, 2, 10**6]) + rng.choice([-1, 0, 1, 0.5])
        elif kind == 3 and isinstance(container[key], str):
            container[key] = rng.choice(
                [container[key] + "\0", container[key][:-1], container[key].upper(), "../" + container[key]]
            )
        else:
            container[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return value


def _places(value):
    """Every (container, key) below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        yield value, key
        yield from _places(child)
