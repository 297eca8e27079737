"""What the layer's CUDA kernels should take on a device, from what can be counted without one.

Counted: the launches of a call and the tiles they are cut into (asked of the host code), instructions of the
main loops (what `make cuda-check` read from the machine code), wavefronts of shared memory (the emulator's),
bytes. Assumed: the rates of each device below, that a block's tensor cores, issue slots and shared memory
overlap fully, and what a launch costs. So a time is what a kernel cannot beat rather than what it will take.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil

import _cuda_tables
import _launches
import devices
import torch

from fastlora import _emulator, cuda_dense, cuda_linear, ops, quantize_nf4

BLOCKSIZE, RANK = 64, 16
ROUTES = ("decode", "tile", "warpgroup", "dense")


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str
    processors: int
    ghz: float  # under load
    copy: float  # TB/s, of a copy: read and written
    products: int  # bfloat16 multiply-adds a clock of a processor, by mma
    group_products: int  # by wgmma; 0: none
    gemm: float  # TFLOP/s of a library's bfloat16 GEMM

    @property
    def capability(self) -> int:
        return int(self.arch.rstrip("a"))


GPUS = (
    Gpu("A100", "80", 108, 1.41, 1.75, 1024, 0, 265),
    Gpu("H100", "90a", 132, 1.7, 3.0, 1024, 2048, 750),
    Gpu("H200", "90a", 132, 1.7, 4.3, 1024, 2048, 790),
    Gpu("RTX 4090", "89", 128, 2.6, 0.93, 256, 0, 160),
)
BLOCK_CLOCKS = 2500  # of a block before its first product and after its last
LAUNCH_US = 1.0  # from the end of a launch to the start of one that waits for it
OVERLAPPED_US = 0.5  # where the second has begun meanwhile
L2_GAIN = 2.0  # how many times as fast as a copy what has just been written is read


# --- a main loop -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Of a block, `depth` steps of the contraction, in clocks of a processor."""

    depth: int
    tensor: float
    issue: float
    shared: float

    @property
    def bound(self) -> str:
        return max((self.tensor, "tensor"), (self.issue, "issue"), (self.shared, "shared"))[1]

    @property
    def clocks(self) -> float:
        return max(self.tensor, self.issue, self.shared)


@dataclass(frozen=True)
class Kernel:
    """A main loop by its name in the tables. A block has `outer` of W's rows (forward) or columns (dx) and
    `columns` rows of x."""

    name: str
    route: str
    grad: bool
    outer: int
    columns: int
    depth: int

    def products(self, depth: int) -> int:
        """Tensor instructions of warps that a block issues."""
        width = self.columns if self.route == "warpgroup" else 8
        rows = 16
        return self.outer // rows * (depth // 16) * max(1, self.columns // width)


def kernels() -> list[Kernel]:
    found = [Kernel(f"nf4_linear_decode<kBFloat16, {t}>", "decode", False, 16 * t, 8, 512) for t in (1, 2)]
    for c, scaled in ((2, "kSums"), (4, "kSums"), (8, "kWeights"), (12, "kWeights")):
        found.append(Kernel(f"nf4_linear_tile<kBFloat16, {c}, {scaled}>", "tile", False, 128, 8 * c, 128))
    for c in (1, 2, 4, 8):
        found.append(
            Kernel(f"nf4_linear_grad_input_tile<kBFloat16, {c}, false>", "tile", True, 128, 8 * c, 128)
        )
    for grad, stem in ((False, "nf4_linear"), (True, "nf4_linear_grad_input")):
        for c in (16, 32, 64, 128, 256):
            found.append(Kernel(f"{stem}_sm90<kBFloat16, {c}>", "warpgroup", grad, 128, c, 64))
    return found


def _data_stage() -> float:
    """128-byte passages between shared memory or L1 and a processor's registers, or into shared memory."""
    lines = _emulator.take_counts()
    copies = {line[:2] for line in lines if line[2] == "shared store"}  # which pass no register
    shared = sum(cost for _, _, kind, _, _, cost, _ in lines if kind.startswith("shared"))
    loads = sum(it[4] for it in lines if it[2] == "global load" and it[:2] not in copies)
    return shared + loads / 128


@cache
def wavefronts(kernel: Kernel) -> float:
    """Shared-memory wavefronts of a block for each step of the contraction, as the emulator counts them."""
    counted = []
    blocks = 2 if kernel.outer == 32 else 1  # fewer of that kind are not chosen
    for depth in (4 * kernel.depth, 12 * kernel.depth):
        rows, cols = (depth, 128) if kernel.grad else (blocks * kernel.outer, depth)
        device = devices.EmulatedDevice(seed=1)
        # As many processors as keep the sum whole; so much for a block that nothing is split.
        _emulator.set_traits(90 if kernel.route == "warpgroup" else 80, 1, block_clocks=1 << 20)
        generator = torch.Generator().manual_seed(0)
        q = quantize_nf4(torch.randn(rows, cols, generator=generator), blocksize=BLOCKSIZE)
        x = torch.randn(kernel.columns, depth, generator=generator).bfloat16()
        _emulator.take_counts()
        with cuda_linear.use_route(kernel.route), _launches.listed(run=True) as launches:
            weight = (q.packed, q.scales, q.nested)
            if kernel.grad:
                ops.CUDA_OPS["nf4_linear_grad_input"](device, x, *weight, cols, BLOCKSIZE, None, None, 1.0)
            else:
                ops.CUDA_OPS["nf4_linear"](device, x, *weight, BLOCKSIZE, None, None, None, 1.0)
        assert [it.kernel for it in launches] == [kernel.name], (kernel.name, launches)
        assert launches[0].grid == (blocks, 1, 1), launches
        counted.append(_data_stage() / blocks)
    _emulator.set_traits()
    found = (counted[1] - counted[0]) / (8 * kernel.depth)
    if kernel.route == "warpgroup":
        found += 2 * kernel.columns * 2 / 128  # what the products of two warpgroups read themselves
    return found


@cache
def step(kernel: Kernel, gpu: Gpu) -> Step | None:
    """None: not of that device."""
    recorded = _cuda_tables.recorded()
    loop = recorded.loops.get((kernel.name, gpu.arch))
    if loop is None:
        return None
    depth = kernel.depth
    each = kernel.outer * depth / 32 if kernel.route == "decode" else kernel.products(depth)
    instructions = each * loop
    rate = gpu.group_products if kernel.route == "warpgroup" else gpu.products
    return Step(
        depth, kernel.outer * kernel.columns * depth / rate, instructions / 4, wavefronts(kernel) * depth
    )


# --- a call ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    route: str
    us: float
    bound: str  # what most of it is spent on: memory, tensor, issue, shared or launches


def _weight_bytes(n: int, k: int) -> float:
    return n * k * (0.5 + 1 / BLOCKSIZE + 4 / BLOCKSIZE / 256)


def moved_bytes(m: int, n: int, k: int) -> float:
    """From and to memory: W as it is stored, x, y and the adapter, each once."""
    return _weight_bytes(n, k) + 2 * (m + RANK) * (n + k)


def _ask(gpu: Gpu, grad: bool, m: int, n: int, k: int, route: str) -> tuple[str, int, int]:
    _emulator.set_traits(gpu.capability, gpu.processors, block_clocks=BLOCK_CLOCKS)
    code, columns, splits = _emulator.nf4_linear_plan(
        grad, m, n, k, RANK, BLOCKSIZE, ops.DTYPE_CODE[torch.bfloat16], cuda_linear.ROUTES[route]
    )
    _emulator.set_traits()
    return next(name for name, value in cuda_linear.ROUTES.items() if value == code), columns, splits


def _kernel_of(route: str, grad: bool, columns: int) -> Kernel:
    """By what the plan calls its columns: rows of W, eights of rows of x, or rows of x."""
    wide = {"decode": 8, "tile": 8 * columns, "warpgroup": columns}[route]
    outer = columns if route == "decode" else 128
    known = {(it.route, it.grad, it.outer, it.columns): it for it in kernels()}
    return known[route, grad, outer, wide]


def predict(gpu: Gpu, grad: bool, m: int, n: int, k: int, route: str = "auto") -> Prediction | None:
    """Forward, or the input's gradient, with an adapter of rank 16; None: that route is not of this call."""
    taken, columns, splits = _ask(gpu, grad, m, n, k, route)
    if route not in ("auto", taken):
        return None
    outer, contraction = (k, n) if grad else (n, k)
    moved = moved_bytes(m, n, k)
    memory = moved / gpu.copy / 1e6
    overlap = OVERLAPPED_US if gpu.capability >= 90 else LAUNCH_US
    if taken == "dense":
        # Slabs are written to the L2 cache and read from it.
        dequantise = _weight_bytes(n, k) / gpu.copy / 1e6 + 2 * 2 * n * k / (L2_GAIN * gpu.copy) / 1e6
        tensor = 2 * m * (n * k + RANK * (n + k)) / gpu.gemm / 1e6
        product = max(tensor, 2 * (n * k + m * (n + k)) / (L2_GAIN * gpu.copy) / 1e6)
        slabs = ceil(outer / cuda_dense._slab_size(m, outer, contraction, 2, gpu.processors))
        thin = 4 * m * contraction / gpu.copy / 1e6  # x is read, and its widened copy written
        us = thin + dequantise + product + 2 * slabs * LAUNCH_US
        return Prediction(taken, us, "tensor" if product == tensor else "memory")
    kernel = _kernel_of(taken, grad, columns)
    one = step(kernel, gpu)
    if one is None:
        raise LookupError(
            f"no main loop of {kernel.name} in docs/cuda_kernels.md: make cuda-check ARGS=--write"
        )
    blocks = ceil(m / kernel.columns) * ceil(outer / kernel.outer) * splits
    waves = ceil(blocks / gpu.processors)
    steps = ceil(contraction / splits / one.depth)
    clocks = waves * steps * one.clocks + BLOCK_CLOCKS
    computing = clocks / gpu.ghz / 1e3
    us = max(memory, computing) + LAUNCH_US + overlap  # u or v first
    if splits > 1:
        us += overlap + 8 * splits * m * outer / (L2_GAIN * gpu.copy) / 1e6
    return Prediction(taken, us, "memory" if memory > computing else one.bound)


def dense_us(gpu: Gpu, m: int, n: int, k: int) -> float:
    """Of a library's bfloat16 product, without an adapter."""
    moved = 2 * (n * k + m * (n + k))
    return max(moved / gpu.copy, 2 * m * n * k / gpu.gemm) / 1e6 + LAUNCH_US
