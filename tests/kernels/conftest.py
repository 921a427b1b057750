"""Tests in interpreted/ run in a process of their own, with TRITON_INTERPRET=1 set from its start."""

import os
from types import SimpleNamespace

import pytest

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


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
