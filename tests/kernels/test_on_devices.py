"""Every op on every device that is here against its float64 specification: what first shows that a GPU works.

`pytest -k cuda` runs the part for a GPU alone; compute-sanitizer takes that command, too.
"""

import pytest
import torch

from brainflow.kernels import conformance
from brainflow.kernels.linear_loss.cpu import _scaled


@pytest.mark.parametrize("name", conformance.ops("cpu"))
def test_ops(device, name):
    assert conformance.ops(device)[name]() <= 1


@pytest.mark.parametrize("name", conformance.attentions("cpu"))
def test_attention(device, name):
    try:
        assert conformance.attentions(device)[name]() <= 1
    except conformance.NotHereError as reason:
        pytest.skip(str(reason))


def test_a_factor_of_32_bits_scales_gradients_of_16(device):
    """1e-7 has no normal float16; as a factor without dimension it would be rounded to one first."""
    grad = torch.full((4, 3), 3e4, dtype=torch.float16, device=device)
    found = _scaled(grad, torch.tensor(1.03e-7, device=device), torch.float16)
    torch.testing.assert_close(found.cpu(), torch.full((4, 3), 3e4 * 1.03e-7).half(), rtol=1e-3, atol=0)
