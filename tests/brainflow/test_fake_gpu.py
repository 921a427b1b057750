"""A step asks nothing of the GPU, and attention runs on a flash kernel, in every framework by default.

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
FRAMEWORKS = {
    "csm": ["csm", "csm single", "csm next", "csm modern", "csm fp16, averaged"],
    "seq-bert": ["seq-bert", "seq-bert in parts"],
    "net-bert": ["net-bert", "net-bert in parts"],
    "autoencoder": ["autoencoder forced", "autoencoder free"],
}


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


@pytest.mark.parametrize("case", [case for cases in FRAMEWORKS.values() for case in cases])
def test_a_step_asks_nothing_of_the_gpu(steps, case):
    assert steps[case]["stops"] == []
    assert steps[case]["on the host"] == []
    assert steps[case]["launches"] > 100


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_attention_runs_on_a_flash_kernel_with_nothing_but_torch(steps, framework):
    for case in FRAMEWORKS[framework]:
        assert steps[case]["backends"] == ([] if framework == "autoencoder" else ["torch"])
        assert f"precision {'fp16' if 'fp16' in case else 'bf16'}" in steps[case]["said"]
