"""A thin setuptools shim: everything but `build_kernels` is in pyproject.toml."""

from setuptools import setup

setup()
