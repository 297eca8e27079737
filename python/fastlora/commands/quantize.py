"""`fastlora quantize`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from .. import _C
from .common import JsonOption, one_line_errors, print_json, size_text, stdout
from .model_folder import ModelFolder, shard_names
from .shard_run import ShardRun, progress_bar


@one_line_errors
def quantize(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A dense model's folder: config.json and safetensors.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    blocksize: Annotated[
        int, typer.Option(help="Weights that share a scale: a power of two from 32 to 4096.")
    ] = 64,
    no_double_quant: Annotated[
        bool,
        typer.Option("--no-double-quant", help="Keep the scales in float32: 0.5 bits a weight, not 0.127."),
    ] = False,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A module to leave dense, in place of lm_head; may be repeated."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Quantise a Hugging Face model to NF4, shard by shard.

    Memory holds one shard, not the model. A run that was killed goes on
    where it was when the same command is given again, to the same bytes.
    The result is what transformers saves after loading with
    FastLoraConfig, tensor for tensor, and loads wherever fastlora is
    imported. Needs transformers 5.23 or newer.

    \b
    Examples:
      fastlora quantize path/to/model path/to/model-nf4
      fastlora quantize path/to/model out --blocksize 128
      fastlora quantize path/to/model out --skip lm_head --skip v_proj
    """
    report = quantize_folder(
        source,
        destination,
        blocksize=blocksize,
        double_quant=not no_double_quant,
        skip_modules=("lm_head",) if skip is None else skip,
    )
    if as_json:
        print_json(report)
        return
    before, after = report["bytes_before"], report["bytes_after"]
    resumed = f", {report['resumed']} of them from an earlier run" if report["resumed"] else ""
    stdout().print(
        f"{report['destination']}: {len(report['quantized'])} layers in NF4, {size_text(before)} -> "
        f"{size_text(after)}, {report['shards']} {'file' if report['shards'] == 1 else 'files'}{resumed}"
    )
    for name, reason in report["dense"].items():
        stdout().print(f"  dense: {name}: {reason}")


def quantize_folder(
    source: Path,
    destination: Path,
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    skip_modules: Sequence[str] = ("lm_head",),
) -> dict[str, Any]:
    """What the command does; returns what --json prints. Raises ValueError, OSError and ImportError."""
    folder = ModelFolder(source)
    from ..integrations.transformers_config import FastLoraConfig

    config = FastLoraConfig(blocksize=blocksize, double_quant=double_quant, skip_modules=skip_modules)
    from ..integrations.transformers_shards import PieceQuantizer

    quantizer = PieceQuantizer(str(source), config)
    by_file: dict[str, list[Any]] = {}
    for piece in quantizer.pieces:
        by_file.setdefault(piece.file, []).append(piece)
    work = dict(zip(shard_names(len(by_file)), (by_file[file] for file in sorted(by_file)), strict=True))
    what = {
        "command": "quantize",
        "config": config.to_dict(),
        "fastlora": _C.__version__,
        "transformers": metadata.version("transformers"),
        "source": folder.fingerprint,
    }
    sizes = {name: sum(piece.nbytes for piece in pieces) for name, pieces in work.items()}
    beside = sum(file.stat().st_size for file in folder.others)
    with ShardRun(destination, what, list(work), quantizer.nbytes + beside) as run:
        done = sum(sizes[name] for name in run.done)
        with progress_bar("quantising", sum(sizes.values()), done) as advance:
            for name in run.left:
                tensors: dict[str, Tensor] = {}
                for piece in work[name]:
                    tensors |= quantizer.quantize(piece)
                    advance(piece.nbytes)
                run.write(name, tensors)
                del tensors
        stored = {key: value for key, value in folder.config.items() if key != "torch_dtype"}
        stored["dtype"] = str(quantizer.dtype).removeprefix("torch.")
        run.finish(stored | {"quantization_config": config.to_dict()}, folder.others)
    return {
        "source": str(source),
        "destination": str(destination),
        "shards": len(work),
        "resumed": run.resumed,
        "bytes_before": folder.nbytes,
        "bytes_after": sum(size for one in run.done.values() for size in one["tensors"].values()),
        "quantized": [layer.name for layer in quantizer.report.converted],
        "dense": {layer.name: layer.reason for layer in quantizer.report.skipped},
    }
