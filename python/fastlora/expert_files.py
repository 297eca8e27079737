"""Experts' adapters in PEFT's files, as its ``LoraConfig(target_parameters=...)`` writes them.

PEFT wraps the experts once for each projection, the first one innermost: its matrices are called
``experts.base_layer.lora_A.weight``, the second's ``experts.lora_A.weight``. All experts' A lie below each
other, (E * r, k); their B side by side, (n, r * E), with the expert as the faster index.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .adapter_config import modules
from .experts import QExperts
from .named_adapters import Parts

_A, _B = "lora_A.weight", "lora_B.weight"


def adapted(model: nn.Module) -> dict[str, QExperts]:
    """Experts with adapters, by path."""
    return {at: m for at, m in modules(model) if isinstance(m, QExperts) and m.rank}


def parts(stacks: Mapping[str, QExperts]) -> dict[str, Parts]:
    """Their adapters, a projection each, by its parameter's path."""
    return {
        f"{at}.{name}": Parts(*m.adapter(name), m.rank, m.alpha, m.use_rslora, m.scaling, m.dropout)
        for at, m in stacks.items()
        for name in m.shapes
    }


def entries(stacks: Mapping[str, QExperts]) -> dict[str, nn.Parameter]:
    """The file's keys and the parameters behind them."""
    return {
        f"base_model.model.{at}.{inner}{end}": p
        for at, m in stacks.items()
        for name, inner in zip(m.shapes, ("base_layer.", ""), strict=True)
        for end, p in zip((_A, _B), m.adapter(name), strict=True)
    }


def shapes(stacks: Mapping[str, QExperts]) -> dict[str, tuple[int, ...]]:
    """Those in the file."""
    found: dict[str, tuple[int, ...]] = {}
    for key, p in entries(stacks).items():
        experts, rows, columns = p.shape
        found[key] = (experts * rows, columns) if key.endswith(_A) else (rows, columns * experts)
    return found


def flat(key: str, stack: Tensor) -> Tensor:
    """A stack (E, r, k) or (E, n, r) as the file has it."""
    return stack.flatten(0, 1) if key.endswith(_A) else stack.permute(1, 2, 0).flatten(1)


def stacked(key: str, t: Tensor, experts: int) -> Tensor:
    """The inverse."""
    if key.endswith(_A):
        return t.unflatten(0, (experts, -1))
    return t.unflatten(1, (-1, experts)).permute(2, 0, 1)


def targets(model: nn.Module, stacks: Mapping[str, QExperts]) -> list[str]:
    """PEFT's target_parameters: the experts' last name where all of that name have adapters, whole paths
    otherwise."""
    same: dict[str, list[str]] = {}
    for at, _ in modules(model):
        same.setdefault(at.rpartition(".")[2], []).append(at)
    found: dict[str, None] = {}
    for at, m in stacks.items():
        last = at.rpartition(".")[2]
        where = last if all(path in stacks for path in same[last]) else at
        found |= dict.fromkeys(f"{where}.{name}" for name in m.shapes)
    return list(found)
