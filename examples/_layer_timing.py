"""One large linear layer with an adapter, three ways, timed in turns on the same threads."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastlora


@dataclass
class LayerTimes:
    """Median milliseconds, and the bytes that the frozen weight takes."""

    name: str
    forward_one: float
    forward_many: float
    step: float
    weight_bytes: int


class DenseLora(nn.Module):
    """What the other two are measured against: a frozen bfloat16 weight and a low-rank pair beside it."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        n, k = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_a = nn.Parameter(torch.randn(rank, k, dtype=weight.dtype) / k**0.5)
        self.lora_b = nn.Parameter(torch.zeros(n, rank, dtype=weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        low_rank = functional.linear(functional.linear(x, self.lora_a), self.lora_b)
        return functional.linear(x, self.weight) + 2.0 * low_rank


def _dense(weight: Tensor, rank: int) -> tuple[nn.Module, int]:
    return DenseLora(weight.clone(), rank), weight.nbytes


def _fastlora(weight: Tensor, rank: int) -> tuple[nn.Module, int]:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device="meta")
    linear.weight = nn.Parameter(weight)
    layer = fastlora.QLinear.from_linear(linear, rank=rank, alpha=2 * rank)
    return layer, layer.quantized_weight.nbytes


def _peft_on_bitsandbytes(weight: Tensor, rank: int) -> tuple[nn.Module, int]:
    # They advise optional downloads, and tell of CUDA parts that a CPU build lacks.
    for talker in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(talker).setLevel(logging.CRITICAL)
    import bitsandbytes
    import peft

    n, k = weight.shape
    linear = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    linear.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    model = nn.Sequential()
    model.add_module("layer", linear)
    model = model.to("cpu")  # quantises
    state = linear.weight.quant_state
    stored = linear.weight.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # how peft knows which adapter class to use
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"])
    return peft.get_peft_model(model, config), stored


def _forward(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def _step(layer: nn.Module, x: Tensor) -> None:
    """Forward and backward: gradients of the input and of the adapter."""
    layer(x).sum().backward()
    for parameter in (x, *layer.parameters()):
        parameter.grad = None


def _medians(calls: list[Callable[[], None]], rounds: int) -> list[float]:
    """Milliseconds, A B C A B C ...: what disturbs the machine disturbs all of them alike."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, kept in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            if turn:  # the first turn warms up
                kept.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(kept) for kept in times]


def compare_layers(
    *, size: int, rows: int, rank: int, rounds: int, seed: int
) -> tuple[list[LayerTimes], str]:
    """A size x size layer in bfloat16: forward of one row and of `rows`, a training step of `rows`.

    Returns the rows of a table and a remark about a peer that is not installed ("" if all are).
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=generator).mul_(size**-0.5).bfloat16()
    one, many = (torch.randn(m, size, generator=generator).bfloat16() for m in (1, rows))
    grad_many = many.clone().requires_grad_()
    makers = {
        "dense + LoRA": _dense,
        "PEFT on bitsandbytes": _peft_on_bitsandbytes,
        "fastlora": _fastlora,
    }
    built, remark = {}, ""
    for name, make in makers.items():
        try:
            built[name] = make(weight, rank)
        except ImportError as error:
            remark = f"{name}: not installed ({error.name}), so not measured."

    def timed(
        run: Callable[[nn.Module, Tensor], None], x: Tensor, rounds: int, training: bool
    ) -> list[float]:
        layers = [layer.train(training) for layer, _ in built.values()]
        return _medians([lambda layer=layer: run(layer, x) for layer in layers], rounds)

    # Training first: bitsandbytes repacks its weight at the first call in eval mode.
    steps = timed(_step, grad_many, rounds, True)
    many_training = timed(_forward, many, rounds, True)
    many_eval = timed(_forward, many, max(1, rounds // 3), False)
    ones = timed(_forward, one, 8 * rounds, False)
    return [
        LayerTimes(name, ones[i], min(many_training[i], many_eval[i]), steps[i], stored)
        for i, (name, (_, stored)) in enumerate(built.items())
    ], remark
