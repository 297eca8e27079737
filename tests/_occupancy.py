"""How many blocks of a kernel one processor (SM) of a device holds at once: what registers, threads and
shared memory leave room for.

The limits are those of the CUDA Programming Guide, "Compute Capabilities", and the steps in which a processor
gives registers and shared memory away those of cuda_occupancy.h, which comes with the toolkit.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536  # of a processor, in four quarters, each of which has a quarter of its warps
QUARTERS = 4
REGISTER_STEP = 256  # of a warp
SHARED_STEP = 128
RESERVED = 1024  # bytes of shared memory that the driver takes of every block


@dataclass(frozen=True)
class Processor:
    shared: int  # KiB
    block_shared: int  # KiB that one block may have
    threads: int
    blocks: int


PROCESSORS = {
    "80": Processor(164, 163, 2048, 32),
    "86": Processor(100, 99, 1536, 16),
    "89": Processor(100, 99, 1536, 24),
    "90a": Processor(228, 227, 2048, 32),
    "100": Processor(228, 227, 2048, 32),
    "120": Processor(100, 99, 1536, 24),
}


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def blocks_per_processor(arch: str, registers: int, threads: int, shared: int) -> int:
    """`registers` of a thread, `shared` bytes of a block; 0: such a block cannot be launched."""
    limits = PROCESSORS[arch]
    if shared > limits.block_shared << 10:
        return 0
    of_warp = _round_up(registers * WARP, REGISTER_STEP)
    warps = -(-threads // WARP)
    return min(
        REGISTERS // QUARTERS // of_warp * QUARTERS // warps,
        (limits.shared << 10) // _round_up(shared + RESERVED, SHARED_STEP),
        limits.threads // (warps * WARP),
        limits.blocks,
    )
