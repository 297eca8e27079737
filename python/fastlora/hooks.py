"""Whether calling a module does more than its class's forward."""

from __future__ import annotations

from torch import nn

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody sees or changes what goes through a module: by hooks, or by a forward of its own."""
    return "forward" in module.__dict__ or any(getattr(module, kind) for kind in _KINDS)
