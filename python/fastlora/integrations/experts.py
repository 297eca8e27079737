"""transformers' stacked experts (MixtralExperts, Qwen3MoeExperts, GptOssExperts, ...) as :class:`QExperts`.

transformers 5 keeps all experts of a layer in two three-dimensional parameters and marks their class by
``use_experts_implementation``, which says on each instance how they are laid out and lets other code compute
them: ``has_gate``, ``has_bias``, ``is_transposed``, ``has_post_expert_norm``, ``_apply_gate``. That contract
is all that is used here, so that nothing is imported and no class is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..experts import QExperts
from ..hooks import has_hooks

_CONTRACT = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate", "num_experts")


class StockActivation(nn.Module):
    """What a stock experts module does between its two projections, by that module's own code and numbers
    (act_fn, a limit, an order of gate and value), of which its parameters are not kept."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        shell = stock.__new__(type(stock))
        shell.__dict__ = stock.__dict__ | {"_parameters": dict.fromkeys(stock._parameters)}
        # Past nn.Module: whoever walks the model must not meet experts without weights.
        object.__setattr__(self, "_shell", shell)

    def forward(self, x: Tensor) -> Tensor:
        shell: Any = self._shell
        return shell._apply_gate(x) if shell.has_gate else shell.act_fn(x)

    def extra_repr(self) -> str:
        shell: Any = self._shell
        return f"{type(shell).__name__}'s {'_apply_gate' if shell.has_gate else 'act_fn'}"


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts, of a kind that :func:`from_module` knows or not."""
    if isinstance(module, QExperts):
        return True
    return _keeps_contract(module) or (
        type(module).__name__.endswith("Experts")
        and any(p is not None and p.dim() == 3 for p in module._parameters.values())
    )


def why_not(module: nn.Module) -> str | None:
    """Why experts cannot become QExperts, or None if they can."""
    if isinstance(module, QExperts):
        return "already QExperts"
    kind = type(module).__name__
    if not _keeps_contract(module):
        return f"a {kind}, which does not keep to transformers' use_experts_implementation"
    stock: Any = module
    if stock.has_post_expert_norm:
        return f"a {kind}, which normalises what each expert gives"
    for name in parameter_names(module):
        p = module._parameters.get(name)
        if not isinstance(p, nn.Parameter):
            return f"its {name} is computed, not stored"
        if p.dtype not in checks.DTYPE_CODE:
            return f"its {name} is {p.dtype}, not float32, bfloat16 or float16"
        if p.dim() != (2 if name.endswith("_bias") else 3):
            return f"its {name} has the shape {tuple(p.shape)}"
    others = [name for name, _ in module.named_parameters() if name not in parameter_names(module)]
    if others or any(True for _ in module.buffers()):
        return f"a {kind} with other parameters or buffers than the experts' ({', '.join(others)})"
    up, down = (_sizes(module, name) for name in weight_names(module))
    if down[::-1] != (up[0] // (2 if stock.has_gate else 1), up[1]) or up[0] % (2 if stock.has_gate else 1):
        return f"a {kind} with projections of {up[0]} x {up[1]} and {down[0]} x {down[1]}"
    if has_hooks(module):
        return "it has hooks, which a replacement would lose"
    return None


def weight_names(module: nn.Module) -> tuple[str, str]:
    """The two projections of stock experts that keep the contract."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The same, and their biases."""
    names = weight_names(module)
    return (*names, *(f"{name}_bias" for name in names)) if module.has_bias else names


def from_module(module: nn.Module, **options: Any) -> QExperts:
    """Quantise stock experts, one at a time. On the meta device nothing is computed, and the shapes are ready
    for a checkpoint.

    Args:
        module: experts of transformers 5; nothing of it changes, and its biases are shared.
        options: rank, alpha, dropout, blocksize, double_quant, use_rslora, adapter_dtype, as for QExperts.

    Raises TypeError for a module that cannot be converted, which says why; ValueError for NaN or Inf.
    """
    why = f"a {type(module).__name__}" if not is_experts(module) else why_not(module)
    if why is not None:
        raise TypeError(f"QExperts: expected experts that can be converted, got {why}")
    stock: Any = module
    up, down = weight_names(module)
    n, k = _sizes(module, up)
    weight: Tensor = getattr(stock, up)
    experts = QExperts(
        weight.shape[0],
        k,
        n // 2 if stock.has_gate else n,
        gated=stock.has_gate,
        activation=StockActivation(module),
        bias=stock.has_bias,
        transposed=stock.is_transposed,
        dtype=weight.dtype,
        device="meta",
        **options,
    )
    if not weight.is_meta:
        for name in (up, down):
            experts.set_weight(name, getattr(stock, name))
        for name in parameter_names(module)[2:]:
            setattr(experts, name, getattr(stock, name))
        for name, p in experts._parameters.items():
            if p is not None and p.is_meta:  # the adapters
                setattr(experts, name, nn.Parameter(torch.empty_like(p, device=weight.device)))
        experts.reset_adapter()
    return experts.train(module.training)


@torch.no_grad()
def dense_experts(experts: QExperts, dtype: torch.dtype | None = None) -> nn.Module:
    """The stock module that `experts` were made from, with the weights that they have in NF4, their adapters
    added, in `dtype` (by default theirs). Raises TypeError for experts that were not made from one."""
    if not isinstance(experts.activation, StockActivation):
        kind = type(experts.activation).__name__
        raise TypeError(f"dense_experts: expected experts made from a stock module, got activation {kind}")
    shell: Any = experts.activation._shell
    stock: nn.Module = shell.__new__(type(shell))
    stock.__dict__ = shell.__dict__ | {"_parameters": dict(shell._parameters)}
    for name in experts.shapes:
        weight = experts.dequantize(name, torch.float32 if experts.rank else dtype)
        if experts.rank:
            a, b = (experts.get_parameter(f"{name}_lora_{ab}").float() for ab in "AB")
            product = torch.bmm(b, a)
            weight.add_(product.transpose(1, 2) if experts.transposed else product, alpha=experts.scaling)
        setattr(stock, name, nn.Parameter(weight.to(dtype or experts.weight_dtype)))
    for name in parameter_names(stock)[2:]:
        setattr(stock, name, nn.Parameter(experts.get_parameter(name).to(dtype or experts.weight_dtype)))
    return stock.train(experts.training)


def replace_experts(
    model: nn.Module, *, skip_modules: Sequence[str] = (), rank: int = 0, **options: Any
) -> dict[str, str | None]:
    """Swap stock experts of `model` for QExperts, in place: on meta before a checkpoint is loaded, or with
    their weights.

    Args:
        skip_modules: names of modules to leave, with all they contain.
        rank: of every expert's adapters; other options as for :func:`from_module`.

    Returns {path: None if it was swapped, else why not} of every module with experts. All that can be asked
    is asked before the first is swapped.
    """
    if isinstance(skip_modules, str):
        skip_modules = (skip_modules,)
    found: dict[str, str | None] = {}
    stock: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path and is_experts(module):
            skip = next((s for s in skip_modules if f".{s}." in f".{path}."), None)
            found[path] = why_not(module) if skip is None else f"in skip_modules ({skip})"
            stock[path] = module
    made: dict[int, QExperts] = {}
    for path, why in found.items():
        if why is None:
            module = stock.pop(path)
            if id(module) not in made:
                made[id(module)] = from_module(module, rank=rank, **options)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, made[id(module)])
    return found


def _keeps_contract(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in _CONTRACT)


def _sizes(module: nn.Module, name: str) -> tuple[int, int]:
    """(out, in) of an expert."""
    _, n, k = module._parameters[name].shape  # type: ignore[union-attr]
    return (k, n) if module.is_transposed else (n, k)
