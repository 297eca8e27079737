"""Outputs too large for the caches, and more than 2^31 weights in a few megabytes of memory.

For the latter the gigabytes are address space alone: one small file, mapped again and again up to element
2^31, and a second file beyond. An offset cut to 32 bits, signed or not, would read and write the first part
instead of the second, or fall outside of the mapping.
"""

import ctypes
import os

import pytest
import torch
from bits import assert_same_bits

from fastlora import _C, ops, reference
from fastlora import isa as levels

CHUNK = 1 << 24  # bytes of the repeated file
PROT_READ_WRITE, MAP_SHARED, MAP_FIXED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE = (
    3,
    1,
    0x10,
    2,
    0x20,
    0x4000,
)


class Mapping:
    """`head` bytes (a multiple of CHUNK) that repeat one file, then `tail` bytes of their own."""

    def __init__(self, head, tail):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.bytes, self.size = head + tail, head + -(-tail // 4096) * 4096
        self.address = self._map(None, self.size, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1)
        self._map_file(self.address, CHUNK, head // CHUNK)
        self._map_file(self.address + head, self.size - head, 1)

    def _map(self, address, length, flags, fd):
        got = self.libc.mmap(address, length, PROT_READ_WRITE, flags, fd, 0)
        if got == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "mmap")
        return got

    def _map_file(self, address, length, times):
        fd = os.memfd_create("fastlora-test")
        os.truncate(fd, length)
        for i in range(times):
            self._map(address + i * length, length, MAP_SHARED | MAP_FIXED, fd)
        os.close(fd)

    def tensor(self, dtype):
        return torch.frombuffer((ctypes.c_uint8 * self.bytes).from_address(self.address), dtype=dtype)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.libc.munmap(self.address, self.size)


def wide_levels():
    """The scalar level walks by the same code and would take a minute."""
    wide = [name for name in levels.available_isas() if name in ("avx2", "avx512")]
    return wide or ["scalar"]


# Even rows (walked flat), odd rows in pieces of several, and two long odd rows in several pieces each.
SHAPES = [(2**14 + 1, 2**17), (2**15 + 1, 2**16 + 1), (2, 2**30 + 2**20 + 1)]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux's memfd_create")
@pytest.mark.parametrize("level", wide_levels())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_past_two_to_the_31(shape, level):
    rows, cols = shape
    count, row_bytes, blocksize = rows * cols, (cols + 1) // 2, 4096
    blocks = -(-count // blocksize)
    beyond = count - 2**31
    assert beyond > 2**16
    isa, threads = levels.LEVELS[level], torch.get_num_threads()
    # The last elements, from a block boundary on; and the bytes whose elements all lie among them.
    first = max(2**31, count - 2**17) // blocksize * blocksize
    tail_bytes = beyond // 2 - rows
    codes_head = (rows * row_bytes - tail_bytes) // CHUNK * CHUNK
    codes_tail = rows * row_bytes - codes_head

    with Mapping(2 * 2**31, 2 * beyond) as weight_map, Mapping(codes_head, codes_tail) as packed_map:
        weight, packed = weight_map.tensor(torch.bfloat16), packed_map.tensor(torch.uint8)
        generator = torch.Generator().manual_seed(0)
        weight[: CHUNK // 2] = torch.randn(CHUNK // 2, generator=generator).to(torch.bfloat16)
        weight[2**31 :] = torch.randn(beyond, generator=generator).to(torch.bfloat16)
        absmax = torch.empty(blocks)
        status = _C.nf4_quantize(
            weight_map.address, 1, rows, cols, blocksize, packed_map.address, absmax.data_ptr(), threads, isa
        )
        assert status == 0
        codes, want_absmax = reference.nf4_quantize(weight[first:], blocksize)
        assert_same_bits(absmax[first // blocksize :], want_absmax, "absmax past 2^31")
        # Clones, because a failure prints its tensors after the mapping has gone.
        # As many columns of the last row as the reference coded, from an even one on.
        begin = max(0, cols - len(codes)) // 2 * 2 + 2
        span = cols - begin
        last_row = packed[(rows - 1) * row_bytes :]
        assert_same_bits(last_row[begin // 2 :].clone(), reference.nf4_pack(codes[-span:]), "codes past 2^31")

        # Back, over the weights: the file beyond 2^31 must hold the dequantised ones.
        weight[2**31 :] = 0
        scales = absmax.view(torch.uint8)
        status = _C.nf4_dequantize(
            packed_map.address,
            scales.data_ptr(),
            0,
            rows,
            cols,
            blocksize,
            0,
            0,
            weight_map.address,
            1,
            threads,
            isa,
        )
        assert status == 0
        want = reference.nf4_dequantize(codes, want_absmax, blocksize, torch.bfloat16)
        assert_same_bits(weight[count - span :].clone(), want[-span:], "dequantised past 2^31")
        del weight, packed, last_row


STREAMED = 32 << 20  # bytes of output from which it is stored past the caches: kStreamBytes of the driver


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("level", wide_levels())
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_output_past_the_caches(level, dtype, nested):
    """Aligned, and one element off; a last block, a last vector and a last byte that are not full."""
    blocksize, count = 64, STREAMED // dtype.itemsize + 64 * 64 + 37
    blocks, code = -(-count // blocksize), ops.DTYPE_CODE[dtype]
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(blocks, generator=generator) + 0.01
    absmax[7], absmax[8] = float("inf"), float("nan")
    scales, second = absmax.view(torch.uint8), None
    if nested:
        scales = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        second = torch.rand(1 + -(-blocks // 256), generator=generator).view(torch.uint8)

    def dequantize(level, out, first):
        before, after = out[:first].clone(), out[first + count :].clone()
        status = _C.nf4_dequantize(
            packed.data_ptr(),
            scales.data_ptr(),
            0 if second is None else second.data_ptr(),
            1,
            count,
            blocksize,
            0,
            0,
            out[first:].data_ptr(),
            code,
            2,
            levels.LEVELS[level],
        )
        assert status == 0
        assert_same_bits(out[:first], before, "before the output")
        assert_same_bits(out[first + count :], after, "after the output")
        return out[first : first + count]

    want = dequantize("scalar", torch.zeros(count, dtype=dtype), 0)
    held = torch.zeros(count + 128, dtype=dtype)
    aligned = -held.data_ptr() % 64 // dtype.itemsize
    for first in (aligned, aligned + 1):
        assert_same_bits(dequantize(level, held.zero_(), first), want, f"{level}, {first - aligned} off")
