"""Operators and host synchronisations of a training step, counted: numbers without noise or GPU.

Counted are forward, backward and AdamW, with dropout, without views, matrix products and attention. A
transformer block costs the same at any depth, so the counts at two depths give what a framework adds around
its blocks: embedding, masks, special tokens, positions, loss, update. An LSTM costs the same at every step.
"""

import traceback
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from brainflow.batch import PackedBatch, Windows
from brainflow.frameworks import build, model_config
from brainflow.kernels import linear_masked_loss

LENGTHS = (5, 9, 2, 20)
SYNCS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "_unique2", "equal"}
MATMULS = {"mm", "addmm", "bmm", "baddbmm"}
VIEWS = {
    "view", "t", "detach", "split", "split_with_sizes", "unbind", "select", "slice", "expand", "alias",
    "_unsafe_view", "transpose", "permute", "as_strided", "unsqueeze", "squeeze", "empty", "empty_like",
    "new_empty", "unsafe_split", "lift_fresh", "_record_function_enter_new", "_record_function_exit",
}  # fmt: skip


def on_the_host():
    """The CPU face of the loss looks at its own factor; there is no device to wait for."""
    return any(frame.filename.endswith("linear_loss/cpu.py") for frame in traceback.extract_stack())


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators, self.syncs = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in SYNCS:
            self.syncs[name] += not on_the_host()
        elif name not in VIEWS | MATMULS and "attention" not in name:
            self.operators[name] += 1
        return func(*args, **(kwargs or {}))


def make_batch(pairs):
    is_next = np.array([1.0, 0.0]) if pairs else None
    return PackedBatch.pack(
        torch.randn(sum(LENGTHS), 6), Windows.end_to_end(LENGTHS, t_r=0.72, is_next=is_next)
    )


def count(framework, layers, monkeypatch, **changes):
    sizes = {"networks": 6, "width": 16, "layers": layers, "heads": 2, "dropout": 0.1, "max_positions": 64}
    model = build(model_config(framework, **sizes, **changes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = make_batch("bert" in framework)
    counter = Count()

    def drawn(mask, lengths):
        # Drawn on the host, by CPU tensors also where the model is on a GPU.
        return np.array([2, 6, 15, 20])

    monkeypatch.setattr("brainflow.frameworks.csm.drawn_rows", drawn)
    monkeypatch.setattr("brainflow.frameworks.seq_bert.drawn_rows", drawn)
    for name in ("base", "csm", "net_bert"):
        monkeypatch.setattr(f"brainflow.frameworks.{name}.linear_masked_loss", with_known_rows)
    model(batch, seed=0).loss.backward()  # the CPU kernels keep the rows of the last masks, AdamW its state
    optimizer.step()
    optimizer.zero_grad()
    with counter:
        model(batch, seed=0).loss.backward()
        optimizer.step()
    return counter


def with_known_rows(*operands, rows=None, **options):
    """The loss with a check: to find the rows of a mask of time points on a GPU is to read their number."""
    assert rows is not None or operands[4].kind in ("columns", "all")
    return linear_masked_loss(*operands, rows=rows, **options)


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
    assert not one.syncs.total()
    assert around <= 60
    assert block <= 30


@pytest.mark.parametrize("forced", [True, False])
def test_few_operators_around_the_lstms(forced, monkeypatch):
    def fixed(layers):
        """Operators of a step of the training, without those that every time point costs."""
        totals = []
        for longest in (20, 30, 40):
            monkeypatch.setattr(f"{__name__}.LENGTHS", (5, 9, 2, longest))
            found = count("autoencoder", layers, monkeypatch, teacher_forcing=float(forced))
            assert not found.syncs.total()
            totals.append(sum(found.operators.values()))
        assert totals[2] - totals[1] == totals[1] - totals[0]
        return totals[0] - 2 * (totals[1] - totals[0])

    one, two = fixed(1), fixed(2)
    around = 2 * one - two
    print(f"autoencoder, forced {forced}: {around} around the LSTMs, {two - one} a layer")
    assert around <= 60
