"""Makes transformers know quantisation method "fastlora" after a mere ``import fastlora``.

transformers has no plug-in discovery: a checkpoint whose config.json says "fastlora" loads only if the method
is in the two tables of ``transformers.quantizers.auto`` by then. Importing that module to enter it costs
seconds (it imports every quantisation library that is installed: 4 to 12 s, where `import fastlora` takes 0.1
after torch), and nothing of ours is called when a model is loaded. So the method is entered at once where
that module is imported already, and else at the end of its import, which comes before any loading.
"""

from __future__ import annotations

import warnings
from importlib import metadata
from types import ModuleType

from .after_import import after_import
from .versions import numbers, text

OLDEST = (5, 23)  # older ones cast a dense weight to the packed one's uint8 before it can be quantised
_TABLES = "transformers.quantizers.auto"


def install() -> None:
    """Enter "fastlora", now or when transformers is used. Again: no effect."""
    after_import(_TABLES, _register)


def require_transformers() -> None:
    """ImportError unless a transformers is installed that is new enough."""
    wanted = text(OLDEST)
    try:
        have = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        raise ImportError(
            f"FastLoraConfig: expected transformers {wanted} or newer, got none; pip install "
            f"'transformers>={wanted}'"
        ) from None
    if numbers(have) < OLDEST:
        raise ImportError(f"FastLoraConfig: expected transformers {wanted} or newer, got {have}")


def _register(auto: ModuleType) -> None:
    """Runs inside somebody's import of transformers, which must not fail for us."""
    try:
        require_transformers()
    except ImportError:
        return  # said by FastLoraConfig, to those who ask for it
    try:
        from .transformers_quantizer import register

        register(auto)
    except Exception as error:
        warnings.warn(f"fastlora could not register with transformers: {error!r}", stacklevel=2)
