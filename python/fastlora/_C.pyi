"""The kernels on raw addresses (csrc/bindings.cpp), each returning a status: only ops.py calls them. And
one on tensors (csrc/nf4_linear_direct.cpp), for direct.py."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

cuda_built: bool
cuda: Any  # of a build with CUDA: csrc/bindings_cuda.cpp
isa_count: int
__version__: str

def nf4_quantize(
    weight: int,
    dtype: int,
    rows: int,
    cols: int,
    blocksize: int,
    packed: int,
    absmax: int,
    threads: int,
    isa: int,
    /,
) -> int: ...
def nf4_double_quantize(absmax: int, blocks: int, codes: int, nested: int, threads: int, /) -> int: ...
def nf4_dequantize(
    packed: int,
    scales: int,
    nested: int,
    n: int,
    k: int,
    blocksize: int,
    offsets: int,
    groups: int,
    out: int,
    dtype: int,
    threads: int,
    isa: int,
    /,
) -> int: ...
def nf4_decode_absmax(scales: int, nested: int, blocks: int, absmax: int, threads: int, /) -> int: ...
def nf4_linear(
    x: int,
    packed: int,
    scales: int,
    nested: int,
    bias: int,
    lora_a: int,
    lora_b: int,
    gain: int,
    u: int,
    y: int,
    m: int,
    n: int,
    k: int,
    r: int,
    blocksize: int,
    offsets: int,
    groups: int,
    scaling: float,
    dtype: int,
    lora_dtype: int,
    threads: int,
    isa: int,
    /,
) -> int: ...
def nf4_linear_grad_input(
    dy: int,
    packed: int,
    scales: int,
    nested: int,
    lora_a: int,
    lora_b: int,
    v: int,
    dx: int,
    m: int,
    n: int,
    k: int,
    r: int,
    blocksize: int,
    offsets: int,
    groups: int,
    scaling: float,
    dtype: int,
    lora_dtype: int,
    threads: int,
    isa: int,
    /,
) -> int: ...
def lora_dropout(x: int, out: int, count: int, seed: int, p: float, dtype: int, threads: int, /) -> int: ...

class AdapterTable:
    def __init__(
        self,
        a: list[int],
        b: list[int],
        rows: list[int],
        n: list[int],
        widths: list[int],
        capacity: int,
        entries: int,
        scaling: int,
        dtype: int,
        /,
    ) -> None: ...

def lora_route(slots: int, wide: bool, m: int, capacity: int, order: int, segments: int, /) -> int: ...
def segmented_lora(
    x: int,
    y: int,
    u: int,
    m: int,
    k: int,
    table: AdapterTable,
    order: int,
    segments: int,
    segment_rows: int,
    dtype: int,
    threads: int,
    isa: int,
    /,
) -> int: ...
def segmented_lora_grad_input(
    dy: int,
    dx: int,
    v: int,
    m: int,
    k: int,
    table: AdapterTable,
    order: int,
    segments: int,
    segment_rows: int,
    dtype: int,
    threads: int,
    isa: int,
    /,
) -> int: ...
def segmented_lora_grad_pools(
    x: int,
    dy: int,
    u: int,
    v: int,
    da: list[int],
    db: list[int],
    m: int,
    k: int,
    table: AdapterTable,
    order: int,
    segments: int,
    segment_rows: int,
    dtype: int,
    threads: int,
    isa: int,
    /,
) -> int: ...
def nf4_multi_lora_linear(
    x: int,
    packed: int,
    scales: int,
    nested: int,
    blocksize: int,
    offsets: int,
    groups: int,
    bias: int,
    y: int,
    u: int,
    m: int,
    n: int,
    k: int,
    table: AdapterTable,
    order: int,
    segments: int,
    segment_rows: int,
    batch_invariant: bool,
    dtype: int,
    threads: int,
    isa: int,
    /,
) -> int: ...
def nf4_multi_lora_grad_input(
    dy: int,
    packed: int,
    scales: int,
    nested: int,
    blocksize: int,
    offsets: int,
    groups: int,
    dx: int,
    v: int,
    m: int,
    n: int,
    k: int,
    table: AdapterTable,
    order: int,
    segments: int,
    segment_rows: int,
    batch_invariant: bool,
    dtype: int,
    threads: int,
    isa: int,
    /,
) -> int: ...
def adamw(
    param: int,
    grad: int,
    exp_avg: int,
    exp_avg_sq: int,
    count: int,
    dtype: int,
    grad_dtype: int,
    decay: float,
    weight1: float,
    beta2: float,
    weight2: float,
    correction2: float,
    eps: float,
    minus_step: float,
    threads: int,
    isa: int,
    /,
) -> int: ...
def adamw_8bit(
    param: int,
    grad: int,
    exp_avg: int,
    exp_avg_sq: int,
    exp_avg_scale: int,
    exp_avg_sq_scale: int,
    count: int,
    dtype: int,
    grad_dtype: int,
    decay: float,
    weight1: float,
    beta2: float,
    weight2: float,
    correction2: float,
    eps: float,
    minus_step: float,
    threads: int,
    isa: int,
    /,
) -> int: ...
def unsigned_dynamic_map(out: int, /) -> None: ...
def fill_adamw_tables(out: int, /) -> None: ...

adamw_tables_bytes: int

def best_isa() -> int: ...
def isa_available(isa: int, /) -> bool: ...
def isa_name(isa: int, /) -> str: ...
def scratch_bytes() -> int: ...
def prefer_huge_pages(data: int, bytes: int, now: bool, /) -> int: ...
def nf4_linear_direct(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None, int, Tensor | None],
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    threads: int,
    isa: int,
    /,
) -> Tensor | None: ...
def nf4_linear_direct_setup(
    tensor: type, parameter: type, empty: Callable[..., Tensor], exchange_api: Any, /
) -> bool: ...
