"""A step asks nothing of the GPU, launches few kernels, and attention has a kernel of its own, by default.

Real optimizer steps run on fake CUDA tensors (fake_gpu_steps.py) over a GPU that does nothing (fake_gpu.cpp).
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import ENV, write_store

HERE = Path(__file__).parent
# Launches of a step of 192 windows, forward and backward, in 4 blocks (2 LSTMs) if no other number is given:
# all but attention's, and attention's.
BUDGETS = {
    "csm": (218, 8),
    "csm, 12 layers": (525, 24),
    "csm single": (220, 8),
    "csm today": (230, 8),
    "csm today, 12 layers": (605, 24),
    "csm modern": (595, 12),  # the blocks run forward twice
    "csm fp16, averaged": (220, 8),
    "seq-bert": (260, 8),
    "seq-bert today": (298, 8),
    "seq-bert in parts": (600, 16),
    "net-bert": (260, 8),
    "net-bert today": (288, 8),
    "net-bert in parts": (600, 16),
    "autoencoder forced": (118, 0),
    "autoencoder free": (385, 0),
    "autoencoder today, forced": (153, 0),
    "autoencoder today, free": (418, 0),
}
UPDATE = 45  # in one part: loading, clipping, meters, AdamW; loss scale and averaged weights are 21 more


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What one step of each case did, from a process of its own."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to build a GPU that does nothing")
    if torch.version.cuda is not None:
        pytest.skip("needs a torch without CUDA; where there is a GPU, the tests named cuda show the same")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    from torch.utils.cpp_extension import include_paths

    folder = tmp_path_factory.mktemp("fake-gpu")
    library, built = Path(torch.__file__).parent / "lib", folder / "fake_gpu.so"
    command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", *(f"-I{path}" for path in include_paths())]
    command += [str(HERE / "fake_gpu.cpp"), "-o", str(built), f"-L{library}", "-lc10", "-ltorch_cpu"]
    subprocess.run([*command, f"-Wl,-rpath,{library}"], check=True, capture_output=True, text=True)
    store = write_store(folder / "store")
    done = subprocess.run(
        [sys.executable, str(HERE / "fake_gpu_steps.py"), store],
        env={**ENV, "LD_PRELOAD": os.pathsep.join(filter(None, (str(built), os.environ.get("LD_PRELOAD"))))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", BUDGETS)
def test_a_step_asks_nothing_of_the_gpu(steps, case):
    assert steps[case]["stops"] == []
    assert steps[case]["on the host"] == []


@pytest.mark.parametrize("case", BUDGETS)
def test_a_step_launches_no_more_than_its_budget(steps, case):
    launches, attention = BUDGETS[case]
    assert 0.9 * launches <= steps[case]["model"] <= launches  # who saves launches lowers the budget
    assert steps[case]["attention"] <= attention
    parts, more = 2 if "parts" in case else 1, 21 if "averaged" in case else 0
    assert steps[case]["update"] <= UPDATE * parts + more


def test_attention_takes_the_kernels_for_short_windows(steps):
    for case, step in steps.items():
        assert step["backends"] == ([] if "autoencoder" in case else ["window"])
        assert f"precision {'fp16' if 'fp16' in case else 'bf16'}" in step["said"]
