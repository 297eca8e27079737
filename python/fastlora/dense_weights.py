""":class:`DenseWeights`: a dense model's weights by name, wherever they are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from .commands.model_folder import CONFIG, ModelFolder


class DenseWeights:
    """Of a module, of a state dict, of a safetensors file, or of a folder of such files, read weight by
    weight when they are asked for. Iterating gives the names.

    Attributes:
        config: config.json of a folder that has one, whose index then says which files count; else empty.

    Raises FileNotFoundError for what is missing, ValueError for a quantised model and unreadable files.
    """

    def __init__(self, source: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]) -> None:
        self.config: Mapping[str, Any] = {}
        self._tensors: Mapping[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        if isinstance(source, nn.Module):
            self._tensors = source.state_dict()
        elif isinstance(source, Mapping):
            self._tensors = source
        elif (Path(source) / CONFIG).is_file():
            folder = ModelFolder(Path(source))
            self.config = folder.config
            self._files = {key: file for file, keys in folder.keys.items() for key in keys}
        else:
            path = Path(source)
            if not path.exists():
                raise FileNotFoundError(f"expected a safetensors file or a folder of such, got {path}")
            for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
                with safe_open(file, framework="pt") as opened:
                    self._files |= dict.fromkeys(opened.keys(), file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors or self._files)

    def shape(self, key: str) -> tuple[int, ...] | None:
        """None if there is no such weight."""
        if key in self._tensors:
            return tuple(self._tensors[key].shape)
        if key not in self._files:
            return None
        with safe_open(self._files[key], framework="pt") as opened:
            return tuple(opened.get_slice(key).get_shape())

    def __getitem__(self, key: str) -> Tensor:
        if key in self._tensors:
            return self._tensors[key]
        with safe_open(self._files[key], framework="pt") as opened:
            return opened.get_tensor(key)
