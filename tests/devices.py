"""Other places for an op to run in: the emulated device, and a real one. While either is in force, CPU
tensors given to the ops that have a CUDA kernel go there and back: a test of the op tests that kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora import _C, autograd, cuda, cuda_linear, direct, multi_autograd, ops, routing

try:
    from fastlora import _emulator
except ImportError:
    _emulator = None

#: The ops, all of which have CUDA kernels; and the names by which autograd.py calls them.
OPS = tuple(ops.CUDA_OPS)
AUTOGRAD_NAMES = {
    "_linear": "nf4_linear",
    "_linear_with_u": "nf4_linear_with_u",
    "_linear_given_u": "nf4_linear_given_u",
    "_grad_input": "nf4_linear_grad_input",
    "_backward": "nf4_linear_backward",
    "_grad_b": "lora_grad_b",
    "_grad_a": "lora_grad_a",
    "_dropout": "lora_dropout",
}
#: The same of multi_autograd.py and routing.py.
MULTI_NAMES = {
    "_multi_linear": "nf4_multi_lora_linear",
    "_multi_grad_input": "nf4_multi_lora_grad_input",
    "_segmented": "segmented_lora",
    "_segmented_grad_input": "segmented_lora_grad_input",
    "_grad_pools": "segmented_lora_grad_pools",
    "_linear": "nf4_linear",
    "_grad_input": "nf4_linear_grad_input",
    "_dropout": "lora_dropout",
}
#: Emulated devices by compute capability, and what of the layer's kernels to take where they can.
EMULATED = {
    "cuda_emulated": (80, "auto"),
    "cuda_emulated_tile": (80, "tile"),
    "cuda_emulated_sm90": (90, "warpgroup"),
    "cuda_emulated_dense": (80, "dense"),
}


class EmulatedDevice(cuda.Device):
    """Runs the kernels of csrc/cuda in csrc/emulator: each may touch exactly the tensors of its call."""

    kernels = _emulator

    def __init__(self, seed: int):
        self.seed = seed

    def call(
        self, kernel: str, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None], *numbers: int
    ) -> int:
        self.seed += 1
        _emulator.set_seed(self.seed)
        registered = []
        for tensors, writable in ((inputs, False), (outputs, True)):
            for i, t in enumerate(tensors):
                if t is not None and t.numel():
                    _emulator.add_buffer(
                        t.data_ptr(), t.nbytes, writable, f"{'output' if writable else 'input'} {i}"
                    )
                    registered.append(t.data_ptr())
        try:
            return super().call(kernel, inputs, outputs, *numbers)
        finally:
            for address in registered:
                _emulator.remove_buffer(address)

    def stream(self) -> int:
        return 0

    def capturing(self) -> bool:
        return False


def _on_cuda(op: Callable[..., Any]) -> Callable[..., Any]:
    written = [
        i
        for i, a in enumerate(op.default._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]

    def moved(value: Any, device: str) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(moved(v, device) for v in value)
        return value.to(device) if isinstance(value, Tensor) else value

    def run(*args: Any) -> Any:
        there = moved(args, "cuda")
        out = op(*there)
        for i in written:
            args[i].copy_(there[i])
        return moved(out, "cpu")

    return run


@contextmanager
def device(name: str, seed: int = 1, emulated: EmulatedDevice | None = None) -> Iterator[None]:
    """One of EMULATED, or `cuda`; skips the test, with the reason, where it cannot be had. `emulated` takes
    the emulated device's calls in place of a new one with this seed."""
    if name in EMULATED:
        if _emulator is None:
            pytest.skip("this build holds no emulator (FASTLORA_EMULATOR=OFF)")
        capability, route = EMULATED[name]
        _emulator.set_traits(capability)
        taker = emulated or EmulatedDevice(seed)
        made = {op: lambda *args, op=op: ops.CUDA_OPS[op](taker, *args) for op in OPS}
    else:
        if not _C.cuda_built:
            pytest.skip("this build holds no CUDA kernels")
        if not torch.cuda.is_available():
            pytest.skip("torch found no CUDA device")
        route = "auto"
        made = {op: _on_cuda(getattr(torch.ops.fastlora, op)) for op in OPS}
    cuda.dynamic_map(torch.device("cpu"))  # which an op makes: before they are replaced
    with pytest.MonkeyPatch.context() as patch, cuda_linear.use_route(route):
        for op, function in made.items():
            patch.setattr(torch.ops.fastlora, op, function)
        for handle, op in AUTOGRAD_NAMES.items():
            patch.setattr(autograd, handle, made[op])
        for handle, op in MULTI_NAMES.items():
            patch.setattr(multi_autograd, handle, made[op])
        patch.setattr(routing, "_route", made["lora_route"])
        if name in EMULATED:
            # Torch's product stands for the device's: not by oneDNN, whose bfloat16 one makes NaN of Inf
            # where its tiles pad the contraction.
            patch.setattr(torch.backends.mkldnn, "enabled", False)
        patch.setattr(autograd, "_thin_products_are_ours", lambda dy: True)
        patch.setattr(direct, "linear", lambda *args: None)
        yield
