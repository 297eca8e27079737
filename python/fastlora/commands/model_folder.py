"""A Hugging Face folder on disk: config.json, safetensors in one file or several, and what lies beside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"}


class ModelFolder:
    """A dense model's folder, of which nothing but names and sizes has been read.

    Attributes:
        path: where it is.
        config: config.json.
        files: its weights, in the order of their names.
        keys: by file, the tensors in it that the index speaks of.

    Raises FileNotFoundError for what is missing, and ValueError for a model that is quantised already and for
    files that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise FileNotFoundError(f"expected a model's folder, got {path}, which is no folder")
        self.config = _json(path / CONFIG)
        if self.config.get("quantization_config"):
            method = self.config["quantization_config"].get("quant_method", "?")
            raise ValueError(f"expected a dense model, got one quantised by {method!r} in {path}")
        self.files, wanted = self._weights()
        self.keys: dict[Path, list[str]] = {}
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as opened:
                    held = sorted(opened.keys())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"expected a safetensors file, got {file}: {error}") from None
            self.keys[file] = [key for key in held if wanted is None or wanted.get(key) == file.name]
        missing = set(wanted or ()) - {key for keys in self.keys.values() for key in keys}
        if missing:
            raise ValueError(
                f"expected the tensors of {INDEX}, got none named {sorted(missing)[0]} in {path}"
            )

    def _weights(self) -> tuple[list[Path], dict[str, str] | None]:
        """The files and, where there is an index, which of them holds a tensor."""
        if (self.path / WEIGHTS).is_file():
            return [self.path / WEIGHTS], None
        if (self.path / INDEX).is_file():
            weight_map = _json(self.path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"expected a weight_map in {self.path / INDEX}, got {weight_map!r}")
            files = [self.path / name for name in sorted(set(weight_map.values()))]
            lost = [file.name for file in files if not file.is_file()]
            if lost:
                raise FileNotFoundError(f"expected the files of {INDEX} in {self.path}, got no {lost[0]}")
            return files, weight_map
        found = sorted(file.name for file in self.path.iterdir() if file.suffix in _WEIGHT_FILES)
        raise FileNotFoundError(f"expected {WEIGHTS} or {INDEX} in {self.path}, got {found or 'no weights'}")

    @property
    def nbytes(self) -> int:
        """Of the weights' files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def others(self) -> list[Path]:
        """The files beside config and weights: tokenizer, generation config, code. Not those in folders."""
        return [
            file
            for file in sorted(self.path.iterdir())
            if file.is_file()
            and file.name != CONFIG
            and not file.name.startswith(".")
            and file.suffix not in _WEIGHT_FILES
            and not file.name.endswith(".index.json")
        ]

    @property
    def fingerprint(self) -> dict[str, list[int]]:
        """By name, size and time of change of all that a run depends on."""
        files = [self.path / CONFIG, *self.files, *self.others]
        return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def index_text(shards: Mapping[str, Mapping[str, int]]) -> str:
    """model.safetensors.index.json of shards: by file, by tensor, bytes."""
    sizes = [size for tensors in shards.values() for size in tensors.values()]
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    return json_text({"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))})


def shard_names(count: int) -> Sequence[str]:
    """What transformers calls that many files of weights."""
    if count == 1:
        return [WEIGHTS]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"expected {file.name} in {file.parent}, got none")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {file}, got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {file}, got a {type(value).__name__}")
    return value
