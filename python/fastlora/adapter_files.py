"""Adapters on disk in PEFT's format: `adapter_model.safetensors` beside `adapter_config.json`.

What is saved here loads in PEFT onto the dense model, and what PEFT saved loads here, with the same scaling.
Files are written under a temporary name, flushed and renamed: a crash leaves the old file or the new one,
never half of one.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import safetensors.torch
import torch
from torch import Tensor, nn

from .linear import QLinear

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."
_TASK_BY_CLASS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    task_type: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write the adapters of every QLinear in `model` to `directory`, which is made if need be.

    Args:
        task_type: PEFT's word for the task; by default read off a transformers class name
            (``LlamaForCausalLM`` -> ``"CAUSAL_LM"``), else null.
        base_model: the dense model's name or path; by default where a transformers model was loaded from.

    Layers may differ in rank and alpha (PEFT's rank_pattern and alpha_pattern). Only adapters are written, in
    their own dtype; a merged layer's adapter is written too. A model sharded by FSDP2 is gathered: every rank
    calls, each writes the same files. Raises ValueError for a model without adapters.
    """
    model = _unwrapped(model)
    layers = _adapted(model)
    if not layers:
        raise ValueError("save_adapter: expected a model with QLinear layers of rank > 0, got none")
    config = _config_of(model, layers)
    config["task_type"] = task_type or _guess_task(model)
    config["base_model_name_or_path"] = base_model or getattr(model, "name_or_path", None) or None
    tensors = {key: _whole(p.detach()).to("cpu").contiguous() for key, p in _entries(layers).items()}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as replace:  # both files are complete and on disk before either is renamed
        replace(WEIGHTS_NAME, lambda to: safetensors.torch.save_file(tensors, to, metadata={"format": "pt"}))
        replace(CONFIG_NAME, lambda to: to.write_text(text, encoding="utf-8"))


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Read a LoRA adapter that :func:`save_adapter` or PEFT wrote into the QLinear layers of `model`.

    Sets lora_A and lora_B (keeping the layers' dtypes and devices), and alpha and scaling as the file's
    config says. A layer's dropout stays as it is.

    Raises, with nothing changed: ValueError that lists what is missing, unexpected or of the wrong shape, for
    a file that does not fit the model exactly, and for a kind of adapter other than plain LoRA or rsLoRA;
    RuntimeError for layers that are merged or on the meta device; FileNotFoundError.
    """
    model = _unwrapped(model)
    path = Path(directory)
    config = _read_config(path)
    if not (path / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"load_adapter: expected {WEIGHTS_NAME} in {path}, got none")
    tensors = safetensors.torch.load_file(path / WEIGHTS_NAME)
    layers = _adapted(model)
    entries = _entries(layers)
    _check_fit(entries, tensors, path)
    for state, names in (
        ("unmerged", [name for name, layer in layers.items() if layer.merged]),
        ("materialised", [name for name, layer in layers.items() if layer.weight.is_meta]),
    ):
        if names:
            raise RuntimeError(
                f"load_adapter: expected {state} layers, got {len(names)} that are not: {names[0]} ..."
            )
    alphas = {name: _pattern_value(config["alpha_pattern"], name, config["lora_alpha"]) for name in layers}
    with torch.no_grad():
        for key, parameter in entries.items():
            parameter.copy_(_sharded_like(parameter, tensors[key]))
    for name, layer in layers.items():
        layer.set_alpha(alphas[name], config["use_rslora"])


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile and DistributedDataParallel put around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _whole(t: Tensor) -> Tensor:
    """What FSDP2 shards, gathered; every rank must take part."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def _sharded_like(parameter: Tensor, t: Tensor) -> Tensor:
    """`t`, the same on every rank, laid out as `parameter` is."""
    if not hasattr(parameter, "full_tensor"):
        return t
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(t.to(parameter.device), parameter.device_mesh, parameter.placements)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules, with the names that they have where no part of the model is compiled."""
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module


def _adapted(model: nn.Module) -> dict[str, QLinear]:
    return {name: m for name, m in _modules(model) if isinstance(m, QLinear) and m.rank}


def _entries(layers: dict[str, QLinear]) -> dict[str, Tensor]:
    """The file's keys and the parameters behind them."""
    entries: dict[str, Tensor] = {}
    for name, layer in layers.items():
        assert layer.lora_A is not None
        assert layer.lora_B is not None
        stem = _PREFIX + (f"{name}." if name else "")
        entries[f"{stem}lora_A.weight"] = layer.lora_A
        entries[f"{stem}lora_B.weight"] = layer.lora_B
    return entries


# --- the config -------------------------------------------------------------------------------------------


def _config_of(model: nn.Module, layers: dict[str, QLinear]) -> dict[str, Any]:
    """PEFT's LoraConfig, as few keys as it takes, so that older versions read it too."""
    rslora = all(layer.use_rslora for layer in layers.values())
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: _alpha(layer, rslora) for name, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(name, layers): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {_pattern(name, layers): a for name, a in alphas.items() if a != alpha},
        "target_modules": _target_modules(model, layers),
        "use_rslora": rslora,
        "lora_dropout": max(layer.dropout for layer in layers.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _pattern(name: str, layers: Iterable[str]) -> str:
    """A PEFT pattern for this layer alone: the path, tied to its start where it also ends another's."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in layers) else name


def _alpha(layer: QLinear, rslora: bool) -> float:
    """The alpha that gives the layer's scaling back; its own where that does."""
    divisor = math.sqrt(layer.rank) if rslora else layer.rank
    alpha = layer.alpha if math.isclose(layer.alpha / divisor, layer.scaling) else layer.scaling * divisor
    return int(alpha) if alpha == int(alpha) else alpha


def _target_modules(model: nn.Module, layers: dict[str, QLinear]) -> list[str]:
    """Last names where they select exactly the adapted layers of that name, whole paths otherwise."""
    by_last_name: dict[str, list[str]] = {}
    for name, _ in _modules(model):
        by_last_name.setdefault(name.rpartition(".")[2], []).append(name)
    targets: list[str] = []
    for last in dict.fromkeys(name.rpartition(".")[2] for name in layers):
        same = by_last_name[last]
        targets += (
            [last] if all(name in layers for name in same) else [name for name in same if name in layers]
        )
    return targets


def _guess_task(model: nn.Module) -> str | None:
    name = type(model).__name__
    return next((task for ending, task in _TASK_BY_CLASS.items() if name.endswith(ending)), None)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"load_adapter: expected {CONFIG_NAME} in {path}, got none")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}, not an object")
    except ValueError as error:
        raise ValueError(f"load_adapter: expected JSON in {file}, got {error}") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"load_adapter: expected peft_type LORA in {file}, got {config.get('peft_type')!r}")
    for key in ("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "trainable_token_indices"):
        if config.get(key):
            raise ValueError(
                f"load_adapter: expected a plain LoRA adapter, got {key}={config[key]!r} in {file}"
            )
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise ValueError(
            f"load_adapter: expected a number lora_alpha in {file}, got {config.get('lora_alpha')!r}"
        )
    config["use_rslora"] = bool(config.get("use_rslora"))
    config["alpha_pattern"] = config.get("alpha_pattern") or {}
    return config


def _pattern_value(patterns: dict[str, float], name: str, default: float) -> float:
    """PEFT's rule: the first pattern that is a regular expression for the path or its end."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), default)


def _check_fit(entries: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    wrong = [
        f"{key}: expected {tuple(p.shape)}, got {tuple(tensors[key].shape)}"
        for key, p in entries.items()
        if key in tensors and tensors[key].shape != p.shape
    ]
    problems = (
        ("missing from the file", [key for key in entries if key not in tensors]),
        ("unexpected in the file", [key for key in tensors if key not in entries]),
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
