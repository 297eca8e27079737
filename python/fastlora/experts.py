""":class:`QExperts`: the experts of a mixture-of-experts layer, stacked and packed in NF4, with adapters.

All experts of a projection are one Parameter of three dimensions, the expert first, and so are their scales:
slice e of each is expert e's weight exactly as :func:`fastlora.quantize_nf4` packs it alone. So a kernel is
given views, a rank of expert parallelism or FSDP2 takes whole experts with their scales, and a checkpoint's
own reshaping by experts and rows stays possible, as a row is whole bytes. One NF4 tensor over all of them
would not do: its second-level scales have one offset and groups of 256 blocks, which cross experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .experts_autograd import Dispatch, experts_linear
from .huge_pages import frozen_bytes
from .linear import check_arguments
from .nf4 import NF4Weight, quantize_nf4

_SUFFIXES = ("", "_scales", "_nested")


class SwiGLU(nn.Module):
    """silu(gate) * up, of (..., 2 * i) whose first half is the gate."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


class QExperts(nn.Module):
    """y[t] = Σ_j top_k_weights[t, j] · down_e(activation(up_e(x[t]))) with e = top_k_index[t, j]; up_e and
    down_e are what :class:`fastlora.QLinear` computes: frozen NF4 weights, and a low-rank adapter each.

    Args:
        num_experts, hidden_dim, intermediate_dim: E, h, i, at least 1.
        gated: whether the first projection makes a gate and a value, (E, 2i, h), and is called
            ``gate_up_proj``; else it is ``up_proj``, (E, i, h). The second is ``down_proj``, (E, h, i).
        activation: from the first projection's (rows, 2i or i) to (rows, i); by default :class:`SwiGLU`, or
            SiLU without a gate. A module, if the layer is to be pickled.
        bias: whether both projections have biases, (E, features).
        transposed: dense weights come, and :meth:`dequantize` gives them, as (E, in, out). Stored is always
            (E, out, in).
        rank, alpha, dropout, use_rslora, adapter_dtype: of every expert's adapters, as for QLinear.
        blocksize, double_quant, dtype, device: as for QLinear.

    Parameters, with p either projection, all with the expert first: ``p`` uint8 ``(E, n, ceil(k / 2))``,
    ``p_scales`` and ``p_nested`` uint8 ``(E, bytes)`` (p_nested None without double quantisation), ``p_bias``
    ``(E, n)``, ``p_lora_A`` ``(E, r, k)``, ``p_lora_B`` ``(E, n, r)``.

    Raises ValueError for sizes and values, TypeError for dtypes.
    """

    down_proj: nn.Parameter

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        intermediate_dim: int,
        *,
        gated: bool = True,
        activation: Callable[[Tensor], Tensor] | None = None,
        bias: bool = False,
        transposed: bool = False,
        rank: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        blocksize: int = 64,
        double_quant: bool = True,
        use_rslora: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        adapter_dtype = torch.float32 if adapter_dtype is None else adapter_dtype
        check_arguments(1, 1, rank, alpha, dropout, blocksize, dtype, adapter_dtype)
        for name, value in (
            ("num_experts", num_experts),
            ("hidden_dim", hidden_dim),
            ("intermediate_dim", intermediate_dim),
        ):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"QExperts: expected {name} as an int, got {value!r}")
            if value < 1:
                raise ValueError(f"QExperts: expected {name} >= 1, got {value}")
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden_dim, intermediate_dim
        self.gated, self.transposed = gated, transposed
        self.blocksize, self.double_quant, self.weight_dtype = blocksize, double_quant, dtype
        self.rank, self.dropout = rank, dropout
        self.set_alpha(alpha, use_rslora)
        self.activation = activation or (SwiGLU() if gated else nn.SiLU())
        self.up_name = "gate_up_proj" if gated else "up_proj"
        self._shapes = {
            self.up_name: ((2 if gated else 1) * intermediate_dim, hidden_dim),
            "down_proj": (hidden_dim, intermediate_dim),
        }
        for name, (n, k) in self._shapes.items():
            blocks = checks.block_count(n * k, blocksize)
            groups = checks.block_count(blocks, checks.NESTED_BLOCKSIZE)
            sizes = (blocks, 4 * (1 + groups)) if double_quant else (4 * blocks, None)
            shapes = ((num_experts, n, (k + 1) // 2), *((num_experts, s) if s else None for s in sizes))
            for suffix, shape in zip(_SUFFIXES, shapes, strict=True):
                self.register_parameter(name + suffix, None if shape is None else frozen_bytes(shape, device))
            for suffix, shape, there, kind in (
                ("_bias", (num_experts, n), bias, dtype),
                ("_lora_A", (num_experts, rank, k), rank, adapter_dtype),
                ("_lora_B", (num_experts, n, rank), rank, adapter_dtype),
            ):
                full = nn.Parameter(torch.empty(shape, dtype=kind, device=device)) if there else None
                self.register_parameter(name + suffix, full)
        if not self.down_proj.is_meta:
            self.reset_parameters()

    def set_alpha(self, alpha: float, use_rslora: bool = False) -> None:
        """Set the scaling to alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
        self.alpha, self.use_rslora = alpha, use_rslora
        self.scaling = 0.0 if self.rank == 0 else alpha / (math.sqrt(self.rank) if use_rslora else self.rank)

    def reset_parameters(self) -> None:
        """Draw every expert as `torch.nn.Linear` would, quantise, and reset the adapters."""
        for name, (n, k) in self._shapes.items():
            empty = partial(torch.empty, n, k, dtype=self.weight_dtype, device=self.down_proj.device)
            drawn = (nn.init.kaiming_uniform_(empty(), a=math.sqrt(5)) for _ in range(self.num_experts))
            for key, part in self._packed(name, drawn).items():
                self.get_parameter(key).detach().copy_(part)
            bias = self._parameters[name + "_bias"]
            if bias is not None:
                nn.init.uniform_(bias, -1 / math.sqrt(k), 1 / math.sqrt(k))
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Every lora_A Kaiming-uniform with a = sqrt(5), lora_B zero: the experts equal their bases again."""
        for name in self._shapes if self.rank else ():
            stack_a, stack_b = self.adapter(name)
            for a in stack_a:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(stack_b)

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """Every lora_A and lora_B."""
        for name in self._shapes if self.rank else ():
            yield from self.adapter(name)

    def adapter(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """lora_A and lora_B of a projection."""
        self._check_name("adapter", name)
        if not self.rank:
            raise ValueError("QExperts.adapter: expected a rank above 0, got 0")
        return self.get_parameter(name + "_lora_A"), self.get_parameter(name + "_lora_B")

    # --- computing ----------------------------------------------------------------------------------------

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, h) to (tokens, h), in hidden_states' dtype.

        Args:
            hidden_states: ``(tokens, h)``, float32, bfloat16 or float16.
            top_k_index: ``(tokens, top_k)`` int32 or int64, experts 0 .. E - 1; E itself is no expert.
            top_k_weights: ``(tokens, top_k)``, any float dtype; differentiable.

        Rows are sorted by expert once, and only experts that have rows are read. Scratch beside activations
        is that of one kernel call.
        """
        x = hidden_states
        if x.dim() != 2 or x.shape[1] != self.hidden_dim:
            raise ValueError(
                f"QExperts: expected hidden_states of shape (tokens, {self.hidden_dim}), got {tuple(x.shape)}"
            )
        if top_k_index.dim() != 2 or top_k_index.shape[0] != x.shape[0]:
            raise ValueError(
                f"QExperts: expected top_k_index of shape ({x.shape[0]}, top_k), got "
                f"{tuple(top_k_index.shape)}"
            )
        if top_k_index.dtype not in {torch.int32, torch.int64}:
            raise TypeError(f"QExperts: expected top_k_index in int32 or int64, got {top_k_index.dtype}")
        if top_k_weights.shape != top_k_index.shape:
            raise ValueError(
                f"QExperts: expected top_k_weights of shape {tuple(top_k_index.shape)} as top_k_index, got "
                f"{tuple(top_k_weights.shape)}"
            )
        if "parametrizations" in self._modules:
            raise RuntimeError(
                "QExperts: expected plain parameters, got parametrised ones (PEFT's target_parameters?): "
                "what they add to packed codes means nothing; give the experts a rank instead"
            )
        dispatch = Dispatch(top_k_index, self.num_experts)
        up = self._project(self.up_name, dispatch.to_experts(x), dispatch.segments)
        inner = self.activation(up)
        if inner.shape != (up.shape[0], self.intermediate_dim):
            raise ValueError(
                f"QExperts: expected activation to make {(up.shape[0], self.intermediate_dim)} of "
                f"{tuple(up.shape)}, got {tuple(inner.shape)}"
            )
        y = dispatch.to_tokens(self._project("down_proj", inner, dispatch.segments))
        return (y * top_k_weights.unsqueeze(-1)).sum(1).to(x.dtype)

    def _project(self, name: str, x: Tensor, segments: Tensor) -> Tensor:
        packed, scales, nested, bias, a, b = (
            getattr(self, name + suffix) for suffix in (*_SUFFIXES, "_bias", "_lora_A", "_lora_B")
        )
        dropout = self.dropout if self.training else 0.0
        weight = (packed, scales, nested, self.blocksize)
        scaling = self.scaling * 1.0  # see linear_from_parts
        return experts_linear(x, segments, weight, bias, a, b, scaling, dropout)

    # --- weights ------------------------------------------------------------------------------------------

    def expert(self, name: str, e: int) -> NF4Weight:
        """Expert e's weight (n, k) of a projection, over this layer's own tensors."""
        self._check_name("expert", name)
        if not 0 <= e < self.num_experts:
            raise ValueError(f"QExperts.expert: expected an expert in 0 .. {self.num_experts - 1}, got {e}")
        packed, scales, nested = (self._parameters[name + suffix] for suffix in _SUFFIXES)
        assert packed is not None
        assert scales is not None
        return NF4Weight(
            packed.detach()[e],
            scales.detach()[e],
            None if nested is None else nested.detach()[e],
            torch.Size(self._shapes[name]),
            self.weight_dtype,
            self.blocksize,
        )

    def dequantize(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """All experts' weights of a projection, dense: (E, n, k), or (E, k, n) if `transposed`; without the
        adapters. In `dtype`, by default the layer's."""
        self._check_name("dequantize", name)
        dense = torch.stack([self.expert(name, e).dequantize(dtype) for e in range(self.num_experts)])
        return dense.transpose(1, 2).contiguous() if self.transposed else dense

    def quantize(self, name: str, dense: Tensor) -> dict[str, Tensor]:
        """The parts of a projection, {parameter's name: uint8}, of its dense weights (E, n, k), or (E, k, n)
        if `transposed`, one expert at a time. Changes nothing here.

        Raises ValueError for another shape, or NaN or Inf; TypeError for other dtypes than quantize_nf4's.
        """
        self._check_name("quantize", name)
        shape = self.dense_shape(name)
        if tuple(dense.shape) != shape:
            raise ValueError(f"QExperts.quantize: expected {name} of shape {shape}, got {tuple(dense.shape)}")
        return self._packed(name, (dense.transpose(1, 2) if self.transposed else dense).detach())

    def set_weight(self, name: str, dense: Tensor) -> None:
        """Quantise a projection's dense weights into this layer, on their device. As :meth:`quantize`."""
        for key, part in self.quantize(name, dense).items():
            setattr(self, key, nn.Parameter(part, requires_grad=False))

    def _packed(self, name: str, experts: Iterable[Tensor]) -> dict[str, Tensor]:
        """Of dense matrices (n, k), one at a time."""
        out: dict[str, Tensor] = {}
        for e, dense in enumerate(experts):
            try:
                one = quantize_nf4(dense, blocksize=self.blocksize, double_quant=self.double_quant)
            except ValueError as error:
                raise ValueError(f"{error}, of {name}'s expert {e}") from error
            for suffix, part in zip(_SUFFIXES, (one.packed, one.scales, one.nested), strict=True):
                if part is None:
                    continue
                if not e:
                    out[name + suffix] = part.new_empty(self.num_experts, *part.shape)
                out[name + suffix][e] = part
        return out

    def _check_name(self, method: str, name: str) -> None:
        if name not in self._shapes:
            raise ValueError(f"QExperts.{method}: expected one of {list(self._shapes)}, got {name!r}")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        error_msgs: list[str] = args[-1]
        for name in (name + suffix for name in self._shapes for suffix in _SUFFIXES):
            loaded = state_dict.get(prefix + name)
            if loaded is not None and loaded.dtype != torch.uint8:
                error_msgs.append(
                    f"QExperts: expected {prefix}{name} in uint8 (packed NF4), got {loaded.dtype}; quantise "
                    "dense weights with QExperts.set_weight"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The projections by name, and an expert's (n, k) of each."""
        return dict(self._shapes)

    def dense_shape(self, name: str) -> tuple[int, int, int]:
        """That of a projection's dense weights: (E, n, k), or (E, k, n) if `transposed`."""
        self._check_name("dense_shape", name)
        n, k = self._shapes[name]
        return (self.num_experts, k, n) if self.transposed else (self.num_experts, n, k)

    def stored(self) -> Iterator[tuple[Tensor, int]]:
        """Every uint8 Parameter and the number of weights that it stands for, 0 for scales."""
        for name, (n, k) in self._shapes.items():
            for suffix in _SUFFIXES:
                part = self._parameters[name + suffix]
                if part is not None:
                    yield part, 0 if suffix else self.num_experts * n * k

    def nbytes_of(self, name: str) -> int:
        """Bytes of a projection's codes and scales."""
        parts = (self._parameters[name + suffix] for suffix in _SUFFIXES)
        return sum(p.nbytes for p in parts if p is not None)

    def extra_repr(self) -> str:
        adapter = f"rank={self.rank}"
        if self.rank:
            adapter += f", alpha={self.alpha}, dropout={self.dropout}"
            adapter += ", use_rslora=True" if self.use_rslora else ""
        stored = list(self.stored())
        bits = 8 * sum(part.nbytes for part, _ in stored) / sum(weights for _, weights in stored)
        return (
            f"num_experts={self.num_experts}, hidden_dim={self.hidden_dim}, "
            f"intermediate_dim={self.intermediate_dim}, gated={self.gated}, {adapter}, "
            f"blocksize={self.blocksize}, double_quant={self.double_quant}, "
            f"{bits:.3f} bits/weight"
        )
