"""Trainings on several ranks of this machine, and whether two of them are one."""

import os
import socket
import traceback

import numpy as np
import pytest
import torch

from brainflow.training.metrics import TIMING, read_metrics
from brainflow.training.run_dir import flatten


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")


def on_ranks(world, work, errors, names=TORCHRUN):
    """Fork `world` ranks that each call `work()`; fail with the traceback of any that fails."""
    port = str(free_port())
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                values = (str(rank), str(world), str(rank), "2")
                os.environ.update(zip(names, values, strict=True))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                torch.set_num_threads(1)
                work()
                code = 0
            except BaseException:
                (errors / f"rank-{rank}.txt").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = "\n".join(path.read_text() for path in sorted(errors.glob("rank-*.txt")))
    assert codes == [0] * world, said


def curve(folder):
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(folder)]


def assert_close(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        one, other = flatten(one), flatten(other)
        assert one.keys() == other.keys()
        for key, value in one.items():
            if "correlation" in key:  # of predictions that hardly vary yet: a quotient of tiny numbers
                value, expected = np.array(value, float), np.array(other[key], float)
                np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-3, err_msg=key)
            else:
                assert value == pytest.approx(other[key], rel=1e-5, abs=1e-5), (one["step"], key)
