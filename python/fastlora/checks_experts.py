"""What the ops of stacked experts demand of their tensors; as checks.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from .checks import (
    NESTED_BLOCKSIZE,
    block_count,
    check_blocksize,
    check_bytes,
    check_device,
    check_float,
    check_pair,
    check_shape,
)
from .checks_segmented import check_dtype, segment_rows


def check_rows(op: str, name: str, t: Tensor, features: int | None = None) -> int:
    """x, dy, u or v: (rows, features), the rows by expert. Returns how many there are."""
    check_float(op, name, t)
    if t.dim() != 2 or (features is not None and t.shape[1] != features):
        wanted = "features" if features is None else features
        raise ValueError(f"{op}: expected {name} of shape (rows, {wanted}), got {tuple(t.shape)}")
    return t.shape[0]


# Stacked weights as their ops take them: packed, scales, nested, blocksize.
Stack: TypeAlias = tuple[Tensor, Tensor, Tensor | None, int]


def check_stack(op: str, weight: Stack, k: int, device: torch.device) -> tuple[int, int]:
    """The parts of `experts` weights (n, k), each quantised by itself. Returns (experts, n)."""
    packed, scales, nested, blocksize = weight
    check_blocksize(op, blocksize)
    for name, t in (("packed", packed), ("scales", scales), ("nested", nested)):
        if t is not None:
            check_bytes(op, name, t, device)
    if packed.dim() != 3 or packed.shape[2] != (k + 1) // 2:
        raise ValueError(
            f"{op}: expected packed of shape (experts, n, {(k + 1) // 2}) for {k} in_features, "
            f"got {tuple(packed.shape)}"
        )
    experts, n = packed.shape[:2]
    blocks = block_count(n * k, blocksize)
    if nested is None:
        check_shape(op, "scales", scales, (experts, 4 * blocks), "{} blocks an expert, 4 bytes each", blocks)
        return experts, n
    check_shape(op, "scales", scales, (experts, blocks), "{} blocks an expert, one byte each", blocks)
    groups = block_count(blocks, NESTED_BLOCKSIZE)
    why = "of each expert an offset and {} scales of 4 bytes"
    check_shape(op, "nested", nested, (experts, 4 * (1 + groups)), why, groups)
    return experts, n


def check_adapters(
    op: str, lora_a: Tensor | None, lora_b: Tensor | None, experts: int, n: int, k: int, device: torch.device
) -> int:
    """Returns the rank (0 without adapters)."""
    pair = check_pair(op, lora_a, lora_b, device)
    if pair is None:
        return 0
    lora_a, lora_b = pair
    shape = tuple(lora_a.shape)
    if len(shape) != 3 or (shape[0], shape[2]) != (experts, k):
        raise ValueError(f"{op}: expected lora_a of shape ({experts}, r, {k}), got {shape}")
    check_shape(op, "lora_b", lora_b, (experts, n, shape[1]), "experts, out_features, rank")
    return shape[1]


def check_segments(op: str, segments: Tensor, rows: int, experts: int, device: torch.device) -> None:
    check_dtype(op, "segments", segments, torch.int32)
    check_device(op, "segments", segments, device)
    wanted = (segment_rows(rows, experts), 2)
    check_shape(op, "segments", segments, wanted, "min(rows, experts) + 1 of {{expert, first row}}")


def check_dropout(op: str, seed: Tensor | None, p: float, device: torch.device) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: expected dropout in [0, 1), got {p}")
    if seed is not None:
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"{op}: expected seed as one int64, got {seed.dtype} of shape {tuple(seed.shape)}"
            )
        check_device(op, "seed", seed, device)


def spans(op: str, segments: Tensor, rows: int, experts: int) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end) of every expert that has rows, ascending. Waits for the device."""
    table = segments.tolist()
    end = 0
    for (expert, begin), (_, after) in itertools.pairwise(table):
        if expert < 0:
            break
        if begin != end or not begin <= after <= rows or expert >= experts:
            raise ValueError(
                f"{op}: expected segments as lora_route makes them of {rows} rows and {experts} experts, "
                f"got {table[:16]}"
            )
        end = after
        if after > begin:
            yield expert, begin, after
