"""The GPU core: compact masks, masking, masked losses, gathering, attention. Needs torch and triton only."""

from .gather_windows import gather_windows
from .linear_masked_loss import linear_masked_loss
from .mask_tokens import mask_tokens
from .masked_loss import masked_loss
from .masks import MaskSpec
from .varlen_attention import attention, shifted_attention

__all__ = [
    "MaskSpec",
    "attention",
    "gather_windows",
    "linear_masked_loss",
    "mask_tokens",
    "masked_loss",
    "shifted_attention",
]
