"""An LSTM decoder that reads its own output, with a kernel a layer and step (GPU only).

Its specification, which runs elsewhere, is the loop of `Decoder.run_free` (brainflow/models/autoencoder.py).
"""

from __future__ import annotations

from ..dispatch import HAS_TRITON

if HAS_TRITON:
    from .triton import decode_freely

__all__ = ["HAS_TRITON", "decode_freely"]
