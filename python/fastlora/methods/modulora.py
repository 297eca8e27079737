"""ModuLoRA: low-rank adapters on any quantiser's weights.

    y = W·x + s·B·A·x + bias        W as a quantiser stores it, frozen

The layer asks one thing of the format: rows of W (`quantizers.py`). Forward and backward dequantise a slab of
rows, multiply and drop it, so that backward keeps the quantised tensors in W's place and memory is that of
the codes, of x, and of a slab (`slab_linear.py`). A format with a kernel of its own may bring that instead.

Yin et al., "ModuLoRA: Finetuning 2-Bit LLMs on Consumer GPUs by Integrating with Modular Quantizers", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..named_adapters import check_adapter
from ..tiles import TILE
from .one_adapter import OnlyOwn
from .quantizers import QuantizedWeight, Quantizer, Stored
from .slab_linear import slab_linear

_PREFIX = "weight_"


class ModuLinear(OnlyOwn):
    """y = x·Wᵀ + scaling · dropout(x)·lora_Aᵀ·lora_Bᵀ + bias, W frozen as a quantiser stores it.

    Args:
        quantizer: of the weight; a :class:`~fastlora.methods.quantizers.Quantizer`.
        parts: the tensors that it has made of the weight, or that it knows how to read; held, not copied.
        in_features, out_features: k and n, at least 1.
        bias: ``(n,)`` or None; it becomes a parameter that learns, over the same memory.
        rank, alpha, dropout, use_rslora, adapter_dtype: as for :class:`fastlora.QLinear`.

    :meth:`from_linear` quantises a dense layer. lora_A is Kaiming-uniform and lora_B zero, so the layer
    starts equal to its base.

    Parameters: ``lora_A`` ``(r, k)``, ``lora_B`` ``(n, r)``, ``bias``, and without gradients
    ``weight_<name>`` for each part. A floating part is held as its bytes, uint8 ``(*shape, bytes of one)``:
    ``.half()`` and ``.to(dtype)``, which cast what is floating, then leave scales as they are.

    It has that one adapter, and none by name. Raises ValueError for sizes and values, TypeError for dtypes.
    """

    #: Elements of W that are dequantised at a time, about; at least what the quantiser's `row_step` asks for.
    slab_elements: int = TILE
    #: Never: an adapter has no place in the codes.
    merged = False

    bias: Tensor | None

    def __init__(
        self,
        quantizer: Quantizer,
        parts: Stored,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        *,
        rank: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        adapter_dtype = torch.float32 if adapter_dtype is None else adapter_dtype
        _check(quantizer, parts, in_features, out_features, bias)
        # Of rank 0 the rest is checked as if there were an adapter.
        check_adapter("ModuLinear", 1 if type(rank) is int and not rank else rank, alpha, dropout)
        if adapter_dtype not in checks.DTYPE_CODE:
            raise TypeError(
                f"ModuLinear: expected adapter_dtype float32, bfloat16 or float16, got {adapter_dtype}"
            )
        self.quantizer = quantizer
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.dropout = rank, dropout
        self.set_alpha(alpha, use_rslora)
        self.part_dtypes = {name: part.dtype for name, part in parts.items()}
        for name, part in parts.items():
            self.register_parameter(_PREFIX + name, nn.Parameter(_kept(part.detach()), requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
        device = next(iter(parts.values())).device
        for name, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
            adapter = nn.Parameter(torch.empty(shape, dtype=adapter_dtype, device=device)) if rank else None
            self.register_parameter(name, adapter)
        self.reset_adapter()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        quantizer: Quantizer,
        *,
        rank: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        init: str = "default",
    ) -> ModuLinear:
        """Quantise a dense layer where it is. Arguments as for the class; init: ``"default"`` or
        ``"gaussian"``, as for :meth:`fastlora.QLinear.from_linear`.

        The bias is copied: nothing of `linear` changes and nothing is shared with it. Raises TypeError if it
        is not a `torch.nn.Linear` with a floating matrix for a weight; the quantiser's errors are its own.
        """
        dense = getattr(linear, "weight", None)
        if not isinstance(linear, nn.Linear) or not isinstance(dense, Tensor):
            raise TypeError(
                f"ModuLinear.from_linear: expected a torch.nn.Linear, got {type(linear).__name__}"
            )
        if dense.dim() != 2 or dense.dtype not in checks.DTYPE_CODE:
            raise TypeError(
                "ModuLinear.from_linear: expected a matrix of float32, bfloat16 or float16 for a weight, got "
                f"{tuple(dense.shape)} of {dense.dtype}"
            )
        if init not in {"default", "gaussian"}:
            raise ValueError(f"ModuLinear.from_linear: expected init 'default' or 'gaussian', got {init!r}")
        _check_quantizer(quantizer)
        with torch.no_grad():
            parts = quantizer.quantize(dense.detach())
        n, k = dense.shape
        layer = cls(
            quantizer,
            parts,
            k,
            n,
            None if linear.bias is None else linear.bias.detach().clone(),
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            use_rslora=use_rslora,
            adapter_dtype=adapter_dtype,
        )
        layer.reset_adapter(init)
        if linear.bias is not None and layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features), in x's dtype (autocast's where that is on)."""
        if not x.dim() or x.shape[-1] != self.in_features:
            raise ValueError(
                f"ModuLinear: expected x of shape (..., {self.in_features}), got {tuple(x.shape)}"
            )
        weight, bias = self.quantized_weight, self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        a, b = (None, None) if self._active is None else (self.lora_A, self.lora_B)
        dropout = self.dropout if self.training else 0.0
        low = (bias, a, b, self.scaling, dropout)
        y = self.quantizer.linear(x, weight.parts, weight.shape, *low)
        return slab_linear(x, weight, *low, self.slab_elements) if y is None else y

    # --- the weight ---------------------------------------------------------------------------------------

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The weight over this layer's own tensors."""
        parts = {
            name: _as_made(self._parameters[_PREFIX + name], dtype)
            for name, dtype in self.part_dtypes.items()
        }
        return QuantizedWeight(self.quantizer, parts, (self.out_features, self.in_features))

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a dense (out_features, in_features) tensor without the adapter; in float32 by
        default."""
        return self.quantized_weight.dequantize(dtype or torch.float32, self.slab_elements)

    def share_base(self, other: ModuLinear) -> None:
        """Hold `other`'s quantised weight, the very Parameters, in place of this layer's own."""
        mine, theirs = (
            (one.quantizer, one.part_dtypes, one.in_features, one.out_features) for one in (self, other)
        )
        if mine != theirs:
            raise ValueError(f"ModuLinear.share_base: expected a layer like {self}, got {other}")
        for name in self.part_dtypes:
            setattr(self, _PREFIX + name, other._parameters[_PREFIX + name])

    def stored(self) -> Iterator[tuple[Tensor, int]]:
        """The quantised tensors; the first stands for all weights of the matrix, the others for none."""
        weights = self.in_features * self.out_features
        for name in self.part_dtypes:
            part = self._parameters[_PREFIX + name]
            assert part is not None
            yield part, weights
            weights = 0

    # --- what torch.nn.Module does to its tensors ----------------------------------------------------------

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in self.part_dtypes:  # torch would cast without a word
            mine, loaded = self._parameters[_PREFIX + name], state_dict.get(f"{prefix}{_PREFIX}{name}")
            if loaded is not None and mine is not None and loaded.dtype != mine.dtype:
                error_msgs.append(
                    f"ModuLinear: expected {prefix}{_PREFIX}{name} in {mine.dtype}, got {loaded.dtype}"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        adapter = f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}" if self.rank else "rank=0"
        bits = 8 * self.quantized_weight.nbytes / (self.in_features * self.out_features)
        return (
            f"{self.quantizer}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {adapter}, {bits:.3f} bits/weight"
            f"{', use_rslora=True' if self.use_rslora else ''}"
        )


def _kept(part: Tensor) -> Tensor:
    """A part as a module may hold it: what torch would cast as its bytes, (*shape, bytes of one)."""
    if part.is_floating_point() or part.is_complex():
        return part.contiguous().unsqueeze(-1).view(torch.uint8)
    return part.contiguous()


def _as_made(kept: Any, dtype: torch.dtype) -> Tensor:
    """The other way round."""
    part: Tensor = kept.detach()
    return part.view(dtype).squeeze(-1) if dtype.is_floating_point or dtype.is_complex else part


def _check_quantizer(quantizer: Any) -> None:
    if isinstance(quantizer, type) or not isinstance(quantizer, Quantizer):
        what = quantizer.__name__ if isinstance(quantizer, type) else type(quantizer).__name__
        raise TypeError(
            f"ModuLinear: expected an object of a class derived from Quantizer, got {what}"
            f"{', a class' if isinstance(quantizer, type) else ''}"
        )


def _check(quantizer: Any, parts: Any, in_features: int, out_features: int, bias: Tensor | None) -> None:
    _check_quantizer(quantizer)
    if not parts or not all(
        isinstance(name, str) and name.isidentifier() and isinstance(part, Tensor)
        for name, part in parts.items()
    ):
        raise ValueError(f"ModuLinear: expected parts as tensors by names that are identifiers, got {parts}")
    devices = {part.device for part in parts.values()}
    if len(devices) > 1:
        raise RuntimeError(f"ModuLinear: expected parts on one device, got {sorted(map(str, devices))}")
    for name, value in (("in_features", in_features), ("out_features", out_features)):
        if type(value) is not int:
            raise TypeError(f"ModuLinear: expected {name} as an int, got {value!r}")
        if value < 1:
            raise ValueError(f"ModuLinear: expected {name} >= 1, got {value}")
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"ModuLinear: expected a bias of shape ({out_features},), got {tuple(bias.shape)}")
