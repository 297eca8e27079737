"""fastlora's layer, made to take one route of its CUDA kernels: what the others would have cost."""

from __future__ import annotations

from _routes import use_route
from torch import Tensor

from peers.fastlora_nf4 import Fastlora


class _ByRoute(Fastlora):
    operations = frozenset({"forward", "grad_input"})

    def forward(self, x: Tensor) -> Tensor:
        with use_route(self.route):
            return super().forward(x)

    def grad_input(self, dy: Tensor) -> Tensor:
        with use_route(self.route):
            return super().grad_input(dy)


class ByDecode(_ByRoute):
    name, route = "fastlora, by decode", "decode"


class ByTile(_ByRoute):
    name, route = "fastlora, by tile", "tile"


class ByWarpgroup(_ByRoute):
    name, route = "fastlora, by warpgroup", "warpgroup"


class ByDense(_ByRoute):
    name, route = "fastlora, by dense", "dense"
