"""Where flash-attn 4 is installed, its adapter's kernels compile for sm_90 on fake tensors, without a GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from brainflow.kernels.varlen_attention import fa4
from brainflow.kernels.varlen_attention.adapter import Call

with FakeTensorMode():
    q, k, v, dout = (torch.empty(1826, 12, 64, dtype=torch.bfloat16, device="cuda") for _ in range(4))
    windows = torch.empty(65, dtype=torch.int32, device="cuda")
    call = Call(windows, 49, True, 0.0, 0.125)
    out, lse, state = fa4.forward(q, k, v, call)
    grads = fa4.backward(dout, q, k, v, out, lse, state, call)
assert out.shape == q.shape and out.dtype == q.dtype
assert lse.shape == q.shape[:2] and lse.dtype == torch.float32
assert all(g.shape == q.shape and g.dtype == q.dtype for g in grads)
print("compiled")
"""


@pytest.mark.slow
def test_forward_and_backward_compile_for_hopper():
    for module, package in (("flash_attn", "flash-attn-4"), ("cutlass", "nvidia-cutlass-dsl")):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{package} is not installed")
    if importlib.util.find_spec("flash_attn.cute") is None:
        pytest.skip("flash-attn-4 is not installed (another flash-attn is)")
    target = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        env={**os.environ, **target, "FLASH_ATTENTION_FAKE_TENSOR": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "compiled" in result.stdout
