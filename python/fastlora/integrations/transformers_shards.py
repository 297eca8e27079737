"""A dense checkpoint quantised a piece at a time, to the tensors that ``from_pretrained`` with a
:class:`FastLoraConfig` and ``save_pretrained`` give, without ever holding the model.

transformers itself prepares all: it picks the class, builds the model on the meta device, has its layers
replaced, and finds out how the files' tensors are renamed and converted. Where it would read them it is
stopped; from there on its own loader is called for one piece after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .transformers_config import FastLoraConfig

import transformers  # isort: skip  # of a version that transformers_config has checked
from transformers.core_model_loading import (  # isort: skip
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    revert_weight_conversion,
)

from .transformers_loading import renamed  # isort: skip

if TYPE_CHECKING:
    from .transformers_quantizer import FastLoraHfQuantizer  # which transformers' own tables must precede

_OP = "PieceQuantizer"


class Piece(NamedTuple):
    """Tensors that are converted together, by their names in the files; the file of the first; and their
    bytes there."""

    keys: tuple[str, ...]
    file: str
    nbytes: int


class PieceQuantizer:
    """See the module.

    Args:
        folder: of a dense model, config.json and safetensors.
        config: without adapters.

    Attributes:
        pieces: what there is to do, in the order of the first names. Tensors that the model has no use for
            are in none, nor those that are tied to others and equal them.
        report: what is quantised, and what is not and why.
        dtype: of the model.
        nbytes: of all that comes out.

    Raises ValueError for a config that names no class of transformers, for adapters, and for a checkpoint
    that does not fit.
    """

    def __init__(self, folder: str, config: FastLoraConfig) -> None:
        if config.has_adapters:
            raise ValueError(f"{_OP}: expected a config without adapters, got rank={config.rank}")
        with _quiet():
            prepared = _prepare(folder, config)
        self._model, self._load_config = prepared.model, prepared.load_config
        self._quantizer: FastLoraHfQuantizer = self._load_config.hf_quantizer
        self.report, self.dtype = self._quantizer.report, self._load_config.dtype
        self._where: dict[str, str] = {}
        for file in prepared.files:
            with safe_open(file, framework="pt") as opened:
                self._where |= dict.fromkeys(opened.keys(), file)
        self._opened: dict[str, Any] = {}
        # The loader and its undoing are given copies, as they keep what they have seen: so a piece comes out
        # the same whatever came before it.
        self._conversions = copy.deepcopy(list(self._load_config.weight_mapping or ()))
        self._undo: list[Any] = []
        self.pieces = self._plan()
        expected = {name: t.nbytes for name, t in self._model.state_dict().items()}
        tied = set(self._model.all_tied_weights_keys)
        self.nbytes = sum(size for name, size in expected.items() if name not in tied)

    @torch.no_grad()
    def quantize(self, piece: Piece) -> dict[str, Tensor]:
        """The tensors that are saved for a piece. Raises ValueError for a weight with NaN or Inf."""
        model = self._model
        before = model.state_dict(keep_vars=True)
        load_config = replace(self._load_config, weight_mapping=copy.deepcopy(self._conversions))
        tensors = {key: self._slice(key) for key in piece.keys}
        with _quiet():
            info, _ = convert_and_load_state_dict_in_model(model, tensors, load_config)
        self._quantizer.get_quantize_ops().check()
        if info.conversion_errors or info.mismatched_keys:
            wrong = sorted(map(str, info.conversion_errors or info.mismatched_keys))
            raise ValueError(f"{_OP}: expected tensors that can be converted, got {wrong[0]}")
        made = {
            name: t
            for name, t in model.state_dict(keep_vars=True).items()
            if t is not before.get(name) and not t.is_meta
        }
        for name in made:  # the model stays on the meta device
            _put(model, name, before[name])
        model._weight_conversions = list(self._undo)
        self._quantizer._save_as_it_is(model)
        return revert_weight_conversion(model, {name: t.detach() for name, t in made.items()})

    def _plan(self) -> list[Piece]:
        meta, prefix = self._model.state_dict(), self._model.base_model_prefix
        seen = copy.deepcopy(self._conversions)
        renamings = [c for c in seen if isinstance(c, WeightRenaming)]
        converters = [c for c in seen if isinstance(c, WeightConverter)]
        together: dict[str, list[str]] = {}
        for key in sorted(self._where, key=dot_natural_key):
            name, _ = renamed(key, renamings, converters, prefix, meta)
            if name in meta:
                together.setdefault(name, []).append(key)
        self._undo = [c for c in seen if c.was_used()]
        for name, its in self._model.all_tied_weights_keys.items():
            one, other = together.get(name), together.get(its)
            if one and other and torch.equal(*(self._slice(keys[0])[...] for keys in (one, other))):
                del together[name]
        for name in self._model._keys_to_ignore_on_save or ():
            together.pop(name, None)
        return [
            Piece(tuple(keys), self._where[keys[0]], sum(self._nbytes(key) for key in keys))
            for keys in together.values()
        ]

    def _slice(self, key: str) -> Any:
        file = self._where[key]
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt")
        return self._opened[file].get_slice(key)

    def _nbytes(self, key: str) -> int:
        found = self._slice(key)
        bits = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "BF16": 16, "F16": 16, "I16": 16}
        count = torch.Size(found.get_shape()).numel()
        return count * bits.get(found.get_dtype(), 8) // 8


class _Prepared(Exception):
    """Carries what transformers had prepared when it was about to read."""

    def __init__(self, model: Any, files: list[str], load_config: Any) -> None:
        super().__init__("prepared")
        self.model, self.files, self.load_config = model, files, load_config


def _prepare(folder: str, config: FastLoraConfig) -> _Prepared:
    made_for = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    names = getattr(made_for, "architectures", None) or []
    cls = getattr(transformers, names[0], None) if names else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ValueError(
            f"{_OP}: expected architectures in config.json to name a class of transformers "
            f"{transformers.__version__}, got {names or 'none'}"
        )

    def stop(model: Any, state_dict: Any, files: list[str], load_config: Any, *_: Any, **__: Any) -> None:
        raise _Prepared(model, files, load_config)

    # Of the same name, by which transformers finds conversions.
    namespace = {"_load_pretrained_model": staticmethod(stop), "__module__": cls.__module__}
    stopped: Any = type(cls.__name__, (cls,), namespace)
    try:
        stopped.from_pretrained(
            folder, quantization_config=config, use_safetensors=True, local_files_only=True, dtype="auto"
        )
    except _Prepared as prepared:
        return prepared
    raise RuntimeError(f"{_OP}: transformers {transformers.__version__} loads models by another way")


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    (module._buffers if last in module._buffers else module._parameters)[last] = value  # type: ignore[assignment]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars, which would be one for each piece."""
    logging = transformers.utils.logging
    showed = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if showed:
            logging.enable_progress_bar()
