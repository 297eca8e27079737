"""One layer to measure: the tensors every contender gets, and what its results are checked against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

SCALING = 2.0  # of the low-rank term, everywhere
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROWS, _COLUMNS = 48, 256  # of the results that are checked: float64 over all of them would take minutes


@dataclass
class Problem:
    """y = x·weightᵀ + SCALING·(x·lora_aᵀ)·lora_bᵀ; weight (n, k), lora_a (r, k), lora_b (n, r), float32
    tensors rounded to `dtype`, so that every layer starts from the same numbers, drawn on the device that
    they stay on. `shared` keeps what several contenders build from them (a quantised weight), so that it is
    built once."""

    n: int
    k: int
    r: int
    dtype: str
    device: str = "cpu"
    shared: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kind = DTYPES[self.dtype]
        self._generator = torch.Generator(self.device).manual_seed(0)
        self.weight = self._normal(self.n, self.k, self.k**-0.5).float()
        self.lora_a = self._normal(self.r, self.k, self.k**-0.5).float()
        self.lora_b = self._normal(self.n, self.r, 0.1 * max(self.r, 1) ** -0.5).float()

    def _normal(self, rows: int, columns: int, scale: float) -> Tensor:
        drawn = torch.randn(rows, columns, generator=self._generator, device=self.device)
        return drawn.mul_(scale).to(self.kind)

    def again(self) -> Problem:
        """The same in other memory, nothing shared."""
        return Problem(self.n, self.k, self.r, self.dtype, self.device)

    def activation(self, m: int) -> Tensor:
        """An input, (m, k) in `dtype`."""
        return self._normal(m, self.k, 1.0)

    def gradient(self, m: int) -> Tensor:
        """A gradient of the output, (m, n) in `dtype`."""
        return self._normal(m, self.n, 1.0)

    def dense(self) -> Tensor:
        """The weight in `dtype`, made once."""
        return self.once("dense weight", lambda: self.weight.to(self.kind))

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


@dataclass(frozen=True)
class Errors:
    """Relative Frobenius distances to float64: to the product with the weight as the contender stores it, to
    that with the weight before quantisation, and of the composite to the first of the two (None where the
    contender stores a dense weight): dequantise to bfloat16, products summed in float32, the adapter's inner
    one rounded to x's dtype, and one rounding at the end."""

    arithmetic: float | None
    total: float
    composite: float | None = None


class Stored(Protocol):
    """What the functions below ask of a contender."""

    problem: Problem
    rank: int
    coded: bool

    def stored(self) -> tuple[Tensor, Tensor]: ...


def relative(found: Tensor, want: Tensor) -> float:
    norm = want.double().norm()
    return ((found.double() - want.double()).norm() / norm).item() if norm else 0.0


def sample(length: int, count: int) -> Tensor:
    """At most `count` indices spread evenly over `length`, both ends among them."""
    return torch.linspace(0, length - 1, min(length, count)).round().long().unique()


def forward_errors(peer: Stored, x: Tensor, y: Tensor) -> Errors:
    """Of y (m, n), over a sample of its elements."""
    problem, rows = peer.problem, sample(x.shape[0], _ROWS)
    at = sample(problem.n, _COLUMNS)
    stored, _ = peer.stored()
    down, up = problem.lora_a[: peer.rank].t(), problem.lora_b[at, : peer.rank].t() * SCALING
    return _errors(x[rows], y[rows][:, at], stored.t(), problem.weight[at].t(), down, up, peer.coded)


def gradient_errors(peer: Stored, dy: Tensor, dx: Tensor) -> Errors:
    """The same of dx = dy·W + SCALING·(dy·B)·A, (m, k)."""
    problem, rows = peer.problem, sample(dy.shape[0], _ROWS)
    at = sample(problem.k, _COLUMNS)
    _, stored = peer.stored()
    down, up = problem.lora_b[:, : peer.rank], problem.lora_a[: peer.rank, at] * SCALING
    return _errors(dy[rows], dx[rows][:, at], stored, problem.weight[:, at], down, up, peer.coded)


def sampled(problem: Problem, dense: Tensor) -> tuple[Tensor, Tensor]:
    """What the two functions above need of a contender's weight (n, k): some rows and some columns."""
    return dense[sample(problem.n, _COLUMNS)], dense[:, sample(problem.k, _COLUMNS)].clone()


def adapter_gradient_error(problem: Problem, x: Tensor, dy: Tensor, da: Tensor, db: Tensor) -> float:
    """The larger error of dA = SCALING·(dy·B)ᵀ·x and dB = SCALING·dyᵀ·(x·Aᵀ), over a sample of columns. The
    inner products are taken in float32, whose error lies a thousand times below the ones shown."""
    ks, ns = sample(problem.k, _COLUMNS), sample(problem.n, _COLUMNS)
    v = SCALING * (dy.float() @ problem.lora_b).double()
    u = SCALING * (x.float() @ problem.lora_a.t()).double()
    return max(relative(da[:, ks], v.t() @ x[:, ks].double()), relative(db[ns], dy[:, ns].double().t() @ u))


def _errors(
    x: Tensor, found: Tensor, stored: Tensor, original: Tensor, down: Tensor, up: Tensor, coded: bool
) -> Errors:
    x64 = x.double()
    low_rank = (x64 @ down.double()) @ up.double()
    exact = x64 @ stored.double() + low_rank
    composite = None
    if coded:
        inner = (x.float() @ down).to(x.dtype).float()  # a layer hands it on in x's dtype
        dense = x.float() @ stored.bfloat16().float() + inner @ up
        composite = relative(dense.to(x.dtype), exact)
    return Errors(relative(found, exact), relative(found, x64 @ original.double() + low_rank), composite)
