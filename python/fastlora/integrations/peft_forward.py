"""The fused forward of a peft LoRA layer over a QLinear, and when a call is left to peft's own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..autograd import linear_from_parts
from ..checks import Packed
from ..hooks import has_hooks
from ..linear import QLinear
from ..methods.dora import Factor, dora_linear
from ..multi_autograd import NO_DROPOUT, multi_linear
from .mixed_batch import Member, low_rank, routing

if TYPE_CHECKING:
    _Layer = Any  # peft's LoraLayer
else:
    _Layer = object


class FusedForward(_Layer):
    """Mixed into a peft LoRA layer before the class whose forward it replaces.

    One adapter is the fused op; several that are active at once are one of their ranks together; a batch with
    adapter_names is one call of the op of many adapters; DoRA scales the fused op's columns.
    """

    _factor: Factor | None = None  # of the DoRA adapter used last

    if TYPE_CHECKING:
        base_layer: Any
        lora_A: Any
        lora_B: Any
        lora_dropout: Any
        lora_magnitude_vector: Any
        scaling: Any

        def dense_view(self) -> AbstractContextManager[Any]: ...

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in_features) to (..., out_features), in x's dtype (autocast's where that is on)."""
        names = kwargs.get("adapter_names")
        if (
            self.disable_adapters
            or args
            or (self.merged and names is None)
            or self.unfused(kwargs) is not None
        ):
            if not self.lora_variant:
                return super().forward(x, *args, **kwargs)
            with self.dense_view():  # a variant may read the weight
                return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        base = self.base_layer
        weight = base.packed_weight()
        if names is not None:
            return self._mixed(x, names, weight, base.bias)
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) == 1 and self.is_dora(active[0]):
            return self._dora(x, active[0], weight, base.bias)
        return self._sum(x, active, weight, base.bias)

    def unfused(self, kwargs: dict[str, Any] | None = None) -> str | None:
        """Why a call, with peft's adapter_names or without, is computed module by module as in peft; None
        where it is fused. The result is the same."""
        kwargs = kwargs or {}
        if not kwargs.keys() <= {"adapter_names", "alora_offsets"}:
            return "it has arguments that are not peft's"
        base = self.base_layer
        if not _is_plain(base, QLinear):
            return "the base layer is wrapped or has hooks"
        if base.adapter_names:
            return "the base layer has been given adapters of its own"
        mixed = kwargs.get("adapter_names")
        names = self.active_adapters if mixed is None else set(mixed)
        for name in names:
            if name not in self.lora_A:
                continue
            if name in self.lora_variant and not (
                mixed is None and len(names) == 1 and self._fuses_dora(name)
            ):
                return f"adapter {name!r} is a {type(self.lora_variant[name]).__name__}"
            if not (_is_plain(self.lora_A[name], nn.Linear) and _is_plain(self.lora_B[name], nn.Linear)):
                return f"lora_A or lora_B of adapter {name!r} is wrapped or has hooks"
            dropout = self.lora_dropout[name]
            if not (_is_plain(dropout, nn.Identity) or (_is_plain(dropout, nn.Dropout) and dropout.p < 1)):
                return f"adapter {name!r} has a dropout other than peft's"
            if mixed is not None and self._p(name):
                return "a mixed batch with dropout"
        return None

    def is_dora(self, name: str) -> bool:
        return type(self.lora_variant.get(name)).__name__ == "DoraLinearVariant"

    def _fuses_dora(self, name: str) -> bool:
        magnitude = self.lora_magnitude_vector[name] if self.is_dora(name) else None
        return magnitude is not None and not has_hooks(magnitude) and not self.lora_bias.get(name)

    def _p(self, name: str) -> float:
        """The adapter's dropout in this call."""
        dropout = self.lora_dropout[name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    # --- the ways to compute it ---------------------------------------------------------------------------

    def _sum(self, x: Tensor, names: list[str], weight: Packed, bias: Tensor | None) -> Tensor:
        """The base and these adapters. Each has a dropout mask of its own, so that of those with dropout only
        one can be fused, and only alone."""
        apart = [name for name in names if self._p(name)]
        fused = [name for name in names if name not in apart]
        p = 0.0
        if apart and not fused:
            fused = [apart.pop(0)]
            p = self._p(fused[0])
        for name in fused:
            low_bias = self.lora_B[name].bias
            if low_bias is not None:
                low_bias = low_bias * self.scaling[name]
                bias = low_bias if bias is None else bias + low_bias
        bias = bias if bias is None else bias.to(x.dtype)
        y = linear_from_parts(x, weight, bias, *self._stacked(fused), p)
        for name in apart:
            lora_a, lora_b = self.lora_A[name], self.lora_B[name]
            seen = self.lora_dropout[name](self._cast_input_dtype(x, lora_a.weight.dtype))
            y = y + (lora_b(lora_a(seen)) * self.scaling[name]).to(y.dtype)
        return y

    def _stacked(self, names: Sequence[str]) -> tuple[Tensor | None, Tensor | None, float]:
        """(lora_A, lora_B, scaling) of these adapters as one of their ranks together."""
        if not names:
            return None, None, 1.0
        pairs = [(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]) for name in names]
        if len(pairs) == 1 and not isinstance(pairs[0][2], Tensor):
            a, b, scaling = pairs[0]
            return a, b, float(scaling)
        if len(pairs) == 1:  # a tensor, so that swapping adapters compiles nothing anew
            return pairs[0][0], pairs[0][1] * pairs[0][2], 1.0
        return torch.cat([a for a, _, _ in pairs]), torch.cat([b * s for _, b, s in pairs], dim=1), 1.0

    def _dora(self, x: Tensor, name: str, weight: Packed, bias: Tensor | None) -> Tensor:
        """DoRA, with peft's magnitude (`methods/dora.py`)."""
        a, b, scaling = self._stacked([name])
        assert a is not None
        assert b is not None
        if self._factor is None:
            self._factor = Factor()
        m = self.lora_magnitude_vector[name].weight
        factor = self._factor.of(weight, self.base_layer.in_features, a, b, m, scaling)
        bias = bias if bias is None else bias.to(x.dtype)
        seen = self.lora_dropout[name](x) if self._p(name) else None
        return dora_linear(x, weight, bias, a, b, scaling, factor, seen)

    def _mixed(self, x: Tensor, names: Sequence[str], weight: Packed, bias: Tensor | None) -> Tensor:
        """Row i of x, with all that is under it, has the adapter names[i]; the base alone where this layer
        has none of that name, as for "__base__"."""
        here = [name for name in dict.fromkeys(names) if name in self.lora_A]
        bias = bias if bias is None else bias.to(x.dtype)
        if not here:
            return linear_from_parts(x, weight, bias, None, None, 0.0)
        low = low_rank(
            [Member(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]) for name in here]
        )
        slots = [here.index(name) if name in here else -1 for name in names]
        route = routing(slots, len(here), x)
        y = multi_linear(x, weight, bias, low, route, NO_DROPOUT, batch_invariant=False)
        for i, name in enumerate(here):
            low_bias = self.lora_B[name].bias
            if low_bias is not None:
                rows = [row for row, slot in enumerate(slots) if slot == i]
                y[rows] += (low_bias * self.scaling[name]).to(y.dtype)
        return y


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module would do no more than `kind` does: what it holds can be read instead."""
    return type(module).forward is kind.forward and not has_hooks(module)
