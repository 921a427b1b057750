"""Stores of tests are not flushed to the disk."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def unflushed(no_flushing):
    """Every test here takes it."""
