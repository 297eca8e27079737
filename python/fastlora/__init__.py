"""fastlora."""

from .nf4 import NF4Weight, quantize_nf4

__all__ = ["NF4Weight", "quantize_nf4"]
