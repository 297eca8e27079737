"""Adapters taken out of the difference of weights: s·B·A is the part of W' - W that is nearest at some rank.

That part is the truncated singular value decomposition of the difference (Eckart and Young, 1936), which is
exact where a model was tuned by an adapter of no larger rank, and an approximation of full fine-tuning, whose
error is measured.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..adapter_config import config_of, guess_task
from ..adapter_files import _entries, write_files
from ..dense_weights import DenseWeights
from ..named_adapters import Parts
from .low_rank import balanced, truncated_svd, widened

Source: TypeAlias = "nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]"
_END = ".weight"
_NO_LAYER = re.compile(r"embed|^(wte|wpe|shared|lm_head)$")  # by default, in a module's own name
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt")  # models of Conv1D, whose weight is (k, n)


@torch.no_grad()
def extract_pair(
    base: Tensor, tuned: Tensor, rank: int, *, scaling: float = 1.0, niter: int | None = None
) -> tuple[Tensor, Tensor]:
    """A (rank, k) and B (n, rank), float32, with scaling·B·A nearest to tuned - base, both (n, k).

    niter: as for :func:`fastlora.methods.low_rank.truncated_svd`. ``layer.set_adapter_values(a, b)`` puts
    them into a layer, ``tuned`` being a dense checkpoint's weight and ``base`` its original's. Raises
    ValueError for shapes, rank and scaling.
    """
    if base.dim() != 2 or base.shape != tuned.shape:
        raise ValueError(
            f"extract_pair: expected two matrices of one shape, got {tuple(base.shape)} and "
            f"{tuple(tuned.shape)}"
        )
    if rank < 1 or not scaling:
        raise ValueError(
            f"extract_pair: expected rank >= 1 and a scaling other than 0, got {rank} and {scaling}"
        )
    a, b = balanced(*truncated_svd(tuned.float() - base.float(), rank, niter))
    return widened(a, b / scaling, rank)


@dataclass(frozen=True)
class ExtractedLayer:
    """What became of one weight's difference. Norms are Frobenius's."""

    name: str
    rank: int
    change: float  # |W' - W| / |W|
    error: float  # |B·A - (W' - W)| / |W' - W|, what the rank leaves of it


@dataclass(frozen=True)
class Extraction:
    """What :func:`extract_adapter` found."""

    layers: list[ExtractedLayer]
    left: dict[str, str]  # tensors that changed and are not in the adapter, and why not


@torch.no_grad()
def extract_adapter(
    base: Source,
    tuned: Source,
    destination: str | os.PathLike[str],
    rank: int,
    *,
    target_modules: Sequence[str] | None = None,
    niter: int | None = None,
    task_type: str | None = None,
    base_model: str | None = None,
    progress: bool = True,
) -> Extraction:
    """Write the LoRA adapter that makes a tuned model of its base, as far as `rank` allows, in PEFT's files.

    Args:
        base, tuned: dense models of the same keys: folders, safetensors files, modules or state dicts. Of
            files one pair of weights is in memory at a time, beside the factors that were found.
        destination: the folder to make; an empty one may be there.
        rank: of every layer's adapter; a smaller matrix gets what it has.
        target_modules: names, each of which selects the modules whose dotted path is it or ends in it. By
            default every matrix but lm_head and embeddings, which go by their names.
        niter: None for the exact decomposition, which is slow for large layers; else as for
            :func:`fastlora.methods.low_rank.truncated_svd`, approximate. Reported is the error of what was
            found.
        task_type, base_model: as for :func:`fastlora.save_adapter`; by default read off a folder's
            config.json, and the folder itself.
        progress: show a progress bar.

    Layers that are the same in both are left out; the scaling is 1. Nothing is written before all is
    computed. Raises ValueError for arguments, for weights that do not fit each other, for models without a
    difference in these layers, and for values that are not finite; FileNotFoundError; FileExistsError for
    the destination.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"extract_adapter: expected rank as an int >= 1, got {rank!r}")
    if niter is not None and niter < 1:
        raise ValueError(f"extract_adapter: expected niter >= 1 or none, got {niter}")
    if isinstance(target_modules, str):
        raise ValueError(f"extract_adapter: expected target_modules as a list, got {target_modules!r}")
    path = Path(destination)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"extract_adapter: expected a new folder to write, got {path}, which is there")
    old, new = DenseWeights(base), DenseWeights(tuned)
    chosen = _chosen(old, new, target_modules)
    layers: list[ExtractedLayer] = []
    parts: dict[str, Parts] = {}
    left = {key: "not in the tuned model" for key in old if new.shape(key) is None}
    for key in tqdm(list(new), desc="extracting", unit="tensor", disable=not progress):
        shape, now = old.shape(key), new.shape(key)
        if shape != now:
            left[key] = (
                "not in the base" if shape is None else f"{shape} in the base, {now} in the tuned model"
            )
            continue
        w, w_new = old[key], new[key]
        w_new = w_new.to(w.device, torch.promote_types(w.dtype, w_new.dtype))
        if torch.equal(w.to(w_new.dtype), w_new):
            continue
        if key in chosen:
            name = key.removesuffix(_END)
            layer, a, b = _extracted(name, w, w_new, rank, niter)
            layers.append(layer)
            parts[name] = Parts(nn.Parameter(a), nn.Parameter(b), layer.rank, layer.rank, False, 1.0, 0.0)
        else:
            left[key] = "not among the target modules" if len(w.shape) == 2 else "no matrix"
    if not layers:
        raise ValueError(
            f"extract_adapter: expected layers that changed, got {len(chosen)} that are the same in both"
        )
    config = config_of(_modules(new), parts)
    architecture = next(iter(new.config.get("architectures") or ()), "")
    config["task_type"] = task_type or guess_task(architecture)
    folder = os.fspath(base) if isinstance(base, (str, os.PathLike)) else None
    config["base_model_name_or_path"] = base_model or folder
    write_files(path, config, _entries(parts))
    return Extraction(layers, left)


def _extracted(
    name: str, base: Tensor, tuned: Tensor, rank: int, niter: int | None
) -> tuple[ExtractedLayer, Tensor, Tensor]:
    difference = tuned.float() - base.float()
    size = difference.norm().item()
    if not math.isfinite(size):
        raise ValueError(f"extract_adapter: expected finite weights, got NaN or Inf in {name}{_END}")
    a, b = balanced(*truncated_svd(difference, rank, niter))
    error = difference.addmm_(b, a, alpha=-1).norm().item()
    whole = base.float().norm().item()
    change = size / whole if whole else math.inf
    left = error / size if size else 0.0  # 0 where two float64 are one float32
    return ExtractedLayer(name, len(a), change, left), a.contiguous(), b.contiguous()


def _chosen(old: DenseWeights, new: DenseWeights, targets: Sequence[str] | None) -> set[str]:
    """The keys of the layers that an adapter may be for. ValueError for what does not fit."""
    kind = new.config.get("model_type")
    if kind in _TRANSPOSED:
        raise ValueError(
            f"extract_adapter: expected a model of linear layers, got {kind!r}, whose weights are transposed"
        )
    matrices = {
        key.removesuffix(_END): shape
        for key in new
        if key.endswith(_END) and (shape := new.shape(key)) and len(shape) == 2
    }
    if targets is None:
        linear = [name for name in matrices if not _NO_LAYER.search(name.rpartition(".")[2])]
        names = [name for name in linear if old.shape(name + _END) is not None]
    else:
        unknown = [one for one in targets if not any(f".{name}".endswith(f".{one}") for name in matrices)]
        if unknown or not targets:
            raise ValueError(f"extract_adapter: expected names of the model's layers, got {unknown}")
        names = [name for name in matrices if any(f".{name}".endswith(f".{one}") for one in targets)]
    wrong = [
        f"{name}{_END} {old.shape(name + _END) or 'missing'} and {matrices[name]}"
        for name in names
        if old.shape(name + _END) != matrices[name]
    ]
    if wrong or not names:
        some = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise ValueError(
            f"extract_adapter: expected two models of the same layers, got {some or 'none that both have'}"
        )
    return {name + _END for name in names}


def _modules(keys: Iterable[str]) -> list[str]:
    """The modules that tensors of these names say there are."""
    found: dict[str, None] = {}
    for key in keys:
        pieces = key.split(".")
        found |= dict.fromkeys(".".join(pieces[:end]) for end in range(1, len(pieces)))
    return list(found)
