"""Every framework learns: held-out loss falls below the mean prediction's, on sines and on AR(1) data."""

import numpy as np
import pytest
import torch

from brainflow.batch import PackedBatch, Windows
from brainflow.config import ModelConfig
from brainflow.frameworks import build

NETWORKS, T_R = 12, 1.0
PERIODS = np.array([4.0, 8.0, 12.0])


def sines(generator, length):
    """The published dummy signal: sines of 4, 8 and 12 s by network, with a random phase of 0–2 TRs."""
    phase = generator.uniform(0, 2)
    t = (np.arange(length) + phase) * T_R
    return np.sin(2 * np.pi * t[:, None] / PERIODS[np.arange(NETWORKS) % 3])


def autoregression(generator, length):
    """Networks that follow three shared AR(1) signals of coefficient 0.95 and unit variance."""
    x = np.empty((length, 3))
    x[0] = generator.standard_normal(3)
    for t in range(1, length):
        x[t] = 0.95 * x[t - 1] + np.sqrt(1 - 0.95**2) * generator.standard_normal(3)
    return np.ascontiguousarray(x[:, np.arange(NETWORKS) % 3])


def draw(signal, step, windows, pairs):
    generator = np.random.default_rng((7, step))
    lengths, parts = [], []
    for _ in range(windows // 2):
        whole = signal(generator, 24)
        cut = int(generator.integers(8, 12))
        parts += [whole[:cut], whole[cut + 1 : cut + 1 + 9]]
        lengths += [cut, 9]
    is_next = np.ones(len(lengths) // 2) if pairs else None
    bold = torch.from_numpy(np.concatenate(parts)).float()
    return PackedBatch.pack(bold, Windows.end_to_end(lengths, t_r=T_R, step=step, is_next=is_next))


@pytest.mark.parametrize("signal", [sines, autoregression])
@pytest.mark.parametrize("framework", ["csm", "seq-bert", "net-bert", "autoencoder"])
def test_held_out_loss_falls_below_mean_prediction(framework, signal):
    torch.manual_seed(0)
    layers = 1 if framework == "autoencoder" else 2
    sizes = {"networks": NETWORKS, "width": 32, "layers": layers, "heads": 2, "dropout": 0.0}
    model = build(ModelConfig(framework=framework, max_positions=32, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    pairs, last = "bert" in framework, 110
    for step in range(last):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 10, (last - step) / last * 1.3)
        optimizer.zero_grad()
        model(draw(signal, step, 12, pairs), seed=0).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    errors = []
    with torch.no_grad():
        for step in range(10_000, 10_003):
            batch = draw(signal, step, 32, pairs)
            values, rows = model.reconstruct(batch, seed=1)
            target = batch.bold[rows]
            known = ~values.isnan()
            # Both signals have mean 0.
            errors.append([float((values - target)[known].abs().mean()), float(target[known].abs().mean())])
    model_error, mean_error = np.mean(errors, 0)
    print(f"{framework} {signal.__name__}: model {model_error:.3f}, mean prediction {mean_error:.3f}")
    assert model_error < 0.85 * mean_error
