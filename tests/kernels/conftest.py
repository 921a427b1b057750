"""Tests in interpreted/ run in a process of their own, with TRITON_INTERPRET=1 set from its start."""

import os
from types import SimpleNamespace

import pytest
import torch

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


@pytest.fixture
def launches(monkeypatch):
    """Launch as on an H100, up to the driver: the fixture is the list of the launches that it was asked for.

    Triton binds, specialises and compiles (for sm_90) as in production; what stands in is its driver alone.
    There is a current device, numbered `DEVICE`, only where `torch.cuda.device_of` says so.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    asked: list[SimpleNamespace] = []
    guarded: list[torch.Tensor] = []

    def launcher(source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            asked.append(SimpleNamespace(kernel=source.fn.__name__, grid=(x, y, z), arguments=arguments))

        return launch

    class Guard:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            guarded.append(self.tensor)

        def __exit__(self, *error):
            guarded.pop()

    def current_device():
        assert guarded, "a launch without torch.cuda.device_of"
        return DEVICE

    standing_in = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=current_device,
        get_current_stream=lambda device: 0,
        launcher_cls=launcher,
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
            load_binary=lambda name, kernel, shared, device: (name, name, 0, 0, 1024),
        ),
    )
    monkeypatch.setattr(driver, "_active", standing_in)
    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    yield asked
    for kernel in (one for one in _jitted(JITFunction) if DEVICE in one.device_caches):
        del kernel.device_caches[DEVICE]  # what was compiled cannot run


DEVICE = 77


def _jitted(cls):
    from brainflow.kernels import aot

    kernels = {id(config.kernel): config.kernel for config in aot.configs()}.values()
    return [kernel for kernel in kernels if isinstance(kernel, cls)]
