""":func:`patch_bitsandbytes`: bitsandbytes' own 4-bit layers computed by our kernels, for the whole process.

No module, weight or file changes. What is replaced: the kernels of bitsandbytes' 4-bit operators, the forward
of its Linear4bit (which would repack the weight in evaluation), and the backward of its autograd function.
"""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from .. import _C, checks, direct
from . import bitsandbytes_weight as weights
from .versions import numbers, text

#: bitsandbytes' versions that this is tested with: from the first, below the second.
SUPPORTED = ((0, 50, 2), (0, 51))


class _Patch:
    """What is in place, and what was there before."""

    def __init__(self, device_types: tuple[str, ...]) -> None:
        from bitsandbytes.autograd._functions import MatMul4Bit
        from bitsandbytes.nn import Linear4bit, modules

        from .bitsandbytes_ops import Operators

        ours = (
            (Linear4bit, "forward", _forward),
            (Linear4bit, "_save_to_state_dict", _save_to_state_dict),
            (MatMul4Bit, "backward", staticmethod(_backward)),
            (modules, "_convert_weight_packed_for_cpu", _convert_weight_packed_for_cpu),
        )
        self.device_types = device_types
        self.operators: list[Operators] = []
        self.replaced: list[tuple[Any, str, Any]] = []
        try:
            for device_type in device_types:
                self.operators.append(Operators(device_type))
            for owner, name, function in ours:
                theirs = owner.__dict__[name]
                _theirs[name] = getattr(theirs, "__func__", theirs)
                self.replaced.append((owner, name, theirs))
                setattr(owner, name, function)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        for owner, name, theirs in self.replaced:
            setattr(owner, name, theirs)
        for operators in self.operators:
            operators.remove()


_patch: _Patch | None = None
#: bitsandbytes' functions, kept afterwards for whoever has bound one of ours meanwhile.
_theirs: dict[str, Any] = {}


def patch_bitsandbytes(*, cuda: bool = False) -> None:
    """Let bitsandbytes' 4-bit layers in NF4 compute with our kernels, everywhere in this process.

    Layers that exist and layers to come, under PEFT or bare, in training and evaluation: forward and the
    gradient of the input are fused, with no dense weight between; quantising and dequantising give
    bitsandbytes' bits. Modules, weights and state dicts stay bitsandbytes' own; FP4 is left to it.
    :func:`unpatch_bitsandbytes` undoes it; a second call does nothing.

    Args:
        cuda: on CUDA devices too. Off by default: nothing there was measured against bitsandbytes' kernels.

    Compiled models are compiled again, and a model compiled in another process is not affected.

    Raises ImportError without a bitsandbytes or a torch that is supported; RuntimeError if `cuda` is asked
    for without a device or a build with CUDA kernels. Nothing is changed then.
    """
    global _patch  # noqa: PLW0603
    require()
    if cuda and not (torch.cuda.is_available() and _C.cuda_built):
        lacks = "a build with CUDA kernels" if torch.cuda.is_available() else "a CUDA device"
        raise RuntimeError(f"patch_bitsandbytes: expected {lacks} for cuda=True, found none")
    device_types = ("cpu", "cuda") if cuda else ("cpu",)
    if _patch is not None:
        if _patch.device_types == device_types:
            return
        unpatch_bitsandbytes()
    _patch = _Patch(device_types)
    _compile_again()


def unpatch_bitsandbytes() -> None:
    """Undo :func:`patch_bitsandbytes`: bitsandbytes computes exactly as before, and weights that its
    evaluation had repacked are so again. Nothing happens where nothing is patched."""
    global _patch  # noqa: PLW0603
    if _patch is None:
        return
    _patch.remove()
    _patch = None
    weights.repack_all()
    weights.forget_scales()
    _compile_again()


def require() -> None:
    """ImportError unless bitsandbytes and torch are of versions that can be patched."""
    least, below = map(text, SUPPORTED)
    wanted = f"patch_bitsandbytes: expected bitsandbytes >= {least}, < {below}"
    try:
        found = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        raise ImportError(f"{wanted}, got none installed") from None
    if not SUPPORTED[0] <= numbers(found) < SUPPORTED[1]:
        raise ImportError(f"{wanted}, got {found}")
    if not hasattr(torch.library, "get_kernel"):
        raise ImportError(f"patch_bitsandbytes: expected torch >= 2.9, got {torch.__version__}")


def _compile_again() -> None:
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


# --- in the place of bitsandbytes' functions ----------------------------------------------------------------


def _takes(x: Tensor, state: Any) -> bool:
    return (
        _patch is not None
        and x.device.type in _patch.device_types
        and state is not None
        and state.quant_type == "nf4"
        and state.blocksize in checks.BLOCKSIZES
        and (not state.nested or state.state2.blocksize == weights.BLOCKSIZE_OF_SCALES)
        and len(state.shape) == 2
    )


def _forward(self: Any, x: Tensor) -> Tensor:
    """Linear4bit's, which changes neither the weight nor the bias."""
    weight = self.weight
    state = getattr(weight, "quant_state", None)
    if state is None:  # FSDP puts in a plain tensor
        from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

        fix_4bit_weight_quant_state_from_module(self)
        weight = self.weight
        state = weight.quant_state
    if not _takes(x, state) or x.shape[-1] != state.shape[1]:
        return _theirs["forward"](self, x)
    if not self.compute_type_is_set:
        self.set_compute_type(x)
        self.compute_type_is_set = True
    dtype = x.dtype if self.compute_dtype is None else self.compute_dtype
    if dtype not in checks.DTYPE_CODE:
        return _theirs["forward"](self, x)
    if weights.is_repacked(state):
        weights.unpack(self)
    seen = x.to(dtype)
    bias = self.bias
    if bias is not None:
        bias = bias.to(dtype)
    learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if learns or torch.compiler.is_compiling() or type(seen) is not Tensor or state.shape[1] % 2:
        from bitsandbytes import matmul_4bit

        return matmul_4bit(seen, weight, bias=bias, quant_state=state).to(x.dtype)
    packed = weights.packed(weights.of_state(weight, state))
    y = direct.linear(seen, packed, bias, None, None, 1.0)
    if y is None:
        y = torch.ops.fastlora.nf4_linear.default(seen, *packed[:4], bias, None, None, 1.0)
    return y.to(x.dtype)


def _save_to_state_dict(self: Any, *args: Any) -> None:
    """Linear4bit's, from the layout in which bitsandbytes would find the weight."""
    weights.repack(self)
    _theirs["_save_to_state_dict"](self, *args)


def _convert_weight_packed_for_cpu(data: Tensor, state: Any, *args: Any) -> tuple[Tensor, Any]:
    """What Linear4bit's own forward repacks by, for those who bound it before: an NF4 weight stays."""
    if _patch is not None and state.quant_type == "nf4":
        return data, state
    return _theirs["_convert_weight_packed_for_cpu"](data, state, *args)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """MatMul4Bit's."""
    from .bitsandbytes_ops import bias_gradient, grad_input

    if ctx.is_empty or not _takes(dy, ctx.state) or dy.dtype not in checks.DTYPE_CODE:
        return _theirs["backward"](ctx, dy)
    needs_x, _, _, needs_bias, _ = ctx.needs_input_grad
    dx = grad_input(dy, weights.of_state(ctx.tensors[1], ctx.state)) if needs_x else None
    return dx, None, None, bias_gradient(dy, ctx.dtype_bias) if needs_bias else None, None
