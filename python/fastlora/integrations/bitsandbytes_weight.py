"""bitsandbytes' 4-bit weight as our kernels take it, from the tensors that its operators are given.

The codes are read where they lie, and so are the scales: of a double-quantised weight only the second level
(a 4096 x 4096 layer's is 4 KiB) is laid out anew, and kept as long as the tensor that it was read from.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .. import checks
from ..checks import Packed
from ..nf4_bitsandbytes import second_level

BLOCKSIZE_OF_SCALES = checks.NESTED_BLOCKSIZE  # the only one that bitsandbytes' operators know


class Stored(NamedTuple):
    """A weight as bitsandbytes' operators get it, in their order. absmax float32: a block's scale, or, with
    codes (uint8, one a block), map (256 float32) and offset (one float), the scale of 256 codes."""

    data: Tensor
    shape: Sequence[int]
    absmax: Tensor
    blocksize: int
    codes: Tensor | None = None
    map: Tensor | None = None
    offset: Tensor | None = None


def of_state(data: Tensor, state: Any) -> Stored:
    """Of a bitsandbytes QuantState."""
    if not state.nested:
        return Stored(data, state.shape, state.absmax, state.blocksize)
    second = state.state2
    return Stored(data, state.shape, second.absmax, state.blocksize, state.absmax, second.code, state.offset)


def packed(stored: Stored) -> Packed:
    """As the kernels take a matrix whose rows are whole bytes (k even)."""
    n, k = stored.shape
    with torch._C.DisableTorchFunctionSubclass():  # a Params4bit's methods take several times as long
        return as_bytes(stored.data, n * k).view(n, k // 2), *_scales(stored), stored.blocksize, None


def dequantize(stored: Stored, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, of any shape. Blocks, and bytes, run over the flattened tensor."""
    count = prod(stored.shape)
    if not count:
        return torch.empty(stored.shape, dtype=dtype, device=stored.data.device)
    columns = count if stored.shape[-1] % 2 else stored.shape[-1]
    with torch._C.DisableTorchFunctionSubclass():
        rows = as_bytes(stored.data, count).view(count // columns, -1)
        scales, nested = _scales(stored)
    op = torch.ops.fastlora.nf4_dequantize.default
    return op(rows, scales, nested, columns, stored.blocksize, dtype).view(stored.shape)


def as_bytes(data: Tensor, count: int) -> Tensor:
    """The bytes of `count` codes, in any shape. `data` may be a float-typed view of them (quant_storage)."""
    data = data.detach()
    if data.dtype is not torch.uint8:
        data = data.contiguous().view(-1).view(torch.uint8)
    wanted = (count + 1) // 2
    if data.numel() == wanted and data.is_contiguous():
        return data
    if data.numel() < wanted:
        raise ValueError(f"bitsandbytes: expected {wanted} bytes for {count} weights, got {data.numel()}")
    return data.reshape(-1)[:wanted]


# --- scales -----------------------------------------------------------------------------------------------


class _Read(NamedTuple):
    """What was made of the second level, and what it was made from."""

    key: ref[Tensor]
    tensors: tuple[Tensor, ...]
    stamps: tuple[tuple[int, int], ...]
    scales: Tensor
    nested: Tensor | None


_read: dict[int, _Read] = {}  # by the id of the second level's absmax


def _stamp(t: Tensor) -> tuple[int, int]:
    """Differs after a write in place, and after a new ``.data``."""
    return t.data_ptr(), t._version


def _scales(stored: Stored) -> tuple[Tensor, Tensor | None]:
    absmax, codes, values, offset = stored.absmax, stored.codes, stored.map, stored.offset
    if codes is None:
        return absmax.detach().float().reshape(-1).view(torch.uint8), None
    assert values is not None
    assert offset is not None
    tensors = (codes, values, offset)
    if absmax.is_inference() or any(t.is_inference() for t in tensors):  # does not count what is written
        return second_level(codes, absmax, values, offset, BLOCKSIZE_OF_SCALES)
    stamps = tuple(map(_stamp, (absmax, *tensors)))
    kept = _read.get(id(absmax))
    if (
        kept is not None
        and kept.key() is absmax
        and all(a is b for a, b in zip(kept.tensors, tensors, strict=True))
        and kept.stamps == stamps
    ):
        return kept.scales, kept.nested
    with torch.inference_mode(False), torch.no_grad():  # it may serve a training step later
        scales, nested = second_level(codes, absmax, values, offset, BLOCKSIZE_OF_SCALES)
    _keep(absmax, tensors, stamps, scales, nested)
    return scales, nested


def _keep(absmax: Tensor, tensors: tuple[Tensor, ...], stamps: Any, scales: Tensor, nested: Any) -> None:
    name = id(absmax)

    def forget(gone: ref[Tensor]) -> None:
        if name in _read and _read[name].key is gone:
            del _read[name]

    _read[name] = _Read(ref(absmax, forget), tensors, stamps, scales, nested)


def forget_scales() -> None:
    """Drop all that was kept."""
    _read.clear()


# --- what bitsandbytes' evaluation made of a weight --------------------------------------------------------

# Layers whose weight was repacked, laid out as it was: the state it belongs to, and whether that was nested.
_unpacked: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()


def is_repacked(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def lay_out(weight: Any) -> None:
    """Lay a weight that bitsandbytes' evaluation has repacked out as it was, in place, no value changed.

    The repacking rounded the scales to bfloat16 and dropped their second level. They stay as it left them, in
    float32, so that the weight has the values that it was evaluated with.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse  # of versions that repack

    state = weight.quant_state
    scales = state.absmax.t().reshape(-1).float()
    stand_in = copy.copy(state)
    stand_in.original_nested = False  # the scales are not to be quantised once more
    with torch.inference_mode(False), torch.no_grad():
        weight.data, _ = _convert_weight_packed_for_cpu_inverse(weight.data, stand_in)
    state.absmax, state.dtype, state.packing_format_for_cpu = scales, state.original_dtype, False


def unpack(layer: nn.Module) -> None:
    """:func:`lay_out` a layer's weight so that :func:`repack` gives exactly the bits that were there."""
    weight: Any = layer.weight
    state = weight.quant_state
    lay_out(weight)
    _unpacked[layer] = (state, state.original_nested)


def repack(layer: nn.Module) -> None:
    """Undo :func:`unpack`, where it was done and the weight is still the same one."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    found = _unpacked.pop(layer, None)
    if found is None:
        return
    weight: Any = layer.weight
    state, nested = found
    current: Any = getattr(weight, "quant_state", None)
    if current is not state or is_repacked(state):
        return
    with torch.inference_mode(False), torch.no_grad():
        weight.data, _ = _convert_weight_packed_for_cpu(weight.data, state)
    state.original_nested = nested


def repack_all() -> None:
    for layer in list(_unpacked):
        repack(layer)
