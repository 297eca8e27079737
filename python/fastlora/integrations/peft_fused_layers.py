"""PEFT's LoRA layers with another forward: base and adapter in one product.

A layer keeps its object, its parameters and everything PEFT can do with it; only its class is a subclass that
computes differently where it can, and hands the call to PEFT's own forward where it cannot. Nothing is kept
between calls, so whatever PEFT does to adapters (adding, deleting, swapping, padding, merging) is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import layer as peft_lora
from torch import Tensor, nn

from .. import checks
from ..autograd import linear_from_parts
from ..multi_autograd import NO_DROPOUT, add_low_rank, multi_linear
from .mixed_batch import BASE, Member, low_rank, routing
from .operands import FusedBase, Operands, computes_on, operands, watched

if TYPE_CHECKING:
    _Base = peft_lora.Linear
else:
    _Base = object


class Term(NamedTuple):
    """An adapter that is no variant of LoRA, of one layer."""

    a: Tensor  # (r, k)
    b: Tensor  # (n, r)
    scaling: float | Tensor  # a tensor where hotswapping is prepared for compilation
    bias: Tensor | None  # (n,), lora_bias
    dropout: float


class Fused(_Base):
    """The forward of a fused layer, before the class of PEFT's that it takes the place of."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        if args or len(kwargs) > (names is not None) or self._disable_adapters or self.merged_adapters:
            return super().forward(x, *args, **kwargs)
        if names is not None:
            self._check_forward_args(x, adapter_names=names)
            y = self._mixed(x, names)
        else:
            held: Any = self._modules["lora_A"]
            terms = [self._term(name, x) for name in self.active_adapters if name in held]
            y = self._fused(x, [term for term in terms if term is not None]) if all(terms) else None
        return super().forward(x, **kwargs) if y is None else y

    def _fused(self, x: Tensor, terms: Sequence[Term]) -> Tensor | None:
        """Base and adapters; None: PEFT is to compute."""
        base: Any = self._modules["base_layer"]
        if type(base) is nn.Linear:
            return None if watched(base) else _dense(base, x, terms)
        if len(terms) != 1 and any(term.dropout for term in terms):
            return None  # masks of their own
        parts = operands(base, x)
        if parts is None:
            return None
        return _returned(base, _one_product(parts, terms), x)

    def _mixed(self, x: Tensor, names: Sequence[str]) -> Tensor | None:
        """Each of x's prompts, or rows, with the adapter of its name; None: PEFT is to compute."""
        base: Any = self._modules["base_layer"]
        held: Any = self._modules["lora_A"]
        used = [name for name in dict.fromkeys(names) if name != BASE and name in held]
        terms = [self._term(name, x) for name in used]
        if x.dim() < 2 or any(t is None or t.dropout or t.bias is not None for t in terms):
            return None
        dense = type(base) is nn.Linear
        parts = None if dense else operands(base, x)
        if (watched(base) or not computes_on(x.device)) if dense else parts is None:
            return None
        if not used:
            return base(x)
        members = [Member(t.a, t.b, t.scaling) for t in terms if t is not None]
        slot = {name: i for i, name in enumerate(used)}
        route = routing([slot.get(name, -1) for name in names], len(used), x)
        if parts is None:
            y = base(x.reshape(-1, x.shape[-1]))
            seen = x.reshape(-1, x.shape[-1]).to(y.dtype)
            return add_low_rank(seen, low_rank(members), route, y).view(*x.shape[:-1], -1)
        y = multi_linear(*parts, low_rank(members), route, NO_DROPOUT, batch_invariant=False)
        return _returned(base, y, x)

    def _term(self, name: str, x: Tensor) -> Term | None:
        """An adapter's tensors, or None where reading them would go around something: a variant, a hook, a
        wrapper (FSDP's of a single leaf among them)."""
        modules: Any = self._modules
        lora_a, lora_b, dropout = (
            modules[kind]._modules[name] for kind in ("lora_A", "lora_B", "lora_dropout")
        )
        if name in self.lora_variant or type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
            return None
        if watched(lora_a, lora_b, dropout):
            return None
        a: Any = lora_a._parameters["weight"]
        b: Any = lora_b._parameters["weight"]
        if type(a) not in _WHOLE or type(b) not in _WHOLE or a.dtype != b.dtype:
            return None
        if a.dtype not in checks.DTYPE_CODE or a.device != x.device or b.device != x.device:
            return None
        p = 0.0
        if type(dropout) is nn.Dropout:
            p = dropout.p if dropout.training else 0.0
        elif type(dropout) is not nn.Identity:
            return None
        return None if p >= 1.0 else Term(a, b, self.scaling[name], lora_b._parameters["bias"], p)


class FusedLinear(Fused, peft_lora.Linear):
    """Over a dense layer, or a 4-bit layer of bitsandbytes that PEFT was not told about."""

    stock = peft_lora.Linear


FusedLinear.__name__ = peft_lora.Linear.__name__

_WHOLE = (nn.Parameter, Tensor)  # not a DTensor


def _returned(base: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    """y in the dtype in which the base returns it: bitsandbytes' layer in x's, under autocast too."""
    return y.to(x.dtype) if isinstance(base, FusedBase) else y


def _one_product(parts: Operands, terms: Sequence[Term]) -> Tensor:
    """y = x·Wᵀ + Σ s·u·Bᵀ + bias: several adapters are one of the sum of their ranks."""
    x, weight, bias = parts
    for term in terms:
        if term.bias is not None:
            added = (term.bias * term.scaling).to(x.dtype)
            bias = added if bias is None else bias + added
    if not terms:
        return linear_from_parts(x, weight, bias, None, None, 0.0)
    if len(terms) == 1:
        a, b, scaling, _, dropout = terms[0]
        if isinstance(scaling, Tensor):
            a, b, scaling = a.float(), b.float() * scaling, 1.0
        return linear_from_parts(x, weight, bias, a, b, scaling, dropout)
    a = torch.cat([term.a.float() for term in terms])
    b = torch.cat([term.b.float() * term.scaling for term in terms], 1)
    return linear_from_parts(x, weight, bias, a, b, 1.0)


def _dense(base: nn.Linear, x: Tensor, terms: Sequence[Term]) -> Tensor:
    """torch's product, to which each adapter's second product is added in place: the scaling and the sum cost
    no pass of their own over y, forward or backward. In y's dtype throughout."""
    rows = x.reshape(-1, x.shape[-1])  # so that y is no view, which autograd would copy
    y = base(rows)
    rows = rows.to(y.dtype)
    for a, b, scaling, bias, dropout in terms:
        u = F.linear(F.dropout(rows, dropout) if dropout else rows, a.to(y.dtype))
        if isinstance(scaling, Tensor):
            u, alpha = u * scaling.to(u.dtype), 1.0
        else:
            alpha = scaling
        y.addmm_(u, b.to(y.dtype).t(), alpha=alpha)
        if bias is not None:
            y.add_((bias * scaling).to(y.dtype))
    return y.view(*x.shape[:-1], y.shape[-1])
