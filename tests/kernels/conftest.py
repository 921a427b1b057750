"""Launches of Triton kernels without a GPU."""

from types import SimpleNamespace

import pytest


@pytest.fixture
def launches():
    """Launch as on an H100, up to the driver: the fixture is the list of the launches that it was asked for.

    Triton binds, specialises and compiles (for sm_90) as in production; what stands in is its driver alone.
    """
    from ptx_launch import launching

    asked: list[SimpleNamespace] = []

    def launch(source, metadata, binary, grid, arguments):
        asked.append(SimpleNamespace(kernel=source.fn.__name__, grid=grid, arguments=arguments))

    with launching(launch):
        yield asked
