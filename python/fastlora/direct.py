"""The short way to the ``nf4_linear`` kernel, for a call that torch would only pass on.

torch's dispatcher takes 3 us to hand a call with nine arguments to Python, and looking at seven tensors from
there takes as long again: more than a small layer computes. Where no part of torch has a say in a call, both
can be left out: :func:`linear` calls the kernel on the tensors as they are, or answers None, having done
nothing, and then the op is to be called. So whatever watches or changes ops meets the op (compilation,
export, dispatch and function modes, functorch, the tracer, the profiler), and so does every tensor that is
not a plain contiguous one on a CPU, and every call with an error in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C, isa
from .checks import Packed

_is_compiling = torch.compiler.is_compiling


def _setup() -> bool:
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # recent versions of torch
    return api is not None and _C.nf4_linear_direct_setup(Tensor, torch.nn.Parameter, torch.empty, api)


#: Whether this torch lets its tensors be read from C, and its state be asked: it promises none of these.
AVAILABLE: bool
try:
    _function_modes = torch._C._len_torch_function_stack
    _profiler_is_on = torch._C._autograd._profiler_enabled
    _keys = torch._C._dispatch_tls_local_include_set
    # The dispatch keys that a thread adds to every call: these, and each mode adds one of its own.
    _INFERENCE = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    _NORMAL = _INFERENCE.add(torch._C.DispatchKey.ADInplaceOrView)
    AVAILABLE = _setup()
except AttributeError:
    AVAILABLE = False


def unwatched() -> bool:
    """Whether nothing in this thread watches or changes ops."""
    if not AVAILABLE or _is_compiling() or _function_modes() or _profiler_is_on():
        return False
    keys = _keys()
    # A DispatchKeySet has no hash, and `in` is slower.
    return bool(keys == _NORMAL or keys == _INFERENCE)  # noqa: PLR1714, SIM109


def linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> Tensor | None:
    """``nf4_linear``, where no gradient is wanted, or None: call the op."""
    if not unwatched():
        return None
    return _C.nf4_linear_direct(
        x, weight, bias, lora_a, lora_b, scaling, torch.get_num_threads(), isa._current
    )
