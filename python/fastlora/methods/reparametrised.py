"""Methods that are LoRA with an A and B computed from what learns: one small step before the fused kernel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..autograd import linear_from_parts
from ..checks import Packed
from ..linear import _BASE, QLinear
from ..named_adapters import DEFAULT, Parts
from .one_adapter import OneAdapter


class Reparametrised(OneAdapter):
    """A layer whose low-rank term is scaling·x·Aᵀ·Bᵀ with the pair that :meth:`pair_in_force` computes.

    Files hold that pair, as plain LoRA; what learns is in ``state_dict``. A file is read back only where a
    class says how (:meth:`can_load`, :meth:`imported`).
    """

    def pair_in_force(self) -> tuple[Tensor, Tensor]:
        """A (r, k) and B (n, r), differentiable in what learns."""
        raise NotImplementedError

    def compact_pair(self) -> tuple[Tensor, Tensor]:
        """The same product B·A, of the smallest rank that the parameters show."""
        return self.pair_in_force()

    def adapted(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return linear_from_parts(x, weight, bias, *self.pair_in_force(), self.scaling, dropout)

    @torch.no_grad()
    def exported(self, name: str = DEFAULT) -> Parts:
        a, b = (nn.Parameter(t.detach().clone()) for t in self.pair_in_force())
        of = self.adapter(name)
        return of._replace(lora_A=a, lora_B=b, rank=a.shape[0], alpha=of.alpha * a.shape[0] / of.rank)

    def can_load(self, name: str) -> bool:
        return False

    def plain(self) -> QLinear:
        """A QLinear that computes the same, of the pair's rank, which may be 0. It shares the packed weight
        and the bias, the very Parameters, with this layer. Raises RuntimeError on a merged layer."""
        self._check_unmerged("plain")
        a, b = self.compact_pair() if self.rank else (None, None)
        layer = self._without_adapter(0 if a is None else a.shape[0])
        if layer.rank and a is not None and b is not None:
            learns = any(p.requires_grad for p in self.adapter_parameters())
            layer.lora_A, layer.lora_B = (
                nn.Parameter(t.detach().clone(memory_format=torch.contiguous_format), requires_grad=learns)
                for t in (a, b)
            )
        return layer

    def _check_unmerged(self, op: str) -> None:
        if self.merged:
            raise RuntimeError(f"{op}: expected an unmerged layer, got a merged one; call unmerge()")

    def _without_adapter(self, rank: int = 0) -> QLinear:
        """A QLinear of this layer's base and bias, its adapter of `rank` still on meta."""
        layer = QLinear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            rank=rank,
            alpha=self.scaling * rank,
            dropout=self.dropout,
            blocksize=self.blocksize,
            double_quant=self.double_quant,
            dtype=self.weight_dtype,
            device="meta",
        )
        for name in (*_BASE, "bias"):
            setattr(layer, name, getattr(self, name))
        return layer.train(self.training)


def make_plain(model: nn.Module) -> int:
    """Swap every reparametrised layer in `model` for its :meth:`Reparametrised.plain`, under all its names;
    how many. Optimisers have to be made anew."""
    if isinstance(model, Reparametrised):
        raise ValueError("make_plain: expected a module that holds layers, got a layer; call its plain()")
    return swapped(model, {m: m.plain() for m in model.modules() if isinstance(m, Reparametrised)})


def swapped(model: nn.Module, new: Mapping[nn.Module, QLinear]) -> int:
    """Put new layers in the old ones' places, under all their names; how many there are."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new[module])
    return len(new)
