"""How a checkpoint's tensors become a quantised model's, while transformers reads its files.

transformers reads one tensor after the other and has those of our layers converted by an op of ours; no more
than one dense weight is in memory at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from ..experts import QExperts
from ..linear import QLinear
from ..nf4 import NF4Weight, quantize_nf4

_OP = "FastLoraConfig"
_STATE = ".quant_state.bitsandbytes__"
_BNB_PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", f"{_STATE}nf4")


class Header(NamedTuple):
    """Of a tensor in a file; dtype in safetensors' words."""

    dtype: str
    shape: tuple[int, ...]


_NONE = Header("", ())


class Checkpoint:
    """What the files of a checkpoint hold, by their headers.

    Attributes:
        tensors: every tensor's header.
        kind: "fastlora" or "bitsandbytes" where weights are packed, else "dense".
        packed: the keys of packed weights.
    """

    def __init__(self, files: Sequence[str] | None) -> None:
        if files is None:
            raise ValueError(f"{_OP}: expected a checkpoint of safetensors files, got a state_dict")
        others = [file for file in files if not str(file).endswith(".safetensors")]
        if others:
            raise ValueError(
                f"{_OP}: expected a checkpoint of safetensors files, got {', '.join(map(str, others))}; load "
                "it without a quantization_config and save it with save_pretrained"
            )
        self.tensors: dict[str, Header] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118 (no mapping)
                        part = opened.get_slice(key)
                        self.tensors[key] = Header(part.get_dtype(), tuple(part.get_shape()))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{_OP}: expected a safetensors file, got {file}: {error}") from error
        self.kind, self.packed = self._packed()

    def _packed(self) -> tuple[str, frozenset[str]]:
        fp4 = [key for key in self.tensors if key.endswith(f"{_STATE}fp4")]
        int8 = [key for key in self.tensors if key.endswith(".SCB")]
        for what, keys in (("bitsandbytes FP4", fp4), ("bitsandbytes int8", int8)):
            if keys:
                raise ValueError(
                    f"{_OP}: expected a checkpoint that is dense, bitsandbytes NF4 or fastlora's, got "
                    f"{what} ({len(keys)} layers: {keys[0]} ...)"
                )
        if nf4 := self._stems(f"{_STATE}nf4"):
            return "bitsandbytes", nf4
        ours = frozenset(key for key in self._stems("_scales") if self.tensors.get(key, _NONE).dtype == "U8")
        return ("fastlora", ours) if ours else ("dense", ours)

    def _stems(self, suffix: str) -> frozenset[str]:
        return frozenset(key.removesuffix(suffix) for key in self.tensors if key.endswith(suffix))

    def layers(self, model: Any, conversions: Sequence[Any]) -> dict[str, str]:
        """{module's path in `model`: key} of packed weights; not of those that the model has no place for."""
        dense = dict(model.state_dict())
        renamings = [c for c in copy.deepcopy(list(conversions)) if isinstance(c, WeightRenaming)]
        found = {}
        for key in sorted(self.packed, key=dot_natural_key):
            name, _ = renamed(key, renamings, [], model.base_model_prefix, dense)
            if name in dense:
                found[name.rpartition(".")[0]] = key
        return found

    def make_room_for_offsets(self, model: Any, layers: Mapping[str, str]) -> None:
        """In those of a model's layers whose weights have offsets here; `layers` as :meth:`layers` finds
        them. Raises ValueError for offsets of a shape that does not fit."""
        for path, key in layers.items():
            header = self.tensors.get(f"{key}_offsets")
            if header is not None and header.dtype == "U8":
                try:
                    model.get_submodule(path).make_room_for_offsets(header.shape)
                except ValueError as error:
                    raise ValueError(f"{_OP}: {key}: {error}") from error


def renamed(
    key: str, renamings: list[Any], converters: list[Any], prefix: str, parameters: dict[str, Any]
) -> tuple[str, str | None]:
    """(parameter, converter's pattern or None) that the loader finds for a key of the files: by its renamings
    or, where these lead nowhere, as the key is."""
    name, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
    if name not in parameters and key in parameters:
        name, pattern = rename_source_key(key, [], [], prefix, parameters)
    return name, pattern


class Packed(NamedTuple):
    """A parameter of a quantised layer that a dense weight becomes."""

    name: str
    dense_shape: tuple[int, ...]
    beside: tuple[str, ...]  # the parameters that come with it


def packed_parameters(module: nn.Module) -> tuple[Packed, ...]:
    """Of a quantised layer; none of any other module."""
    suffixes = ("_scales", "_nested") if getattr(module, "double_quant", False) else ("_scales",)
    shapes: dict[str, tuple[int, ...]] = {}
    if isinstance(module, QLinear):
        shapes["weight"] = (module.out_features, module.in_features)
    elif isinstance(module, QExperts):
        shapes |= {name: module.dense_shape(name) for name in module.shapes}
    return tuple(Packed(name, shape, tuple(name + s for s in suffixes)) for name, shape in shapes.items())


def quantize(module: nn.Module, name: str, dense: Tensor) -> dict[str, Tensor]:
    """A dense weight as the parameters of `module` that hold it."""
    if isinstance(module, QExperts):
        return module.quantize(name, dense)
    assert isinstance(module, QLinear)
    return _parts(quantize_nf4(dense, blocksize=module.blocksize, double_quant=module.double_quant))


def _parts(weight: NF4Weight) -> dict[str, Tensor]:
    parts = {"weight": weight.packed, "weight_scales": weight.scales, "weight_nested": weight.nested}
    return {name: part for name, part in parts.items() if part is not None}


# --- the steps that transformers calls --------------------------------------------------------------------


class Quantize(ConversionOps):
    """A dense weight to packed parameters.

    transformers turns an error here into a line of a log and goes on, so errors are kept for :meth:`check`.
    """

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer
        self.failures: dict[str, str] = {}

    def __deepcopy__(self, memo: object) -> Quantize:
        return self  # transformers copies it for each tensor

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Sequence[str] = (),
        target_patterns: Sequence[str] = (),
        *,
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for target, found in input_dict.items():
            path, _, name = target.rpartition(".")
            module = model.get_submodule(path)
            dense = found[0] if isinstance(found, list) else found
            if all(name != packed.name for packed in packed_parameters(module)):  # a converter's other target
                out[target] = dense
                continue
            try:
                parts = quantize(module, name, dense)
            except (TypeError, ValueError, RuntimeError) as error:
                parts = self._failed(target, module, name, error)
            out |= {f"{path}.{part}": value for part, value in parts.items()}
        return out

    def _failed(self, target: str, module: nn.Module, name: str, error: Exception) -> dict[str, Tensor]:
        """Notes an error, and fills the place."""
        self.failures[target] = str(error)
        (packed,) = (p for p in packed_parameters(module) if p.name == name)
        places = {part: module.get_parameter(part) for part in (name, *packed.beside)}
        return {part: torch.zeros_like(place, device="cpu") for part, place in places.items()}

    def check(self) -> None:
        """ValueError that lists what failed."""
        if self.failures:
            lines = "".join(f"\n  {name}: {error}" for name, error in self.failures.items())
            raise ValueError(f"{_OP}: expected weights that can be quantised, got{lines}")


class ReadBitsAndBytes(Quantize):
    """bitsandbytes' tensors of one layer to packed parameters of the same values."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Sequence[str] = (),
        target_patterns: Sequence[str] = (),
        *,
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        path, _, name = full_layer_name.rpartition(".")
        layer = model.get_submodule(path)
        try:
            weight = NF4Weight.from_bitsandbytes({key: found[0] for key, found in input_dict.items()})
            if weight.shape != (layer.out_features, layer.in_features):
                n, k = layer.out_features, layer.in_features
                raise ValueError(f"expected a weight of {n} x {k}, got {tuple(weight.shape)}")
        except (TypeError, ValueError, RuntimeError) as error:
            parts = self._failed(full_layer_name, layer, name, error)
        else:
            if (layer.blocksize, layer.double_quant) != (weight.blocksize, weight.double_quant):
                layer._set_base(weight)  # which the parameters' shapes depend on
                layer.blocksize, layer.double_quant = weight.blocksize, weight.double_quant
                if missing_keys is not None and weight.nested is None:
                    missing_keys.discard(f"{path}.weight_nested")
            parts = _parts(weight)
        return {f"{path}.{part}": value for part, value in parts.items()}


class BitsAndBytesConverter(WeightConverter):
    """Collects the tensors of each layer that bitsandbytes packed, and of those alone: dense weights beside
    them have the same name."""

    __slots__ = ("layers",)

    def __init__(self, read: ReadBitsAndBytes, checkpoint: Checkpoint, renamings: Sequence[Any]) -> None:
        super().__init__([f"weight{part}" for part in _BNB_PARTS], ["weight"], [read])
        own = copy.deepcopy(list(renamings))  # some keep what they have seen
        self.layers = _Shared(apply_renamings(key, own) for key in checkpoint.packed)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        for part in _BNB_PARTS:
            if source_key.endswith(f"weight{part}") and source_key.removesuffix(part) in self.layers:
                return source_key.removesuffix(part), f"weight{part}"
        return source_key, None

    def was_used(self) -> bool:
        return False  # or transformers would try to undo it when it saves


class _Shared(frozenset[str]):
    """Not copied by deepcopy, which transformers calls for each tensor."""

    def __deepcopy__(self, memo: object) -> _Shared:
        return self
