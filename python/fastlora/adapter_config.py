"""PEFT's LoraConfig, as few keys as it takes: written from layers, and read."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .named_adapters import NamedAdapters, Parts

CONFIG_NAME = "adapter_config.json"
_TASK_BY_CLASS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules less what is inside a layer with adapters, with the names that they have where no part of
    the model is compiled."""
    inside = None
    for name, module in model.named_modules():
        if inside is None or not name.startswith(inside):
            yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module
            inside = f"{name}." if isinstance(module, NamedAdapters) and name else None


def config_of(
    names: Iterable[str], layers: Mapping[str, Parts], stacks: Mapping[str, Parts] | None = None
) -> dict[str, Any]:
    """Of the adapter that these layers hold, and `stacks`, experts' projections. Few keys, so that older
    versions read it too. `names` are those of all the model's modules."""
    every = {**layers, **(stacks or {})}
    rslora = all(layer.use_rslora for layer in every.values())
    ranks = {name: layer.rank for name, layer in every.items()}
    alphas = {name: _alpha(layer, rslora) for name, layer in every.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(name, every): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {_pattern(name, every): a for name, a in alphas.items() if a != alpha},
        "target_modules": _target_modules(names, layers),
        "use_rslora": rslora,
        **({"use_dora": True} if any(layer.magnitude is not None for layer in every.values()) else {}),
        # PEFT makes no experts' adapter with dropout, which it needs in training only.
        "lora_dropout": 0.0 if stacks else max(layer.dropout for layer in every.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _pattern(name: str, layers: Iterable[str]) -> str:
    """A PEFT pattern for this layer alone: the path, tied to its start where it also ends another's."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in layers) else name


def _alpha(layer: Parts, rslora: bool) -> float:
    """The alpha that gives the layer's scaling back; its own where that does."""
    divisor = math.sqrt(layer.rank) if rslora else layer.rank
    alpha = layer.alpha if math.isclose(layer.alpha / divisor, layer.scaling) else layer.scaling * divisor
    return int(alpha) if alpha == int(alpha) else alpha


def _target_modules(names: Iterable[str], layers: Mapping[str, Parts]) -> list[str]:
    """Last names where they select exactly the adapted layers of that name, whole paths otherwise."""
    by_last_name: dict[str, list[str]] = {}
    for name in names:
        by_last_name.setdefault(name.rpartition(".")[2], []).append(name)
    targets: list[str] = []
    for last in dict.fromkeys(name.rpartition(".")[2] for name in layers):
        same = by_last_name[last]
        targets += (
            [last] if all(name in layers for name in same) else [name for name in same if name in layers]
        )
    return targets


def guess_task(name: str) -> str | None:
    """Of the name of a transformers class."""
    return next((task for ending, task in _TASK_BY_CLASS.items() if name.endswith(ending)), None)


def read_config(path: Path, op: str = "load_adapter") -> dict[str, Any]:
    file = path / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{op}: expected {CONFIG_NAME} in {path}, got none")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}, not an object")
    except ValueError as error:
        raise ValueError(f"{op}: expected JSON in {file}, got {error}") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{op}: expected peft_type LORA in {file}, got {config.get('peft_type')!r}")
    for key in ("use_qalora", "lora_bias", "fan_in_fan_out", "trainable_token_indices"):
        if config.get(key):
            raise ValueError(f"{op}: expected a plain LoRA adapter, got {key}={config[key]!r} in {file}")
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise ValueError(f"{op}: expected a number lora_alpha in {file}, got {config.get('lora_alpha')!r}")
    config["use_dora"] = bool(config.get("use_dora"))
    config["use_rslora"] = bool(config.get("use_rslora"))
    config["alpha_pattern"] = config.get("alpha_pattern") or {}
    return config


def pattern_value(patterns: dict[str, float], name: str, default: float) -> float:
    """PEFT's rule: the first pattern that is a regular expression for the path or its end."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), default)
