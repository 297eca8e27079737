""":class:`FastLoraConfig`: what transformers is told to quantise by, and what config.json keeps of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from ..linear import check_arguments
from .transformers_hook import require_transformers

require_transformers()

from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

_FORMAT = ("blocksize", "double_quant", "target_modules", "skip_modules")
_ADAPTER = ("rank", "expert_rank", "alpha", "dropout", "use_rslora", "adapter_dtype")


@dataclass(kw_only=True)
class FastLoraConfig(QuantizationConfigMixin):
    """``AutoModel....from_pretrained(path, quantization_config=FastLoraConfig())`` gives a model whose linear
    layers are :class:`fastlora.QLinear`, and whose stacked experts are :class:`fastlora.QExperts`, quantised
    while they are read.

    Args:
        blocksize: weights that share one scale, a power of two from 32 to 4096.
        double_quant: whether the scales are quantised to 8 bits too.
        skip_modules: names of modules to leave dense, with all they contain; they need not occur.
        target_modules: what to quantise, as for :func:`fastlora.convert`.
        rank: of an adapter inside each layer; 0, the default, for a bare base, which PEFT or
            :func:`fastlora.load_adapter` can put adapters on. With a rank everything but the adapters is
            frozen, and transformers' Trainer takes the model as it is.
        expert_rank: that of each single expert of a mixture, by default `rank`.
        alpha, dropout, use_rslora, adapter_dtype: the adapter's, as for QLinear.

    For a checkpoint that is quantised already, by fastlora or as bitsandbytes' NF4, the first four are the
    file's and these are ignored; the adapter's hold where the file has none.

    Raises ValueError for sizes and values, TypeError for dtypes.
    """

    blocksize: int = 64
    double_quant: bool = True
    skip_modules: Sequence[str] = ("lm_head",)
    target_modules: str | Sequence[str] = "all-linear"
    rank: int = 0
    expert_rank: int | None = None
    alpha: float = 32
    dropout: float = 0.0
    use_rslora: bool = False
    adapter_dtype: str | torch.dtype = "float32"
    quant_method: str = "fastlora"  # type: ignore[assignment]  # transformers' own is an enum of its methods

    def __post_init__(self) -> None:
        if self.quant_method != "fastlora":
            raise ValueError(f"FastLoraConfig: expected quant_method 'fastlora', got {self.quant_method!r}")
        skip = self.skip_modules
        self.skip_modules = [skip] if isinstance(skip, str) else list(skip)
        if not isinstance(self.target_modules, str):
            self.target_modules = list(self.target_modules)
        self.adapter_dtype = str(self.adapter_dtype).removeprefix("torch.")
        for rank in (self.rank, self.rank if self.expert_rank is None else self.expert_rank):
            options = (rank, self.alpha, self.dropout, self.blocksize)
            check_arguments(1, 1, *options, torch.float32, self.adapter_torch_dtype)

    @property
    def adapter_torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, str(self.adapter_dtype), None)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(
                "FastLoraConfig: expected adapter_dtype float32, bfloat16 or float16, got "
                f"{self.adapter_dtype!r}"
            )
        return dtype

    @property
    def has_adapters(self) -> bool:
        return self.rank > 0 or bool(self.expert_rank)

    @property
    def layer_options(self) -> dict[str, Any]:
        """Keyword arguments of :func:`fastlora.convert` that describe a layer."""
        options = {name: getattr(self, name) for name in ("blocksize", "double_quant", *_ADAPTER)}
        return options | {"adapter_dtype": self.adapter_torch_dtype}

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Of config.json's quantization_config. Raises ValueError for fields that this version lacks."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(config_dict) - known)
        if unknown:
            raise ValueError(
                f"FastLoraConfig: expected fields of {sorted(known)}, got {unknown}; of a newer fastlora?"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What config.json keeps."""
        return asdict(self)


def merged(stored: Mapping[str, Any], given: FastLoraConfig) -> FastLoraConfig:
    """The config for a checkpoint that is quantised: what config.json says, and what the caller gave.

    Raises ValueError for a checkpoint of a kind that is not read here.
    """
    if stored.get("quant_method") == "fastlora":
        of_file = FastLoraConfig.from_dict(stored)
        # An adapter that is in the file is read from there.
        names = (*_FORMAT, *_ADAPTER) if of_file.has_adapters else _FORMAT
    else:
        of_file = _of_bitsandbytes(stored)
        names = _FORMAT
    held = {name: getattr(of_file, name) for name in names}
    ignored = [
        f"{name}={getattr(given, name)!r} ({held[name]!r})"
        for name in names
        if getattr(given, name) not in (held[name], getattr(FastLoraConfig(), name))
    ]
    if ignored:
        warnings.warn(
            "FastLoraConfig: the checkpoint is quantised already, so what it has holds (in brackets) instead "
            f"of {', '.join(ignored)}",
            stacklevel=2,
        )
    return replace(given, **held)


def _of_bitsandbytes(stored: Mapping[str, Any]) -> FastLoraConfig:
    found: Any = stored.get("quant_method")
    found = f"one quantised by {getattr(found, 'value', found)!r}"
    if stored.get("load_in_8bit"):
        found = "bitsandbytes int8 (load_in_8bit)"
    elif stored.get("load_in_4bit"):
        kind = stored.get("bnb_4bit_quant_type", "fp4")
        if kind == "nf4":
            return FastLoraConfig(
                double_quant=bool(stored.get("bnb_4bit_use_double_quant", False)),
                skip_modules=stored.get("llm_int8_skip_modules") or ("lm_head",),
            )
        found = f"bitsandbytes 4-bit with bnb_4bit_quant_type {kind!r}"
    raise ValueError(
        f"FastLoraConfig: expected a checkpoint that is dense, bitsandbytes NF4 or fastlora's, got {found}; "
        "dequantise it with the library it was made by, and quantise the result"
    )
