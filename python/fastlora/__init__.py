"""fastlora: fused 4-bit NormalFloat layers with low-rank adapters."""

from . import ops_segmented  # noqa: F401 (registers its ops)
from ._C import __version__
from .adapter_files import load_adapter, save_adapter
from .adapter_table import AdapterTable
from .autograd import nf4_linear
from .conversion_report import ConversionReport
from .convert import convert
from .integrations.bitsandbytes_patch import patch_bitsandbytes, unpatch_bitsandbytes
from .isa import available_isas, current_isa, use_isa
from .linear import QLinear
from .model_adapters import adapters
from .multi_autograd import nf4_multi_lora_linear, segmented_lora
from .nf4 import NF4Weight, quantize_nf4
from .routing import Routing, route

__all__ = [
    "AdapterTable",
    "ConversionReport",
    "NF4Weight",
    "QLinear",
    "Routing",
    "__version__",
    "adapters",
    "available_isas",
    "convert",
    "current_isa",
    "load_adapter",
    "nf4_linear",
    "nf4_multi_lora_linear",
    "patch_bitsandbytes",
    "quantize_nf4",
    "route",
    "save_adapter",
    "segmented_lora",
    "unpatch_bitsandbytes",
    "use_isa",
]
