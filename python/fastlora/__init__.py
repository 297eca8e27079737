"""fastlora: fused 4-bit NormalFloat layers with low-rank adapters."""

from . import ops_segmented  # noqa: F401 (registers its ops)
from ._C import __version__
from .adapters import load_adapter, save_adapter
from .autograd import nf4_linear
from .conversion_report import ConversionReport
from .convert import convert
from .isa import available_isas, current_isa, use_isa
from .linear import QLinear
from .nf4 import NF4Weight, quantize_nf4

__all__ = [
    "ConversionReport",
    "NF4Weight",
    "QLinear",
    "__version__",
    "available_isas",
    "convert",
    "current_isa",
    "load_adapter",
    "nf4_linear",
    "quantize_nf4",
    "save_adapter",
    "use_isa",
]
