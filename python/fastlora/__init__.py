"""fastlora: fused 4-bit NormalFloat layers with low-rank adapters."""

from ._C import __version__
from .autograd import nf4_linear
from .conversion_report import ConversionReport
from .convert import convert
from .linear import QLinear
from .nf4 import NF4Weight, quantize_nf4
from .ops import available_isas, current_isa, use_isa

__all__ = [
    "ConversionReport",
    "NF4Weight",
    "QLinear",
    "__version__",
    "available_isas",
    "convert",
    "current_isa",
    "nf4_linear",
    "quantize_nf4",
    "use_isa",
]
