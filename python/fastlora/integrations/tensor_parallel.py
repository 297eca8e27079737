"""Tensor parallelism for QLinear: styles for plans of ``torch.distributed.tensor.parallel``.

    parallelize_module(block, mesh, {"up_proj": ColwiseQLinear(), "down_proj": RowwiseQLinear()})

Parameters become DTensors of the shapes they had, so that state dicts, checkpoints and adapter files hold
what those of the whole layer hold. A rank computes with its part of the 4-bit weight, by the same kernels:

    column-wise   rows of W, lora_B and bias; lora_A everywhere        yᵢ = [ x | x·Aᵀ ] · [ Wᵢ | s·Bᵢ ]ᵀ
    row-wise      columns of W, lora_A; lora_B and bias everywhere     y = Σᵢ [ xᵢ | xᵢ·Aᵢᵀ ] · [ Wᵢ | s·B ]ᵀ

The row-wise y is linear in xᵢ·Aᵢᵀ too, so the sum that the base needs anyway is the only one: u itself is
never sent. Beside what torch's own styles send there is the gradient of the replicated half of the adapter,
once a backward pass: lora_A's (r·k numbers) column-wise, lora_B's (n·r) row-wise.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..autograd import linear_from_parts
from ..checks import NESTED_BLOCKSIZE, group_count
from ..linear import QLinear
from ..named_adapters import DEFAULT

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["ColwiseQLinear", "RowwiseQLinear"]


class _Style(ParallelStyle):
    """What the two styles share."""

    layer: ClassVar[type[_Layer]]
    wanted: ClassVar[Placement]  # of x

    def __init__(
        self, input_layouts: Placement, output_layouts: Placement, use_local_output: bool = True
    ) -> None:
        super().__init__()
        self.input_layouts, self.output_layouts = (input_layouts,), (output_layouts,)
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        name = type(self).__name__
        if isinstance(module, QLinear) and (module.merged or module.sharded):
            state = "merged" if module.merged else "sharded"
            raise RuntimeError(f"{name}: expected a whole, unmerged layer, got a {state} one")
        if type(module) is not QLinear:
            raise TypeError(f"{name}: expected a fastlora.QLinear, got {type(module).__name__}")
        if device_mesh.ndim != 1:
            raise ValueError(f"{name}: expected a mesh of one dimension, got {device_mesh.ndim}")
        self.layer.check(name, module, device_mesh.size())
        if module._table is not None:
            module.lay_apart()
        # Where every rank keeps a scale. Else they are few, and a rank that has none would not see a change.
        count = module.weight_scales.numel()
        shared = (device_mesh.size() - 1) * -(-count // device_mesh.size()) < count
        placements: dict[str, Placement] = {
            **self.layer.placements,
            "weight_scales": Shard(0) if shared else Replicate(),
            "weight_nested": Replicate(),
        }
        source = {"src_data_rank": self.src_data_rank} if hasattr(self, "src_data_rank") else {}
        for holder in (module, *(module.adapters.values() if "adapters" in module._modules else ())):
            for key, p in list(holder._parameters.items()):
                if p is not None:
                    part = distribute_tensor(p.detach(), device_mesh, [placements[key]], **source)
                    holder.register_parameter(key, nn.Parameter(part, requires_grad=p.requires_grad))
        module.__class__ = self.layer
        layer = cast(_Layer, module)
        layer.style, layer.mesh = self, device_mesh
        return layer

    def __repr__(self) -> str:
        layouts = f"input_layouts={self.input_layouts[0]}, output_layouts={self.output_layouts[0]}"
        return f"{type(self).__name__}({layouts}, use_local_output={self.use_local_output})"


class _Layer(QLinear):
    """A QLinear of which each rank of a mesh computes a part."""

    placements: ClassVar[dict[str, Placement]]
    style: _Style
    mesh: DeviceMesh
    _scales: tuple[list[tuple[Tensor, tuple[int, int]]], Tensor, Tensor | None] | None = None

    @staticmethod
    def check(name: str, layer: QLinear, ranks: int) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor | DTensor) -> Any:
        """x and the result as the style's layouts say, of features in_features and out_features over all."""
        style = self.style
        given = x if isinstance(x, DTensor) else DTensor.from_local(
            x, self.mesh, style.input_layouts, run_check=False
        )  # fmt: skip
        if given.placements != (style.wanted,):
            given = given.redistribute(placements=(style.wanted,), async_op=True)
        if given.shape[-1] != self.in_features:
            raise ValueError(
                f"{type(style).__name__}: expected x of {self.in_features} features over all ranks, got "
                f"{given.shape[-1]}"
            )
        out = self.summed(self.compute(self.local_input(given)))
        if out.placements != style.output_layouts:
            out = out.redistribute(placements=style.output_layouts, async_op=True)
        return out.to_local() if style.use_local_output else out

    def compute(self, x: Tensor) -> Tensor:
        """What this rank adds to y, or the part of it that it has."""
        scales, nested = self.local_scales()
        offsets = None if self.weight_offsets is None else _local(self.weight_offsets).detach()
        weight = (_local(self.weight).detach(), scales, nested, self.blocksize, offsets)
        bias = self.local_bias()
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if self._table is not None or self._active is None:
            return self.forward_named(x, weight, bias)
        dropout = self.dropout if self.training else 0.0
        return linear_from_parts(x, weight, bias, *self.pair(DEFAULT), self.scaling, dropout)

    def local_input(self, x: DTensor) -> Tensor:
        raise NotImplementedError

    def local_bias(self) -> Tensor | None:
        raise NotImplementedError

    def summed(self, y: Tensor) -> DTensor:
        raise NotImplementedError

    def slice_scales(self) -> tuple[Tensor, Tensor | None]:
        """Scales and nested scales of this rank's part as a weight of its own. May gather."""
        raise NotImplementedError

    def local_scales(self) -> tuple[Tensor, Tensor | None]:
        """The same, kept until the layer's scales change, which they do on all ranks or on none."""
        with torch.no_grad():
            if "_is_fsdp_managed_module" in self.__dict__:  # which changes them unseen
                return self.slice_scales()
            held = [p for p in (self.weight_scales, self.weight_nested) if p is not None]
            # An operation on a DTensor counts as one on it alone, a write to its local part as one there.
            now = [(p, (p._version, _local(p)._version)) for p in held]
            if self._scales is None or any(
                p is not q or version != other
                for (p, version), (q, other) in zip(now, self._scales[0], strict=True)
            ):
                self._scales = (now, *self.slice_scales())
            return self._scales[1:]

    def decoded(self) -> Tensor:
        """float32 (blocks,): every block's absmax, gathered. Exactly the numbers that the kernels multiply
        by."""
        nested = None if self.weight_nested is None else _local(self.weight_nested)
        return torch.ops.fastlora.nf4_decode_absmax(_gather(self.weight_scales), nested)

    def _apply(self, fn: Any, recurse: bool = True) -> _Layer:
        self._scales = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._scales = None
        super()._load_from_state_dict(*args)


class ColwiseLayer(_Layer):
    placements: ClassVar = {
        "weight": Shard(0), "weight_offsets": Shard(0), "bias": Shard(0), "lora_A": Replicate(),
        "lora_B": Shard(0),
    }  # fmt: skip

    @staticmethod
    def check(name: str, layer: QLinear, ranks: int) -> None:
        n, k, blocksize = layer.out_features, layer.in_features, layer.blocksize
        rows = -(-n // ranks)
        if (ranks - 1) * rows >= n:
            raise ValueError(
                f"{name}: expected out_features of which each of {ranks} ranks gets rows, got {n} "
                f"({rows} to a rank)"
            )
        if ranks > 1 and rows * k % blocksize:
            raise ValueError(
                f"{name}: expected the {rows} rows of a rank to be whole blocks of {blocksize} weights, got "
                f"in_features={k}; quantise with a blocksize that divides in_features"
            )

    def pair(self, name: str) -> tuple[Any, Any]:
        p = self.holder(name)._parameters
        return _everywhere(p["lora_A"]), _local(p["lora_B"])

    def local_input(self, x: DTensor) -> Tensor:
        return x.to_local(grad_placements=[Partial()])

    def local_bias(self) -> Tensor | None:
        return None if self.bias is None else _local(self.bias)

    def summed(self, y: Tensor) -> DTensor:
        shape = torch.Size((*y.shape[:-1], self.out_features))
        stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        return DTensor.from_local(
            y, self.mesh, [Shard(y.dim() - 1)], run_check=False, shape=shape, stride=stride
        )

    def slice_scales(self) -> tuple[Tensor, Tensor | None]:
        ranks, rank = self.mesh.size(), self.mesh.get_local_rank()
        rows = -(-self.out_features // ranks)
        end = min((rank + 1) * rows, self.out_features)
        each = -(-rows * self.in_features // self.blocksize)  # blocks of every rank but the last
        first, last = rank * each, -(-end * self.in_features // self.blocksize)
        # Where torch cuts the scales at the same rows, and no group of 256 blocks, they are here already.
        total = self.weight_scales.numel()
        held = -(-total // ranks) == (each if self.double_quant else 4 * each)
        held = held and isinstance(_placement(self.weight_scales), Shard)
        if held and self.weight_nested is None:
            return _local(self.weight_scales), None
        if held and self.weight_nested is not None and (ranks == 1 or each % NESTED_BLOCKSIZE == 0):
            nested = _local(self.weight_nested)
            group, groups = first // NESTED_BLOCKSIZE, -(-last // NESTED_BLOCKSIZE)
            return _local(self.weight_scales), torch.cat((nested[:4], nested[4 + 4 * group : 4 + 4 * groups]))
        return self.decoded()[first:last].clone().view(torch.uint8), None


class RowwiseLayer(_Layer):
    placements: ClassVar = {
        "weight": Shard(1), "weight_offsets": Shard(1), "bias": Replicate(), "lora_A": Shard(1),
        "lora_B": Replicate(),
    }  # fmt: skip

    @staticmethod
    def check(name: str, layer: QLinear, ranks: int) -> None:
        k, blocksize = layer.in_features, layer.blocksize
        if ranks > 1 and (k % ranks or k // ranks % blocksize):
            raise ValueError(
                f"{name}: expected in_features that give each of {ranks} ranks whole blocks of {blocksize} "
                f"weights, got {k}"
            )
        groups = group_count(layer.weight_offsets)
        if groups % ranks:
            raise ValueError(
                f"{name}: expected offsets of groups of columns that {ranks} ranks can share, got {groups} a "
                "row"
            )

    def pair(self, name: str) -> tuple[Any, Any]:
        p = self.holder(name)._parameters
        return _local(p["lora_A"]), _everywhere(p["lora_B"])

    def local_input(self, x: DTensor) -> Tensor:
        return x.to_local()

    def local_bias(self) -> Tensor | None:
        if self.bias is None:
            return None
        return _OnFirstRank.apply(_local(self.bias), self.mesh.get_local_rank() == 0)

    def summed(self, y: Tensor) -> DTensor:
        return DTensor.from_local(y, self.mesh, [Partial()], run_check=False)

    def slice_scales(self) -> tuple[Tensor, Tensor | None]:
        ranks, rank = self.mesh.size(), self.mesh.get_local_rank()
        if ranks == 1:
            return _local(self.weight_scales), None if self.weight_nested is None else _local(
                self.weight_nested
            )
        across = self.in_features // self.blocksize
        mine = slice(rank * (across // ranks), (rank + 1) * (across // ranks))
        absmax = self.decoded().reshape(self.out_features, across)[:, mine]
        return absmax.reshape(-1).clone().view(torch.uint8), None


class ColwiseQLinear(_Style):
    """Each rank has rows of W, and computes the same columns of y.

    Args: as :class:`torch.distributed.tensor.parallel.ColwiseParallel`.
        input_layouts: of x (..., k); Replicate() by default.
        output_layouts: of y (..., n); Shard(-1) by default.
        use_local_output: whether y is this rank's tensor, not a DTensor.

    Exact, whatever n is (rows are dealt as torch.chunk does), where a rank's rows are whole blocks: for any k
    that is a multiple of the block size. The stored scales are cut evenly; where that is at the same rows and
    between groups of 256 blocks (in_features / blocksize · rows a multiple of 256) a rank computes with them
    as they are, else with the absmax of its blocks decoded to float32 (4 bytes a block), which changes no bit
    of the weight.

    Forward sends nothing. Backward sums dx, as every column-wise layer, and the gradient of lora_A.

    The layer's adapters, named ones too, must be there before; they can be loaded, trained, routed and saved
    after. Dropout: each rank draws its seed; seed all alike for the mask of one process.

    Raises, before anything is changed: TypeError for another module than a QLinear, ValueError for sizes,
    RuntimeError for a layer that is merged or sharded.
    """

    layer, wanted = ColwiseLayer, Replicate()

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__(input_layouts or Replicate(), output_layouts or Shard(-1), use_local_output)


class RowwiseQLinear(_Style):
    """Each rank has columns of W and of x, and computes a term of y.

    Args: as :class:`torch.distributed.tensor.parallel.RowwiseParallel`.
        input_layouts: of x (..., k); Shard(-1) by default.
        output_layouts: of y (..., n); Replicate() by default.
        use_local_output: whether y is this rank's tensor, not a DTensor.

    The rank's part of W is exact where in_features / ranks is a multiple of the block size and each rank gets
    whole groups of offsets, if there are any; anything else is an error. It computes with the absmax of its
    blocks decoded to float32 (4 bytes a block): the groups of nested scales run across rows. y is a sum over
    ranks, so it may differ from one process's in the last bits; in 16 bits each term is rounded before it is
    summed.

    Forward sums y, as every row-wise layer, adapter included; bias is added by the first rank alone. Backward
    sums the gradient of lora_B.

    Adapters as for :class:`ColwiseQLinear`. Dropout: each rank draws a seed for its own columns. Raises as
    that one.
    """

    layer, wanted = RowwiseLayer, Shard(-1)

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__(input_layouts or Shard(-1), output_layouts or Replicate(), use_local_output)


class _OnFirstRank(torch.autograd.Function):
    """A term of a sum over ranks, which the first of them alone adds. Every rank has all of the sum's
    gradient, so that all find the same one for the term, and nothing is sent."""

    @staticmethod
    def forward(ctx: Any, term: Tensor, first: bool) -> Tensor:
        return term.clone() if first else torch.zeros_like(term)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _placement(p: Any) -> Placement:
    return p.placements[0]


def _local(p: Any) -> Any:
    """This rank's part of a parameter, with its gradient."""
    return p.to_local() if p is not None else None


def _everywhere(p: Any) -> Any:
    """A parameter that all ranks have, of whose gradient each finds a term."""
    return p.full_tensor(grad_placements=[Partial()]) if p is not None else None


def _gather(p: Any) -> Tensor:
    return p.full_tensor()
