""":func:`initialize_loftq`: start an adapter with what quantisation lost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..dense_weights import DenseWeights
from ..methods.loftq import loftq

_PREFIX = "base_model.model."


@torch.no_grad()
def initialize_loftq(
    model: nn.Module,
    dense: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    iterations: int = 1,
) -> None:
    """Set an adapter of a peft model on QLinear to the best low-rank part of W - NF4(W) (LoftQ, Li et al.,
    2023), so that the model starts closer to the dense one than its quantised base is.

    Args:
        model: a peft model, or one that an adapter was added to, whose LoRA layers lie over QLinear.
        dense: the weights that were quantised: the dense model, its state dict, or a safetensors file or a
            folder of such files, of which one weight at a time is read.
        iterations: 1 leaves the base's bits alone, so that the adapter fits whoever quantises the same
            weights. Each further one quantises what the adapter leaves over, and fits the adapter to that:
            closer, but the base is another one then and has to be saved with the adapter.

    Where scaling is not 1 it is accounted for: scaling·lora_B·lora_A is the low-rank part.

    Raises, with nothing changed: ValueError for a model without such layers, for weights that are missing or
    of another shape, and for an adapter that no layer has; RuntimeError for a merged layer.
    """
    from .peft_layer import LoraQLinear

    if iterations < 1:
        raise ValueError(f"initialize_loftq: expected iterations >= 1, got {iterations}")
    layers = {
        name.removeprefix(_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraQLinear) and adapter_name in module.lora_A
    }
    if not layers:
        raise ValueError(
            f"initialize_loftq: expected a model with LoRA layers {adapter_name!r} over QLinear, got none"
        )
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(
            f"initialize_loftq: expected unmerged layers, got {len(merged)} that are not: {merged[0]} ..."
        )
    weights = DenseWeights(dense)
    wrong = [
        f"{name}.weight: expected {(layer.out_features, layer.in_features)}, got {shape or 'none'}"
        for name, layer in layers.items()
        if (shape := weights.shape(f"{name}.weight")) != (layer.out_features, layer.in_features)
    ]
    if wrong:
        raise ValueError("initialize_loftq: expected the model's dense weights, got\n  " + "\n  ".join(wrong))
    for name, layer in layers.items():
        _initialize(layer, weights[f"{name}.weight"], adapter_name, iterations)


def _initialize(layer: Any, weight: Tensor, name: str, iterations: int) -> None:
    base = layer.qlinear
    quantized, a, b = loftq(
        weight.to(device=base.weight.device, dtype=torch.float32),
        layer.r[name],
        scaling=float(layer.scaling[name]),
        iterations=iterations,
        blocksize=base.blocksize,
        double_quant=base.double_quant,
        quantized=base.quantized_weight,
    )
    if iterations > 1:
        base._set_base(quantized)
    layer.lora_A[name].weight.copy_(a)
    layer.lora_B[name].weight.copy_(b)
