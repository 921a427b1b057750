"""The GPU core: compact masks, masking, masked losses, gathering, attention. Needs torch and triton only."""

from typing import Any

__all__ = [
    "MaskSpec",
    "attention",
    "gather_windows",
    "linear_masked_loss",
    "mask_tokens",
    "masked_loss",
    "qkv_attention",
    "shifted_attention",
]

if __name__ != "kernels":
    from .gathering import gather_windows
    from .linear_loss import linear_masked_loss
    from .loss import masked_loss
    from .masking import mask_tokens
    from .masks import MaskSpec
    from .varlen_attention import attention, qkv_attention, shifted_attention
else:
    # In a checkout whose root is on the path, transformers' look for a package `kernels` ends here. A version
    # this low tells it that the package it means is not installed; an ImportError would be its end. To import
    # the operators under a second name would register them again, which crashes the process.
    import sys

    __version__ = "0"
    _ADVICE = "this folder is a package of brainflow: write `from brainflow.kernels import …`"

    def __getattr__(name: str) -> Any:
        raise AttributeError(f"kernels.{name}: {_ADVICE}")

    class _Refuse:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:
            if name.startswith("kernels."):
                raise ImportError(f"{name}: {_ADVICE}", name=name)

    sys.meta_path.insert(0, _Refuse)
