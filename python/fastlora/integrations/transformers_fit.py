"""Whether a checkpoint fits a model: asked of the files' headers, before transformers reads any tensor.

transformers itself initialises what is missing and goes on, which is a warning in a log for a dense layer and
nonsense for a packed one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
)

from .transformers_loading import Checkpoint, Header, packed_parameters, renamed

_FLOATS = {"F64", "F32", "F16", "BF16"}


def check_fit(
    model: Any, checkpoint: Checkpoint, conversions: Sequence[Any], *, new: Sequence[str] = ()
) -> None:
    """ValueError that lists all that the model lacks or that has another shape, before anything is read.

    Args:
        model: on the meta device, its layers replaced.
        conversions: what transformers will rename and convert by.
        new: parameters that are not in the checkpoint and will be initialised.
    """
    expected, produced = _expected(model, checkpoint.kind)
    found: dict[str, Header | None] = {}
    wrong: list[str] = []
    for key, target, converted in _targets(model, checkpoint, conversions):
        header = None if converted else checkpoint.tensors[key]
        for name in (target, *produced.get(target, ())):
            found[name] = header
        shape = expected.get(target)
        if header is None or shape is None:
            continue
        if header.shape != shape:
            wrong.append(f"{target}: expected {shape}, got {header.shape}")
        elif target in produced and header.dtype not in _FLOATS:
            wrong.append(f"{target}: expected floating numbers, got {header.dtype}")
    missing = [name for name in expected if name not in found and name not in set(new)]
    missing = sorted(set(missing) - _excused(model, found), key=dot_natural_key)
    problems = (("missing from the checkpoint", missing), ("that do not fit", wrong))
    if missing or wrong:
        text = "".join(
            f"\n  {len(lines)} {what}:" + "".join(f"\n    {line}" for line in lines)
            for what, lines in problems
            if lines
        )
        raise ValueError(f"FastLoraConfig: expected the tensors of a {type(model).__name__}, got{text}")


def _expected(model: Any, kind: str) -> tuple[dict[str, tuple[int, ...] | None], dict[str, tuple[str, ...]]]:
    """The shapes that are wanted of a checkpoint, None where they are seen to later; and, by the weight that
    they are made of, the parameters of which nothing is wanted."""
    expected: dict[str, tuple[int, ...] | None] = {
        name: tuple(t.shape) for name, t in model.state_dict().items() if isinstance(t, Tensor)
    }
    produced: dict[str, tuple[str, ...]] = {}
    if kind != "fastlora":
        for path, module in model.named_modules(remove_duplicate=False):
            for packed in packed_parameters(module):
                beside = tuple(f"{path}.{part}" for part in packed.beside)
                produced[f"{path}.{packed.name}"] = beside
                for name in beside:
                    del expected[name]
                expected[f"{path}.{packed.name}"] = packed.dense_shape if kind == "dense" else None
    return expected, produced


def _targets(
    model: Any, checkpoint: Checkpoint, conversions: Sequence[Any]
) -> Iterator[tuple[str, str, bool]]:
    """(key in the files, parameter, whether it is computed from the tensor), as the loader will find them."""
    conversions = copy.deepcopy(list(conversions))
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    meta, prefix = model.state_dict(), model.base_model_prefix
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = renamed(key, renamings, converters, prefix, meta)
        if pattern is None:
            yield key, name, False
        else:
            first, *_ = targets = by_pattern[pattern].target_patterns
            yield from ((key, name.replace(first, target), True) for target in targets)


def _excused(model: Any, found: Mapping[str, object]) -> set[str]:
    """Parameters that may be missing: tied to others that are there, or the model says so."""
    named: dict[int, list[str]] = {}
    for name, t in model.state_dict(keep_vars=True).items():
        named.setdefault(id(t), []).append(name)
    groups = [*named.values(), *([a, b] for a, b in model.all_tied_weights_keys.items())]
    excused = {name for group in groups if any(name in found for name in group) for name in group}
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return excused | {
        name for name in model.state_dict() if any(pattern.search(name) for pattern in patterns)
    }
