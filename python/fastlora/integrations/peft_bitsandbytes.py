"""bitsandbytes' 4-bit layer, computed by our kernels: the same module and the same weight, another product.

A Params4bit's codes are NF4's bytes as our kernels read them, so the layer reads them where they lie. Of the
scales only the second level (a 4096 x 4096 layer's is 4 KiB) is laid out anew. What was read is kept beside
the tensors that it was read from, and read again when one of them is another: after a merge, `.to`,
`load_state_dict`, or a repacking by bitsandbytes itself.
"""

from __future__ import annotations

import contextlib
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import Tensor, nn

from .. import checks
from ..autograd import linear_from_parts
from ..checks import Packed
from ..nf4 import NF4Weight
from . import bitsandbytes_weight
from .operands import FusedBase, Operands, computes_on
from .peft_fused_layers import Fused


class Kept:
    """What was read of a weight, and what it was read from. A copy of the layer reads for itself."""

    packed: Packed | None = None
    address = 0
    state: Any = None
    absmax: Tensor | None = None
    offset: Tensor | None = None
    second: Tensor | None = None
    written = 0

    def read_from(self, state: Any, address: int) -> bool:
        """Whether it still is what these hold. Codes and first scales are views; the second level is a copy,
        of which writes in place count."""
        if self.state is not state or self.address != address or self.absmax is not state.absmax:
            return False
        if not state.nested:
            return True
        second, offset = state.state2.absmax, state.offset
        return self.second is second and self.offset is offset and self.written == _written(second, offset)

    def remember(self, state: Any, address: int) -> None:
        self.state, self.address, self.absmax = state, address, state.absmax
        if state.nested:
            self.second, self.offset = state.state2.absmax, state.offset
            self.written = _written(state.state2.absmax, state.offset)

    def __deepcopy__(self, memo: dict[int, object]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


class FusedLinear4bit(FusedBase, bnb.nn.Linear4bit):
    """bitsandbytes' Linear4bit over an NF4 weight. It neither dequantises the weight in training nor repacks
    it in evaluation; whatever it cannot read (see :func:`why_not`) goes the way it went."""

    stock: type = bnb.nn.Linear4bit
    _kept = Kept()

    def prepare(self) -> None:
        """Once it has this class."""
        unpack(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        operands = self.operands(x)
        if operands is None:
            return bnb.nn.Linear4bit.forward(self, x)
        return linear_from_parts(*operands, None, None, 0.0).to(x.dtype)

    def operands(self, x: Tensor) -> Operands | None:
        """As in FusedBase; x in the dtype that bitsandbytes would compute in."""
        weight = self.packed()
        if weight is None or x.device != weight[0].device:
            return None
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        dtype = self.compute_dtype or x.dtype
        if dtype not in checks.DTYPE_CODE:
            return None
        bias = self._parameters["bias"]
        return x.to(dtype), weight, bias if bias is None or bias.dtype == dtype else bias.to(dtype)

    def packed(self) -> Packed | None:
        """The weight as the kernels take it, or None where they cannot."""
        weight: Any = self._parameters["weight"]
        state = getattr(weight, "quant_state", None)
        if state is None:
            if self.quant_state is None:
                return None
            fix_4bit_weight_quant_state_from_module(self)  # FSDP puts in a plain tensor
            weight, state = self.weight, self.quant_state
        if torch.compiler.is_compiling():
            return _traced(weight, state, self.out_features, self.in_features)
        kept = self._kept
        if not kept.read_from(state, _address(weight)):
            kept = Kept()
            if _obstacle(self) is None:
                unpack(weight)
                with contextlib.suppress(TypeError, ValueError):
                    kept.packed = read(weight)
            kept.remember(state, _address(weight))
            self._kept = kept
        return kept.packed


class FusedLinearNF4(FusedLinear4bit, bnb.nn.LinearNF4):
    """The same of bitsandbytes' subclass."""

    stock = bnb.nn.LinearNF4


class FusedLoraLinear4bit(Fused, LoraLinear4bit):
    """PEFT's LoRA layer over one."""

    stock = LoraLinear4bit


# PEFT and accelerate look at these names.
for _fused in (FusedLinear4bit, FusedLinearNF4, FusedLoraLinear4bit):
    _fused.__name__ = _fused.stock.__name__


def fused_class(layer: nn.Module) -> type[nn.Module] | None:
    """The class that computes what a layer of bitsandbytes does; None where none of ours can."""
    if type(layer) in {FusedLinear4bit, FusedLinearNF4}:
        return type(layer)
    return {bnb.nn.Linear4bit: FusedLinear4bit, bnb.nn.LinearNF4: FusedLinearNF4}.get(type(layer))


def is_repacked(layer: Any) -> bool:
    """Whether bitsandbytes' evaluation has changed the layout of a layer's weight."""
    return bitsandbytes_weight.is_repacked(getattr(layer.weight, "quant_state", None))


def why_not(layer: Any) -> str | None:
    """Why our kernels cannot read a layer's weight where it lies; None if they can. Changes nothing."""
    obstacle = _obstacle(layer)
    if obstacle is not None or is_repacked(layer):
        return obstacle
    try:
        read(layer.weight)
    except (TypeError, ValueError) as error:
        return str(error).partition(" got: ")[2] or str(error)
    return None


def _obstacle(layer: Any) -> str | None:
    """What of it can be seen without looking into the tensors."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return "its weight is not quantised yet"
    if state.quant_type != "nf4":
        return f"its codes are {str(state.quant_type).upper()}, not NF4"
    if tuple(state.shape) != (layer.out_features, layer.in_features):
        return f"its weight is {tuple(state.shape)}, not {(layer.out_features, layer.in_features)}"
    if layer.in_features % 2:
        return "its rows are not whole bytes (in_features is odd)"
    if not computes_on(layer.weight.device):
        return f"its weight is on {layer.weight.device}, for which this build has no kernels"
    return None


def read(weight: Tensor) -> Packed:
    """A Params4bit as the kernels take it, over its own codes. Raises ValueError or TypeError where it is
    none of ours."""
    state: Any = weight.quant_state  # type: ignore[attr-defined]
    with torch.inference_mode(False), torch.no_grad():  # it may serve a training step later
        with torch._C.DisableTorchFunctionSubclass():
            codes = weight.detach()
        tensors = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        got = NF4Weight.from_bitsandbytes({"weight": codes, **tensors})
    return got.parts


def unpack(weight: Any) -> None:
    """Undo the layout that bitsandbytes' evaluation on a CPU gives a weight, in place, where it has."""
    state = weight.quant_state
    if bitsandbytes_weight.is_repacked(state):
        bitsandbytes_weight.lay_out(weight)
        state.original_nested = state.nested = False
        state.state2 = state.offset = None


def _address(weight: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():  # a subclass's methods take several times as long
        return weight.data_ptr()


def _written(second: Any, offset: Any) -> int:
    """How often they were written in place."""
    count = 0 if second.is_inference() else second._version
    return count if offset.is_inference() else count + offset._version


def _traced(weight: Tensor, state: Any, n: int, k: int) -> Packed | None:
    """:func:`read` within a graph, where what differs is part of the graph's guards."""
    if state.quant_type != "nf4" or getattr(state, "packing_format_for_cpu", False) or k % 2:
        return None
    if state.blocksize not in checks.BLOCKSIZES or not computes_on(weight.device):
        return None
    codes = weight.detach().view(torch.uint8).view(n, k // 2)
    if not state.nested:
        return codes, state.absmax.float().reshape(-1).view(torch.uint8), None, state.blocksize, None
    if state.state2.blocksize != checks.NESTED_BLOCKSIZE:
        return None
    nested = torch.cat((state.offset.reshape(1).float(), state.state2.absmax.float()))
    return codes, state.absmax, nested.view(torch.uint8), state.blocksize, None
