"""Launches of Triton kernels on CPU tensors: Triton binds, specialises and compiles; its driver stands in."""

import hashlib
from collections import defaultdict
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace
from unittest import mock

import ptx
import ptx_matrix  # noqa: F401 - registers its instructions
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from brainflow.kernels import aot, dispatch

DEVICES = count(77)
"""Numbers of devices: each block has one of its own, by which Triton keeps what it has compiled."""


@contextmanager
def launching(launch, arch=90, stages=None):
    """Replace Triton's driver inside the block: a kernel is compiled for sm_`arch`, and `launch` is called.

    There is a current device only where `torch.cuda.device_of` says so.

    Parameters
    ----------
    launch
        Called with (source, metadata, binary, grid, arguments): what Triton compiled from, and for.
    arch
        Compute capability times ten.
    stages
        Triton's `add_stages_inspection_hook`, where the compiler shall take other steps.
    """
    device, guarded, launched = next(DEVICES), [], {}

    def launcher(source, metadata):
        launched[id(source.fn)] = source.fn

        def call(x, y, z, stream, binary, packed, launch_metadata, enter, leave, *arguments):
            launch(source, metadata, binary, (x, y, z), arguments)

        return call

    class Guard:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            guarded.append(self.tensor)

        def __exit__(self, *error):
            guarded.pop()

    def current_device():
        assert guarded, "a launch without torch.cuda.device_of"
        return device

    standing_in = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=current_device,
        get_current_stream=lambda device: 0,
        launcher_cls=launcher,
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
            load_binary=lambda name, binary, shared, device: (name, binary, 0, 0, 1024),
        ),
    )
    try:
        with (
            mock.patch.object(driver, "_active", standing_in),
            mock.patch.object(torch.cuda, "device_of", Guard),
            mock.patch.object(knobs.runtime, "add_stages_inspection_hook", stages),
        ):
            yield
    finally:
        for kernel in launched.values():  # what was compiled is for this block alone
            kernel.device_caches.pop(device, None)


@contextmanager
def executed(arch=90, edit=None):
    """Execute the PTX of every Triton kernel that is launched inside the block, on CPU tensors.

    `impl="triton"` takes CPU tensors there. The block's value is the list of launches: `kernel` (name),
    `configuration` (:func:`configuration` of what was compiled), `program` (:class:`ptx.Program`), `executed`
    (places of the program that some thread has reached).

    Parameters
    ----------
    arch
        Compute capability times ten.
    edit
        Changes the PTX before it is executed, to see that a fault is found.

    Raises
    ------
    ptx.Trap
        At a fault, from the launch.
    """
    launches = []

    def launch(source, metadata, binary, grid, arguments):
        text = binary.decode()
        program = ptx.parse(edit(text) if edit else text)
        given = zip(source.signature.values(), arguments, strict=True)
        passed = [value for kind, value in given if kind != "constexpr"]
        tensors = [value for value in passed if isinstance(value, torch.Tensor)]
        done = ptx.run(program, grid, passed, tensors, metadata.shared)
        launches.append(
            SimpleNamespace(
                kernel=source.fn.__name__, configuration=configuration(source), program=program, executed=done
            )
        )

    def stop_at_ptx(*pipeline):
        """Triton asks for a cache key, then for a change of the compiler's stages: its binary is the PTX."""
        if not pipeline:
            return "ptx", hashlib.sha256(b"ptx").hexdigest()
        pipeline[1]["cubin"] = lambda ptx, metadata: ptx.encode()

    cpu_tensors = mock.patch.object(dispatch, "interpreting", return_value=True)
    with launching(launch, arch, stop_at_ptx), cpu_tensors:
        yield launches


def configuration(source):
    """Return what a kernel is compiled for: name, types, constants and hints."""
    hints = {path: hint for path, hint in source.attrs.items() if hint}
    return source.fn.__name__, str(source.signature), str(source.constants), str(hints)


def names_of(launches, arch=90):
    """Return the names of the AOT configurations that were launched."""
    if not NAMES[arch]:
        NAMES[arch] |= {configuration(aot.source_of(config, arch)): config.name for config in aot.configs()}
    return {NAMES[arch][launch.configuration] for launch in launches if launch.configuration in NAMES[arch]}


NAMES = defaultdict(dict)
"""Architecture → configuration → name."""
