"""Adapters put together, and folded into weights.

    linear   A = Σ ±√|w·s|·A_i,  B = Σ √|w·s|·B_i    of one rank: cheap, and not the sum of the changes
    cat      A = [w·s·A_i],  B = [B_i]               exactly the sum of the changes Σ w·s·B_i·A_i
    svd      B·A nearest to that sum at some rank    from the factors alone: no matrix (n, k) is made

with weight w and scaling s of each adapter; the result has scaling 1. The sum of changes is that of task
arithmetic (Ilharco et al., 2023); names and numbers are those of PEFT's ``add_weighted_adapter``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import QLinear
from ..rounding import Rounding
from .low_rank import balanced, truncated_svd, widened
from .modulora import ModuLinear

KINDS = ("svd", "linear", "cat")


@torch.no_grad()
def merge_pairs(
    pairs: Sequence[tuple[Tensor, Tensor, float]],
    weights: Sequence[float],
    kind: str = "svd",
    rank: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One adapter from several of one layer.

    Args:
        pairs: A (r, k), B (n, r) and scaling of each; ranks may differ, but for "linear".
        weights: one for each, of either sign.
        kind: "svd", "linear" or "cat".
        rank: of the result of "svd", by default the largest of theirs.

    Returns A and B in float32, whose scaling is 1. Raises ValueError.
    """
    if kind not in KINDS:
        raise ValueError(f"merge_pairs: expected kind 'svd', 'linear' or 'cat', got {kind!r}")
    if not pairs or len(pairs) != len(weights):
        raise ValueError(
            f"merge_pairs: expected a weight for each of one or more adapters, got "
            f"{len(weights)} for {len(pairs)}"
        )
    if rank is not None and (kind != "svd" or rank < 1):
        raise ValueError(f"merge_pairs: expected a rank >= 1, with kind 'svd' only, got {rank} with {kind!r}")
    ranks = [a.shape[0] for a, _, _ in pairs]
    factors = [w * s for w, (_, _, s) in zip(weights, pairs, strict=True)]
    if kind == "linear":
        if len(set(ranks)) > 1:
            raise ValueError(f"merge_pairs: expected adapters of one rank for 'linear', got ranks {ranks}")
        roots = [math.sqrt(abs(f)) for f in factors]
        signed = [math.copysign(root, f) for root, f in zip(roots, factors, strict=True)]
        a = sum(f * a.float() for f, (a, _, _) in zip(signed, pairs, strict=True))
        b = sum(f * b.float() for f, (_, b, _) in zip(roots, pairs, strict=True))
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        return a, b
    a = torch.cat([f * a.float() for f, (a, _, _) in zip(factors, pairs, strict=True)])
    b = torch.cat([b.float() for _, b, _ in pairs], 1)
    return (a, b) if kind == "cat" else compressed(a, b, rank or max(ranks))


def compressed(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of `rank` whose product is nearest to b·a, from triangles of the factors' rank."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = truncated_svd(r_b @ r_a.T, rank)
    return widened(*balanced(q_b @ u, s, vh @ q_a.T), rank)


def add_merged_adapter(
    model: nn.Module,
    name: str,
    adapters: Sequence[str],
    weights: Sequence[float],
    *,
    kind: str = "svd",
    rank: int | None = None,
) -> None:
    """Give every QLinear that has some of the `adapters` another one, `name`, merged from those that it has.

    kind, rank: as for :func:`merge_pairs`. The new adapter does not learn, and has an effect once it is set.

    Raises, with nothing changed, ValueError for names that no layer has, for a `name` that is taken, and for
    what :func:`merge_pairs` refuses; RuntimeError for layers that can have no named adapters at present.
    """
    layers = [m for m in model.modules() if isinstance(m, QLinear)]
    known = {one for layer in layers for one in layer.adapter_names}
    unknown = [one for one in adapters if one not in known]
    if unknown or not adapters:
        raise ValueError(
            f"add_merged_adapter: expected names of adapters, got {unknown}; this model has {sorted(known)}"
        )
    if name in known or name == "default" or not name or "." in name:
        raise ValueError(f"add_merged_adapter: expected a new name without a dot, got {name!r}")
    if len(weights) != len(adapters):
        raise ValueError(
            f"add_merged_adapter: expected {len(adapters)} weights, one an adapter, got {len(weights)}"
        )
    made: list[tuple[QLinear, Tensor, Tensor]] = []
    for layer in layers:
        mine = [(one, w) for one, w in zip(adapters, weights, strict=True) if one in layer.adapter_names]
        if mine:
            if layer.merged or layer.lies_apart or not layer.can_load(name):
                raise RuntimeError(
                    "add_merged_adapter: expected unmerged, unsharded layers of plain LoRA, got "
                    f"{type(layer).__name__}{', merged' if layer.merged else ''}"
                )
            parts = [layer.adapter(one) for one, _ in mine]
            pairs = [(of.lora_A.detach(), of.lora_B.detach(), of.scaling) for of in parts]
            made.append((layer, *merge_pairs(pairs, [w for _, w in mine], kind, rank)))
    for layer, a, b in made:
        adapter = layer.add_adapter(name, a.shape[0], a.shape[0])
        with torch.no_grad():
            adapter.lora_A.copy_(a)
            adapter.lora_B.copy_(b)
        adapter.requires_grad_(False)


# --- folding in -------------------------------------------------------------------------------------------


@torch.no_grad()
def to_linear(layer: Any, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    """A dense layer of a QLinear or ModuLinear with its active adapter, or of PEFT's layer over a QLinear
    with its active ones, in the weight: no rounding but the last, to `dtype`."""
    weight, bias = layer.merged_parts() if _is_pefts(layer) else (layer.merged_weight(), layer.bias)
    linear = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype).clone(), requires_grad=False)
    return linear.train(layer.training)


def make_dense(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> int:
    """Swap every QLinear and ModuLinear in `model`, and PEFT's layers over the first, for :func:`to_linear`
    of it, one at a time and under all its names; how many. ValueError if `model` is such a layer itself.

    What is left of a PEFT model after that is unwrapped by its ``unload()``.
    """
    if isinstance(model, (QLinear, ModuLinear)) or _is_pefts(model):
        raise ValueError("make_dense: expected a module that holds layers, got a layer; use to_linear")
    names: dict[Any, list[str]] = {}
    inside = {id(m.qlinear) for m in model.modules() if _is_pefts(m)}
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_pefts(module) or (isinstance(module, (QLinear, ModuLinear)) and id(module) not in inside):
            names.setdefault(module, []).append(name)
    count = len(names)
    while names:
        layer, aliases = names.popitem()
        linear = to_linear(layer, dtype)
        for alias in aliases:
            parent, _, child = alias.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
        del layer  # with it goes the packed weight, before the next one is made dense
    return count


def merge_into_nf4(model: nn.Module) -> list[Rounding]:
    """``merge`` of every QLinear with an active adapter, and of PEFT's LoRA layers over QLinear, and what it
    cost each of them. Their ``unmerge`` gives the original bits back.

    Raises RuntimeError, with nothing changed, where layers are merged already or sharded.
    """
    layers: dict[str, Any] = {}
    for name, m in model.named_modules():
        if (isinstance(m, QLinear) and m.active_adapter) or _is_pefts(m):
            layers[name] = m
    not_ready = [
        name for name, layer in layers.items() if layer.merged or getattr(layer, "qlinear", layer).sharded
    ]
    if not_ready:
        raise RuntimeError(
            "merge_into_nf4: expected unmerged layers whose parameters are whole, got "
            f"{len(not_ready)} that are not: {not_ready[0]} ..."
        )
    costs = {name: layer.merge() for name, layer in layers.items()}
    return [replace(cost, name=name) for name, cost in costs.items() if cost is not None]


def _is_pefts(module: Any) -> bool:
    """Whether it is PEFT's layer over a QLinear (without an import of PEFT)."""
    return isinstance(getattr(module, "qlinear", None), QLinear)
