"""The memory that fine-tuning takes, by formula: what `estimate` shows.

Bytes a weight:

=====================  =======  =========  ======================
of a weight            itself    gradient   AdamW's two moments
=====================  =======  =========  ======================
trained, full          2        2          8
trained, an adapter    4        4          8
frozen, 16 bits        2        0          0
frozen, NF4            0.516    0          0
=====================  =======  =========  ======================

Full fine-tuning is that of the QLoRA paper, which counts 780 GB for 65B weights: everything in 16 bits but
the moments. Adapters are kept in float32, as QLinear does by default. NF4 at block size 64 with double
quantisation is 4.127 bits; what is no linear layer of a block stays in 16 bits.

Activations, for a number of tokens in a step T, with the input of every block kept and the block computed
again in the backward pass, in 16 bits: 2·T·hidden a block; 2·T·Σ(in + out) over the linear layers of the one
block that is live; and 10·T·vocab for the logits (16 bits, their float32 copy, and its gradient).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import NESTED_BLOCKSIZE, block_count
from .model_sizes import ModelSizes

_TRAINED, _ADAPTER, _FROZEN = (2, 2, 8), (4, 4, 8), 2


@dataclass(frozen=True)
class Memory:
    """Bytes on the device; `host` are those of the optimiser's states that may leave it."""

    method: str
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def nf4_bytes(out_features: int, in_features: int, blocksize: int = 64) -> int:
    """Of a double-quantised matrix: codes, an 8-bit scale a block, a float32 for every 256 of those."""
    blocks = block_count(out_features * in_features, blocksize)
    groups = block_count(blocks, NESTED_BLOCKSIZE)
    return out_features * ((in_features + 1) // 2) + blocks + 4 * (1 + groups)


def adapter_weights(model: ModelSizes, rank: int, targets: Sequence[str] | None = None) -> int:
    """Trainable weights: rank · (in + out) for every layer that has an adapter."""
    return model.layers * sum(rank * (n + k) for n, k in model.selected(targets))


def activation_bytes(model: ModelSizes, tokens: int) -> int:
    live = sum(n + k for n, k in model.linears.values())
    return tokens * (2 * model.hidden * model.layers + 2 * live + 10 * model.vocab)


def methods(
    model: ModelSizes, rank: int = 16, targets: Sequence[str] | None = None, tokens: int = 0
) -> list[Memory]:
    """Full fine-tuning, LoRA, QLoRA, and QLoRA with a paged optimiser."""
    activations = activation_bytes(model, tokens)
    trainable = adapter_weights(model, rank, targets)
    packed = model.layers * sum(nf4_bytes(n, k) for n, k in model.linears.values()) + _FROZEN * model.other
    dense = _FROZEN * model.weights
    weight, gradient, moments = (each * model.weights for each in _TRAINED)
    of_a, of_ga, of_ma = (each * trainable for each in _ADAPTER)
    return [
        Memory("full fine-tuning", model.weights, weight, gradient, moments, activations),
        Memory("LoRA", trainable, dense + of_a, of_ga, of_ma, activations),
        Memory("QLoRA", trainable, packed + of_a, of_ga, of_ma, activations),
        Memory("QLoRA, paged", trainable, packed + of_a, of_ga, 0, activations, of_ma),
    ]
