"""The layers that are measured by default: n x k, attention and MLP of common models."""

from __future__ import annotations

SHAPES = (
    (4096, 4096),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (11008, 4096),
    (3584, 3584),
    (4304, 1152),
    (1152, 4304),
)
FIVE = SHAPES[:5]

CUDA_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
CUDA_ROWS = tuple(2**i for i in range(14))  # 1 to 8192


def targeted(device: str) -> tuple[tuple[int, int], ...]:
    """The shapes that the targets' means go over."""
    return CUDA_SHAPES if device == "cuda" else FIVE
