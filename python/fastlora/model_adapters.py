"""Adapters of a whole model: :func:`adapters`, a batch in which every row, or every prompt, has its own, and
:func:`scale_adapter`."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import nn

from .active import Batch, Place
from .adapter_table import AdapterTable
from .adapters_apart import ApartAdapters
from .experts import QExperts
from .named_adapters import DEFAULT, NamedAdapters
from .routing import Router


class adapters:
    """Inside ``with fastlora.adapters(model, names):`` row i of a batch has the adapter ``names[i]``.

    Args:
        model: any module with QLinear layers, or one of them.
        names: an adapter's name, or None for the base alone, for each row of x (rows, k), or for each prompt
            of x (prompts, tokens, k), whose tokens then all have it. So the same block serves a whole
            generation: the prompts, and then a token each. "default" is a layer's own adapter.
        batch_invariant: one kernel whatever the number of rows, so that a row's bits do not depend on who
            shares its batch.

    A layer without one of the adapters, where others of the model have it, computes the base for its rows, as
    PEFT does with adapters that target different layers. Blocks may be nested, the inner one holds; what was
    in force before comes back when it is left, by an exception too. The object can be kept and entered again,
    which saves looking the layers up.

    A block holds for the thread that entered it; a layer under torch.compile is routed for all threads, of
    which one at a time may then be inside. A backward pass may come after the block: checkpointed layers are
    replayed with the routing that they had, but compiled ones only inside the block.

    Raises, with nothing changed: ValueError for a name that no layer has, listing those there are;
    RuntimeError for a merged layer, or experts with adapters. A layer that is given another number of rows
    raises ValueError.
    """

    def __init__(self, model: nn.Module, names: Sequence[str | None], batch_invariant: bool = False) -> None:
        if isinstance(names, str) or not all(name is None or isinstance(name, str) for name in names):
            raise TypeError(f"adapters: expected a sequence of names, one a row or a prompt, got {names!r}")
        trained = sum(isinstance(m, QExperts) and bool(m.rank) for m in model.modules())
        if trained:
            raise RuntimeError(
                "adapters: expected experts without adapters of their own, which all rows would get, got "
                f"{trained} layers with them; convert with expert_rank=0"
            )
        self._layers = _layers(model)
        self._names, self._batch_invariant = list(names), batch_invariant
        self._distinct = [name for name in dict.fromkeys(names) if name is not None]
        self._routers: dict[Place, Router] = {}
        self._seen: list[tuple[Any, ...]] | None = None
        self._entered: dict[int, list[Batch]] = {}  # by thread
        self._check()

    def __enter__(self) -> None:
        merged = [layer for layer in self._layers if layer.merged]
        if merged:
            raise RuntimeError(f"adapters: expected unmerged layers, got {len(merged)} that are merged")
        tables = [layer.join_table(self._distinct) for layer in self._layers]
        seen = [(id(table), table.generation, table.capacity, table.device) for table in tables]
        if seen != self._seen:
            self._check()
            self._routers, self._seen = self._make(tables), seen
        batch = Batch(self._routers)
        batch.enter()
        self._entered.setdefault(threading.get_ident(), []).append(batch)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered[threading.get_ident()].pop().leave()

    def _check(self) -> None:
        known = {name for layer in self._layers for name in layer.adapter_names}
        unknown = [name for name in self._distinct if name not in known]
        if unknown:
            raise ValueError(
                f"adapters: expected names of adapters, got {unknown}; this model has {sorted(known)}"
            )

    def _make(self, tables: list[AdapterTable | ApartAdapters]) -> dict[Place, Router]:
        shared: dict[tuple, Router] = {}
        routers: dict[Place, Router] = {}
        for layer, table in zip(self._layers, tables, strict=True):
            slots = {name: table.slot(name) for name in self._distinct if name in table}
            key = (tuple(slots.items()), table.capacity, table.device)
            if key not in shared:
                rows = [-1 if name is None else slots.get(name, -1) for name in self._names]
                shared[key] = Router(rows, table.capacity, table.device, self._batch_invariant)
            assert layer.place is not None
            routers[layer.place] = shared[key]
        return routers


def _layers(model: nn.Module) -> list[NamedAdapters]:
    return [m for m in model.modules() if isinstance(m, NamedAdapters) and m.adapter_names]


def scale_adapter(model: nn.Module, name: str, factor: float) -> None:
    """Let an adapter count `factor` times: its scaling becomes factor · alpha / rank (alpha / sqrt(rank) with
    rsLoRA) in every layer that has it.

    Args:
        model: any module with QLinear layers, QExperts, or PEFT's LoRA layers.
        name: the adapter's; "default" is the layers' own, and PEFT's first.
        factor: 1 is what was trained, exactly, however often it was scaled before; 0 turns the adapter off;
            negative ones take away what it adds.

    The new scaling is in force at once, for training too, and is what :func:`fastlora.save_adapter` writes.
    ``set_alpha`` and loading a file into the adapter set the factor back to 1.

    Raises, with nothing changed, ValueError for a name that no layer has and a factor that is not finite,
    RuntimeError for merged layers and inside a block of :func:`adapters`.
    """
    if not math.isfinite(factor):
        raise ValueError(f"scale_adapter: expected a finite factor, got {factor}")
    layers = [m for m in model.modules() if isinstance(m, NamedAdapters) and name in m.adapter_names]
    experts = [m for m in model.modules() if isinstance(m, QExperts) and m.rank and name == DEFAULT]
    pefts: list[Any] = [m for m in model.modules() if _is_pefts(m)]
    theirs = [m for m in pefts if name in m.scaling]
    if not (layers or experts or theirs):
        known = {one for m in model.modules() if isinstance(m, NamedAdapters) for one in m.adapter_names}
        known |= {one for m in pefts for one in m.scaling}
        raise ValueError(
            f"scale_adapter: expected the name of an adapter, got {name!r}; this model has {sorted(known)}"
        )
    for layer in layers:
        layer._check_change("scale_adapter")
    merged = sum(name in m.merged_adapters for m in theirs)
    if merged:
        raise RuntimeError(f"scale_adapter: expected unmerged layers, got {merged} that are merged")
    for layer in layers:
        layer.scale_adapter(name, factor)
    for stack in experts:
        stack.set_alpha(stack.alpha, stack.use_rslora)
        stack.scaling *= factor
    for other in theirs:
        other.set_scale(name, factor)


def _is_pefts(module: Any) -> bool:
    """Whether it is a LoRA layer of PEFT's, over whatever."""
    return hasattr(module, "set_scale") and hasattr(module, "merged_adapters")
