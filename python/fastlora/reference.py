"""The specification: every op in plain torch, short enough to read before its kernel.

Linear algebra is in float64. The NF4 format is defined by float32 arithmetic, one rounding a step, so its
half here computes in float32 and kernels must give the same bits. Nothing here is fast, and nothing else in
the package calls it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

# --- the format -------------------------------------------------------------------------------------------

# NormalFloat4 (Dettmers et al., QLoRA, 2023), float32.
CODES = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
ZERO_CODE = 7
NESTED_BLOCKSIZE = 256
# A smaller absmax divides as if it were this, so that its inverse stays finite (bitsandbytes' bound).
TINY = 1e-38


def _in_blocks(flat: Tensor, blocksize: int) -> Tensor:
    """(count,) to (blocks, blocksize), the last block padded with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).reshape(-1, blocksize)


def nf4_quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes (weight.shape) uint8 and absmax (ceil(numel / blocksize),) float32 of a finite weight.

    The nearest code of w * (1 / absmax), a tie to the lower one: as many codes as midpoints lie strictly
    below. A last block that is not full divides by absmax instead, one rounding where the others have two;
    that is bitsandbytes' arithmetic.
    """
    blocks = _in_blocks(weight.detach().reshape(-1).float(), blocksize)
    absmax = blocks.abs().amax(dim=1) if len(blocks) else blocks.new_empty(0)
    divisor = absmax.clamp(min=TINY)[:, None]
    scaled = blocks * (1.0 / divisor)
    if weight.numel() % blocksize:
        scaled[-1] = blocks[-1] / divisor[-1]
    midpoints = (CODES[:-1] + CODES[1:]) / 2
    codes = torch.bucketize(scaled, midpoints, right=False)
    return codes.reshape(-1)[: weight.numel()].reshape(weight.shape).to(torch.uint8), absmax


def nf4_pack(codes: Tensor) -> Tensor:
    """Codes (..., cols) to bytes (..., ceil(cols / 2)), even columns high; an odd row ends with code 7."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=ZERO_CODE)
    return (codes[..., 0::2] << 4) | codes[..., 1::2]


def nf4_unpack(packed: Tensor, cols: int) -> Tensor:
    """Bytes (..., ceil(cols / 2)) to codes (..., cols)."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(-2)[..., :cols]


def nf4_dequantize(codes: Tensor, absmax: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """code * absmax in float32, rounded once to dtype; codes' shape."""
    values = _in_blocks(CODES[codes.reshape(-1).long()], blocksize) * absmax[:, None]
    return values.reshape(-1)[: codes.numel()].reshape(codes.shape).to(dtype)


def nf4_add_offsets(weight: Tensor, offsets: Tensor) -> Tensor:
    """weight (n, k) float32, and to each group of k / groups columns of a row its offset (n, groups): one
    float32 rounding after that of code * absmax."""
    n, k = weight.shape
    return (weight.view(n, offsets.shape[1], -1) + offsets[:, :, None]).view(n, k)


def dynamic_map() -> Tensor:
    """The 256 ascending float32 values of the signed dynamic 8-bit map (8-bit optimizers, Dettmers, 2022).

    Seven decades 10^-6 .. 1; decade i has 2^i values on either side of zero, the centres of as many equal
    cells of [0.1, 1], times the decade. And 0, and 1. Rounded to float32 at every step: files hold those
    bits.
    """
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float32)
        centres = (edges[:-1] + edges[1:]) / 2
        positive.append(centres * torch.tensor(10.0 ** (decade - 6), dtype=torch.float32))
    side = torch.cat(positive)
    return torch.cat((-side, torch.tensor([0.0]), side, torch.tensor([1.0]))).sort().values


def unsigned_dynamic_map() -> Tensor:
    """The same without negative values, and twice as fine: decade i has 2^(i + 1) values."""
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade + 1) + 1, dtype=torch.float32)
        centres = (edges[:-1] + edges[1:]) / 2
        positive.append(centres * torch.tensor(10.0 ** (decade - 6), dtype=torch.float32))
    return torch.cat((torch.tensor([0.0]), *positive, torch.tensor([1.0])))


def nf4_double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """absmax (blocks,) float32 to codes (blocks,) uint8 and nested (1 + ceil(blocks / 256),) float32.

    nested is [offset, scale of blocks 0..255, ...]: offset the mean of absmax rounded once, a scale the
    largest |absmax - offset| of its 256. A code is the exactly nearest entry of the map to
    (absmax - offset) / scale, a tie to the lower index.
    """
    mean = math.fsum(absmax.tolist()) / absmax.numel() if absmax.numel() else 0.0
    offset = torch.tensor([mean], dtype=torch.float64).float()
    residual = _in_blocks(absmax - offset, NESTED_BLOCKSIZE)
    valid = _in_blocks(torch.ones_like(absmax), NESTED_BLOCKSIZE)
    scale = (residual.abs() * valid).amax(dim=1) if len(residual) else residual.new_empty(0)
    scaled = torch.where(scale[:, None] > 0, residual / scale[:, None], 0.0)
    entries = dynamic_map().double()
    codes = torch.bucketize(scaled.double(), (entries[:-1] + entries[1:]) / 2, right=False)
    return codes.reshape(-1)[: absmax.numel()].to(torch.uint8), torch.cat((offset, scale))


def nf4_decode_absmax(codes: Tensor, nested: Tensor) -> Tensor:
    """The inverse: map[code] * scale + offset, two float32 roundings."""
    scale = nested[1:].repeat_interleave(NESTED_BLOCKSIZE)[: codes.numel()]
    return dynamic_map()[codes.long()] * scale + nested[0]


# --- the fused linear and its gradients, all in float64 ---------------------------------------------------


def nf4_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = gain·(x·Wᵀ + scaling·u·Bᵀ) + bias (..., n) and u = x·Aᵀ (..., r), of a dequantised W (n, k).

    x (..., k), bias and gain (n,), lora_a (r, k), lora_b (n, r); without adapters u is (..., 0).
    """
    x = x.double()
    y = x @ weight.double().T
    u = x.new_zeros((*x.shape[:-1], 0))
    if lora_a is not None and lora_b is not None:
        u = x @ lora_a.double().T
        y = y + scaling * (u @ lora_b.double().T)
    if gain is not None:
        y = y * gain.double()
    return (y if bias is None else y + bias.double()), u


def nf4_linear_grad_input(
    dy: Tensor,
    weight: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """dx = dy·W + v·A (..., k) and v = scaling·dy·B (..., r), of dy (..., n)."""
    dy = dy.double()
    dx = dy @ weight.double()
    v = dy.new_zeros((*dy.shape[:-1], 0))
    if lora_a is not None and lora_b is not None:
        v = scaling * (dy @ lora_b.double())
        dx = dx + v @ lora_a.double()
    return dx, v


def _rows(t: Tensor) -> Tensor:
    """(..., f) to (rows, f) in float64, also where a size is 0."""
    return t.double().reshape(math.prod(t.shape[:-1]), t.shape[-1])


def lora_grad_a(v: Tensor, x: Tensor) -> Tensor:
    """dA = vᵀ·x (r, k), of v = scaling·dy·B (..., r) and x (..., k)."""
    return _rows(v).T @ _rows(x)


def lora_grad_b(dy: Tensor, u: Tensor, scaling: float) -> Tensor:
    """dB = scaling·dyᵀ·u (n, r), of dy (..., n) and u = x·Aᵀ (..., r)."""
    return scaling * (_rows(dy).T @ _rows(u))


def grad_bias(dy: Tensor) -> Tensor:
    """dbias = the sum of dy (..., n) over its rows: (n,)."""
    return _rows(dy).sum(0)


# --- dropout ----------------------------------------------------------------------------------------------


def _as_int64(value: int) -> int:
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


def _xor_shift(z: Tensor, bits: int) -> Tensor:
    """z ^ (z >> bits) with a logical shift, on int64 that stand for uint64."""
    return z ^ ((z >> bits) & ((1 << (64 - bits)) - 1))


def lora_dropout_mask(shape: tuple[int, ...], seed: int, p: float) -> Tensor:
    """Which elements stay: bool. Element i (flattened) stays when the top 32 bits of
    splitmix64(seed + i * 0x9E3779B97F4A7C15) (Steele, Lea, Flood, 2014) reach floor(p * 2^32)."""
    index = torch.arange(math.prod(shape), dtype=torch.int64)
    z = index * _as_int64(0x9E3779B97F4A7C15) + _as_int64(seed)  # int64 arithmetic wraps, as uint64 does
    z = _xor_shift(z, 30) * _as_int64(0xBF58476D1CE4E5B9)
    z = _xor_shift(z, 27) * _as_int64(0x94D049BB133111EB)
    top = (_xor_shift(z, 31) >> 32) & 0xFFFFFFFF
    return (top >= int(p * 2**32)).reshape(shape)


def lora_dropout(x: Tensor, seed: int, p: float) -> Tensor:
    """x / (1 - p) where the mask keeps it, else 0; float64."""
    return torch.where(lora_dropout_mask(tuple(x.shape), seed, p), x.double() / (1 - p), 0.0)


# --- many adapters in one batch ---------------------------------------------------------------------------


def lora_route(slots: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Rows by slot, stably, those of -1 last: order (m,) int32; and segments (min(m, capacity) + 1, 2) int32:
    {slot, first position} of every slot that has rows, then {-1, rows that have a slot} to the end."""
    flat = slots.reshape(-1).long()
    order = torch.where(flat < 0, capacity, flat).argsort(stable=True)
    found, counts = flat[flat >= 0].unique(return_counts=True)
    segments = torch.tensor([[-1, int(counts.sum())]]).repeat(min(flat.numel(), capacity) + 1, 1)
    segments[: len(found)] = torch.stack((found, counts.cumsum(0) - counts), dim=1)
    return order.int(), segments.int()


def _slots_of(order: Tensor, segments: Tensor) -> list[int]:
    """The slot of every position in order."""
    slots = [-1] * order.numel()
    rows = segments.tolist()
    for (slot, begin), (_, end) in itertools.pairwise(rows):
        if slot >= 0:
            slots[begin:end] = [slot] * (end - begin)
    return slots


def _pieces(
    a: list[Tensor], b: list[Tensor], entries: Tensor, scaling: Tensor, order: Tensor, segments: Tensor,
    widths: list[int],
) -> Iterator[tuple[int, int, int, slice, slice, slice, float]]:  # fmt: skip
    """Position, row, slice of the layer, its pool's rows, columns of y and columns of u, scaling: for every
    row that has an adapter, one by one."""
    entries, scaling = entries.reshape(len(a), -1, 2), scaling.reshape(len(a), -1)
    column = [sum(t.shape[1] for t in b[:j]) for j in range(len(b))]
    for position, slot in enumerate(_slots_of(order, segments)):
        for j in range(len(a) if slot >= 0 else 0):
            first, rank = entries[j, slot].tolist()
            at = sum(widths[:j])
            yield (
                position, int(order[position]), j, slice(first, first + rank),
                slice(column[j], column[j] + b[j].shape[1]), slice(at, at + rank), float(scaling[j, slot]),
            )  # fmt: skip


def segmented_lora(
    x: Tensor, a: list[Tensor], b: list[Tensor], entries: Tensor, scaling: Tensor, order: Tensor,
    segments: Tensor, widths: list[int], y: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (..., n) with s·u·Bᵀ added and u = x·Aᵀ (m, sum of widths) in the order of `order`; a kernel rounds u
    to x's dtype before the second product. Rows without an adapter leave y as it is and u zero."""
    rows, out = _rows(x), _rows(y).clone()
    u = rows.new_zeros(len(rows), sum(widths))
    for p, i, j, ranks, columns, at, scale in _pieces(a, b, entries, scaling, order, segments, widths):
        u[p, at] = a[j][ranks].double() @ rows[i]
        out[i, columns] += scale * (u[p, at] @ b[j][ranks].double())
    return out.reshape(y.shape), u


def segmented_lora_grad_input(
    dy: Tensor, a: list[Tensor], b: list[Tensor], entries: Tensor, scaling: Tensor, order: Tensor,
    segments: Tensor, widths: list[int], dx: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx (..., k) with v·A added and v = s·dy·B (m, sum of widths), which a kernel rounds to dy's dtype."""
    rows, out = _rows(dy), _rows(dx).clone()
    v = rows.new_zeros(len(rows), sum(widths))
    for p, i, j, ranks, columns, at, scale in _pieces(a, b, entries, scaling, order, segments, widths):
        v[p, at] = scale * (b[j][ranks].double() @ rows[i, columns])
        out[i] += v[p, at] @ a[j][ranks].double()
    return out.reshape(dx.shape), v


def segmented_lora_grad_pools(
    x: Tensor, dy: Tensor, u: Tensor, v: Tensor, a: list[Tensor], b: list[Tensor], entries: Tensor,
    scaling: Tensor, order: Tensor, segments: Tensor, widths: list[int],
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """dA = Σ vᵀ·x and dB = s·Σ uᵀ·dy (B as the pool has it) over the rows of each slot; zeros elsewhere."""
    x, dy, u, v = _rows(x), _rows(dy), u.double(), v.double()
    da = [torch.zeros_like(t, dtype=torch.float64) for t in a]
    db = [torch.zeros_like(t, dtype=torch.float64) for t in b]
    for p, i, j, ranks, columns, at, scale in _pieces(a, b, entries, scaling, order, segments, widths):
        da[j][ranks] += torch.outer(v[p, at], x[i])
        db[j][ranks] += scale * torch.outer(u[p, at], dy[i, columns])
    return da, db


def nf4_multi_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: list[Tensor], b: list[Tensor], entries: Tensor,
    scaling: Tensor, order: Tensor, segments: Tensor, widths: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x·Wᵀ + bias with segmented_lora's term, and u, of a dequantised W (n, k)."""
    y, _ = nf4_linear(x, weight, bias)
    return segmented_lora(x, a, b, entries, scaling, order, segments, widths, y)


def nf4_multi_lora_grad_input(
    dy: Tensor, weight: Tensor, a: list[Tensor], b: list[Tensor], entries: Tensor, scaling: Tensor,
    order: Tensor, segments: Tensor, widths: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dy·W with segmented_lora_grad_input's term, and v."""
    dx, _ = nf4_linear_grad_input(dy, weight)
    return segmented_lora_grad_input(dy, a, b, entries, scaling, order, segments, widths, dx)


# --- optimisers -------------------------------------------------------------------------------------------


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The parameter and both moments after step `step` (from 1), in float64 (Loshchilov, Hutter, 2019)."""
    p, g = param.double(), grad.double()
    m = betas[0] * exp_avg.double() + (1 - betas[0]) * g
    v = betas[1] * exp_avg_sq.double() + (1 - betas[1]) * g * g
    corrected1, corrected2 = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return p * (1 - lr * weight_decay) - lr * corrected1 / (corrected2.sqrt() + eps), m, v


def encode_moment(moment: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (moment.shape) uint8 and scales (ceil(numel / 256),) of a float32 moment, block by block.

    The scale is the largest magnitude, from 1e-38 up, or 0; the code the nearest entry of the map to
    moment * (1 / scale), a tie to the lower one. Without a sign nothing but 0 becomes 0: a second moment that
    vanished beside a first one that did not would divide that one by eps.
    """
    blocks = _in_blocks(moment.reshape(-1), NESTED_BLOCKSIZE)
    largest = blocks.abs().amax(dim=1) if len(blocks) else blocks.new_empty(0)
    scale = torch.where(largest > 0, largest.clamp(min=TINY), 0.0)
    scaled = blocks * torch.where(scale > 0, 1.0 / scale, 0.0)[:, None]
    entries = (dynamic_map() if signed else unsigned_dynamic_map()).double()
    codes = torch.bucketize(scaled.double(), (entries[:-1] + entries[1:]) / 2, right=False)
    if not signed:
        codes = torch.where(scaled > 0, codes.clamp(min=1), codes)
    return codes.reshape(-1)[: moment.numel()].reshape(moment.shape).to(torch.uint8), scale


def decode_moment(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """map[code] * scale, float32, codes' shape."""
    entries = dynamic_map() if signed else unsigned_dynamic_map()
    values = _in_blocks(entries[codes.reshape(-1).long()], NESTED_BLOCKSIZE) * scale[:, None]
    return values.reshape(-1)[: codes.numel()].reshape(codes.shape)
