"""Flushing to the disk takes most of the time of writing a small store, and no test cuts the power."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_flushing():
    flush, os.fsync = os.fsync, lambda descriptor: None
    yield flush
    os.fsync = flush
