"""What an op demands of its tensors: the same checks for real and traced ones, before anything is written.

ValueError for shapes and values, TypeError for dtypes, RuntimeError for devices, as
``<op>: expected <what>, got <value>``. They run at every call, so messages are made only when one is needed.
"""

from __future__ import annotations

from typing import NoReturn, TypeAlias, TypeVar

import torch
from torch import Tensor

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# A weight as the ops take it: packed, scales, nested, blocksize, offsets. A plain tuple is the cheapest to
# pass on. The ops have offsets last, as most weights have none.
Packed: TypeAlias = tuple[Tensor, Tensor, Tensor | None, int, Tensor | None]


def block_count(count: int, blocksize: int) -> int:
    return -(-count // blocksize)


_Maybe = TypeVar("_Maybe", Tensor, Tensor | None)


def whole(t: _Maybe) -> _Maybe:
    """Bytes at a multiple of 4, where kernels read them as float32; a view may begin anywhere."""
    return t if t is None or t.data_ptr() % 4 == 0 else t.clone()


def group_count(offsets: Tensor | None) -> int:
    """Groups of columns a row that have an offset each."""
    return 0 if offsets is None or not offsets.dim() else offsets.shape[-1] // 4


def check_float(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in DTYPE_CODE:
        raise TypeError(f"{op}: expected {name} in float32, bfloat16 or float16, got {t.dtype}")


def check_blocksize(op: str, blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{op}: expected blocksize in {BLOCKSIZES}, got {blocksize}")


def check_device(op: str, name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise RuntimeError(f"{op}: expected {name} on {device}, got {t.device}")


def check_bytes(op: str, name: str, t: Tensor, device: torch.device) -> None:
    if t.dtype is not torch.uint8:
        raise TypeError(f"{op}: expected {name} in uint8, got {t.dtype}")
    check_device(op, name, t, device)


def check_shape(op: str, name: str, t: Tensor, shape: tuple[int, ...], why: str, *values: object) -> None:
    """`why` is formatted with `values` only when it is needed."""
    if t.shape != shape:
        reason = why.format(*values)
        raise ValueError(f"{op}: expected {name} of shape {tuple(shape)} ({reason}), got {tuple(t.shape)}")


def check_scales(op: str, scales: Tensor, nested: Tensor | None, blocks: int) -> None:
    """The sizes of a weight's scales."""
    if nested is None:
        check_shape(op, "scales", scales, (4 * blocks,), "{} blocks, 4 bytes each", blocks)
        return
    check_shape(op, "scales", scales, (blocks,), "{} blocks, one byte each", blocks)
    groups = block_count(blocks, NESTED_BLOCKSIZE)
    check_shape(op, "nested", nested, (4 * (1 + groups),), "an offset and {} scales of 4 bytes", groups)


def check_matrix(op: str, packed: Tensor) -> int:
    """Returns n."""
    if packed.dim() != 2:
        raise ValueError(f"{op}: expected packed of shape (n, ceil(k / 2)), got {tuple(packed.shape)}")
    return packed.shape[0]


def check_weight(op: str, weight: Packed, rows: int, cols: int, device: torch.device) -> None:
    """The parts of a (rows, cols) weight."""
    packed, scales, nested, blocksize, offsets = weight
    check_blocksize(op, blocksize)
    check_bytes(op, "packed", packed, device)
    check_bytes(op, "scales", scales, device)
    check_shape(op, "packed", packed, (rows, (cols + 1) // 2), "a weight of {} x {}", rows, cols)
    if nested is not None:
        check_bytes(op, "nested", nested, device)
    check_scales(op, scales, nested, block_count(rows * cols, blocksize))
    if offsets is not None:
        check_bytes(op, "offsets", offsets, device)
        groups = group_count(offsets)
        if offsets.dim() != 2 or offsets.shape != (rows, 4 * groups) or not groups or cols % groups:
            raise ValueError(
                f"{op}: expected offsets of shape ({rows}, 4 * groups), groups a divisor of {cols} columns, "
                f"got {tuple(offsets.shape)}"
            )


def check_activation(op: str, name: str, t: Tensor, features: int, what: str) -> None:
    check_float(op, name, t)
    if t.dim() < 1 or t.shape[-1] != features:
        raise ValueError(
            f"{op}: expected {name} of shape (..., {features}) to match {what}, got {tuple(t.shape)}"
        )


def check_pair(
    op: str, lora_a: Tensor | None, lora_b: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Of any shapes. Returns both, or None where there is no adapter."""
    if lora_a is None and lora_b is None:
        return None
    if lora_a is None or lora_b is None:
        raise ValueError(f"{op}: expected lora_a and lora_b together, got only one of them")
    check_float(op, "lora_a", lora_a)
    if lora_b.dtype is not lora_a.dtype:
        raise TypeError(f"{op}: expected lora_b in lora_a's dtype {lora_a.dtype}, got {lora_b.dtype}")
    check_device(op, "lora_a", lora_a, device)
    check_device(op, "lora_b", lora_b, device)
    return lora_a, lora_b


def check_lora(
    op: str, lora_a: Tensor | None, lora_b: Tensor | None, n: int, k: int, device: torch.device
) -> int:
    """Returns the rank (0 without adapters)."""
    pair = check_pair(op, lora_a, lora_b, device)
    if pair is None:
        return 0
    lora_a, lora_b = pair
    shape = lora_a.shape
    if len(shape) != 2 or shape[1] != k:
        raise ValueError(f"{op}: expected lora_a of shape (r, {k}), got {tuple(shape)}")
    check_shape(op, "lora_b", lora_b, (n, shape[0]), "{} out_features, rank {}", n, shape[0])
    return shape[0]


def check_linear(op: str, x: Tensor, weight: Packed, bias: Tensor | None) -> tuple[int, int]:
    """What x·Wᵀ + bias demands, without an adapter. Returns (n, k)."""
    check_float(op, "x", x)
    lead, device, packed = x.shape, x.device, weight[0]
    if not lead:
        raise ValueError(f"{op}: expected x of shape (..., in_features), got a 0-dimensional tensor")
    n, k = check_matrix(op, packed), lead[-1]
    if packed.shape[1] != (k + 1) // 2:
        raise ValueError(
            f"{op}: expected x of shape (..., k) with ceil(k / 2) = {packed.shape[1]} to match packed "
            f"{tuple(packed.shape)}, got {tuple(lead)}"
        )
    check_weight(op, weight, n, k, device)
    if bias is not None:
        if bias.dtype is not x.dtype:
            raise TypeError(f"{op}: expected bias in x's dtype {x.dtype}, got {bias.dtype}")
        check_device(op, "bias", bias, device)
        check_shape(op, "bias", bias, (n,), "out_features")
    return n, k


def check_gain(op: str, gain: Tensor, n: int, device: torch.device) -> None:
    if gain.dtype is not torch.float32:
        raise TypeError(f"{op}: expected gain in float32, got {gain.dtype}")
    check_device(op, "gain", gain, device)
    check_shape(op, "gain", gain, (n,), "out_features")


def check_given_u(op: str, x: Tensor, u: Tensor, lora_b: Tensor, n: int) -> None:
    """An adapter whose u = dropout(x)·Aᵀ is there already."""
    check_float(op, "lora_b", lora_b)
    check_device(op, "lora_b", lora_b, x.device)
    r = check_narrow(op, "u", u, "x", x)
    check_shape(op, "lora_b", lora_b, (n, r), "{} out_features, rank {}", n, r)


def check_narrow(op: str, name: str, t: Tensor, like_name: str, like: Tensor) -> int:
    """u or v: (..., rank) beside x or dy (..., features). Returns the rank."""
    if t.dtype != like.dtype:
        raise TypeError(f"{op}: expected {name} in {like_name}'s dtype {like.dtype}, got {t.dtype}")
    check_device(op, name, t, like.device)
    if t.dim() < 1:
        raise ValueError(f"{op}: expected {name} of shape (..., rank), got a 0-dimensional tensor")
    check_shape(op, name, t, (*like.shape[:-1], t.shape[-1]), "{}'s rows, rank", like_name)
    return t.shape[-1]


def raise_not_finite(op: str, weight: Tensor) -> NoReturn:
    """What a kernel that met NaN or Inf in `weight` has found."""
    bad = ~torch.isfinite(weight)
    first = int(bad.reshape(-1).view(torch.uint8).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), weight.shape))
    raise ValueError(
        f"{op}: expected finite weights, got {int(bad.sum())} NaN or Inf of {weight.numel()}, "
        f"the first at index {where}"
    )
