"""fastlora: fused 4-bit NormalFloat layers with low-rank adapters."""

from typing import TYPE_CHECKING, Any

from . import ops_adamw, ops_segmented  # noqa: F401 (register their ops)
from ._C import __version__
from .adapter_files import load_adapter, save_adapter
from .adapter_table import AdapterTable
from .autograd import nf4_linear
from .conversion_report import ConversionReport
from .convert import convert
from .experts import QExperts
from .huge_pages import use_huge_pages
from .integrations import peft_hook, transformers_hook
from .integrations.bitsandbytes_patch import patch_bitsandbytes, unpatch_bitsandbytes
from .integrations.peft_loftq import initialize_loftq
from .integrations.peft_patch import patch, unpatch
from .isa import available_isas, current_isa, use_isa
from .linear import QLinear
from .model_adapters import adapters, scale_adapter
from .multi_autograd import nf4_multi_lora_linear, segmented_lora
from .nf4 import NF4Weight, quantize_nf4
from .optim import PagedAdamW, PagedAdamW8bit
from .routing import Routing, route

if TYPE_CHECKING:
    from .integrations.transformers_config import FastLoraConfig as FastLoraConfig

__all__ = [
    "AdapterTable",
    "ConversionReport",
    "NF4Weight",
    "PagedAdamW",
    "PagedAdamW8bit",
    "QExperts",
    "QLinear",
    "Routing",
    "__version__",
    "adapters",
    "available_isas",
    "convert",
    "current_isa",
    "initialize_loftq",
    "load_adapter",
    "nf4_linear",
    "nf4_multi_lora_linear",
    "patch",
    "patch_bitsandbytes",
    "quantize_nf4",
    "route",
    "save_adapter",
    "scale_adapter",
    "segmented_lora",
    "unpatch",
    "unpatch_bitsandbytes",
    "use_huge_pages",
    "use_isa",
]

peft_hook.install()
transformers_hook.install()


def __getattr__(name: str) -> Any:  # what needs another library, which is imported when it is asked for
    if name == "FastLoraConfig":
        from .integrations.transformers_config import FastLoraConfig

        return FastLoraConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
