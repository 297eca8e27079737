"""`fastlora merge`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import safetensors.torch
import torch
import typer
from safetensors import safe_open
from torch import Tensor

from .. import _C
from ..adapter_config import CONFIG_NAME, pattern_value, read_config
from ..adapter_files import _PREFIX, WEIGHTS_NAME
from ..nf4 import quantize_nf4
from .common import JsonOption, one_line_errors, print_json, stdout
from .model_folder import ModelFolder
from .shard_run import ShardRun, progress_bar

_A, _B = ".lora_A.weight", ".lora_B.weight"


@one_line_errors
def merge(
    base: Annotated[
        Path, typer.Argument(metavar="BASE", help="A dense model's folder: config.json and safetensors.")
    ],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A LoRA adapter's folder, PEFT's or fastlora's.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    as_json: JsonOption = False,
) -> None:
    """Add a LoRA adapter to a dense model's weights, shard by shard.

    W + scaling * B @ A in float32, rounded once to the base's dtype.
    rsLoRA, ranks and alphas that differ by layer, and modules that were
    saved whole are understood. Memory holds one shard; a run that was
    killed goes on when the same command is given again. BASE is the dense
    model, also of an adapter that was trained on its 4-bit form. Says what
    storing the sum rounds away, in its dtype, and what NF4 would: from 1
    times the change on, keep base and adapter apart.

    \b
    Example:
      fastlora merge path/to/model path/to/adapter path/to/merged
    """
    report = merge_folder(base, adapter, destination)
    if as_json:
        print_json(report)
        return
    resumed = f", {report['resumed']} of them from an earlier run" if report["resumed"] else ""
    count = report["shards"]
    stdout().print(
        f"{report['destination']}: {report['merged']} weights changed, {count} "
        f"{'file' if count == 1 else 'files'}{resumed}"
    )
    if report["largest_change"] is not None:
        stdout().print(
            f"largest relative change: {report['largest_change']:.2e}, {report['largest_change_at']}"
        )
    for what, costs in (("as stored", report["roundings"]), ("in NF4", report["nf4_roundings"])):
        if costs:
            at = max(costs, key=costs.__getitem__)
            stdout().print(f"largest rounding {what}: {costs[at]:.2e} of the change, {at}")


def merge_folder(base: Path, adapter: Path, destination: Path) -> dict[str, Any]:
    """What the command does; returns what --json prints. Raises ValueError and OSError."""
    folder = ModelFolder(base)
    changes, whole = _read_adapter(adapter, folder)
    what = {
        "command": "merge",
        "fastlora": _C.__version__,
        "base": folder.fingerprint,
        "adapter": {
            name: [(adapter / name).stat().st_size, (adapter / name).stat().st_mtime_ns]
            for name in (CONFIG_NAME, WEIGHTS_NAME)
        },
    }
    needed = folder.nbytes + sum(file.stat().st_size for file in folder.others)
    with ShardRun(destination, what, [file.name for file in folder.files], needed) as run:
        sizes = {file.name: file.stat().st_size for file in folder.files}
        with progress_bar("merging", sum(sizes.values()), sum(sizes[name] for name in run.done)) as advance:
            for name in run.left:
                tensors, notes = _merge_shard(base / name, folder.keys[base / name], changes, whole)
                run.write(name, tensors, notes)
                del tensors
                advance(sizes[name])
        run.finish(folder.config, folder.others)
    notes = {key: note for one in run.done.values() for key, note in one["note"].items()}
    relative = {key: note["change"] for key, note in notes.items()}
    largest = max(relative, key=lambda key: relative[key], default=None)
    return {
        "base": str(base),
        "adapter": str(adapter),
        "destination": str(destination),
        "shards": len(run.shards),
        "resumed": run.resumed,
        "merged": len(changes) + len(whole),
        "largest_change": None if largest is None else relative[largest],
        "largest_change_at": largest,
        "changes": relative,
        "roundings": {key: note["rounding"] for key, note in notes.items() if "rounding" in note},
        "nf4_roundings": {key: note["nf4_rounding"] for key, note in notes.items() if "rounding" in note},
    }


class Change(NamedTuple):
    """scaling · B @ A."""

    a: Tensor
    b: Tensor
    scaling: float


def _merge_shard(
    file: Path, keys: list[str], changes: Mapping[str, Change], whole: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """The file's tensors, and of those that an adapter changes ‖change‖ / ‖weight‖, in Frobenius' norm, and
    relative to the change what storing the sum rounds away, in its dtype and in NF4."""
    tensors: dict[str, Tensor] = {}
    notes: dict[str, dict[str, float]] = {}
    with safe_open(file, framework="pt") as opened:
        for key in keys:
            tensors[key] = weight = opened.get_tensor(key)
            if key in whole:
                tensors[key] = whole[key].to(weight.dtype)
            if key in changes:
                a, b, scaling = changes[key]
                old = tensors[key].float()
                change = (b.float() @ a.float()).mul_(scaling)
                size, whole_size = change.norm().item(), old.norm().item()
                notes[key] = {"change": size / whole_size if whole_size else math.inf}
                wanted = change.add_(old)
                tensors[key] = wanted.to(weight.dtype)
                if not tensors[key].isfinite().all():
                    raise ValueError(
                        f"merge: expected a finite sum in {weight.dtype}, got Inf or NaN in {key}"
                    )
                if size:
                    stored, packed = tensors[key].float(), quantize_nf4(wanted).dequantize(torch.float32)
                    notes[key]["rounding"] = (stored - wanted).norm().item() / size
                    notes[key]["nf4_rounding"] = (packed - wanted).norm().item() / size
    return tensors, notes


def _read_adapter(path: Path, folder: ModelFolder) -> tuple[dict[str, Change], dict[str, Tensor]]:
    """By the base's keys: what to add, and what to put in its place. ValueError for what does not fit."""
    if not path.is_dir():
        raise FileNotFoundError(f"merge: expected an adapter's folder, got {path}, which is no folder")
    config = read_config(path, "merge")
    if config["use_dora"]:
        raise ValueError(f"merge: expected a plain LoRA adapter, got use_dora=True in {path}")
    if not (path / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"merge: expected {WEIGHTS_NAME} in {path}, got none")
    tensors = safetensors.torch.load_file(path / WEIGHTS_NAME)
    shapes = _shapes(folder)
    changes: dict[str, Change] = {}
    whole: dict[str, Tensor] = {}
    wrong: list[str] = []
    for name, t in tensors.items():
        at = name.removeprefix(_PREFIX)
        if name.endswith(_B) and name.removesuffix(_B) + _A in tensors:
            continue  # with its A
        if not name.endswith(_A):
            key = _find(at, shapes)
            if key is None or ".lora_" in name or shapes[key] != tuple(t.shape):
                wrong.append(f"{name} {tuple(t.shape)}")
            else:
                whole[key] = t
            continue
        at = at.removesuffix(_A)
        key, b = _find(f"{at}.weight", shapes), tensors.get(name.removesuffix(_A) + _B)
        if key is None or b is None or t.dim() != 2 or b.dim() != 2 or t.shape[0] != b.shape[1]:
            wrong.append(f"{name} {tuple(t.shape)}")
        elif shapes[key] != (b.shape[0], t.shape[1]):
            wrong.append(f"{name}, as {key} is {shapes[key]} and B @ A {(b.shape[0], t.shape[1])}")
        else:
            alpha = pattern_value(config["alpha_pattern"], at, config["lora_alpha"])
            rank = t.shape[0]
            changes[key] = Change(t, b, alpha / (math.sqrt(rank) if config["use_rslora"] else rank))
    if wrong or not tensors:
        some = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise ValueError(
            f"merge: expected an adapter of {folder.path}, got no place for {some or 'no tensor'}"
        )
    return changes, whole


def _shapes(folder: ModelFolder) -> dict[str, tuple[int, ...]]:
    """Of the base's floating tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file, keys in folder.keys.items():
        with safe_open(file, framework="pt") as opened:
            for key in keys:
                part = opened.get_slice(key)
                if part.get_dtype() in ("F64", "F32", "BF16", "F16"):
                    shapes[key] = tuple(part.get_shape())
    return shapes


def _find(name: str, shapes: Mapping[str, Any]) -> str | None:
    """The base's key of that name; or the only one that has it but for a prefix, as files of a model with a
    head and without one differ."""
    if name in shapes:
        return name
    found = [key for key in shapes if name.endswith(f".{key}") or key.endswith(f".{name}")]
    return found[0] if len(found) == 1 else None
