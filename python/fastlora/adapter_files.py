"""Adapters on disk in PEFT's format: `adapter_model.safetensors` beside `adapter_config.json`.

What is saved here loads in PEFT onto the dense model, and what PEFT saved loads here, with the same scaling.
Files are written under a temporary name, flushed and renamed: a crash leaves the old file or the new one,
never half of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import safetensors.torch
import torch
from torch import Tensor, nn

from . import expert_files
from .adapter_config import CONFIG_NAME, config_of, guess_task, modules, pattern_value, read_config
from .experts import QExperts
from .named_adapters import DEFAULT, NamedAdapters, Parts
from .sharded import cut_like, reshard, whole

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ENDS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str = DEFAULT,
    task_type: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write an adapter of every QLinear and ModuLinear in `model` that has it to `directory`, which is made
    if need be.

    Args:
        name: which; by default the layers' own, those of QExperts included (PEFT's target_parameters).
        task_type: PEFT's word for the task; by default read off a transformers class name
            (``LlamaForCausalLM`` -> ``"CAUSAL_LM"``), else null.
        base_model: the dense model's name or path; by default where a transformers model was loaded from.

    Layers may differ in rank and alpha (PEFT's rank_pattern and alpha_pattern). Only adapters are written, in
    their own dtype, or in that of the file they were loaded from where this loses nothing; a merged layer's
    adapter is written too. A model sharded by FSDP2 is gathered: every rank calls, each writes the same
    files. Raises ValueError for a model without such an adapter.
    """
    model = _unwrapped(model)
    layers = _adapted(model, name)
    stacks = expert_files.adapted(model) if name == DEFAULT else {}
    if not layers and not stacks:
        what = "QLinear layers of rank > 0" if name == DEFAULT else f"an adapter {name!r}"
        raise ValueError(f"save_adapter: expected a model with {what}, got {_names(model) or 'none'}")
    parts = {path: layer.exported(name) for path, layer in layers.items()}
    magnitudes = [path for path, one in parts.items() if one.magnitude is not None]
    if magnitudes and (stacks or len(magnitudes) < len(parts)):
        raise ValueError(
            "save_adapter: expected DoRA in every adapted layer or in none, which is all that a file can "
            f"say, got it in {len(magnitudes)} of {len(parts) + len(stacks)}"
        )
    config = config_of((at for at, _ in modules(model)), parts, expert_files.parts(stacks))
    if stacks:
        config["target_parameters"] = expert_files.targets(model, stacks)
    config["task_type"] = task_type or guess_task(type(model).__name__)
    config["base_model_name_or_path"] = base_model or getattr(model, "name_or_path", None) or None
    came_in = {path: _file_dtype(layer, name) for path, layer in layers.items()}
    tensors = {
        key: _as_it_came(whole(p.detach()).to("cpu").contiguous(), came_in[path])
        for path, one in parts.items()
        for key, p in _entries({path: one}).items()
    }
    for key, p in expert_files.entries(stacks).items():
        tensors[key] = expert_files.flat(key, whole(p.detach()).to("cpu")).contiguous()
    write_files(Path(directory), config, tensors)


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str = DEFAULT,
    dtype: torch.dtype | None = None,
) -> None:
    """Read a LoRA adapter that :func:`save_adapter` or PEFT wrote into the QLinear and ModuLinear layers of
    `model`, and the default one into its QExperts of a rank above 0 too.

    Args:
        name: by default the layers' own adapter, which each of them must find in the file. Any other: the
            layers that are in the file get an adapter of this name, with the file's rank and dropout, or
            where they have one its values, in place. So several files may be loaded, each for its own layers.
        dtype: of an adapter that is its layer's first; float32 by default, which holds any file's values.
            Other adapters take their layer's.

    Sets lora_A and lora_B (keeping the layers' dtypes and devices), and alpha and scaling as the file's
    config says. The dropout of an adapter that was there stays as it is.

    Raises, with nothing changed: ValueError that lists what is missing, unexpected or of the wrong shape, for
    a file that does not fit the model exactly, for a kind of adapter other than plain LoRA, rsLoRA or, into
    DoraQLinear, DoRA, and into QALoraQLinear for a lora_A that is not constant over its groups; RuntimeError
    for layers that are merged or on the meta device, for sharded ones that have no adapter of the name and
    rank, and for kinds of layers that hold no such adapter; FileNotFoundError.
    """
    model = _unwrapped(model)
    path = Path(directory)
    config = read_config(path)
    if not (path / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"load_adapter: expected {WEIGHTS_NAME} in {path}, got none")
    tensors = safetensors.torch.load_file(path / WEIGHTS_NAME)
    layers = _adapted(model, name)
    stacks = expert_files.adapted(model) if name == DEFAULT else {}
    held = {at: one.exported(name) for at, one in layers.items()}
    if config["use_dora"] and not any(one.magnitude is not None for one in held.values()):
        raise ValueError(
            f"load_adapter: expected a plain LoRA adapter, got use_dora=True in {path / CONFIG_NAME}; "
            "convert with layer_class=DoraQLinear"
        )
    expected: dict[str, tuple[int, ...]] = {key: p.shape for key, p in _entries(held).items()}
    if name != DEFAULT:
        layers |= _in_file(model, tensors)
        expected |= _shapes(layers, tensors)
    expected |= expert_files.shapes(stacks)
    _check_fit(expected, tensors, path)
    ranks = {at: tensors[_keys(at)[0]].shape[0] for at in layers}
    apart = [at for at, layer in layers.items() if layer.lies_apart]
    for state, names in (
        ("whole", [at for at in apart if ranks[at] != _rank(layers[at], name)]),
        ("unmerged", [at for at, layer in layers.items() if layer.merged]),
        ("plain LoRA", [at for at, layer in layers.items() if not layer.can_load(name)]),
        ("materialised", [at for at, one in layers.items() if any(p.is_meta for p in one.parameters())]),
        ("materialised", [at for at, experts in stacks.items() if experts.down_proj.is_meta]),
    ):
        if names:
            raise RuntimeError(
                f"load_adapter: expected {state} layers, got {len(names)} that are not: {names[0]} ..."
            )
    pairs = {at: _imported(at, layer, tensors) for at, layer in layers.items()}
    if apart:
        reshard(model)
    rslora, dropout = config["use_rslora"], float(config.get("lora_dropout") or 0.0)
    _load_experts(stacks, config, tensors)
    for at, layer in layers.items():
        (a, b), magnitude = pairs[at], tensors.get(_keys(at)[2])
        alpha = pattern_value(config["alpha_pattern"], at, config["lora_alpha"])
        if name not in layer.adapter_names:
            layer.add_adapter(
                name, a.shape[0], alpha, dropout=dropout, use_rslora=rslora, dtype=_kind(layer, dtype)
            )
        parts = layer.adapter(name)
        if parts.rank == a.shape[0]:
            with torch.no_grad():
                for p, t in zip((*parts[:2], parts.magnitude), (a, b, magnitude), strict=True):
                    if p is not None and t is not None:
                        p.copy_(cut_like(p, t))
            layer.set_adapter_alpha(name, alpha, rslora)
        else:
            layer.replace_adapter(name, a, b, alpha, use_rslora=rslora)
        if name != DEFAULT:
            layer.holder(name).file_dtype = a.dtype


def _load_experts(
    stacks: Mapping[str, QExperts], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    alphas = {
        at: {
            pattern_value(config["alpha_pattern"], f"{at}.{name}", config["lora_alpha"]) for name in m.shapes
        }
        for at, m in stacks.items()
    }
    for at, values in alphas.items():
        if len(values) > 1:
            raise ValueError(f"load_adapter: expected one alpha for both projections of {at}, got {values}")
    for at, experts in stacks.items():
        for key, p in expert_files.entries({at: experts}).items():
            with torch.no_grad():
                p.copy_(cut_like(p, expert_files.stacked(key, tensors[key], experts.num_experts)))
        experts.set_alpha(alphas[at].pop(), config["use_rslora"])


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile and DistributedDataParallel put around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _adapted(model: nn.Module, name: str) -> dict[str, NamedAdapters]:
    return {at: m for at, m in modules(model) if isinstance(m, NamedAdapters) and name in m.adapter_names}


def _names(model: nn.Module) -> list[str]:
    found = (m.adapter_names for m in model.modules() if isinstance(m, NamedAdapters))
    return sorted({name for names in found for name in names})


def _keys(layer: str) -> list[str]:
    """What the file calls a layer's A and B, and DoRA's magnitude if there is one."""
    stem = _PREFIX + (f"{layer}." if layer else "")
    return [stem + end for end in _ENDS]


def _entries(adapters: Mapping[str, Parts]) -> dict[str, Tensor]:
    """The file's keys and the parameters behind them."""
    return {
        key: p
        for layer, parts in adapters.items()
        for key, p in zip(_keys(layer), (*parts[:2], parts.magnitude), strict=True)
        if p is not None
    }


def _in_file(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, NamedAdapters]:
    """The layers that a file speaks of."""
    return {
        at: m
        for at, m in modules(model)
        if isinstance(m, NamedAdapters) and not tensors.keys().isdisjoint(_keys(at))
    }


def _imported(at: str, layer: NamedAdapters, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    a, b, _ = _keys(at)
    try:
        return layer.imported(tensors[a], tensors[b])
    except ValueError as error:
        raise ValueError(f"load_adapter: {at}: {error}") from None


def _shapes(layers: Mapping[str, NamedAdapters], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Those that a file with its own ranks should have."""
    shapes: dict[str, tuple[int, ...]] = {}
    for at, layer in layers.items():
        a, b, _ = _keys(at)
        rank = tensors[a].shape[0] if a in tensors and tensors[a].dim() else 1
        shapes |= {a: (max(rank, 1), layer.in_features), b: (layer.out_features, max(rank, 1))}
    return shapes


def _kind(layer: NamedAdapters, dtype: torch.dtype | None) -> torch.dtype | None:
    """That of a new adapter: the layer's, where it has others."""
    return None if layer.adapter_names else dtype


def _rank(layer: NamedAdapters, name: str) -> int | None:
    return layer.adapter(name).rank if name in layer.adapter_names else None


def _file_dtype(layer: NamedAdapters, name: str) -> torch.dtype | None:
    return None if name == DEFAULT else layer.holder(name).file_dtype


def _as_it_came(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In the dtype of the file that it was read from, if no value has changed since that needs a wider
    one."""
    if dtype is None or dtype == t.dtype:
        return t
    narrow = t.to(dtype)
    return narrow if torch.equal(narrow.to(t.dtype), t) else t


def _check_fit(expected: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor], path: Path) -> None:
    wrong = [
        f"{key}: expected {tuple(shape)}, got {tuple(tensors[key].shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != tuple(shape)
    ]
    problems = (
        ("missing from the file", [key for key in expected if key not in tensors]),
        ("unexpected in the file", [key for key in tensors if key not in expected]),
        ("of the wrong shape", wrong),
    )
    if any(listed for _, listed in problems):
        text = "".join(
            f"\n  {len(listed)} {what}:" + "".join(f"\n    {line}" for line in listed)
            for what, listed in problems
            if listed
        )
        raise ValueError(f"load_adapter: expected {path / WEIGHTS_NAME} to fit the model, got{text}")


# --- files ------------------------------------------------------------------------------------------------


def write_files(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """An adapter's two files, into a folder that is made if need be."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    path.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as replace:  # both files are complete and on disk before either is renamed
        replace(
            WEIGHTS_NAME,
            lambda to: safetensors.torch.save_file(dict(tensors), to, metadata={"format": "pt"}),
        )
        replace(CONFIG_NAME, lambda to: to.write_text(text, encoding="utf-8"))


@contextmanager
def _replacing(directory: Path) -> Iterator[Callable[[str, Callable[[Path], Any]], None]]:
    """Gives replace(name, write), which calls write(temporary path) at once. On leaving, all are renamed into
    place; on an error before that, none is."""
    pending: dict[Path, Path] = {}

    def replace(name: str, write: Callable[[Path], Any]) -> None:
        temporary = directory / f".{name}.{uuid4().hex}.tmp"
        pending[temporary] = directory / name
        write(temporary)
        _fsync(temporary)

    try:
        yield replace
        for temporary, final in pending.items():
            os.replace(temporary, final)
        _fsync(directory)
    finally:
        for temporary in pending:
            temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
