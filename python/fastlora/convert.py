""":func:`convert`: swap a model's dense linear layers for QLinear and its stacked experts for QExperts, in
place, and say what was done."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import checks
from .conversion_report import ConversionReport, ConvertedLayer, SkippedLayer
from .experts import QExperts
from .hooks import has_hooks
from .integrations import experts as stacked
from .linear import QLinear, check_arguments
from .methods import initialisation
from .methods.modulora import ModuLinear
from .named_adapters import NamedAdapters

ALL_LINEAR = "all-linear"


class NothingToConvert(ValueError):
    """Nothing in a model could be converted; `skipped` says of each layer why."""

    def __init__(self, message: str, skipped: list[SkippedLayer]) -> None:
        super().__init__(message)
        self.skipped = skipped


def convert(
    model: nn.Module,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    *,
    rank: int = 16,
    alpha: float = 32,
    skip_modules: Sequence[str] = ("lm_head",),
    dropout: float = 0.0,
    blocksize: int = 64,
    double_quant: bool = True,
    use_rslora: bool = False,
    adapter_dtype: torch.dtype | None = None,
    init: str = "default",
    calibrate: str | None = None,
    layer_class: type[QLinear] | type[ModuLinear] = QLinear,
    expert_rank: int | None = None,
    progress: bool = True,
    **kind: Any,
) -> ConversionReport:
    """Replace dense linear layers of `model` by QLinear, and stacked experts (mixture-of-experts layers of
    transformers 5) by :class:`QExperts`, in place, and freeze everything but the adapters.

    Args:
        model: any module that holds linear layers; they may be on the meta device.
        target_modules: ``"all-linear"``; or names, each of which selects the modules whose dotted path is it
            or ends in it (``["q_proj", "layers.0.mlp.up_proj"]``); or, as a string, one regular expression
            that must match a whole path.
        skip_modules: names of modules to leave dense, with all they contain; they need not occur.
        rank, alpha, dropout, blocksize, double_quant, use_rslora, adapter_dtype: as for :class:`QLinear`.
        init: how linear layers' adapters start, as for :meth:`QLinear.from_linear`; experts' by default.
        calibrate: how linear layers' bases are quantised, as for :meth:`QLinear.from_linear`; experts' are as
            by default.
        layer_class: what linear layers become: QLinear or a kind of it, as `fastlora.methods` has them; or
            ModuLinear, whose `quantizer` stands for blocksize and double_quant. Experts are NF4 always.
        expert_rank: that of each single expert, by default `rank`; 0 leaves the experts without adapters,
            which are most of a model's where there are many experts.
        progress: show a progress bar.
        kind: what `layer_class` takes besides, as ``group_size=64``.

    Layers go one at a time and each dense weight is let go at once, so no more than the dense model and one
    packed layer are in memory together (less where the dense weights are mapped from a file).

    Ties are kept. A layer registered under several names stays one layer. Layers that share a weight share
    its packed form, each with its own adapter. A weight that anything else uses too (an embedding, or a layer
    that is not converted) stays dense, and the report says so.

    QLinear layers and QExperts that are there already are left alone, adapters and all, so that a second call
    can give other layers another rank.

    Raises ValueError when a name or the expression matches nothing, when nothing could be converted, and when
    a layer's in_features are no whole blocks, as `calibrate` needs them; and, with
    the layers before it converted by then, for a weight that holds NaN or Inf, which it names.
    """
    if isinstance(model, nn.Linear):
        raise ValueError(
            "convert: expected a module that holds linear layers, got a linear layer; use QLinear.from_linear"
        )
    options: dict[str, Any] = {
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "blocksize": blocksize,
        "double_quant": double_quant,
        "use_rslora": use_rslora,
        "adapter_dtype": adapter_dtype,
    }
    expert_rank = rank if expert_rank is None else expert_rank
    for one in (rank, expert_rank):
        check_arguments(1, 1, one, alpha, dropout, blocksize, torch.float32, adapter_dtype or torch.float32)
    if not (isinstance(layer_class, type) and issubclass(layer_class, (QLinear, ModuLinear))):
        raise TypeError(
            f"convert: expected layer_class QLinear, ModuLinear or a kind of these, got {layer_class!r}"
        )
    initialisation.check_init("convert", init, rank, alpha)
    unused = () if issubclass(layer_class, QLinear) else ("blocksize", "double_quant")
    linear_options = {key: value for key, value in options.items() if key not in unused} | kind
    initialisation.check_calibrate("convert", calibrate, 0, blocksize)
    if calibrate is not None and not issubclass(layer_class, QLinear):
        raise ValueError(
            f"convert: expected calibrate with QLinear or a kind of it, got {calibrate!r} with "
            f"{layer_class.__name__}, whose quantizer sees to it"
        )
    calibrated: dict[str, Any] = {} if calibrate is None else {"calibrate": calibrate}
    report = ConversionReport(bytes_before=_bytes(model))
    names = _names(model)
    groups = _plan(model, names, target_modules, skip_modules, report.skipped)
    for module in (m for group in groups for m in group if isinstance(m, nn.Linear)):
        where = f"convert: {names[id(module)][0]}"
        initialisation.check_calibrate(where, calibrate, module.in_features, blocksize)
    count = sum(len(group) for group in groups)
    with tqdm(total=count, desc="quantising", unit="layer", disable=not progress) as bar:
        for group in groups:
            first: tuple[str, Any] | None = None  # the group's layer that the others share weights with
            while group:
                dense = group.pop(0)
                name = names[id(dense)][0]
                bar.set_postfix_str(name, refresh=False)
                layer: Any
                try:
                    if isinstance(dense, nn.Linear):
                        again = first is not None and initialisation.reads_weight(init)
                        layer = layer_class.from_linear(
                            dense,
                            **linear_options,
                            init="default" if again else init,
                            **(calibrated if first is None else {}),
                        )
                    else:
                        layer = stacked.from_module(dense, **options | {"rank": expert_rank})
                except ValueError as error:
                    done = len(report.converted)
                    raise ValueError(
                        f"convert: {name}: {error} ({done} of {count} layers converted)"
                    ) from error
                if isinstance(dense, nn.Linear):
                    layer.bias = dense.bias  # itself, in case it is shared
                    if first is not None:
                        layer.share_base(first[1])
                        if again and first[1].lora_A is not None and first[1].lora_B is not None:
                            layer.set_adapter_values(first[1].lora_A, first[1].lora_B)  # it fits this base
                    report.converted.append(_converted(name, dense, layer, first))
                    first = first or (name, layer)
                else:
                    report.converted += _converted_experts(name, dense, layer)
                for alias in names[id(dense)]:
                    parent, _, child = alias.rpartition(".")
                    setattr(model.get_submodule(parent), child, layer)
                bar.update()
                del dense  # with it goes the dense weight, before the next layer is packed
    _freeze_all_but_adapters(model)
    report.bytes_after = _bytes(model)
    report.trainable, report.total = _weights(model)
    return report


def _converted(
    name: str, linear: nn.Linear, layer: QLinear | ModuLinear, first: tuple[str, Any] | None
) -> ConvertedLayer:
    return ConvertedLayer(
        name,
        layer.out_features,
        layer.in_features,
        layer.rank,
        linear.weight.nbytes if first is None else 0,
        layer.quantized_weight.nbytes if first is None else 0,
        None if first is None else first[0],
    )


def _converted_experts(name: str, dense: nn.Module, layer: QExperts) -> Iterator[ConvertedLayer]:
    """An entry for each projection."""
    for p, (n, k) in layer.shapes.items():
        before, after = dense.get_parameter(p).nbytes, layer.nbytes_of(p)
        yield ConvertedLayer(f"{name}.{p}", n, k, layer.rank, before, after, experts=layer.num_experts)


# --- what to convert --------------------------------------------------------------------------------------


def _names(model: nn.Module) -> dict[int, list[str]]:
    """Every dotted path of every module, by the module's id."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def _plan(
    model: nn.Module,
    names: dict[int, list[str]],
    target_modules: str | Sequence[str],
    skip_modules: Sequence[str],
    skipped: list[SkippedLayer],
) -> list[list[nn.Module]]:
    """Layers to convert, those that share a weight together; fills `skipped`. Changes nothing else."""
    matching = _matching(names, target_modules)
    if isinstance(skip_modules, str):
        skip_modules = (skip_modules,)
    reasons: dict[int, str] = {}
    candidates: list[nn.Module] = []
    for module in model.modules():
        paths = names[id(module)]
        if target_modules == ALL_LINEAR and not (isinstance(module, nn.Linear) or stacked.is_experts(module)):
            continue
        if not any(path in matching for path in paths):
            continue
        candidates.append(module)
        why = next(
            (f"in skip_modules ({s})" for s in skip_modules for p in paths if f".{s}." in f".{p}."), None
        )
        why = why or _unconvertible(model, module, paths)
        if why is not None:
            reasons[id(module)] = why

    users = _users_of_parameters(model)
    groups: dict[Hashable, list[nn.Module]] = {}
    chosen = {id(m) for m in candidates} - set(reasons)
    for module in candidates:
        if id(module) in reasons:
            continue
        if isinstance(module, nn.Linear):
            key = _identity(module.weight)
            outsider = next((m for m, attr in users[key] if id(m) not in chosen or attr != "weight"), None)
        else:
            key = id(module)
            weights = [_identity(getattr(module, name)) for name in stacked.weight_names(module)]
            outsider = next((m for weight in weights for m, _ in users[weight] if m is not module), None)
        if outsider is None:
            groups.setdefault(key, []).append(module)
        else:
            where = names[id(outsider)][0]
            reasons[id(module)] = (
                f"its weight is also {where}'s ({type(outsider).__name__}), which stays dense"
            )
    skipped.extend(SkippedLayer(names[id(m)][0], reasons[id(m)]) for m in candidates if id(m) in reasons)
    if not groups:
        why = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:5])
        why = why or "the model holds no torch.nn.Linear and no stacked experts"
        raise NothingToConvert(f"convert: expected a layer that can be converted, got none ({why})", skipped)
    return list(groups.values())


def _matching(names: dict[int, list[str]], target_modules: str | Sequence[str]) -> set[str]:
    """The paths that the targets select; ValueError for a target without any."""
    paths = [path for group in names.values() for path in group if path]
    if target_modules == ALL_LINEAR:
        return set(paths)
    if isinstance(target_modules, str):
        try:
            expression = re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"convert: expected target_modules as a regular expression, got {target_modules!r}: {error}"
            ) from error
        found = {target_modules: {path for path in paths if expression.fullmatch(path)}}
    else:
        found = {t: {path for path in paths if path == t or path.endswith(f".{t}")} for t in target_modules}
    empty = [target for target, matches in found.items() if not matches]
    if empty or not found:
        raise ValueError(
            f"convert: expected target_modules that match modules, got no match for {empty}; this model's "
            f"layers end in {sorted({path.rpartition('.')[2] for path in paths})}"
        )
    return set().union(*found.values())


def _unconvertible(model: nn.Module, module: nn.Module, paths: list[str]) -> str | None:
    """Why a module cannot become a QLinear, or None if it can."""
    if isinstance(module, QLinear):
        return "already a QLinear"
    if stacked.is_experts(module):
        return stacked.why_not(module)
    if not isinstance(module, nn.Linear):
        return f"not a torch.nn.Linear but a {type(module).__name__}"
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}, which may compute in its own way"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed, not stored"
    if module.weight.dtype not in checks.DTYPE_CODE:
        return f"its weight is {module.weight.dtype}, not float32, bfloat16 or float16"
    if module.weight.numel() == 0:
        return "its weight is empty"
    if has_hooks(module):
        return "it has hooks, which a replacement would lose"
    for path in paths:
        parent = model.get_submodule(path.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer):
            return "torch.nn.TransformerEncoderLayer reads this weight itself in evaluation"
    return None


# --- parameters and what they share -----------------------------------------------------------------------


def _identity(t: Tensor) -> Hashable:
    """Equal for tensors over the same elements in memory, whatever objects hold them."""
    if t.is_meta or t.numel() == 0:
        return id(t)
    return t.device, t.data_ptr(), tuple(t.shape), t.stride()


def _users_of_parameters(model: nn.Module) -> dict[Hashable, list[tuple[nn.Module, str]]]:
    users: dict[Hashable, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attr, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None:
                users.setdefault(_identity(t), []).append((module, attr))
    return users


def _once(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({_identity(t): t for t in tensors}.values())


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in _once([*model.parameters(), *model.buffers()]))


def _freeze_all_but_adapters(model: nn.Module) -> None:
    adapters = {
        id(p)
        for m in model.modules()
        if isinstance(m, NamedAdapters)
        for name in m.adapter_names
        for p in m.adapter_parameters(name)
    }
    adapters |= {id(p) for m in model.modules() if isinstance(m, QExperts) for p in m.adapter_parameters()}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)


def _weights(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) weights, each parameter once; packed matrices by their elements."""
    elements: dict[Hashable, int] = {}
    for module in model.modules():
        if isinstance(module, QLinear):
            elements[_identity(module.weight)] = module.out_features * module.in_features
            for beside in (module.weight_scales, module.weight_nested, module.weight_offsets):
                if beside is not None:
                    elements[_identity(beside)] = 0
        if isinstance(module, (QExperts, ModuLinear)):
            elements |= {_identity(p): weights for p, weights in module.stored()}
    parameters = _once(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return trainable, sum(elements.get(_identity(p), p.numel()) for p in parameters)
