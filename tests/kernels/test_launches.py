"""Launches of the Triton kernels on the path that production takes, up to the driver; see `launches`."""

import gc
import sys
from unittest import mock

import pytest
import torch
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

from brainflow.kernels import MaskSpec, dispatch, qkv_attention
from brainflow.kernels.feedback import triton as feedback
from brainflow.kernels.gathering import triton as gather
from brainflow.kernels.linear_loss import triton as linear
from brainflow.kernels.loss import triton as loss
from brainflow.kernels.masking import triton as tokens

ROWS, NETWORKS, WIDTH = 64, 48, 16
BOUNDS = torch.tensor([0, 30, ROWS], dtype=torch.int32)
TIME_POINTS = MaskSpec.time_points(0.2, seed=2**63 + 1, offset=3).code()
COLUMNS = MaskSpec.networks(0.2, seed=5).code()


def masked_loss():
    pred, target = torch.randn(2, ROWS, NETWORKS)
    value, _ = loss.masked_loss(pred.requires_grad_(), target, BOUNDS, 0, TIME_POINTS, 0, True)
    value.backward()


def linear_masked_loss():
    hidden, target = torch.randn(ROWS, WIDTH), torch.randn(ROWS, NETWORKS)
    weight, bias = torch.randn(NETWORKS, WIDTH), torch.randn(NETWORKS)
    linear.linear_masked_loss(
        hidden.requires_grad_(), weight, bias, target, None, None, BOUNDS, 0, COLUMNS, 0, True
    )[0].backward()


def mask_tokens():
    token = torch.randn(64, 1, requires_grad=True)
    tokens.mask_tokens(torch.randn(ROWS, NETWORKS), token, BOUNDS, 0, COLUMNS).sum().backward()


def gather_windows():
    starts = torch.tensor([3, 50])
    gather.gather_windows(torch.randn(128, NETWORKS), starts, BOUNDS, ROWS, 34, None, torch.float32, [], None)


def decode_freely():
    weight, bias, width = torch.randn(4 * WIDTH, WIDTH), torch.randn(4 * WIDTH), WIDTH
    norm = torch.ones(width), torch.zeros(width)
    start = torch.randn(3, width, requires_grad=True)
    feedback.decode_freely(
        (3,), torch.arange(3, 6), 1e-5, start, bias, torch.randn(width, width), torch.randn(width),
        torch.ones(2, 3, width), [(weight, weight, bias)] * 2, [norm],
    ).sum().backward()  # fmt: skip


def window_attention():
    qkv = torch.randn(2 * ROWS, 3, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    with mock.patch.object(dispatch, "interpreting", return_value=True):  # CPU tensors stand in
        qkv_attention(qkv, BOUNDS, 34, dropout_p=0.1, streams="two", impl="window").sum().backward()


@pytest.mark.parametrize(
    ("op", "kernels"),
    [
        (masked_loss, ["partial_sums", "finish", "gradient"]),
        (linear_masked_loss, ["compare", "finish"]),
        (mask_tokens, ["replace", "gradients", "sum_positions"]),
        (gather_windows, ["gather_kernel"]),
        (decode_freely, ["step", "step", "step_backward", "step_backward"]),
        (window_attention, ["attend", "attend_backward"]),
    ],
)
def test_every_kernel_is_launched_on_the_device_of_its_tensors(op, kernels, launches):
    op()
    assert [launch.kernel for launch in launches] == kernels
    assert all(min(launch.grid) >= 1 for launch in launches)


def every_launch():
    """Nine launches of all kernels, without autograd."""
    data, token, code = torch.ones(ROWS, NETWORKS), torch.ones(64, 1), COLUMNS
    _, inverse = loss.forward_impl(data, data, BOUNDS, 0, TIME_POINTS, 0)
    loss.backward_impl(inverse, inverse, data, data, BOUNDS, 0, TIME_POINTS, 0)
    hidden, weight = torch.ones(ROWS, WIDTH), torch.ones(NETWORKS, WIDTH)
    with torch.cuda.device_of(hidden):
        linear.forward_impl(hidden, weight, None, data, None, None, BOUNDS, 0, code, 0, True)
    tokens.forward_impl(data, token, BOUNDS, 0, code)
    tokens.backward_impl(data, BOUNDS, 0, code, 64, True, True)
    gather_windows()


@torch.no_grad()
def test_launches_keep_nothing(launches):
    def kept(times):
        """Return how many more of Python's blocks of memory are in use after so many rounds."""
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(times):
            every_launch()
            launches.clear()
        gc.collect()
        return sys.getallocatedblocks() - before

    every_launch()
    assert len(launches) == 9
    kept(20)
    entries = len(kernel_side_table.constant_args)
    assert kept(300) < 1_000  # 2,700 launches; 300 traced ones of a single kernel keep 5,200
    assert len(kernel_side_table.constant_args) == entries
