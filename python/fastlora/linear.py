""":class:`QLinear`: a linear layer whose weight is packed NF4, with a low-rank adapter inside.

The packed codes and their scales are uint8 Parameters without gradients. Parameters, not buffers: FSDP2
shards them and DDP does not broadcast them every step. uint8: ``.to(dtype)``, ``.half()`` and mixed precision
cast floating tensors only, so the bits stay what quantisation made them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .autograd import linear_from_parts
from .huge_pages import frozen_bytes
from .methods import initialisation
from .nf4 import NF4Weight, quantize_nf4
from .own_adapter import OwnAdapter
from .rounding import Rounding, rounding
from .sharded import cut_like, whole

_BASE = ("weight", "weight_scales", "weight_nested", "weight_offsets")


class QLinear(OwnAdapter, nn.Linear):
    """y = x·Wᵀ + scaling · dropout(x)·lora_Aᵀ·lora_Bᵀ + bias, W frozen in NF4 (LoRA, Hu et al., 2021; QLoRA,
    Dettmers et al., 2023).

    Args:
        in_features, out_features: k and n, at least 1.
        bias: whether there is a bias; it is an ordinary parameter of `dtype` and learns.
        rank: r, the adapter's; 0 makes a plain quantised layer.
        alpha: LoRA's numerator: scaling is alpha / rank, or alpha / sqrt(rank) with `use_rslora`
            (Kalajdzievski, 2023).
        dropout: the probability in [0, 1) that an element of x is left out of the adapter's input (training).
        blocksize: weights that share one scale, a power of two from 32 to 4096.
        double_quant: whether the scales are quantised to 8 bits too (4.127 bits a weight, not 4.5, at 64).
        dtype: float32, bfloat16 or float16: the bias's, and that of :meth:`dequantize`. The layer computes in
            x's dtype, whatever it is.
        adapter_dtype: of lora_A and lora_B; by default float32, also under 16-bit layers.
        device: where; on ``"meta"`` nothing is computed.

    Built directly, the weight is drawn as `torch.nn.Linear` draws it and quantised. lora_A is Kaiming-uniform
    and lora_B zero, so the layer starts equal to its base.

    Parameters: ``weight`` uint8 ``(n, ceil(k / 2))``, ``weight_scales`` and ``weight_nested`` uint8 1-D (None
    without double quantisation), ``weight_offsets`` None or uint8 ``(n, 4 * groups)``, ``bias`` ``(n,)``,
    ``lora_A`` ``(r, k)``, ``lora_B`` ``(n, r)``.

    Raises ValueError for sizes and values, TypeError for dtypes.
    """

    weight: Tensor
    weight_scales: Tensor
    weight_nested: Tensor | None
    weight_offsets: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
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
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate the dense weight
        dtype = torch.get_default_dtype() if dtype is None else dtype
        adapter_dtype = torch.float32 if adapter_dtype is None else adapter_dtype
        check_arguments(in_features, out_features, rank, alpha, dropout, blocksize, dtype, adapter_dtype)
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.dropout = rank, dropout
        self.set_alpha(alpha, use_rslora)
        self.blocksize, self.double_quant, self.weight_dtype = blocksize, double_quant, dtype
        self._unmerged: tuple[Tensor | None, ...] | None = None  # the base while merged

        blocks = -(-in_features * out_features // blocksize)
        groups = -(-blocks // checks.NESTED_BLOCKSIZE)

        self.weight = frozen_bytes((out_features, (in_features + 1) // 2), device)
        self.weight_scales = frozen_bytes((blocks if double_quant else 4 * blocks,), device)
        nested = frozen_bytes((4 * (1 + groups),), device) if double_quant else None
        self.register_parameter("weight_nested", nested)
        self.register_parameter("weight_offsets", None)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        )
        for name, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
            adapter = torch.empty(shape, dtype=adapter_dtype, device=device)
            self.register_parameter(name, nn.Parameter(adapter) if rank else None)
        if not self.weight.is_meta:
            self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        blocksize: int = 64,
        double_quant: bool = True,
        use_rslora: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        adapter_dtype: torch.dtype | None = None,
        init: str = "default",
        calibrate: str | None = None,
        **kind: Any,
    ) -> QLinear:
        """Quantise a dense layer. Arguments as for the class; dtype and device default to the layer's own.

        init: how the adapter starts. ``"default"`` as :meth:`reset_adapter` says; ``"gaussian"``, lora_A
        normal with a standard deviation of 1 / rank; ``"loftq"``, with what quantising lost;
        ``"loftq_niter_N"``, N alternations, which change the base too; ``"pissa"``, with the principal part
        of the weight, which is taken out of the base, or ``"pissa_niter_N"``, faster and approximate. A base
        that was changed has to be saved with the adapter (`methods/loftq.py`, `methods/pissa.py`).

        calibrate: ``"icq"`` gives every block of a row the offset about which its codes say the most, for 0.5
        bits a weight (`methods/icq.py`); some 15 s for 4096 x 4096 weights on one core.

        kind: what a class derived from QLinear takes besides.

        The bias is copied: nothing of `linear` changes and nothing is shared with it. Raises TypeError if it
        is not a `torch.nn.Linear` with a floating matrix for a weight, ValueError if that holds NaN or Inf,
        or for an `init` or `calibrate` that does not fit.
        """
        initialisation.check_init("QLinear.from_linear", init, rank, alpha)
        dense = getattr(linear, "weight", None)
        if not isinstance(linear, nn.Linear) or not isinstance(dense, Tensor) or isinstance(linear, QLinear):
            raise TypeError(f"QLinear.from_linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        if dense.dim() != 2 or dense.dtype not in checks.DTYPE_CODE:
            raise TypeError(
                "QLinear.from_linear: expected a matrix of float32, bfloat16 or float16 for a weight, got "
                f"{tuple(dense.shape)} of {dense.dtype}"
            )
        n, k = dense.shape
        initialisation.check_calibrate("QLinear.from_linear", calibrate, k, blocksize)
        layer = cls(
            k,
            n,
            linear.bias is not None,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            blocksize=blocksize,
            double_quant=double_quant,
            use_rslora=use_rslora,
            dtype=dense.dtype if dtype is None else dtype,
            device="meta",
            adapter_dtype=adapter_dtype,
            **kind,
        )
        target = torch.device(dense.device if device is None else device)
        if target.type != "meta":
            if dense.is_meta:
                raise RuntimeError(
                    f"QLinear.from_linear: expected a weight with data, got a meta one for {target}"
                )
            base, pair = initialisation.start(
                init, dense, rank, layer.scaling, blocksize, double_quant, calibrate
            )
            layer._set_base(base)
            layer._materialize(target)
            if linear.bias is not None:
                with torch.no_grad():
                    layer.bias.copy_(linear.bias)
            layer.reset_adapter("default" if pair is not None else init)
            if pair is not None:
                layer.set_adapter_values(*pair)
        elif calibrate is not None:
            layer.make_room_for_offsets((n, 4 * (k // blocksize)))
        if linear.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    def _materialize(self, device: torch.device) -> None:
        """Move what has data to `device`, and allocate there what is still on meta, uninitialised."""
        for name, p in self._parameters.items():
            if p is not None:
                data = torch.empty_like(p, device=device) if p.is_meta else p.detach().to(device)
                setattr(self, name, nn.Parameter(data, requires_grad=p.requires_grad))

    def reset_parameters(self) -> None:
        """Draw the weight and bias as `torch.nn.Linear` does, quantise, and reset the adapter."""
        if self._unmerged is not None:
            self.unmerge()
        dense = torch.empty(
            self.out_features, self.in_features, dtype=self.weight_dtype, device=self.weight.device
        )
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        quantized = quantize_nf4(dense, blocksize=self.blocksize, double_quant=self.double_quant)
        with torch.no_grad():
            self.weight.copy_(cut_like(self.weight, quantized.packed))
            self.weight_scales.copy_(cut_like(self.weight_scales, quantized.scales))
            if self.weight_nested is not None and quantized.nested is not None:
                self.weight_nested.copy_(cut_like(self.weight_nested, quantized.nested))
            if self.weight_offsets is not None:
                self.weight_offsets.zero_()
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_adapter()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features), in x's dtype (autocast's where that is on)."""
        shape = x.shape
        if not shape or shape[-1] != self.in_features:
            raise ValueError(f"QLinear: expected x of shape (..., {self.in_features}), got {tuple(shape)}")
        try:  # nn.Module looks names up in a dozen times the time; what wraps a layer may keep them elsewhere
            p: dict[str, Any] = self._parameters
            weight = (
                p["weight"], p["weight_scales"], p["weight_nested"], self.blocksize, p["weight_offsets"],
            )  # fmt: skip
            bias, lora_a, lora_b = p["bias"], p["lora_A"], p["lora_B"]
        except KeyError:
            weight = self.packed_weight()
            bias, lora_a, lora_b = self.bias, self.lora_A, self.lora_B
        if self._unmerged is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "QLinear: expected an unmerged layer in training; call unmerge() or train()"
                )
            lora_a = lora_b = None
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if self._table is not None or self._active is None:
            return self.forward_named(x, weight, bias)
        dropout = self.dropout if self.training else 0.0
        return linear_from_parts(x, weight, bias, lora_a, lora_b, self.scaling, dropout)

    # --- the weight ---------------------------------------------------------------------------------------

    def packed_weight(self) -> checks.Packed:
        """The weight in force as the ops take it: this layer's own tensors."""
        return self.weight, self.weight_scales, self.weight_nested, self.blocksize, self.weight_offsets

    @property
    def quantized_weight(self) -> NF4Weight:
        """The weight in force (the merged one while merged) as an NF4Weight over this layer's own tensors. A
        sharded one is gathered, for which every rank must ask."""
        return NF4Weight(
            whole(self.weight.detach()),
            whole(self.weight_scales.detach()),
            None if self.weight_nested is None else whole(self.weight_nested.detach()),
            torch.Size((self.out_features, self.in_features)),
            self.weight_dtype,
            self.blocksize,
            None if self.weight_offsets is None else whole(self.weight_offsets.detach()),
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in force as a dense (out_features, in_features) tensor, without the adapter unless it is
        merged. In `dtype`, by default the layer's."""
        return self.quantized_weight.dequantize(dtype)

    def _set_base(self, weight: NF4Weight) -> None:
        parts = (weight.packed, weight.scales, weight.nested, weight.offsets)
        for name, part in zip(_BASE, parts, strict=True):
            setattr(self, name, None if part is None else nn.Parameter(part, requires_grad=False))

    def share_base(self, other: QLinear) -> None:
        """Hold `other`'s packed weight, the very Parameters, in place of this layer's own. Both unmerged."""
        mine, theirs = self.quantized_weight, other.quantized_weight
        if (mine.shape, mine.blocksize, mine.double_quant) != (
            theirs.shape,
            theirs.blocksize,
            theirs.double_quant,
        ):
            raise ValueError(f"QLinear.share_base: expected a layer like {self}, got {other}")
        if self.merged or other.merged:
            raise RuntimeError("QLinear.share_base: expected unmerged layers, got a merged one")
        for name in _BASE:
            setattr(self, name, getattr(other, name))

    @property
    def merged(self) -> bool:
        """Whether the adapter is folded into the weight."""
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self) -> Rounding | None:
        """Fold the active adapter into the weight for inference: W becomes NF4(W + scaling·lora_B·lora_A).

        This is lossy: the sum is quantised again, and an adapter's change is often smaller than the distance
        between two codes. To lose nothing, stay unmerged (the fused kernel makes the adapter nearly free), or
        keep a dense copy, :meth:`merged_weight`. What it cost is measured, and returned.

        The original bits are kept beside the merged ones until :meth:`unmerge` gives them back exactly.
        While merged, ``state_dict`` holds the original bits and the adapter, as if unmerged;
        ``load_state_dict`` and ``train()`` unmerge first; a training forward is an error. No effect, and
        None, when already merged, or at rank 0. Raises, changing nothing, ValueError if the sum holds NaN or
        Inf, and RuntimeError for a sharded layer.
        """
        if self._unmerged is not None or self.active_adapter is None:
            return None
        if self.sharded:
            raise RuntimeError("merge: expected a layer whose parameters are whole, got a sharded one")
        base, wanted = self.dequantize(torch.float32), self.merged_weight()
        merged = self.quantized_again(wanted)
        # The Parameters themselves are kept, not copies, so that layers that share a weight share it again.
        self._unmerged = tuple(getattr(self, name) for name in _BASE)
        self._set_base(merged)
        return rounding("", base, wanted, merged.dequantize(torch.float32))

    def quantized_again(self, dense: Tensor) -> NF4Weight:
        """What :meth:`merge` puts in the weight's place for a dense (n, k). Offsets stay what they are."""
        return quantize_nf4(
            dense,
            blocksize=self.blocksize,
            double_quant=self.double_quant,
            offsets=self.quantized_weight.offset_values,
        )

    def unmerge(self) -> None:
        """Give the weight its original bits back. No effect when not merged."""
        if self._unmerged is not None:
            for name, part in zip(_BASE, self._unmerged, strict=True):
                setattr(self, name, part)
            self._unmerged = None

    def train(self, mode: bool = True) -> QLinear:
        """As `torch.nn.Module.train`; entering training unmerges."""
        if mode:
            self.unmerge()
        return super().train(mode)

    # --- what torch.nn.Module does to its tensors ----------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLinear:
        super()._apply(fn, recurse)
        if self._unmerged is not None:
            self._unmerged = tuple(None if part is None else _applied(fn, part) for part in self._unmerged)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unmerged is not None:
            for name, part in zip(_BASE, self._unmerged, strict=True):
                if part is not None:
                    destination[prefix + name] = part if keep_vars else part.detach()
                else:
                    destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in _BASE:  # torch would cast a dense weight of a fitting shape without a word
            loaded = state_dict.get(prefix + name)
            if loaded is not None and loaded.dtype != torch.uint8:
                error_msgs.append(
                    f"QLinear: expected {prefix}{name} in uint8 (packed NF4), got {loaded.dtype}; quantise a "
                    "dense layer with QLinear.from_linear"
                )
                return
        self.unmerge()
        offsets = state_dict.get(prefix + "weight_offsets")
        if offsets is not None and self.weight_offsets is None:
            try:
                self.make_room_for_offsets(offsets.shape)
            except (ValueError, RuntimeError) as error:
                error_msgs.append(str(error))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def make_room_for_offsets(self, shape: Sequence[int]) -> None:
        """Give the layer a parameter ``weight_offsets``, uninitialised, to be loaded into. Raises ValueError
        for a shape other than (n, 4 * groups), RuntimeError on a sharded layer."""
        if self.sharded:
            raise RuntimeError(
                "QLinear: expected no weight_offsets for a sharded layer that has none, got some"
            )
        groups = shape[-1] // 4 if len(shape) == 2 else 0
        if tuple(shape) != (self.out_features, 4 * groups) or not groups or self.in_features % groups:
            raise ValueError(
                f"QLinear: expected weight_offsets of shape ({self.out_features}, 4 * groups), groups a "
                f"divisor of {self.in_features}, got {tuple(shape)}"
            )
        self.weight_offsets = frozen_bytes(shape, self.weight.device)

    def extra_repr(self) -> str:
        adapter = (
            f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, " if self.rank else "rank=0, "
        )
        stored = sum(p.nbytes for p in map(self._parameters.get, _BASE) if p is not None)
        groups = checks.group_count(self.weight_offsets)
        bits = 8 * stored / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {adapter}blocksize={self.blocksize}, "
            f"double_quant={self.double_quant}, {f'offset_groups={groups}, ' if groups else ''}"
            f"{bits:.3f} bits/weight"
            f"{', use_rslora=True' if self.use_rslora else ''}{', merged' if self.merged else ''}"
            f"{'' if self._table is None else f', active={self.active_adapter}'}"
        )


def _applied(fn: Callable[[Tensor], Tensor], parameter: Tensor) -> Tensor:
    """fn over a parameter, in place where torch can, so that who shares the parameter sees it too."""
    data = fn(parameter.data)
    if torch._has_compatible_shallow_copy_type(parameter.data, data):
        parameter.data = data
        return parameter
    return nn.Parameter(data, requires_grad=False)


def check_arguments(
    in_features: int,
    out_features: int,
    rank: int,
    alpha: float,
    dropout: float,
    blocksize: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
) -> None:
    for name, value, least in (
        ("in_features", in_features, 1),
        ("out_features", out_features, 1),
        ("rank", rank, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"QLinear: expected {name} as an int, got {value!r}")
        if value < least:
            raise ValueError(f"QLinear: expected {name} >= {least}, got {value}")
    if not math.isfinite(alpha):
        raise ValueError(f"QLinear: expected a finite alpha, got {alpha}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"QLinear: expected dropout in [0, 1), got {dropout}")
    checks.check_blocksize("QLinear", blocksize)
    for name, dt in (("dtype", dtype), ("adapter_dtype", adapter_dtype)):
        if dt not in checks.DTYPE_CODE:
            raise TypeError(f"QLinear: expected {name} float32, bfloat16 or float16, got {dt}")
