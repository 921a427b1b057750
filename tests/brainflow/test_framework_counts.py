"""Operators and host synchronisations of a training step, counted: numbers without noise or GPU.

Counted are forward and backward, without views, matrix products and attention. A transformer block costs the
same at any depth, so the counts at two depths give what a framework adds around its blocks: embedding, masks,
special tokens, positions, loss.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from brainflow.config import ModelConfig
from brainflow.data.batch import PackedBatch
from brainflow.frameworks import build

SYNCS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "_unique2", "equal"}
MATMULS = {"mm", "addmm", "bmm", "baddbmm"}
VIEWS = {
    "view", "t", "detach", "split", "split_with_sizes", "unbind", "select", "slice", "expand", "alias",
    "_unsafe_view", "transpose", "permute", "as_strided", "unsqueeze", "squeeze", "empty", "empty_like",
    "new_empty", "unsafe_split", "lift_fresh",
}  # fmt: skip


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators, self.syncs = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in SYNCS:
            self.syncs[name] += 1
        elif name not in VIEWS | MATMULS and "attention" not in name:
            self.operators[name] += 1
        return func(*args, **(kwargs or {}))


def make_batch(pairs):
    lengths = np.array([5, 9, 2, 20], np.int32)
    bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return PackedBatch(
        bold=torch.randn(int(lengths.sum()), 6),
        times=torch.cat([torch.arange(int(n)) * 0.72 for n in lengths]),
        cu_seqlens=torch.from_numpy(bounds),
        max_seqlen=20,
        lengths=lengths,
        runs=np.zeros(4, np.int32),
        step=0,
        is_next=torch.tensor([1.0, 0.0]) if pairs else None,
    )


def count(framework, layers, monkeypatch, **changes):
    sizes = {"networks": 6, "width": 16, "layers": layers, "heads": 2, "dropout": 0.0, "max_positions": 64}
    model = build(ModelConfig(framework=framework, **sizes, **changes))
    batch = make_batch("bert" in framework)
    counter = Count()

    def drawn(mask, lengths):
        # Drawn on the host, by CPU tensors also where the model is on a GPU.
        return np.array([2, 6, 15, 20])

    monkeypatch.setattr("brainflow.frameworks.csm.drawn_rows", drawn)
    monkeypatch.setattr("brainflow.frameworks.seq_bert.drawn_rows", drawn)
    model(batch, seed=0)  # the CPU kernels keep the rows of the last masks
    with counter:
        model(batch, seed=0).loss.backward()
    return counter


CASES = [
    ("csm", {}),
    ("csm", {"masking": "single"}),
    ("csm", {"masking": "next"}),
    ("seq-bert", {}),
    ("net-bert", {}),
]


@pytest.mark.parametrize(("framework", "changes"), CASES)
def test_few_operators_and_no_synchronisation(framework, changes, monkeypatch):
    one = count(framework, 2, monkeypatch, **changes)
    two = count(framework, 3, monkeypatch, **changes)
    block = sum(two.operators.values()) - sum(one.operators.values())
    around = sum(one.operators.values()) - 2 * block
    print(f"{framework} {changes}: {around} around the blocks, {block} in a block")
    assert not one.syncs
    assert around <= 60
    assert block <= 30


@pytest.mark.parametrize("forced", [True, False])
def test_autoencoder_does_not_synchronise(forced, monkeypatch):
    assert not count("autoencoder", 2, monkeypatch, teacher_forcing=float(forced)).syncs
