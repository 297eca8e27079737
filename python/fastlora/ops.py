"""The operators: ``torch.ops.fastlora.*``.

An op is a schema and two functions of its arguments. One checks them and says what comes out, as (shape,
dtype), for real and for traced tensors alike; the other hands addresses and sizes to the kernel, which fills
the outputs. An error is raised before anything is written: ValueError for shapes and values, TypeError for
dtypes, RuntimeError for devices and builds.

Storage conventions shared by all ops (see fastlora/nf4.h):

* ``packed`` uint8 ``(n, ceil(k / 2))``: two 4-bit codes a byte, the even column in the high nibble.
* ``scales`` uint8: with ``nested`` None the bytes of ``ceil(n*k / blocksize)`` float32 absmax values, else
  one 8-bit index a block.
* ``nested`` uint8 or None: the bytes of float32 ``[offset, absmax2 of blocks 0..255, of 256..511, ...]``.
* ``offsets`` uint8 ``(n, 4 * groups)`` or None: the bytes of a float32 for each group of ``k / groups``
  columns of a row, added to its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from . import _C, checks, cuda
from .checks import DTYPE_CODE, NESTED_BLOCKSIZE, block_count
from .isa import level

Output: TypeAlias = tuple[Sequence[int], torch.dtype]
#: One (shape, dtype) an output; a list of them for one that is a list.
Outputs: TypeAlias = Sequence[Output | list[Output]]

_STATUS = {
    1: (ValueError, "the kernel refused its arguments"),
    2: (MemoryError, "no memory for the kernel's scratch buffer"),
    3: (RuntimeError, "this machine cannot run the requested instruction-set level"),
}
_NOT_FINITE = 4

_CPU = torch.device("cpu")
_lib = torch.library.Library("fastlora", "DEF")


def ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _raise_freed(op: str, t: Tensor) -> NoReturn:
    raise RuntimeError(
        f"{op}: expected tensors with data, got one of shape {tuple(t.shape)} whose storage was freed"
    )


#: op -> its implementation on a CUDA device (cuda.Device) from that device and the op's arguments.
CUDA_OPS: dict[str, Callable[..., Any]] = {}


def define(
    schema: str,
    outputs: Callable[..., Outputs],
    kernel: Callable[..., int],
    cuda_kernel: Callable[..., int] | None,
) -> None:
    """Register an op. `kernel` gets the arguments, tensors made contiguous, then the outputs, and returns a
    status; `cuda_kernel` gets a cuda.Device first (None: there is none). `outputs` has refused what is to be
    written in place and is not contiguous."""
    op = schema.split("(", 1)[0]

    def filled(args: tuple) -> tuple:
        return args if len(args) == len(defaults) else (*args, *defaults[len(args) :])

    def pack(out: list[Any]) -> Any:
        return out[0] if len(out) == 1 else tuple(out) or None

    def make(what: Output | list[Output], empty: Callable[..., Tensor]) -> Tensor | list[Tensor]:
        if isinstance(what, list):
            return [empty(*(shape or ((),)), dtype=dtype) for shape, dtype in what]
        # Sizes as separate arguments: parsed in half the time of a tuple. Torch refuses none at all.
        return empty(*(what[0] or ((),)), dtype=what[1])

    def contiguous_of(t: Tensor) -> Tensor:
        if not t.data_ptr() and t.numel():
            _raise_freed(op, t)
        return t.contiguous()

    def run(run_kernel: Callable[..., int], device: torch.device, args: tuple) -> Any:
        args = filled(args)
        out = [make(what, partial(torch.empty, device=device)) for what in outputs(*args)]
        contiguous = list(args)  # a list, because an address keeps no copy alive
        for i in tensors:
            t = args[i]
            if t is not None:
                contiguous[i] = contiguous_of(t)
        for i in lists:
            contiguous[i] = [contiguous_of(t) for t in args[i]]
        status = run_kernel(*contiguous, *out)
        if status:
            kind, text = _STATUS.get(status, (RuntimeError, f"status {status}"))
            raise kind(f"{op}: {text}")
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        return pack(out)

    def cpu(*args: Any) -> Any:
        return run(kernel, _CPU, args)

    def on_device(device: cuda.Device, *args: Any) -> Any:
        if cuda_kernel is None:
            raise RuntimeError(f"{op}: expected CPU tensors, got CUDA ones, for which it has no kernel")
        if device.kernels is None:
            raise RuntimeError(
                f"{op}: expected CPU tensors, got CUDA ones; this build of fastlora holds no CUDA kernels: "
                "install nvcc (pip install nvidia-cuda-nvcc nvidia-cuda-cccl) and build it again "
                "(`python -m fastlora info` says what was built)"
            )
        return run(partial(cuda_kernel, device), args[0].device, args)

    def on_cuda(*args: Any) -> Any:
        with torch.cuda.device(args[0].device):
            return on_device(cuda.Device(), *args)

    def fake(*args: Any) -> Any:
        def empty(*shape: Any, dtype: torch.dtype) -> Tensor:
            return args[0].new_empty(shape if shape != ((),) else (), dtype=dtype)

        return pack([make(what, empty) for what in outputs(*filled(args))])

    # By the schema, as isinstance(t, Tensor) takes 0.5 us for anything that is not exactly a Tensor.
    arguments = torch._C.parse_schema(f"fastlora::{schema}").arguments
    tensors = [i for i, a in enumerate(arguments) if str(a.type) in {"Tensor", "Optional[Tensor]"}]
    lists = [i for i, a in enumerate(arguments) if str(a.type) == "List[Tensor]"]
    defaults = [a.default_value for a in arguments]  # torch leaves out trailing arguments that have them
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _lib.impl(op, cpu, "CPU")
    _lib.impl(op, on_cuda, "CUDA")
    CUDA_OPS[op] = on_device
    torch.library.register_fake(f"fastlora::{op}", fake, lib=_lib)


# --- the format -------------------------------------------------------------------------------------------


def _quantize_outputs(weight: Tensor, blocksize: int, double_quant: bool, check_finite: bool) -> Outputs:
    checks.check_float("nf4_quantize", "weight", weight)
    checks.check_blocksize("nf4_quantize", blocksize)
    if weight.dim() < 1:
        raise ValueError("nf4_quantize: expected a weight of at least one dimension, got a scalar")
    blocks = block_count(weight.numel(), blocksize)
    return [
        ([*weight.shape[:-1], (weight.shape[-1] + 1) // 2], torch.uint8),
        ([blocks if double_quant else 4 * blocks], torch.uint8),
        ([4 * (1 + block_count(blocks, NESTED_BLOCKSIZE)) if double_quant else 0], torch.uint8),
    ]


def _quantize(
    weight: Tensor, blocksize: int, double_quant: bool, check_finite: bool, packed: Tensor, scales: Tensor,
    nested: Tensor,
) -> int:  # fmt: skip
    cols, blocks, threads = weight.shape[-1], block_count(weight.numel(), blocksize), torch.get_num_threads()
    absmax = torch.empty(blocks, dtype=torch.float32) if double_quant else scales
    status = _C.nf4_quantize(
        weight.data_ptr(), DTYPE_CODE[weight.dtype], prod(weight.shape[:-1]), cols, blocksize,
        packed.data_ptr(), absmax.data_ptr(), threads, level(),
    )  # fmt: skip
    if status == _NOT_FINITE:
        if check_finite:
            checks.raise_not_finite("nf4_quantize", weight)
        status = 0
    if status or not double_quant:
        return status
    return _C.nf4_double_quantize(absmax.data_ptr(), blocks, scales.data_ptr(), nested.data_ptr(), threads)


define(
    "nf4_quantize(Tensor weight, int blocksize, bool double_quant, bool check_finite) -> "
    "(Tensor packed, Tensor scales, Tensor nested)",
    _quantize_outputs,
    _quantize,
    cuda.quantize,
)


def _decode_absmax_outputs(scales: Tensor, nested: Tensor | None) -> Outputs:
    op = "nf4_decode_absmax"
    for name, t in (("scales", scales), ("nested", nested)):
        if t is not None:
            checks.check_bytes(op, name, t, scales.device)
            if t.dim() != 1:
                raise ValueError(f"{op}: expected {name} of one dimension, got shape {tuple(t.shape)}")
    blocks = scales.shape[0]
    if nested is None:
        if blocks % 4:
            raise ValueError(f"{op}: expected scales of 4 bytes a block, got {blocks} bytes")
        blocks //= 4
    checks.check_scales(op, scales, nested, blocks)
    return [([blocks], torch.float32)]


def _decode_absmax(scales: Tensor, nested: Tensor | None, absmax: Tensor) -> int:
    return _C.nf4_decode_absmax(
        scales.data_ptr(), ptr(nested), absmax.numel(), absmax.data_ptr(), torch.get_num_threads()
    )


define(
    "nf4_decode_absmax(Tensor scales, Tensor? nested) -> Tensor",
    _decode_absmax_outputs,
    _decode_absmax,
    cuda.decode_absmax,
)


def _dequantize_outputs(
    packed: Tensor, scales: Tensor, nested: Tensor | None, cols: int, blocksize: int, dtype: torch.dtype,
    offsets: Tensor | None,
) -> Outputs:  # fmt: skip
    op = "nf4_dequantize"
    if dtype not in DTYPE_CODE:
        raise TypeError(f"{op}: expected dtype float32, bfloat16 or float16, got {dtype}")
    rows = checks.check_matrix(op, packed)
    checks.check_weight(op, (packed, scales, nested, blocksize, offsets), rows, cols, packed.device)
    return [((rows, cols), dtype)]


def _dequantize(
    packed: Tensor, scales: Tensor, nested: Tensor | None, cols: int, blocksize: int, dtype: torch.dtype,
    offsets: Tensor | None, out: Tensor,
) -> int:  # fmt: skip
    offsets = checks.whole(offsets)
    exact = out if offsets is None or dtype is torch.float32 else torch.empty(out.shape, dtype=torch.float32)
    status = _C.nf4_dequantize(
        packed.data_ptr(), scales.data_ptr(), ptr(nested), packed.shape[0], cols, blocksize, ptr(offsets),
        checks.group_count(offsets), exact.data_ptr(), DTYPE_CODE[exact.dtype], torch.get_num_threads(),
        level(),
    )  # fmt: skip
    if exact is not out:
        out.copy_(exact)
    return status


define(
    "nf4_dequantize(Tensor packed, Tensor scales, Tensor? nested, int cols, int blocksize, ScalarType dtype, "
    "Tensor? offsets=None) -> Tensor",
    _dequantize_outputs,
    _dequantize,
    cuda.dequantize,
)


def nf4_dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic 8-bit map that double quantisation indexes: float32, ascending."""
    identity = torch.tensor([0.0, 1.0]).view(torch.uint8)  # offset 0, scale 1
    return torch.ops.fastlora.nf4_decode_absmax(torch.arange(256, dtype=torch.uint8), identity)


def nf4_codes() -> Tensor:
    """The 16 values of NF4: float32, ascending."""
    packed = torch.arange(0x01, 0x100, 0x22, dtype=torch.int32).to(torch.uint8)  # 01 23 45 ... ef
    one = torch.ones(1).view(torch.uint8)
    codes = torch.ops.fastlora.nf4_dequantize(packed.reshape(1, 8), one, None, 16, 32, torch.float32)
    return codes.reshape(16)
