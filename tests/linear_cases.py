"""Shapes and inputs that the tests of nf4_linear and nf4_linear_grad_input share."""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# (n, k): odd and even, rows that straddle scale blocks, one column, one row, whole blocks, and 4304, which is
# a multiple of 16 but not of 64.
SHAPES = (
    (123, 123), (96, 4304), (1, 1), (1, 64), (65, 1), (64, 64), (7, 33), (130, 257), (48, 320), (17, 1024),
    (256, 192), (33, 511), (3, 5000),
)  # fmt: skip
AXES = {
    "m": (0, 1, 3, 5, 8, 9, 16, 33, 128),
    "shape": SHAPES,
    "r": (0, 1, 7, 16, 64),
    "blocksize": (32, 64, 128, 256, 512, 1024, 2048, 4096),
    "dtype": FLOATS,
    "float32_adapters": (False, True),
    "double_quant": (False, True),
    "bias": (False, True),
    "offsets": (False, True),
    "gain": (False, True),
    "scaling": (1.0, 2.0, 0.25),
}


def pairwise(axes: dict[str, tuple], seed: int) -> list[dict]:
    """Few combinations in which every pair of values of two axes occurs: each next one is the best of some
    random candidates."""
    rng = random.Random(seed)
    names = list(axes)
    missing = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]}

    def pairs(case: dict) -> set:
        return {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)}

    cases = []
    while missing:
        a, x, b, y = min(missing, key=repr)
        candidates = []
        for _ in range(12):
            case = {name: rng.choice(values) for name, values in axes.items()}
            case[a], case[b] = x, y
            candidates.append(case)
        best = max(candidates, key=lambda case: len(missing & pairs(case)))
        missing -= pairs(best)
        cases.append(best)
    return cases


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    r: int
    blocksize: int
    dtype: torch.dtype
    float32_adapters: bool = True
    double_quant: bool = True
    bias: bool = True
    scaling: float = 1.0
    offsets: bool = False
    gain: bool = False

    def __str__(self) -> str:
        words = [f"m{self.m}-n{self.n}-k{self.k}-r{self.r}-bs{self.blocksize}", str(self.dtype)[6:]]
        words += [
            name
            for name in ("float32_adapters", "double_quant", "bias", "offsets", "gain")
            if getattr(self, name)
        ]
        return "-".join(words)


def cases(seed: int) -> list[Case]:
    """The pairwise selection, and the shapes that must always be there."""
    selected = []
    for chosen in pairwise(AXES, seed):
        n, k = chosen.pop("shape")
        selected.append(Case(n=n, k=k, **chosen))
    for dtype in FLOATS:
        selected.append(Case(5, 123, 123, 16, 64, dtype))
        selected.append(Case(2, 96, 4304, 16, 64, dtype, double_quant=False))
        selected.append(Case(24, 72, 1024, 24, 64, dtype, offsets=True))
    return selected


@dataclass(frozen=True)
class Weight:
    """NF4 storage as the ops take it, and the float32 matrix it stands for. Every code is equally likely."""

    packed: Tensor
    scales: Tensor
    nested: Tensor | None
    blocksize: int
    dense: Tensor  # (n, k) float32, offsets and all
    offsets: Tensor | None = None
    apart: Tensor | None = None  # |codes * absmax| + |offsets|, where there are offsets

    @property
    def magnitudes(self) -> Tensor:
        """What is multiplied."""
        return self.dense.abs() if self.apart is None else self.apart

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.packed, self.scales, self.nested


@functools.lru_cache(maxsize=64)
def make_weight(
    n: int, k: int, blocksize: int = 64, double_quant: bool = True, seed: int = 0, offsets: bool = False
) -> Weight:
    """Built by the reference alone, so that no kernel is trusted to make its own inputs. Offsets are of
    groups as large as the shape allows, up to 64 columns."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    blocks = -(-n * k // blocksize)
    absmax = 0.02 + 0.1 * torch.rand(blocks, generator=generator)
    if blocks > 1:
        absmax[blocks // 2] = 0.0
    nested = None
    scales = absmax.view(torch.uint8)
    if double_quant:
        scales, nested = reference.nf4_double_quantize(absmax)
        absmax = reference.nf4_decode_absmax(scales, nested)
        nested = nested.view(torch.uint8)
    dense = reference.nf4_dequantize(codes, absmax, blocksize, torch.float32)
    packed = reference.nf4_pack(codes)
    if not offsets or not k:
        return Weight(packed, scales, nested, blocksize, dense)
    group = next(size for size in (64, 32, 16, 3, 7, k) if k % size == 0)
    values = 0.1 * torch.randn(n, k // group, generator=generator)
    apart = reference.nf4_add_offsets(dense.abs(), values.abs())
    dense = reference.nf4_add_offsets(dense, values)
    return Weight(packed, scales, nested, blocksize, dense, values.view(torch.uint8), apart)


@dataclass
class Inputs:
    weight: Weight
    x: Tensor  # (m, k), dtype
    dy: Tensor  # (m, n), dtype
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: float
    gain: Tensor | None = None  # (n,) float32

    @property
    def linear(self) -> tuple:
        """What nf4_linear and nf4_linear_with_u take."""
        w = self.weight
        return (
            self.x, *w.tensors, w.blocksize, self.bias, self.lora_a, self.lora_b, self.scaling, w.offsets,
            self.gain,
        )  # fmt: skip

    @property
    def grad_input(self) -> tuple:
        """What nf4_linear_grad_input takes."""
        w = self.weight
        k = self.x.shape[-1]
        return (self.dy, *w.tensors, k, w.blocksize, self.lora_a, self.lora_b, self.scaling, w.offsets)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Standard normal x, dy and bias; adapters that make u and the low-rank term about as large as y."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    adapters = torch.float32 if case.float32_adapters else case.dtype
    return Inputs(
        weight=make_weight(case.n, case.k, case.blocksize, case.double_quant, seed, case.offsets),
        x=normal(case.m, case.k, dtype=case.dtype),
        dy=normal(case.m, case.n, dtype=case.dtype),
        bias=normal(case.n, dtype=case.dtype) if case.bias else None,
        lora_a=normal(case.r, case.k, dtype=adapters, scale=case.k**-0.5) if case.r else None,
        lora_b=normal(case.n, case.r, dtype=adapters, scale=0.1) if case.r else None,
        scaling=case.scaling,
        gain=normal(case.n, dtype=torch.float32) if case.gain else None,
    )
