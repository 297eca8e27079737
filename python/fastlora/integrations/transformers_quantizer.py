""":class:`FastLoraHfQuantizer`: what transformers calls to load, save and undo a quantised model."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from ..conversion_report import ConversionReport, SkippedLayer
from ..convert import (
    ALL_LINEAR,
    NothingToConvert,
    _bytes,
    _freeze_all_but_adapters,
    _names,
    _weights,
    convert,
)
from ..experts import QExperts
from ..linear import QLinear
from ..named_adapters import DEFAULT
from .experts import dense_experts
from .transformers_config import FastLoraConfig, merged

if TYPE_CHECKING:
    from . import transformers_loading

_LAYERS = (QLinear, QExperts)
_ADAPTERS = r"(^|[._])lora_[AB]$"


def register(auto: ModuleType) -> None:
    """Enter "fastlora" in the tables of `auto`, which is transformers.quantizers.auto. Again: no effect."""
    if "fastlora" in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config("fastlora")(FastLoraConfig)
    auto.register_quantizer("fastlora")(FastLoraHfQuantizer)
    # transformers refuses a config of another class than the checkpoint's, and so to read bitsandbytes' files
    # with ours; and takes all of its own class from the checkpoint, an adapter for a bare base too. Calls
    # with any other class go the way they went.
    stock = auto.AutoHfQuantizer.merge_quantization_configs

    def merge(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        stored, given = quantization_config, quantization_config_from_args
        if isinstance(given, FastLoraConfig):
            return merged(stored if isinstance(stored, dict) else stored.to_dict(), given)
        return stock(stored, given)

    auto.AutoHfQuantizer.merge_quantization_configs = classmethod(merge)


class FastLoraHfQuantizer(HfQuantizer):
    """A model's ``hf_quantizer``. Its `report` says what was quantised, and what was not and why."""

    requires_calibration = False
    quantization_config: FastLoraConfig

    def __init__(self, quantization_config: FastLoraConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report = ConversionReport()
        self._checkpoint: transformers_loading.Checkpoint | None = None  # while one is being loaded
        self._op: transformers_loading.Quantize | None = None
        self._head: list[str] = []  # parameters of a head that the checkpoint has not

    is_trainable = True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the Trainer may take the model without an adapter of PEFT's: it has its own."""
        return self.quantization_config.has_adapters

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if "disk" in (device_map.values() if isinstance(device_map, dict) else (device_map,)):
            raise ValueError("FastLoraConfig: expected a device_map of devices, got one with 'disk'")

    # --- loading, in the order in which transformers calls ------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Replace layers of the model, which is on the meta device."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        from .transformers_loading import Checkpoint, Quantize, ReadBitsAndBytes

        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                "FastLoraConfig: expected a model that is loaded whole, got a distributed_config; shard it "
                "after it is loaded"
            )
        checkpoint = Checkpoint(checkpoint_files)
        if checkpoint.kind != "dense" and not self.pre_quantized:
            raise ValueError(
                "FastLoraConfig: expected dense weights, as config.json has no quantization_config, got a "
                f"{checkpoint.kind} checkpoint"
            )
        config = self.quantization_config
        self._head = self._new_head(model, checkpoint)
        if self.pre_quantized:
            packed = checkpoint.layers(model, get_model_conversion_mapping(model))
            self.report = ConversionReport()
            if packed:
                self.report = self._replace(model, "|".join(map(re.escape, packed)), [], {})
                checkpoint.make_room_for_offsets(model, packed)
            if self.report.skipped:
                lines = "".join(f"\n  {s.name}: {s.reason}" for s in self.report.skipped)
                raise ValueError(f"FastLoraConfig: expected packed weights of linear layers only, got{lines}")
            self._list_others(model, "dense in the checkpoint")
        else:
            self.report = self._replace(
                model, config.target_modules, config.skip_modules, self._stay_dense(model)
            )
            if config.target_modules == ALL_LINEAR:
                self._list_others(model, None)
        if not self.report.converted:
            why = "; ".join(f"{s.name}: {s.reason}" for s in self.report.skipped[:5])
            warnings.warn(f"FastLoraConfig: nothing in this model is quantised ({why})", stacklevel=2)
        for module in model.modules():
            if isinstance(module, _LAYERS):
                # transformers is not to initialise it as the Linear that it is a kind of.
                module._is_hf_initialized = True  # type: ignore[assignment]
        self._checkpoint = checkpoint
        self._op = (ReadBitsAndBytes if checkpoint.kind == "bitsandbytes" else Quantize)(self)
        if self._new_adapters(model):  # they are no surprise to be reported
            ignored = set(model._keys_to_ignore_on_load_missing or ())
            model._keys_to_ignore_on_load_missing = ignored | {_ADAPTERS}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The last call before tensors are read, and the first that knows all renamings."""
        if self._checkpoint is None:
            return weight_conversions
        from transformers.core_model_loading import WeightRenaming

        from .transformers_fit import check_fit
        from .transformers_loading import BitsAndBytesConverter, ReadBitsAndBytes

        conversions = list(weight_conversions)
        if isinstance(self._op, ReadBitsAndBytes):
            renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
            conversions.insert(0, BitsAndBytesConverter(self._op, self._checkpoint, renamings))
        check_fit(model, self._checkpoint, conversions, new=self._new_adapters(model) + self._head)
        return conversions

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        from .transformers_loading import packed_parameters

        path, _, name = param_name.rpartition(".")
        return any(name == packed.name for packed in packed_parameters(model.get_submodule(path)))

    def get_quantize_ops(self) -> Any:
        return self._op

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        checkpoint, op, self._checkpoint, self._op = self._checkpoint, self._op, None, None
        assert checkpoint is not None
        assert op is not None
        op.check()
        if checkpoint.kind == "bitsandbytes":
            self._adopt_format(model)
        if self._new_adapters(model, checkpoint):
            model._keys_to_ignore_on_load_missing -= {_ADAPTERS}
            for module in model.modules():
                if isinstance(module, _LAYERS):
                    module.reset_adapter()
        self._save_as_it_is(model)
        if self.quantization_config.has_adapters:
            _freeze_all_but_adapters(model)
            for name, parameter in model.named_parameters():
                if name in self._head:
                    parameter.requires_grad_(True)
        adapters = sum(p.nbytes for name, p in model.named_parameters() if re.search(_ADAPTERS, name))
        packed = sum(layer.bytes_before - layer.bytes_after for layer in self.report.converted)
        self.report.bytes_after = _bytes(model)
        self.report.bytes_before = self.report.bytes_after - adapters + packed
        self.report.trainable, self.report.total = _weights(model)

    def _replace(self, model: Any, target: Any, skip: Any, stay: dict[str, str]) -> ConversionReport:
        """Of a model on meta. `stay` are more layers to leave, and why."""
        options = self.quantization_config.layer_options
        try:
            report = convert(model, target, skip_modules=[*skip, *stay], progress=False, **options)
        except NothingToConvert as nothing:
            report = ConversionReport(skipped=nothing.skipped)
        reasons = {f"in skip_modules ({name})": why for name, why in stay.items() if name not in skip}
        report.skipped = [SkippedLayer(s.name, reasons.get(s.reason, s.reason)) for s in report.skipped]
        return report

    def _stay_dense(self, model: Any) -> dict[str, str]:
        """Layers of a dense checkpoint that are not to be quantised, and why."""
        stay = dict.fromkeys(model._keep_in_fp32_modules or (), "the model keeps it in float32")
        stay |= dict.fromkeys(model._keep_in_fp32_modules_strict or (), "the model keeps it in float32")
        for one, other in model.all_tied_weights_keys.items():
            for name, its in ((one, other), (other, one)):
                if name.endswith(".weight"):
                    stay[name.removesuffix(".weight")] = f"its weight is tied to {its}"
        for name in self._head:
            stay[name.rpartition(".")[0]] = "not in the checkpoint, which is of another kind of model"
        return stay

    def _list_others(self, model: Any, why_linear: str | None) -> None:
        """Report modules that hold matrices and are neither quantised nor reported."""
        listed = {s.name for s in self.report.skipped}
        for ids in _names(model).values():
            module = model.get_submodule(ids[0])
            matrices = any(p is not None and p.dim() > 1 for p in module._parameters.values())
            if not matrices or isinstance(module, _LAYERS) or listed.intersection(ids):
                continue
            reason = f"not a torch.nn.Linear but a {type(module).__name__}"
            if isinstance(module, nn.Linear):
                reason = why_linear or reason
            self.report.skipped.append(SkippedLayer(ids[0], reason))

    def _new_adapters(self, model: Any, checkpoint: Any = None) -> list[str]:
        """Parameters of adapters that the checkpoint has not and that will be initialised."""
        checkpoint = checkpoint or self._checkpoint
        if any(re.search(_ADAPTERS, key) for key in checkpoint.tensors):
            return []
        return [name for name in model.state_dict() if re.search(_ADAPTERS, name)]

    @staticmethod
    def _new_head(model: Any, checkpoint: Any) -> list[str]:
        """Parameters outside the base model that the checkpoint, of another kind of model, has not:
        transformers initialises them and says so. Of the model before its layers are replaced."""
        prefix = f"{model.base_model_prefix}."
        made_for = getattr(model.config, "architectures", None) or []
        if not hasattr(model, model.base_model_prefix) or type(model).__name__ in made_for:
            return []
        heads = [name for name in model.state_dict() if not name.startswith(prefix)]
        return [name for name in heads if name not in checkpoint.tensors]

    def _adopt_format(self, model: Any) -> None:
        """Have the config say what the layers are that bitsandbytes' files were read into."""
        layers = {path: m for path, m in model.named_modules() if isinstance(m, QLinear)}
        formats = {(m.blocksize, m.double_quant) for m in layers.values()}
        if len(formats) != 1:
            raise ValueError(
                "FastLoraConfig: expected layers of one block size and kind of scales, got "
                f"{sorted(formats)} as (blocksize, double_quant)"
            )
        blocksize, double_quant = formats.pop()
        self.quantization_config = replace(
            self.quantization_config, blocksize=blocksize, double_quant=double_quant
        )
        model.config.quantization_config = self.quantization_config

    @staticmethod
    def _save_as_it_is(model: Any) -> None:
        """transformers undoes when it saves what it did when it loaded. Packed experts stay stacked."""
        from transformers.core_model_loading import WeightConverter

        packed = [
            f"{path}.{name}"
            for path, module in model.named_modules()
            if isinstance(module, QExperts)
            for name in module.shapes
        ]
        model._weight_conversions = [
            c
            for c in getattr(model, "_weight_conversions", None) or []
            if not isinstance(c, WeightConverter)
            or not any(name.endswith(target) for name in packed for target in c.target_patterns)
        ]

    # --- saving, and back to dense ------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        added = {name for m in model.modules() if isinstance(m, QLinear) for name in m.adapter_names}
        added -= {DEFAULT}
        if added:
            raise RuntimeError(
                f"save_pretrained: expected layers without named adapters, got {sorted(added)}; save each "
                "with fastlora.save_adapter and take them off with delete_adapter"
            )
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Each layer as a dense one of what it computes: the packed weight, and the active adapter's product
        where there is one. One at a time."""
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        names = _names(model)
        layers: dict[int, Any] = {id(m): m for m in model.modules() if isinstance(m, _LAYERS)}
        while layers:
            key, layer = layers.popitem()
            dense = dense_experts(layer, kind) if isinstance(layer, QExperts) else _dense_linear(layer, kind)
            for path in names[key]:
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, dense)
        return model


@torch.no_grad()
def _dense_linear(layer: QLinear, dtype: torch.dtype | None) -> nn.Linear:
    active = None if layer.merged else layer.active_adapter
    weight = layer.dequantize(torch.float32 if active else dtype)
    if active:
        adapter = layer.adapter(active)
        weight.addmm_(adapter.lora_B.float(), adapter.lora_A.float(), alpha=adapter.scaling)
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight.to(dtype))
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.to(dtype))
    return dense.train(layer.training)
