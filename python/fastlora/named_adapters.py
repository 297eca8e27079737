"""Adapters by name on one layer: what of QLinear is about having several.

A layer with named adapters keeps all of them, its own too, in an AdapterTable. The own one, "default", stays
the layer's lora_A and lora_B; another is ``layer.adapters[name]``, a module with parameters of these names.
All are views of the table's pools, which is kept so by whatever torch does to a module's parameters; where
those are sharded, or will be, they lie apart instead (`adapters_apart.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, optimizer_strides
from .active import Place
from .adapter_pairs import LowRank, Pair, compact
from .adapter_table import AdapterTable
from .adapters_apart import ApartAdapters
from .autograd import linear_from_parts
from .checks import Packed
from .multi_autograd import NO_DROPOUT, Dropout, multi_linear
from .routing import uniform
from .sharded import gathered, is_sharded

DEFAULT = "default"


class Adapter(nn.Module):
    """A named adapter of a layer. Parameters ``lora_A`` ``(r, k)``, ``lora_B`` ``(n, r)``: rows of its table.

    dropout and, by :meth:`set_alpha`, the scaling may be changed at any time outside a block of
    :func:`fastlora.adapters`.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, rank: int, alpha: float, use_rslora: bool, dropout: float) -> None:
        super().__init__()
        self.rank, self.dropout = rank, dropout
        self.file_dtype: torch.dtype | None = None  # of the file it was loaded from
        self.set_alpha(alpha, use_rslora)

    def set_alpha(self, alpha: float, use_rslora: bool = False) -> None:
        """Set the scaling to alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
        self.alpha, self.use_rslora = alpha, use_rslora
        self.scaling = alpha / (math.sqrt(self.rank) if use_rslora else self.rank)

    def reset(self) -> None:
        """lora_A Kaiming-uniform with a = sqrt(5), lora_B zero: the layer with it equals its base."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def extra_repr(self) -> str:
        rslora = ", use_rslora=True" if self.use_rslora else ""
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}{rslora}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        return _deepcopy(self, self.__dict__, memo)

    def __getstate__(self) -> dict[str, Any]:  # for pickle
        return self.__dict__ | {"_parameters": _compact(self._parameters)}


class Parts(NamedTuple):
    """An adapter, the layer's own or a named one."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    rank: int
    alpha: float
    use_rslora: bool
    scaling: float
    dropout: float
    magnitude: nn.Parameter | None = None  # of DoRA


class NamedAdapters(nn.Module):
    """Mixed into QLinear, whose attributes it uses."""

    # There while there are named adapters, or some were routed, or they are to lie apart.
    _table: AdapterTable | ApartAdapters | None = None
    _active: str | None = DEFAULT
    _single: tuple[Tensor, Tensor, float] | None = None  # entries and scaling of the active one, by itself
    _kinds: tuple[object, Tensor | None] = (None, None)
    place: Place | None = None  # where fastlora.adapters says what rows are routed by

    if TYPE_CHECKING:
        in_features: int
        out_features: int
        rank: int
        alpha: float
        use_rslora: bool
        scaling: float
        dropout: float
        weight: Tensor
        lora_B: Tensor | None
        adapters: nn.ModuleDict

        @property
        def merged(self) -> bool: ...

    def add_adapter(
        self,
        name: str,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        use_rslora: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Adapter:
        """Give the layer another adapter, which is returned: ``layer.adapters[name]``. It starts equal to the
        base, learns, and has no effect until rows are sent to it: by :meth:`set_adapter` all, by
        :func:`fastlora.adapters` some.

        rank, alpha, dropout and use_rslora are as for the layer. dtype: of its parameters; all adapters of a
        layer have one dtype, by default that of those it has, else float32. The layer's lora_B and those of
        its adapters become views of a common pool, whose strides are (1, n): make optimisers after the last
        adapter.

        Raises ValueError for a name that is taken or "default", RuntimeError inside a block of
        :func:`fastlora.adapters` and on a layer that is merged, sharded or laid apart.
        """
        self._check_change("add_adapter")
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"add_adapter: expected a name without a dot, got {name!r}")
        if name == DEFAULT or name in self.adapter_names:
            raise ValueError(f"add_adapter: expected a new name, got {name!r}; this layer has {self._has()}")
        check_adapter("add_adapter", rank, alpha, dropout)
        held = [parts.lora_A for one in self.adapter_names for parts in (self.adapter(one),)]
        kind = held[0].dtype if held else dtype or torch.float32
        if kind not in checks.DTYPE_CODE:
            raise TypeError(f"add_adapter: expected dtype float32, bfloat16 or float16, got {kind}")
        if dtype not in {None, kind}:
            raise TypeError(f"add_adapter: expected dtype {kind}, as the layer's other adapters, got {dtype}")
        table = self._pooled("add_adapter", more=rank, dtype=kind)
        adapter = Adapter(rank, alpha, use_rslora, dropout)
        a = torch.empty(rank, self.in_features, dtype=kind, device=table.device)
        b = torch.empty(self.out_features, rank, dtype=kind, device=table.device)
        adapter.lora_A, adapter.lora_B = nn.Parameter(a), nn.Parameter(b)
        adapter.reset()
        table.register(name, adapter.lora_A, adapter.lora_B, adapter.scaling)
        optimizer_strides.watch([adapter.lora_B])
        if "adapters" not in self._modules:
            self.adapters = nn.ModuleDict()
        self.adapters[name] = adapter
        return adapter.train(self.training)

    def set_adapter(self, name: str | None) -> None:
        """The adapter of all rows, outside blocks of :func:`fastlora.adapters`; None: the base alone. Which
        parameters learn stays as it is; those of other adapters get no gradients."""
        if self.merged:
            raise RuntimeError("set_adapter: expected an unmerged layer, got a merged one; call unmerge()")
        if name is not None and name not in self.adapter_names:
            raise ValueError(
                f"set_adapter: expected the name of an adapter, got {name!r}; this layer has {self._has()}"
            )
        self._active = name
        self._prepare()

    def delete_adapter(self, name: str) -> None:
        """Take a named adapter off the layer. Who holds its parameters keeps their values."""
        self._check_change("delete_adapter")
        if name == DEFAULT or name not in self.adapter_names:
            raise ValueError(
                f"delete_adapter: expected the name of an added adapter, got {name!r}; this layer has "
                f"{self._has()}"
            )
        if name == self._active:
            raise RuntimeError(
                f"delete_adapter: expected another adapter to be set, got {name!r}; call set_adapter()"
            )
        table = self._pooled("delete_adapter")
        del self.adapters[name]
        table.evict(name)
        if not self.adapters:
            del self.adapters
            if DEFAULT in table:
                (pair,) = table.parameters(DEFAULT)
                table.evict(DEFAULT)
                for p in pair or ():
                    p.data = p.detach().contiguous()
            self._table = self._single = None

    def replace_adapter(
        self, name: str, lora_a: Tensor, lora_b: Tensor, alpha: float, *, use_rslora: bool = False
    ) -> None:
        """Swap an adapter's values for lora_a (r, k) and lora_b (n, r), in place; the rank may be another.
        Also inside a block of :func:`fastlora.adapters`, and under a captured CUDA graph where the rank is no
        larger."""
        self.adapter(name)
        of = self.holder(name)
        scaling = alpha / (math.sqrt(lora_a.shape[0]) if use_rslora else lora_a.shape[0])
        self._pooled("replace_adapter").replace(name, lora_a, lora_b, scaling)
        of.rank = lora_a.shape[0]
        of.set_alpha(alpha, use_rslora)
        self._prepare()

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Those there are: "default", if the layer has one of its own, and the added ones."""
        own = (DEFAULT,) if self._parameters.get("lora_A") is not None else ()
        return (*own, *self.adapters) if "adapters" in self._modules else own

    @property
    def active_adapter(self) -> str | None:
        """The adapter of all rows outside blocks of :func:`fastlora.adapters`."""
        return self._active if self._active in self.adapter_names else None

    def adapter(self, name: str) -> Parts:
        """An adapter's parameters and numbers."""
        if name not in self.adapter_names:
            raise ValueError(
                f"QLinear: expected the name of an adapter, got {name!r}; this layer has {self._has()}"
            )
        of = self.holder(name)
        return Parts(of.lora_A, of.lora_B, of.rank, of.alpha, of.use_rslora, of.scaling, of.dropout)

    def adapter_parameters(self, name: str = DEFAULT) -> list[nn.Parameter]:
        """All that an adapter learns."""
        return list(self.adapter(name)[:2])

    def exported(self, name: str = DEFAULT) -> Parts:
        """An adapter as files hold it."""
        return self.adapter(name)

    def can_load(self, name: str) -> bool:
        """Whether a file's values may become the adapter of this name."""
        return True

    def imported(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """A file's A and B as an adapter's lora_A and lora_B. ValueError where they are none of this kind."""
        return lora_a, lora_b

    def holder(self, name: str) -> Any:
        """The module that has an adapter's parameters and numbers as attributes: the layer, or an Adapter."""
        return self if name == DEFAULT else self.adapters[name]

    def set_adapter_alpha(self, name: str, alpha: float, use_rslora: bool = False) -> None:
        """set_alpha of the layer's own adapter or of a named one."""
        self.adapter(name)
        of = self.holder(name)
        of.set_alpha(alpha, use_rslora)

    def scale_adapter(self, name: str, factor: float) -> None:
        """As :func:`fastlora.scale_adapter`, of one layer."""
        self._check_change("scale_adapter")
        self.adapter(name)
        of = self.holder(name)
        of.set_alpha(of.alpha, of.use_rslora)
        of.scaling *= factor

    # --- for fastlora.adapters ----------------------------------------------------------------------------

    def join_table(self, names: Iterable[str] = ()) -> AdapterTable | ApartAdapters:
        """The table, with the present scalings of these adapters; made if need be."""
        if self.lies_apart:
            if not isinstance(self._table, ApartAdapters):
                self.lay_apart()
            assert isinstance(self._table, ApartAdapters)
            self._table.set(*self._numbers(self._table.names))
            return self._table
        table = self._pooled("adapters")
        mine = [name for name in names if name in table]
        if not all(table.holds(name, 0, *self.adapter(name)[:2]) for name in mine):
            self.rejoin()  # somebody put in other parameters, or other memory
        for name in mine:
            scaling = self.holder(name).scaling
            if table.scaling_of(name) != (scaling,):
                table.set_scaling(name, scaling)
        return table

    def _pooled(self, op: str, *, more: int = 0, dtype: torch.dtype | None = None) -> AdapterTable:
        """The table of pools; made, if need be, with `more` free rows. An error where there can be none."""
        if self.lies_apart:
            raise RuntimeError(
                f"{op}: expected a layer whose parameters are whole, got one that is sharded or that "
                "lay_apart() has prepared for it"
            )
        if self._table is None:
            own, lora_b = self._parameters.get("lora_A"), self._parameters.get("lora_B")
            kind = dtype if own is None else own.dtype
            table = AdapterTable(
                self.in_features, self.out_features, rank_rows=(self.rank if own is not None else 0) + more,
                dtype=kind or torch.float32, device=self.weight.device,
            )  # fmt: skip
            if own is not None and lora_b is not None:
                table.register(DEFAULT, own, lora_b, self.scaling)
                optimizer_strides.watch([own, lora_b])
            self._take_table(table)
        assert isinstance(self._table, AdapterTable)
        return self._table

    def _take_table(self, table: AdapterTable | ApartAdapters) -> None:
        self._table, self.place = table, self.place or Place()
        self._prepare()
        if _rejoin not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(_rejoin)

    @property
    def lies_apart(self) -> bool:
        """Whether adapters keep memory of their own: asked for by :meth:`lay_apart`, or torch shards them."""
        return isinstance(self._table, ApartAdapters) or self.sharded

    @property
    def sharded(self) -> bool:
        """Whether this layer's parameters are DTensors, or are whole for the moment and FSDP2's."""
        managed = "_is_fsdp_managed_module" in self.__dict__
        return managed or any(is_sharded(p) for p in self._parameters.values())

    def lay_apart(self) -> None:
        """Give each adapter contiguous memory of its own, as :func:`torch.distributed.fsdp.fully_shard` needs
        it of parameters; afterwards none can be added, deleted or replaced. The Parameters stay the objects
        they are. A batch of several adapters then copies them at each call. No effect the second time, nor on
        a layer whose only adapter is its own and was not routed yet.

        Raises RuntimeError inside a block of :func:`fastlora.adapters` and on a merged layer.
        """
        self._check_change("lay_apart")
        if isinstance(self._table, ApartAdapters) or (self._table is None and not self.sharded):
            return
        if not self.sharded:  # else they do, and the memory is not ours to change
            for name in self.adapter_names:
                for p in self.adapter(name)[:2]:
                    p.data = p.detach().clone(memory_format=torch.contiguous_format)
        table = ApartAdapters(self.adapter_names)
        table.set(*self._numbers(table.names))
        self._take_table(table)

    def _numbers(self, names: Iterable[str]) -> tuple[list[int], list[float], torch.device]:
        holders = [self.holder(name) for name in names]
        return [of.rank for of in holders], [of.scaling for of in holders], self.weight.device

    def pair(self, name: str) -> tuple[Any, Any]:
        """lora_A and lora_B as this call computes with them."""
        p = self.holder(name)._parameters
        return gathered(p["lora_A"]), gathered(p["lora_B"])

    def forward_named(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        """forward where there are named adapters, or none is active."""
        table, place, active = self._table, self.place, self._active
        router = None if place is None or table is None else place.current()
        if router is not None:
            if self.merged:
                raise RuntimeError("QLinear: expected an unmerged layer inside adapters(), got a merged one")
            if isinstance(table, ApartAdapters):
                low = table.low_rank([self.pair(name) for name in table.names])
            else:
                assert table is not None
                low = table.low_rank(learns=torch.is_grad_enabled())
            dropout = self._dropouts(table)
            return multi_linear(x, weight, bias, low, router.of(x), dropout, router.batch_invariant)
        lora_a, lora_b = (None, None) if active is None or self.merged else self.pair(active)
        if active is None or lora_a is None or lora_b is None:
            return linear_from_parts(x, weight, bias, None, None, 0.0)
        of = self.holder(active)
        if self._single is None or self._single[2] != of.scaling:
            self._prepare()
        assert self._single is not None
        entries, scaling, _ = self._single
        low = LowRank([lora_a], [lora_b.t()], entries, scaling, [of.rank], [], ())
        dropout = Dropout((of.dropout,)) if self.training and of.dropout else NO_DROPOUT
        m = x.shape[:-1].numel()
        return multi_linear(x, weight, bias, low, uniform(m, x.device), dropout, batch_invariant=False)

    def _prepare(self) -> None:
        """What a call with the active adapter needs beside its parameters."""
        self._single = None
        if self.active_adapter is not None:
            parts = self.adapter(self.active_adapter)
            with torch.inference_mode(False):
                device = parts.lora_A.device
                entries = torch.tensor([[[0, parts.rank]]], dtype=torch.int32, device=device)
                scaling = torch.tensor([[parts.scaling]], dtype=torch.float32, device=device)
            self._single = entries, scaling, parts.scaling

    def _dropouts(self, table: AdapterTable | ApartAdapters) -> Dropout:
        """Each adapter's, where it is one of this training pass."""
        if not self.training:
            return NO_DROPOUT
        added = self._modules.get("adapters")
        modules: Iterable[Any] = () if added is None else added._modules.values()
        if not self.dropout and not any(one.dropout for one in modules):
            return NO_DROPOUT
        by_name: dict[str, float] = {name: self.holder(name).dropout for name in table.names}
        mine = [by_name[name] for name in table.names]
        p = tuple(dict.fromkeys(one for one in mine if one))
        if not p or mine.count(p[0]) == len(mine):
            return Dropout(p)
        key = (p, *((table.slot(name), by_name[name]) for name in table.names), table.capacity, table.device)
        if self._kinds[0] != key:
            kinds = [len(p)] * table.capacity
            for name in table.names:
                kinds[table.slot(name)] = p.index(by_name[name]) if by_name[name] else len(p)
            self._kinds = key, torch.tensor(kinds, dtype=torch.int32, device=table.device)
        return Dropout(p, self._kinds[1])

    # --- what torch.nn.Module does to its tensors ----------------------------------------------------------

    def rejoin(self) -> None:
        """Make the parameters views of the table's pools again, whatever has become of them."""
        if isinstance(self._table, AdapterTable):
            pairs: dict[str, Sequence[Pair]] = {}
            for name in self.adapter_names:
                parts = self.adapter(name)
                pairs[name] = [(parts.lora_A, parts.lora_B)]
            self._table.follow(pairs)
        if self._table is not None or self._single is not None:
            self._prepare()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NamedAdapters:
        super()._apply(fn, recurse)
        self.rejoin()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> NamedAdapters:
        state = self.__dict__
        if self._table is not None:
            state = state | {"_table": self._table.skeleton()}
        new = _deepcopy(self, state, memo)
        new.rejoin()
        return new

    def __getstate__(self) -> dict[str, Any]:  # for pickle
        state = self.__dict__.copy()
        if self._table is not None:
            state["_table"] = self._table.skeleton()
            state["_parameters"] = _compact(self._parameters)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.rejoin()

    # --- what is refused ----------------------------------------------------------------------------------

    def _check_change(self, op: str) -> None:
        if self.merged:
            raise RuntimeError(f"{op}: expected an unmerged layer, got a merged one; call unmerge()")
        if self.place is not None and self.place.routers:
            raise RuntimeError(
                f"{op}: expected to be called outside adapters(), got a layer that is being routed"
            )

    def _has(self) -> str:
        return str(list(self.adapter_names)) if self.adapter_names else "none"


def _rejoin(module: nn.Module, keys: object) -> None:
    """After load_state_dict, which may have put in other parameters."""
    assert isinstance(module, NamedAdapters)
    module.rejoin()


def _compact(parameters: dict[str, nn.Parameter | None]) -> dict[str, nn.Parameter | None]:
    """A module's parameters for a file, those that are rows of a pool without the rest of it."""
    return {
        name: compact(p) if p is not None and name in {"lora_A", "lora_B"} else p
        for name, p in parameters.items()
    }


def _deepcopy(module: Any, state: dict[str, Any], memo: dict[int, Any]) -> Any:
    """As copy does it where there is no __getstate__."""
    new = module.__class__.__new__(module.__class__)
    memo[id(module)] = new
    new.__dict__.update(copy.deepcopy(state, memo))
    return new


def check_adapter(op: str, rank: int, alpha: float, dropout: float) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"{op}: expected rank as an int, got {rank!r}")
    if rank < 1:
        raise ValueError(f"{op}: expected rank >= 1, got {rank}")
    if not math.isfinite(alpha):
        raise ValueError(f"{op}: expected a finite alpha, got {alpha}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: expected dropout in [0, 1), got {dropout}")
