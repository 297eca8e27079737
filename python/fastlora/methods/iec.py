"""IEC: the input, averaged, goes around A, and the low-rank vector, repeated, around B.

    u = A·drop(x) + β₁·pool(x)               pool: k -> r, the means of gcd(k, r) groups, each repeated
    y = W·x + s·(B·u + β₂·lift(u)) + bias    lift: r -> n, the means of gcd(r, n) groups, each repeated

β₁ and β₂ are one number each, start at 0 and learn. It is LoRA with A' = A + β₁·Pool and B' = B + β₂·Lift,
exactly, and runs as that; with dropout, which is of what A alone sees, in two terms. Where r divides k and n,
as it should, pool is the means of r groups of k/r inputs, and lift repeats each of them n/r times.

With a base of `calibrate="icq"` (`icq.py`) it is IR-QLoRA. Groups are of neighbours, as in the authors' code.

Qin et al., "Accurate LoRA-Finetuning Quantization of LLMs via Information Retention" (IR-QLoRA), 2024.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..autograd import linear_from_parts
from ..checks import Packed
from ..named_adapters import DEFAULT
from .reparametrised import Reparametrised


class IecQLinear(Reparametrised):
    """QLinear with IEC: beside lora_A and lora_B parameters ``lora_beta_A`` and ``lora_beta_B`` ``(1,)``.

    Arguments as for :class:`QLinear`; made by ``IecQLinear.from_linear`` and by
    ``convert(model, layer_class=IecQLinear)``. It starts as plain LoRA does, with every `init`. Files hold A'
    and B' as plain LoRA.
    """

    lora_beta_A: nn.Parameter | None
    lora_beta_B: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any) -> None:
        super().__init__(in_features, out_features, bias, **options)
        for name in ("lora_beta_A", "lora_beta_B"):
            beta = None if self.lora_A is None else nn.Parameter(torch.zeros_like(self.lora_A[0, :1]))
            self.register_parameter(name, beta)

    def reset_adapter(self, init: str = "default") -> None:
        """lora_A and lora_B as for QLinear, both numbers zero."""
        super().reset_adapter(init)
        self._leave_out()

    def set_adapter_values(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Copy values (rank, k) and (n, rank) into the adapter; both numbers zero."""
        super().set_adapter_values(lora_a, lora_b)
        self._leave_out()

    def _leave_out(self) -> None:
        for name in ("lora_beta_A", "lora_beta_B"):
            beta = self._parameters.get(name)
            if beta is not None:
                nn.init.zeros_(beta)

    def pair_in_force(self) -> tuple[Tensor, Tensor]:
        around_a, b = self._around()
        assert self.lora_A is not None
        return self.lora_A + around_a, b

    def _around(self) -> tuple[Tensor, Tensor]:
        """β₁·Pool (r, k), and B'."""
        a, b, beta_a, beta_b = self.lora_A, self.lora_B, self.lora_beta_A, self.lora_beta_B
        assert a is not None
        assert b is not None
        assert beta_a is not None
        assert beta_b is not None
        return beta_a * group_means(*a.shape, like=a), b + beta_b * group_means(*b.shape, like=b)

    def adapted(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        if not (self.dropout and self.training):
            return super().adapted(x, weight, bias)
        around_a, b = self._around()
        assert self.lora_A is not None
        y = linear_from_parts(x, weight, bias, around_a, b, self.scaling)
        u = F.linear(F.dropout(x, self.dropout), self.lora_A.to(x.dtype))
        return y + self.scaling * F.linear(u, b.to(u.dtype))

    def adapter_parameters(self, name: str = DEFAULT) -> list[nn.Parameter]:
        betas = (self._parameters[one] for one in ("lora_beta_A", "lora_beta_B"))
        return super().adapter_parameters(name) + [beta for beta in betas if beta is not None]


def group_means(rows: int, columns: int, *, like: Tensor) -> Tensor:
    """The matrix (rows, columns) that takes a vector to the means of its gcd(rows, columns) equal groups,
    each repeated to fill the rows."""
    groups = gcd(rows, columns)
    one = torch.eye(groups, dtype=like.dtype, device=like.device) * (groups / columns)
    return one.repeat_interleave(rows // groups, 0).repeat_interleave(columns // groups, 1)
