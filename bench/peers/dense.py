"""torch.nn.functional.linear on a dense weight in x's dtype (oneDNN or MKL; cuBLAS), without an adapter."""

from __future__ import annotations

from torch import Tensor, nn

from peers import Peer, Problem


def dense_linear(problem: Problem) -> nn.Linear:
    """A frozen dense layer over the problem's weight, shared by the peers that need one."""

    def make() -> nn.Linear:
        linear = nn.Linear(problem.k, problem.n, bias=False, device="meta")
        linear.weight = nn.Parameter(problem.dense(), requires_grad=False)
        return linear

    return problem.once("dense linear", make)


class Dense(Peer):
    name = "dense"
    coded = False

    def build(self, problem: Problem) -> nn.Module:
        return dense_linear(problem)

    def represented(self) -> Tensor:
        return self.layer.weight.float()

    def weight_bytes(self) -> int:
        return self.layer.weight.nbytes

    def grad_input(self, dy: Tensor) -> Tensor:
        return dy @ self.layer.weight
