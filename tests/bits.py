"""Bit-for-bit comparison, and weights that are hard to quantise."""

import torch

from fastlora import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def assert_same_bits(got, want, what):
    """Equal shape, dtype and bits (0.0 is not -0.0, but any NaN is any NaN: which bits it has is the
    processor's affair); the first mismatch is named by its coordinate."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}"
    view = _BITS.get(got.dtype, got.dtype)
    differ = got.contiguous().view(view) != want.contiguous().view(view)
    if got.is_floating_point():
        differ &= ~(got.isnan() & want.isnan())
    if differ.any():
        where = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.numel()} differ, the first at {where}: "
            f"{got[where].item()!r}, expected {want[where].item()!r}"
        )


def midpoints():
    return (reference.CODES[:-1] + reference.CODES[1:]) / 2


def hard_weight(shape, dtype, blocksize, seed):
    """Normal values with zero blocks, exact ties, subnormal blocks and near-maximal ones among them."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(torch.Size(shape).numel(), generator=generator)
    ties = midpoints()
    for block, kind in enumerate(torch.randint(0, 10, (-(-flat.numel() // blocksize),), generator=generator)):
        part = flat[block * blocksize : (block + 1) * blocksize]
        match int(kind):
            case 0:
                part.zero_()
            case 1:  # absmax 1: the midpoints stay midpoints
                part.copy_(ties[torch.randint(0, 15, part.shape, generator=generator)])
                part[0] = 1.0
            case 2:  # subnormal in float32 and bfloat16, zero in float16
                part.mul_(1e-39)
            case 3:
                part.mul_(1e37 if dtype != torch.float16 else 1e4)
            case 4:  # around float16's own subnormals
                part.mul_(1e-6)
    return flat.reshape(shape).to(dtype)
