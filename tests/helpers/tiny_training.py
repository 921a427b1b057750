"""A store and a training small enough for tests that run many of them."""

import os
import shlex

import numpy as np

from brainflow.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from brainflow.storage import StoreWriter
from brainflow.training.metrics import TIMING, read_metrics
from brainflow.training.step import TrainingStep

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
FLAGS = shlex.split(
    "--device cpu --model.width 16 --model.layers 1 --model.heads 2 --data.batch-size 8 --data.seq-min 6 "
    "--data.seq-max 16 --data.loader host --data.validation-batches 1 --train.lr 1e-2 --train.no-plot "
    "--train.log-every 1 --train.micro-batches 2"
)


def write_store(path):
    rng = np.random.default_rng(0)
    with StoreWriter.create(path, networks=12, dtype="float32", parcellation="none") as writer:
        for run in range(8):
            bold = rng.standard_normal((60, 12)).astype(np.float32)
            writer.append(bold, t_r=2.0, dataset="noise", subject=str(run), session="", task="rest", run="1")
    return str(path)


def tiny(store, out, *, loader="host", framework="csm", **train):
    return PretrainConfig(
        store=store,
        out=str(out),
        device="cpu",
        model=ModelConfig(framework=framework, width=16, layers=1, heads=2),
        data=DataConfig(batch_size=8, seq_min=6, seq_max=16, loader=loader, validation_batches=1),
        train=TrainConfig(
            **{
                "steps": 12,
                "lr": 1e-2,
                "log_every": 1,
                "validate_every": 12,
                "checkpoint_every": 4,
                "plot": False,
                **train,
            }
        ),
    )


def curve(folder):
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(folder)]


def at_step(number, what):
    """Return a step that first does `what` when it is step `number`."""

    def one_step(self, batches, step, lr, real=TrainingStep.__call__, **more):
        if step == number:
            what(self)
        return real(self, batches, step, lr, **more)

    return one_step
