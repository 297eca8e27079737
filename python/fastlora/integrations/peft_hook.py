"""Has peft give a QLinear our LoRA layer, without importing peft.

peft chooses a layer's class by a chain of dispatchers in ``peft.tuners.lora.model``, whose last one,
``dispatch_default``, takes a QLinear for the torch.nn.Linear that it is a kind of. We put ours in its place,
which passes on all that is not a QLinear. `LoraConfig` has an entry for such classes, but it belongs to one
config, is not written to adapter_config.json and so is gone when an adapter is loaded; and nothing of ours is
called between a QLinear's construction and its wrapping. So the dispatcher has to be in peft, whichever of
the two libraries is imported first: at once where peft is there, else at the end of its import.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..linear import QLinear
from .after_import import after_import
from .versions import numbers, text

if TYPE_CHECKING:
    from collections.abc import Callable

OLDEST_PEFT = (0, 20)  # of those whose layers are given their whole config, what is tested


def install() -> None:
    """Put the dispatcher into peft, now or when it is imported. Again: no effect."""
    after_import("peft.tuners.lora.model", add_dispatcher)


def add_dispatcher(module: ModuleType) -> None:
    """Put it into ``peft.tuners.lora.model``."""
    default: Callable[..., Any] | None = getattr(module, "dispatch_default", None)
    if default is None or hasattr(default, "_fastlora"):
        return

    @functools.wraps(default)
    def dispatch(target: Any, adapter_name: str, **kwargs: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if not isinstance(base, QLinear):
            return default(target, adapter_name, **kwargs)
        check_version()
        from .peft_layer import dispatch_qlinear

        return dispatch_qlinear(target, adapter_name, **kwargs)

    dispatch._fastlora = True  # type: ignore[attr-defined]
    module.dispatch_default = dispatch  # type: ignore[attr-defined]


def check_version() -> None:
    """RuntimeError for a peft that is too old."""
    import peft

    if numbers(peft.__version__) < OLDEST_PEFT:
        raise RuntimeError(
            f"LoRA on QLinear: expected peft {text(OLDEST_PEFT)} or newer, got {peft.__version__}"
        )
