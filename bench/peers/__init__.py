"""What is measured: one adapter class a file, all of one shape (see :class:`Peer`).

A peer is imported only when a suite wants it. One whose package is not installed, or whose build cannot run a
case, is named as absent, with the reason.
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cache, partial

import _options
import torch
from _problem import SCALING, Problem, sampled
from _results import OURS
from torch import Tensor, nn

__all__ = ["REGISTRY", "ROUTES", "SCALING", "Peer", "Problem", "Unsupported", "build", "find", "reason"]

# Advice on optional downloads, and on CUDA parts that a CPU build lacks.
for _talker in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(_talker).setLevel(logging.CRITICAL)

# Route of fastlora's CUDA kernels to the class that is made to take it, by the contender's name.
ROUTES = {f"fastlora, by {route}": f"By{route.capitalize()}" for route in _options.ROUTES}

# name: module, class. The order is that of every table and of the turns.
REGISTRY = {
    "dense": ("dense", "Dense"),
    "dense + LoRA (PEFT)": ("peft_dense", "PeftDense"),
    "bitsandbytes, training mode": ("bitsandbytes_nf4", "BitsandbytesTraining"),
    "bitsandbytes, eval mode": ("bitsandbytes_eval", "BitsandbytesEval"),
    "bitsandbytes": ("bitsandbytes_nf4", "BitsandbytesCuda"),
    "PEFT on bitsandbytes": ("peft_bitsandbytes", "PeftBitsandbytes"),
    "torchao NF4": ("torchao_nf4", "TorchaoNf4"),
    "torchao int4": ("torchao_int4", "TorchaoInt4"),
    "fastlora": ("fastlora_nf4", "Fastlora"),
    "fastlora, no adapter": ("fastlora_nf4", "FastloraNoAdapter"),
    "fastlora, plain absmax": ("fastlora_nf4", "FastloraPlainAbsmax"),
    **{name: ("fastlora_routes", cls) for name, cls in ROUTES.items()},
}


class Unsupported(Exception):
    """This peer cannot do this case; the text says why."""


class Peer(ABC):
    """A linear layer built from a problem. x is (m, k), dy and y (m, n), all in the problem's dtype.

    A peer implements the operations it can do, and `operations` names them. Beside the three below there are
    quantize(), of the problem's weight; dequantize(), to the problem's dtype; and dequantize_into(out).
    `coded` says whether the weight is quantised.
    """

    name: str
    operations: frozenset[str] = frozenset({"forward", "grad_input", "step"})
    training: bool = False  # the mode the layer is put in
    coded: bool = True
    has_adapter: bool = False
    route: str = ""  # of fastlora's own kernels: what it is made to take; "auto" is the library's choice

    def __init__(self, problem: Problem):
        self.problem = problem
        self.rank = problem.r if self.has_adapter else 0
        self._stored: tuple[Tensor, Tensor] | None = None
        self._graph: tuple[Tensor, Tensor] | None = None  # an input and its output
        self.layer = self.build(problem).train(self.training)

    @abstractmethod
    def build(self, problem: Problem) -> nn.Module: ...

    @abstractmethod
    def represented(self) -> Tensor:
        """The weight that the layer stands for, (n, k) float32: what its arithmetic is checked against."""

    def stored(self) -> tuple[Tensor, Tensor]:
        """The rows and columns of `represented` that results are checked with."""
        if self._stored is None:
            self._stored = sampled(self.problem, self.represented())
        return self._stored

    @abstractmethod
    def weight_bytes(self) -> int:
        """Of the weight as stored, scales included, without the adapter."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer(x)

    def grad_input(self, dy: Tensor) -> Tensor:
        """dx (m, k) alone."""
        graph = self._graph
        if graph is None or graph[0].shape[0] != dy.shape[0]:
            x = dy.new_zeros(dy.shape[0], self.problem.k, requires_grad=True)
            self._graph = graph = (x, self.layer(x))
        return torch.autograd.grad(graph[1], graph[0], dy, retain_graph=True)[0]

    def forget(self) -> None:
        """Drop what `grad_input` keeps between its calls."""
        self._graph = None

    def step(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Forward and backward: the gradients of x (which requires one) and, where there is an adapter, of A
        and B."""
        wanted = [x, *(p for p in self.adapter() if p is not None)]
        dx, *rest = torch.autograd.grad(self.layer(x), wanted, dy)
        return (dx, rest[0], rest[1]) if rest else (dx, None, None)

    def adapter(self) -> tuple[Tensor | None, Tensor | None]:
        """(A, B), the parameters that learn."""
        return None, None

    def adapter_bytes(self) -> int:
        return sum(p.nbytes for p in self.adapter() if p is not None)


def find(names: Iterable[str]) -> tuple[list[type[Peer]], dict[str, str]]:
    """The classes of the peers that can be imported, in the registry's order, and why the others cannot."""
    found: list[type[Peer]] = []
    absent: dict[str, str] = {}
    wanted = set(names)
    for name, where in REGISTRY.items():
        if name in wanted:
            loaded = _load(*where)
            if isinstance(loaded, str):
                absent[name] = loaded
            else:
                found.append(loaded)
    return found, absent


@cache
def _load(module: str, cls: str) -> type[Peer] | str:
    """The class, or why not; asked once, as an import that fails may take seconds."""
    try:
        return getattr(importlib.import_module(f"peers.{module}"), cls)
    except Exception as error:  # a library may fail in many ways while it is loaded
        return reason(error)


def build(kinds: Iterable[type[Peer]], problem: Problem) -> tuple[list[Peer], dict[str, str]]:
    """The peers for this problem, each built once a problem, and why some could not be."""
    built: list[Peer] = []
    absent: dict[str, str] = {}
    for kind in kinds:
        made = problem.once(f"peer {kind.name}", partial(_build, kind, problem))
        if isinstance(made, str):
            absent[kind.name] = made
        else:
            built.append(made)
    return built, absent


def _build(kind: type[Peer], problem: Problem) -> Peer | str:
    try:
        return kind(problem)
    except Exception as error:
        if kind.name.startswith(OURS) and not isinstance(error, Unsupported):
            raise
        return reason(error)


def reason(error: Exception) -> str:
    """One line of it."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
