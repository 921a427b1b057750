"""A thin setuptools shim: everything but `build_kernels` is in pyproject.toml."""

from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup


class BuildKernels(Command):
    """`python setup.py build_kernels --arch 80,90,100 --out DIR`: Triton kernels to PTX and cubin."""

    description = "compile every Triton kernel ahead of time, without a GPU, to PTX, cubin and a manifest"
    user_options: ClassVar = [
        ("arch=", None, "compute capabilities times ten, separated by commas (default: 80,90,100)"),
        ("out=", None, "folder to write to (default: build/kernels)"),
        ("only=", None, "build the kernels whose name holds this (default: all)"),
    ]

    def initialize_options(self) -> None:
        """Set the defaults."""
        self.arch, self.out, self.only = "80,90,100", "build/kernels", ""

    def finalize_options(self) -> None:
        """Read the architectures."""
        try:
            self.archs = [int(arch) for arch in self.arch.split(",")]
        except ValueError:
            raise SystemExit(f"--arch: got {self.arch!r}, expected numbers like 80,90,100") from None

    def run(self) -> None:
        """Compile and write; torch and triton are imported here and nowhere else in this file."""
        from brainflow.kernels import aot

        manifest = aot.build(self.archs, Path(self.out), self.only)
        print(f"wrote {manifest}")


setup(cmdclass={"build_kernels": BuildKernels})
