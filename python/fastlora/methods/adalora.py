"""AdaLoRA: the ranks of a model's layers come out of training, within a common budget.

    y = W·x + s·P·diag(E)·Q·x + bias          P = lora_B (n, r), E = lora_E (r, 1), Q = lora_A (r, k)

A triplet is a column of P, its E and a row of Q. Each step, after backward:

    I = |w·∇w|     Ī <- β₁·Ī + (1-β₁)·I     Ū <- β₂·Ū + (1-β₂)·|I - Ī|       for every element w of P, E, Q
    score of a triplet = Ī·Ū of E + the mean of Ī·Ū over its column of P + the mean over its row of Q

and E of all but the best `budget` triplets of the model becomes 0. The budget falls from where it starts to
the target, along a cubic. A regulariser, 0.5 · the mean of |PᵀP - I| and |QQᵀ - I| (Frobenius), keeps P and Q
orthogonal, so that a triplet's effect is its own.

Scores, budget and what is masked are PEFT's, which divides s by r + 1e-5 where this divides by r, and whose
masking lets ties all fall, where this keeps as many as the budget says, the first of equals.

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..named_adapters import DEFAULT
from .reparametrised import Reparametrised, make_plain


class AdaLoraQLinear(Reparametrised):
    """QLinear with a low-rank term in three parts: beside lora_A and lora_B a parameter ``lora_E`` (r, 1).

    Arguments as for :class:`QLinear`; made by ``AdaLoraQLinear.from_linear`` and by
    ``convert(model, layer_class=AdaLoraQLinear)``. lora_A and lora_B start normal with a deviation of 0.02,
    lora_E zero, so that the layer starts equal to its base.
    """

    lora_E: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any) -> None:
        super().__init__(in_features, out_features, bias, **options)
        e = None if self.lora_A is None else nn.Parameter(torch.zeros_like(self.lora_A[:, :1]))
        self.register_parameter("lora_E", e)

    def reset_adapter(self, init: str = "default") -> None:
        """lora_A and lora_B normal with a deviation of 0.02, lora_E zero. Raises ValueError for another
        `init`."""
        if init != "default":
            raise ValueError(f"AdaLoraQLinear: expected init 'default', got {init!r}")
        if self.lora_A is not None and self.lora_B is not None:
            nn.init.normal_(self.lora_A, std=0.02)
            nn.init.normal_(self.lora_B, std=0.02)
            e = self._parameters.get("lora_E")
            if e is not None:
                nn.init.zeros_(e)

    def set_adapter_values(self, lora_a: Tensor, lora_b: Tensor) -> None:
        raise ValueError(
            "AdaLoraQLinear: expected init 'default', got one that gives lora_A and lora_B values"
        )

    def pair_in_force(self) -> tuple[Tensor, Tensor]:
        a, b, e = self.lora_A, self.lora_B, self.lora_E
        assert a is not None
        assert b is not None
        assert e is not None
        return a * e, b

    def compact_pair(self) -> tuple[Tensor, Tensor]:
        """Without the triplets whose E is 0."""
        a, b = self.pair_in_force()
        assert self.lora_E is not None
        kept = self.lora_E.detach()[:, 0] != 0
        return a[kept], b[:, kept]

    def adapter_parameters(self, name: str = DEFAULT) -> list[nn.Parameter]:
        e = self._parameters["lora_E"]
        return super().adapter_parameters(name) + ([] if e is None else [e])


class AdaLora:
    """The budget of the AdaLoraQLinear layers of a model.

    Args:
        model: with at least one such layer of rank 1 or more; their ranks are what the budget starts from.
        total_steps: of the training.
        target_rank: what the layers have on average in the end, 0 < target_rank <= that of the start.
        init_steps, final_steps: at the start without, and at the end after, any change of the budget.
        every: steps between two choices of the triplets that stay.
        beta1, beta2: of the averages of importance and uncertainty.
        orthogonality: the weight of the regulariser.

    A step of training::

        (loss + adalora.orthogonality_loss()).backward()
        optimizer.step()
        adalora.update_and_allocate(step)      # before the gradients are cleared; steps count from 0
        optimizer.zero_grad()

    and in the end ``adalora.compact()``. Raises ValueError for the arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        target_rank: int = 8,
        init_steps: int = 0,
        final_steps: int = 0,
        every: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orthogonality: float = 0.5,
    ) -> None:
        self._model = model
        self._layers = {
            name: m for name, m in model.named_modules() if isinstance(m, AdaLoraQLinear) and m.rank
        }
        if not self._layers:
            raise ValueError("AdaLora: expected a model with AdaLoraQLinear layers of rank >= 1, got none")
        self._start = sum(layer.rank for layer in self._layers.values())
        self._target = target_rank * len(self._layers)
        if not 0 < self._target <= self._start:
            raise ValueError(
                "AdaLora: expected target_rank from 1 to the layers' mean rank "
                f"{self._start / len(self._layers):g}, got {target_rank}"
            )
        if min(init_steps, final_steps) < 0 or init_steps >= total_steps - final_steps:
            raise ValueError(
                "AdaLora: expected 0 <= init_steps < total_steps - final_steps, got init_steps "
                f"{init_steps}, total_steps {total_steps}, final_steps {final_steps}"
            )
        if every < 1:
            raise ValueError(f"AdaLora: expected every >= 1, got {every}")
        if not (0 < beta1 < 1 and 0 < beta2 < 1):
            raise ValueError(f"AdaLora: expected beta1 and beta2 in (0, 1), got {beta1} and {beta2}")
        if orthogonality < 0:
            raise ValueError(f"AdaLora: expected orthogonality >= 0, got {orthogonality}")
        self._steps, self._init, self._last = total_steps, init_steps, total_steps - final_steps
        self._every, self._betas, self._weight = every, (beta1, beta2), orthogonality
        self._importance: dict[str, Tensor] = {}  # of each parameter, averaged
        self._uncertainty: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}  # bool (r,) of each layer, as chosen last

    def budget(self, step: int) -> int:
        """Triplets that all layers have together after this step."""
        if step <= self._init:
            return self._start
        if step > self._last:
            return self._target
        left = 1 - (step - self._init) / (self._last - self._init)
        return int((self._start - self._target) * left**3 + self._target)

    def orthogonality_loss(self) -> Tensor:
        """To be added to the loss: orthogonality * the mean over all P and Q of |PᵀP - I|, |QQᵀ - I|."""
        off: list[Tensor] = []
        for layer in self._layers.values():
            assert layer.lora_A is not None
            assert layer.lora_B is not None
            eye = torch.eye(layer.rank, dtype=layer.lora_A.dtype, device=layer.lora_A.device)
            off += [
                (layer.lora_A @ layer.lora_A.T - eye).norm(),
                (layer.lora_B.T @ layer.lora_B - eye).norm(),
            ]
        return self._weight * torch.stack(off).mean()

    @torch.no_grad()
    def update_and_allocate(self, step: int) -> None:
        """Take this step's gradients into the scores and mask what is not within the budget. Raises
        RuntimeError for parameters without a gradient, before anything is changed."""
        if step < self._last:
            self._update()
        if step > self._last:
            self._mask()
        elif step == self._last or (step > self._init and step % self._every == 0):
            self._choose(self.budget(step))
            self._mask()

    def _parts(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{part}": getattr(layer, part)
            for name, layer in self._layers.items()
            for part in ("lora_A", "lora_B", "lora_E")
        }

    def _update(self) -> None:
        parts = self._parts()
        without = [name for name, p in parts.items() if p.grad is None]
        if without:
            raise RuntimeError(
                "update_and_allocate: expected gradients, after backward and before zero_grad, got "
                f"{len(without)} parameters without: {without[0]} ..."
            )
        beta1, beta2 = self._betas
        for name, p in parts.items():
            assert p.grad is not None
            if name not in self._importance:
                self._importance[name], self._uncertainty[name] = torch.zeros_like(p), torch.zeros_like(p)
            now = (p * p.grad).abs()
            mean = self._importance[name].mul_(beta1).add_(now, alpha=1 - beta1)
            self._uncertainty[name].mul_(beta2).add_((now - mean).abs(), alpha=1 - beta2)

    def _choose(self, budget: int) -> None:
        if not self._importance:
            raise RuntimeError("update_and_allocate: expected a call for an earlier step, got none")
        score = {name: self._importance[name] * self._uncertainty[name] for name in self._parts()}
        of_triplets = [
            score[f"{name}.lora_E"][:, 0]
            + (score[f"{name}.lora_A"].mean(1) + score[f"{name}.lora_B"].mean(0)).to(score[f"{name}.lora_E"])
            for name in self._layers
        ]
        flat = torch.cat([one.cpu().float() for one in of_triplets])
        kept = torch.zeros(len(flat), dtype=torch.bool)
        kept[flat.argsort(descending=True, stable=True)[:budget]] = True
        ranks = [layer.rank for layer in self._layers.values()]
        self._kept = dict(zip(self._layers, kept.split(ranks), strict=True))

    def _mask(self) -> None:
        for name, kept in self._kept.items():
            e = self._layers[name].lora_E
            assert e is not None
            e[~kept.to(e.device)] = 0

    def ranks(self) -> dict[str, int]:
        """What each layer has left, by its name."""
        return {
            name: int(self._kept[name].sum()) if name in self._kept else layer.rank
            for name, layer in self._layers.items()
        }

    def compact(self) -> None:
        """Swap the layers, in place in the model, for plain QLinear of the ranks that are left, E folded into
        lora_A: smaller, faster, and in PEFT's files. A layer with nothing left has rank 0. This object is of
        no use afterwards."""
        make_plain(self._model)
        self._layers = {}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What a training that goes on elsewhere needs beside the model."""
        return {
            "importance": dict(self._importance),
            "uncertainty": dict(self._uncertainty),
            "kept": dict(self._kept),
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over a state; ValueError if it is of other layers, with nothing changed."""
        parts = self._parts()
        for key, names in (
            ("importance", set(parts)),
            ("uncertainty", set(parts)),
            ("kept", set(self._layers)),
        ):
            if key not in state or (state[key] and set(state[key]) != names):
                raise ValueError(
                    f"AdaLora.load_state_dict: expected {key} of this model's layers, got others"
                )
        self._importance, self._uncertainty = (
            {name: t.to(parts[name], copy=True) for name, t in state[key].items()}
            for key in ("importance", "uncertainty")
        )
        self._kept = {name: t.clone() for name, t in state["kept"].items()}
