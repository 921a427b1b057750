"""Compiles a sample of configurations and the negative controls, in a process without the interpreter.

Run as a script by test_aot.py; writes JSON to standard output: case → report and problems.
"""

import dataclasses
import json
import sys

import torch
import triton
import triton.language as tl

from brainflow.kernels import aot
from brainflow.kernels.dispatch import AotConfig
from brainflow.kernels.feedback import triton as decoder

ROWS, NETWORKS = 3200, 1024


@triton.jit
def masked_copy(x, columns, out, rows, networks, R: tl.constexpr, C: tl.constexpr, PREDICATE: tl.constexpr):
    """Copy x where `columns` says so; the mask is a load predicate or is applied to the values."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, C)
    inside = (row < rows)[:, None] & (column < networks)[None, :]
    chosen = tl.load(columns + column, mask=column < networks, other=0) != 0
    at = row[:, None] * networks + column[None, :]
    if PREDICATE:
        value = tl.load(x + at, mask=inside & chosen[None, :], other=0)
    else:
        value = tl.where(chosen[None, :], tl.load(x + at, mask=inside, other=0), 0)
    tl.store(out + at, value, mask=inside)


@triton.jit
def row_means(x, out, rows, networks, R: tl.constexpr, C: tl.constexpr):
    """Subtract from each row its mean and its maximum: the whole tile has to be held."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, C)
    inside = (row < rows)[:, None] & (column < networks)[None, :]
    at = row[:, None] * networks + column[None, :]
    value = tl.load(x + at, mask=inside, other=0)
    centred = value - tl.sum(value, 1)[:, None] / networks
    value = centred * tl.max(centred, 1)[:, None] + value
    tl.store(out + at, value, mask=inside)


def copy_config(*, predicate=False):
    data = ((ROWS, NETWORKS), torch.float32)
    return AotConfig(
        name="masked_copy",
        kernel=masked_copy,
        arguments={
            "x": data,
            "columns": ((NETWORKS,), torch.int8),
            "out": data,
            "rows": ROWS,
            "networks": NETWORKS,
        },
        constants={"R": 4, "C": 1024, "PREDICATE": predicate},
        wide=("x", "out"),
    )


def means_config(rows):
    data = ((ROWS, NETWORKS), torch.float32)
    return AotConfig(
        name="row_means",
        kernel=row_means,
        arguments={"x": data, "out": data, "rows": ROWS, "networks": NETWORKS},
        constants={"R": rows, "C": 1024},
        wide=("x", "out"),
    )


def decoder_config(kernel):
    """Return a kernel of the decoder that reads its own output, of its top layer at the published size."""
    rows, width, windows = 5664, 768, 192
    low = {name: (shape, torch.bfloat16) for name, shape in {
        "upstream": (rows, width), "keep": (rows, width), "before": (rows, width), "hidden": (rows, width),
        "later_pre": (rows, width), "d_pre": (rows, width), "inputs": (4 * width, width),
        "recurrent": (4 * width, width), "output": (width, width), "bias": (4 * width,),
        "output_bias": (width,), "later_gates": (rows, 4 * width), "later_lowest": (rows, 4 * width),
        "d_gates": (rows, 4 * width),
    }.items()}  # fmt: skip
    wide = {name: (shape, torch.float32) for name, shape in {
        "below": (rows, width), "pre": (rows, width), "cells": (rows, width), "cells_before": (rows, width),
        "gates": (rows, 4 * width), "d_cells": (windows, width), "gamma": (width,), "beta": (width,),
    }.items()}  # fmt: skip
    known = {**low, **wide, "count": windows, "later": windows, "width": width, "eps": 1e-5}
    sizes = {"R": decoder.R, "C": decoder.C, "K": decoder.K}
    constants = {"LOWEST": False, "TOP": True, "START": False, "END": False, "PRECISION": "ieee", **sizes}
    names = kernel.arg_names
    return AotConfig(
        name=kernel.fn.__name__,
        kernel=kernel,
        arguments={name: known[name] for name in names if name in known},
        constants={name: constants[name] for name in names if name in constants},
    )


def main():
    production = {config.name: config for config in aot.configs()}
    gather = production["gather_windows.fp32.fp32.plain"]
    odd = {**gather.arguments, "networks": 1023, "stride": 1023}
    cases = {
        "values": (copy_config(), 90),
        "predicate": (copy_config(predicate=True), 90),
        "gather 1023": (dataclasses.replace(gather, arguments=odd), 90),
        "small tile": (means_config(4), 90),
        "oversized tile": (means_config(16), 90),
        "gather 90": (gather, 90),
        "gather 80": (gather, 80),
        "gather 100": (gather, 100),
        "gather bf16": (production["gather_windows.int16.bf16.networks"], 90),
        "loss bf16": (production["masked_loss.gradient.rows.l1.bf16"], 90),
        "decoder": (decoder_config(decoder.step), 90),
        "decoder backward": (decoder_config(decoder.step_backward), 90),
    }
    result = {}
    for name, (config, arch) in cases.items():
        report = aot.compile_config(config, arch)
        result[name] = {**report.to_dict(), "problems": aot.problems(config, report)}
        result[name]["tensor cores"] = "mma" in report.ptx
        try:
            aot.check(config, report)
        except ValueError as error:
            result[name]["error"] = str(error)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
