"""A batch whose rows have adapters of their own, and who computes with it: the low-rank term alone, or a
layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peers
import torch
from _problem import SCALING, Errors, Problem, relative, sample
from torch import Tensor, nn

import fastlora

ONE, EQUAL = "fastlora, one adapter", "fastlora, equal ranks"
LOOP, GATHERED = "torch, a loop", "torch.bmm, gathered"
PEFT_DENSE, PEFT_BNB = "dense + LoRA (PEFT)", "PEFT on bitsandbytes"
_ROWS, _COLUMNS = 48, 256  # of the results that are checked


@dataclass
class Batch:
    """Adapters of the given ranks, and m rows that have them in turn, row by row where there are as many, and
    else in stretches as prompts do. All tensors are in the problem's dtype."""

    problem: Problem
    m: int
    ranks: tuple[int, ...]
    a: list[Tensor] = field(init=False)  # (r, k)
    b: list[Tensor] = field(init=False)  # (n, r)
    slots: list[int] = field(init=False)

    def __post_init__(self) -> None:
        p, count = self.problem, len(self.ranks)
        self.a = [p._normal(r, p.k, p.k**-0.5) for r in self.ranks]
        self.b = [p._normal(p.n, r, 0.1 * r**-0.5) for r in self.ranks]
        self.slots = [i * count // self.m for i in range(self.m)]
        self.x, self.dy = p.activation(self.m), p.gradient(self.m)

    def adapter_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.a, *self.b))

    def flops(self) -> float:
        """Of the low-rank term."""
        return sum(2.0 * self.ranks[s] * (self.problem.n + self.problem.k) for s in self.slots)

    def rows(self) -> list[list[int]]:
        """By adapter."""
        return [[i for i, s in enumerate(self.slots) if s == slot] for slot in range(len(self.ranks))]

    def table(self) -> tuple[fastlora.AdapterTable, fastlora.Routing]:
        p = self.problem
        table = fastlora.AdapterTable(
            p.k, p.n, capacity=len(self.ranks), rank_rows=sum(self.ranks), dtype=p.kind, device=p.device
        )
        for i, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            table.register(f"{i}", a, b, SCALING)
        return table, fastlora.route(
            torch.tensor(self.slots, dtype=torch.int32, device=p.device), table.capacity
        )

    # --- float64 ------------------------------------------------------------------------------------------

    def errors(self, y: Tensor, contender: Contender) -> Errors:
        """Of y (m, n), over a sample of its elements."""
        rows, at = sample(self.m, _ROWS), sample(self.problem.n, _COLUMNS)
        want = torch.stack([self._term(i, at) for i in rows.tolist()])
        found = y[rows][:, at]
        stored = contender.stored()
        if stored is None:
            error = relative(found, want)
            return Errors(error, error)
        x = self.x[rows].double()
        exact = [x @ w.double().t() + want for w in (stored, self.problem.weight[at])]
        return Errors(*(relative(found, one) for one in exact))

    def _term(self, i: int, at: Tensor) -> Tensor:
        slot = self.slots[i]
        u = self.a[slot].double() @ self.x[i].double()
        return SCALING * (self.b[slot][at].double() @ u)

    def gradient_error(self, dx: Tensor, gradients: list[Tensor]) -> float:
        """The largest of dx's and of some adapters' dA and dB. The inner products are taken in float32."""
        k, n, errors = sample(self.problem.k, _COLUMNS), sample(self.problem.n, _COLUMNS), []
        for slot, rows in enumerate(self.rows()):
            if slot not in (0, len(self.ranks) - 1):
                continue
            x, dy, a, b = (t.float() for t in (self.x[rows], self.dy[rows], self.a[slot], self.b[slot]))
            u, v = (x @ a.t()).double(), SCALING * (dy @ b).double()
            errors += [
                relative(dx[rows][:, k], v @ a[:, k].double()),
                relative(gradients[2 * slot][:, k], v.t() @ x[:, k].double()),
                relative(gradients[2 * slot + 1][n], SCALING * dy[:, n].double().t() @ u),
            ]
        return max(errors)


class Contender(ABC):
    """What suites.Context wants of one, built from a batch."""

    route = ""

    def __init__(self, name: str, batch: Batch) -> None:
        self.name, self.batch, self.problem = name, batch, batch.problem
        self.build()

    @abstractmethod
    def build(self) -> None: ...

    @abstractmethod
    def forward(self) -> Tensor: ...

    def step(self) -> list[Tensor]:
        """Forward and backward: the gradients of x, and of A and B of each adapter."""
        raise peers.Unsupported(f"{self.name} has no backward pass here")

    def stored(self) -> Tensor | None:
        """The rows of the weight that results are checked with; None of the low-rank term alone."""
        return None

    def weight_bytes(self) -> int:
        return 0


class Term(Contender):
    """fastlora's low-rank term, added to a y that is there."""

    def build(self) -> None:
        self.table, self.routing = self.batch.table()
        self.y = self.batch.x.new_zeros(self.batch.m, self.problem.n)
        self.x = self.batch.x.clone().requires_grad_()
        self.learning = [
            p for name in self.table.names for pair in self.table.parameters(name) for p in pair or ()
        ]

    def forward(self) -> Tensor:
        with torch.no_grad():
            return fastlora.segmented_lora(self.batch.x, self.table, self.routing, self.y)

    def step(self) -> list[Tensor]:
        for p in self.learning:
            p.requires_grad_()
        y = fastlora.segmented_lora(self.x, self.table, self.routing, torch.zeros_like(self.y))
        return list(torch.autograd.grad(y, [self.x, *self.learning], self.batch.dy))


class EqualRanks(Term):
    """The same with adapters of one rank, of the same sum: what the batch would cost if nothing but it
    counted."""

    def build(self) -> None:
        count = len(self.batch.ranks)
        self.batch = Batch(self.problem, self.batch.m, (sum(self.batch.ranks) // count,) * count)
        super().build()


class Loop(Contender):
    """One adapter after the other in torch."""

    def build(self) -> None:
        self.x = self.batch.x.clone().requires_grad_()
        device = self.problem.device
        self.rows = [torch.tensor(rows, device=device) for rows in self.batch.rows()]
        self.adapters = [
            tuple(t.clone().requires_grad_() for t in ab)
            for ab in zip(self.batch.a, self.batch.b, strict=True)
        ]

    def _run(self, x: Tensor) -> Tensor:
        y = x.new_zeros(self.batch.m, self.problem.n)
        for rows, (a, b) in zip(self.rows, self.adapters, strict=True):
            y.index_add_(0, rows, (x[rows] @ a.t()) @ (SCALING * b).t())
        return y

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self._run(self.batch.x)

    def step(self) -> list[Tensor]:
        wanted = [self.x, *(t for pair in self.adapters for t in pair)]
        return list(torch.autograd.grad(self._run(self.x), wanted, self.batch.dy))


class Gathered(Contender):
    """Each row's adapter copied to it, and batched products."""

    def build(self) -> None:
        if len(set(self.batch.ranks)) > 1:
            raise peers.Unsupported("torch.bmm takes adapters of one rank")
        self.a = torch.stack(self.batch.a)
        self.b = SCALING * torch.stack(self.batch.b)
        self.slots = torch.tensor(self.batch.slots, device=self.problem.device)

    def forward(self) -> Tensor:
        with torch.no_grad():
            u = torch.bmm(self.a[self.slots], self.batch.x[:, :, None])
            return torch.bmm(self.b[self.slots], u)[:, :, 0]


class Layer(Contender):
    """QLinear's weight with all the adapters, by the fused op."""

    def build(self) -> None:
        found, _ = peers.find(["fastlora, no adapter"])
        (base,), _ = peers.build(found, self.problem)
        self.base = base
        self.weight = base.layer.quantized_weight
        self.table, self.routing = self.batch.table()

    def forward(self) -> Tensor:
        with torch.no_grad():
            return fastlora.nf4_multi_lora_linear(self.batch.x, self.weight, self.table, self.routing)

    def stored(self) -> Tensor:
        return self.base.stored()[0]

    def weight_bytes(self) -> int:
        return self.base.weight_bytes()


class OneAdapter(Layer):
    """QLinear with an adapter of its own, which all rows have."""

    def build(self) -> None:
        self.batch = Batch(self.problem, self.batch.m, self.batch.ranks[:1])
        found, _ = peers.find(["fastlora, no adapter"])
        (self.base,), _ = peers.build(found, self.problem)

    def forward(self) -> Tensor:
        (a,), (b,) = self.batch.a, self.batch.b
        with torch.no_grad():
            return fastlora.nf4_linear(self.batch.x, self.base.layer.quantized_weight, None, a, b, SCALING)


class Peft(Layer):
    """PEFT's layer with an `adapter_names` for each row."""

    def build(self) -> None:
        import peft

        found, absent = peers.find([self.name])
        made, unable = peers.build(found, self.problem)
        if not made:
            raise peers.Unsupported(next(iter((absent | unable).values())))
        self.base = made[0]
        holder = self.base.build(self.problem)
        for i, (r, a, b) in enumerate(zip(self.batch.ranks, self.batch.a, self.batch.b, strict=True)):
            config = peft.LoraConfig(r=r, lora_alpha=SCALING * r, target_modules=["linear"])
            peft.inject_adapter_in_model(config, holder, adapter_name=f"adapter {i}")
            layer = holder.linear
            with torch.no_grad():
                for parts, value in ((layer.lora_A, a), (layer.lora_B, b)):
                    parts[f"adapter {i}"].weight = nn.Parameter(value)
        self.layer, self.names = holder.linear, [f"adapter {s}" for s in self.batch.slots]

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.layer(self.batch.x, adapter_names=self.names)


#: name: how it is made, and the contender of the other suites that must be wanted for it.
TERM: dict[str, tuple[type[Contender], str]] = {
    "fastlora": (Term, "fastlora"),
    EQUAL: (EqualRanks, "fastlora"),
    LOOP: (Loop, "dense"),
    GATHERED: (Gathered, "dense"),
}
LAYER: dict[str, tuple[type[Contender], str]] = {
    "fastlora": (Layer, "fastlora"),
    ONE: (OneAdapter, "fastlora"),
    PEFT_DENSE: (Peft, PEFT_DENSE),
    PEFT_BNB: (Peft, PEFT_BNB),
}


class Stack(Contender):
    """Several layers, called one after the other. What is said of it, and its result, are the first one's."""

    def __init__(self, layers: list[Contender]) -> None:
        self.layers = layers
        super().__init__(layers[0].name, layers[0].batch)

    def build(self) -> None:
        """The layers are."""

    def forward(self) -> Tensor:
        first, *_ = [one.forward() for one in self.layers]
        return first

    def stored(self) -> Tensor | None:
        return self.layers[0].stored()

    def weight_bytes(self) -> int:
        return self.layers[0].weight_bytes()


def make(
    registry: dict[str, tuple[type[Contender], str]],
    names: tuple[str, ...],
    wanted: frozenset[str],
    *batches: Batch,
) -> tuple[list[Any], dict[str, str]]:
    """Those of the names that are wanted and can be made, and why the others cannot. Several batches make
    stacks, of a layer each."""
    made: list[Any] = []
    absent: dict[str, str] = {}
    for name in names:
        build: Callable[[str, Batch], Contender] = registry[name][0]
        if registry[name][1] in wanted:
            try:
                layers = [build(name, batch) for batch in batches]
                made.append(layers[0] if len(layers) == 1 else Stack(layers))
            except (peers.Unsupported, ImportError) as error:
                absent[name] = peers.reason(error)
    return made, absent
