"""peft's LoRA layer over a QLinear: all of peft's interface, one fused call a forward.

What peft computes module by module, base layer, lora_A, lora_B and a sum, is one op here. Parameters, their
names, configs and files are peft's own, so adapters go back and forth between this and a dense model.
Imported by peft_hook when peft first meets a QLinear.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..linear import QLinear, _applied
from ..nf4 import NF4Weight, quantize_nf4
from ..rounding import Rounding, rounding
from .peft_forward import FusedForward

_PARTS = ("weight", "weight_scales", "weight_nested", "weight_offsets", "bias")
# peft's variants of LoRA that leave the base weight alone, or only read it.
_VARIANTS = frozenset(
    [
        "DoraLinearVariant",
        "ALoraLinearVariant",
        "MiCALinearVariant",
        "VeloraLinearVariant",
    ]
)
_INITS = "True, False, 'gaussian', 'orthogonal', 'eva', 'pissa', 'olora', 'mica'"


class FusedLoraLayer:
    """Marks peft layers that compute by fastlora's ops already."""


def dispatch_qlinear(target: Any, adapter_name: str, *, config: Any, **kwargs: Any) -> LoraQLinear:
    """The layer for a QLinear, or for a layer of another peft method over one.

    Raises ValueError for a QLinear that has adapters of its own, and for a target that is a parameter.
    """
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    where = kwargs.get("target_name") or "the layer"
    if base.adapter_names:
        raise ValueError(
            f"LoRA on QLinear: expected a layer without adapters of its own, got {where} with "
            f"{list(base.adapter_names)}; convert with rank=0, or train those without peft"
        )
    if kwargs.get("parameter_name") is not None:
        raise ValueError(
            f"LoRA on QLinear: expected the layer in target_modules, got {where} in target_parameters"
        )
    if config.fan_in_fan_out:
        warnings.warn("fan_in_fan_out is for Conv1D, not for QLinear: it is set to False.", stacklevel=2)
        config.fan_in_fan_out = False
    return LoraQLinear(target, adapter_name, config=config, **kwargs)


class LoraQLinear(FusedForward, FusedLoraLayer, Linear):  # "Linear": peft goes by the name
    """peft's ``lora.Linear`` over a QLinear of rank 0.

    Adapters are float32 unless a file or :meth:`to` makes them something else; x's dtype is computed in.
    Merging quantises the sum again, once for all adapters that are merged, from the original weight;
    unmerging puts the original parameters back, the very objects. While merged, the base's entries of
    ``state_dict`` are the merged bits, as elsewhere in peft.

    Initialisations that take something out of the weight (PiSSA, OLoRA) quantise what is left again, and the
    layer's base is that from then on, as it is of a dense model.
    """

    _original: tuple[nn.Parameter | None, ...] | None = None  # the base's parameters while merged
    _dense: _DenseView | None = None

    # --- what peft's code for dense layers reads and writes -----------------------------------------------

    def get_base_layer(self) -> Any:
        """The QLinear; while peft's own code for dense layers runs, a view of it with a dense weight."""
        return super().get_base_layer() if self._dense is None else self._dense

    @property
    def qlinear(self) -> Any:
        """The QLinear."""
        return super().get_base_layer()

    @contextmanager
    def dense_view(self) -> Iterator[_DenseView]:
        """Inside, :meth:`get_base_layer` has a float32 weight, dequantised when it is first read."""
        outer = self._dense
        view = self._dense = outer or _DenseView(self.qlinear)
        try:
            yield view
        finally:
            self._dense = outer

    def update_layer(self, adapter_name: str, r: int, lora_alpha: Any, config: Any, **kwargs: Any) -> None:
        """Add an adapter. Raises ValueError for an initialisation or a variant that needs the dense weight
        that was quantised, RuntimeError on a merged layer for one that changes the weight."""
        init = config.init_lora_weights
        kind = init.lower() if isinstance(init, str) else ""
        if kind == "loftq":
            raise ValueError(
                f"LoRA on QLinear: expected init_lora_weights of {_INITS}, got 'loftq', for which the dense "
                "weights are needed; call fastlora.initialize_loftq(model, dense_weights) on a peft model "
                "made with True, which the config of an adapter that is to be loaded has to say too"
            )
        if kind.startswith("corda"):
            raise ValueError(f"LoRA on QLinear: expected init_lora_weights of {_INITS}, got {init!r}")
        if self.merged and kind.startswith(("pissa", "olora")):
            raise RuntimeError(f"LoRA on QLinear: expected an unmerged layer for {init!r}, got a merged one")
        with self.dense_view() as view:
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        rest = view.changed()
        if rest is not None:
            base = self.qlinear
            base._set_base(
                quantize_nf4(
                    rest,
                    blocksize=base.blocksize,
                    double_quant=base.double_quant,
                    offsets=base.quantized_weight.offset_values,
                )
            )

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:
        variant = super().resolve_lora_variant(config=config, **kwargs)
        if variant is not None and type(variant).__name__ not in _VARIANTS:
            raise ValueError(
                f"LoRA on QLinear: expected plain LoRA or one of {sorted(_VARIANTS)}, got "
                f"{type(variant).__name__}"
            )
        return variant

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[Any, None]:
        return self.qlinear.weight.device, None  # uint8 is no dtype for an adapter

    # --- merging ------------------------------------------------------------------------------------------

    def merge(  # type: ignore[override]
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Rounding | None:
        """Fold adapters into the weight, by default the active ones: W becomes NF4(W + their changes). This
        is lossy (see :meth:`QLinear.merge`). With several at once or one after the other, the sum is
        quantised once. Returns what it cost, of all that is merged now; None if there was nothing to merge.

        safe_merge makes no difference: that the sum is finite is checked always, since NF4 has no NaN.
        Raises, changing nothing, ValueError if it is not, RuntimeError for a bias with no base bias to add
        to, and what peft raises for variants that cannot be merged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        if not names:
            return None
        base = self.qlinear
        original = self._original or tuple(getattr(base, part) for part in _PARTS)
        with torch.no_grad():
            dense, bias = self._folded(original, [*self.merged_adapters, *names])
            try:
                merged = quantize_nf4(
                    dense,
                    blocksize=base.blocksize,
                    double_quant=base.double_quant,
                    offsets=_packed(base, original).offset_values,
                )
            except ValueError as error:
                raise ValueError(
                    f"merge: expected a finite sum with adapters {names}, got {error}"
                ) from error
            if bias is not None and not torch.isfinite(bias).all():
                raise ValueError(f"merge: expected a finite bias with adapters {names}, got NaN or Inf")
        self._original = original
        base._set_base(merged)
        if bias is not None:
            base.bias = nn.Parameter(bias.to(base.bias.dtype), requires_grad=base.bias.requires_grad)
        self.merged_adapters += names
        return rounding("", _dequantized(base, original), dense, merged.dequantize(torch.float32))

    @torch.no_grad()
    def merged_parts(self) -> tuple[Tensor, Tensor | None]:
        """The float32 weight with the active adapters in it, unquantised, and the bias; of a merged layer
        what is in force."""
        base = self.qlinear
        if self.merged:
            return base.dequantize(torch.float32), base.bias
        names = [] if self.disable_adapters else [n for n in self.active_adapters if n in self.lora_A]
        dense, bias = self._folded([getattr(base, part) for part in _PARTS], names)
        return dense, base.bias if bias is None else bias

    def _folded(self, original: Sequence[Any], names: list[str]) -> tuple[Tensor, Tensor | None]:
        """The float32 weight with these adapters in it, and the bias where it changes."""
        base = self.qlinear
        dense, bias = _dequantized(base, original), None
        for name in names:
            a, b = self.lora_A[name].weight.float(), self.lora_B[name].weight.float()
            scaling = float(self.scaling[name])
            variant = self.lora_variant.get(name)
            if variant is None:
                dense.addmm_(b, a, alpha=scaling)
            elif self.is_dora(name):
                norm = torch.linalg.vector_norm(
                    _dequantized(base, original).addmm_(b, a, alpha=scaling), dim=1
                )
                factor = self.lora_magnitude_vector[name].weight.float() / norm
                dense = dense.addmm_(b, a, alpha=scaling).mul_(factor[:, None])
            else:
                dense = variant.merge_safe(self, name, dense)
            if self.lora_bias.get(name):
                if base.bias is None:
                    raise RuntimeError(f"merge: expected a base with a bias for {name}'s lora_bias, got none")
                bias = (original[-1].float() if bias is None else bias) + self.lora_B[name].bias * scaling
        return dense, bias

    def unmerge(self) -> None:
        """Give the base its own parameters back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._original is not None:
            base = self.qlinear
            for part, parameter in zip(_PARTS, self._original, strict=True):
                setattr(base, part, parameter)
            self._original = None
        self.merged_adapters.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self._original is not None:
            self._original = tuple(None if p is None else _applied(fn, p) for p in self._original)  # type: ignore[misc]
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.merged and any(key.startswith(f"{prefix}base_layer.") for key in state_dict):
            self.unmerge()  # else unmerging would undo the loading
        super()._load_from_state_dict(state_dict, prefix, *args)


def _packed(base: QLinear, parts: Sequence[Any]) -> NF4Weight:
    """What _PARTS of the base are as a weight."""
    weight, scales, nested, offsets = (None if p is None else p.detach() for p in parts[:-1])
    assert weight is not None
    assert scales is not None
    shape = torch.Size((base.out_features, base.in_features))
    return NF4Weight(weight, scales, nested, shape, base.weight_dtype, base.blocksize, offsets)


def _dequantized(base: QLinear, parts: Sequence[Any]) -> Tensor:
    return _packed(base, parts).dequantize(torch.float32)


class _DenseView:
    """A QLinear whose weight is dense and float32; all else is the layer's."""

    def __init__(self, base: QLinear) -> None:
        self._base = base

    @cached_property
    def weight(self) -> nn.Parameter:
        return nn.Parameter(self._base.dequantize(torch.float32), requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)

    def changed(self) -> Tensor | None:
        """The weight, if somebody has written to it."""
        if "weight" not in self.__dict__ or self.weight.is_meta:
            return None
        weight = self.weight.detach()
        return None if torch.equal(weight, self._base.dequantize(torch.float32)) else weight
