"""bitsandbytes' checkpoint tensors for one NF4 weight, read and written.

For a weight under key ``w`` a file holds (bitsandbytes 0.50):

* ``w`` uint8 ``((numel + 1) // 2, 1)``: codes of the FLATTENED tensor, two a byte. It may be transposed to
  ``[1, n]``, and may be a float-typed view of the same bytes (its ``quant_storage`` option).
* ``w.absmax``: float32, or uint8 indices when double-quantised; ``w.quant_map``: the 16 codes.
* ``w.nested_absmax``, ``w.nested_quant_map`` (256): the second level, when double-quantised.
* ``w.quant_state.bitsandbytes__nf4``: the rest as UTF-8 JSON in a uint8 tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checks, ops
from .nf4 import as_float32

if TYPE_CHECKING:
    from .nf4 import NF4Weight

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OP = "NF4Weight.from_bitsandbytes"
_STATE = ".quant_state.bitsandbytes__"
_PAD_CODE = 7


def _key(prefix: str) -> str:
    if prefix == "weight" or prefix.endswith(".weight"):
        return prefix
    return prefix + ("" if prefix == "" or prefix.endswith(".") else ".") + "weight"


def _repack(packed: Tensor, numel: int, old_cols: int, new_cols: int) -> Tensor:
    """Codes stored in rows of `old_cols`, each padded to whole bytes, to rows of `new_cols`."""
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1, old_cols + old_cols % 2)
    codes = codes[:, :old_cols].reshape(-1)[:numel].reshape(-1, new_cols)
    if new_cols % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=_PAD_CODE)
    return (codes[:, 0::2] << 4) | codes[:, 1::2]


def _metadata(tensors: Mapping[str, Tensor], key: str) -> dict[str, Any]:
    if key + _STATE + "fp4" in tensors:
        raise ValueError(
            f"{_OP}: expected NF4 codes, got an FP4 checkpoint at {key!r} (its 16 values are other ones); "
            "dequantise it with bitsandbytes and quantise the result"
        )
    name = key + _STATE + "nf4"
    if name not in tensors:
        return {}
    try:
        state = json.loads(bytes(tensors[name].detach().cpu().reshape(-1).to(torch.uint8).tolist()))
    except ValueError as error:
        raise ValueError(
            f"{_OP}: expected JSON in {name!r}, got bytes that do not parse ({error})"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{_OP}: expected a JSON object in {name!r}, got {type(state).__name__}")
    if state.get("quant_type") != "nf4":
        raise ValueError(f"{_OP}: expected quant_type 'nf4' in {name!r}, got {state.get('quant_type')!r}")
    return state


def _same_map(have: Tensor, want: Tensor) -> bool:
    return have.numel() == want.numel() and torch.equal(have.reshape(-1), want.to(have.device, have.dtype))


def read(
    tensors: Mapping[str, Tensor], prefix: str
) -> tuple[Tensor, Tensor, Tensor | None, torch.Size, torch.dtype, int]:
    """The fields of :class:`NF4Weight`, in order. All that is missing or does not fit is listed at once."""
    key = _key(prefix)
    state = _metadata(tensors, key)
    problems: list[str] = []

    def take(name: str, count: int | None = None) -> Tensor:
        if name not in tensors:
            problems.append(f"{name} is missing")
            return torch.empty(0)
        tensor = tensors[name].detach().reshape(-1)
        if count is not None and tensor.numel() != count:
            problems.append(f"{name} has {tensor.numel()} elements, expected {count}")
        return tensor

    def entry(name: str, kinds: type | tuple[type, ...]) -> Any:
        value = state.get(name)
        if state and (not isinstance(value, kinds) or isinstance(value, bool)):
            problems.append(f"{key}{_STATE}nf4 has {name} {value!r}")
            return None
        return value

    if not state:
        problems.append(f"{key}{_STATE}nf4 is missing")
    blocksize, shape, dtype_name = entry("blocksize", int), entry("shape", list), entry("dtype", str)
    if blocksize is not None and blocksize not in checks.BLOCKSIZES:
        problems.append(f"blocksize is {blocksize}, expected one of {checks.BLOCKSIZES}")
        blocksize = None
    if shape is not None and not (shape and all(type(s) is int and s >= 0 for s in shape)):
        problems.append(f"shape is {shape}, expected at least one size")
        shape = None
    numel: Any = None if shape is None else torch.Size(shape).numel()
    blocks = None if numel is None or blocksize is None else -(-numel // blocksize)

    flat = take(key)
    packed = flat.contiguous().view(torch.uint8)
    if key in tensors and numel is not None and packed.numel() != (numel + 1) // 2:
        problems.append(f"{key} has {packed.numel()} bytes, expected {(numel + 1) // 2} for shape {shape}")
    codes = take(f"{key}.absmax", blocks)
    quant_map = take(f"{key}.quant_map", 16)
    if quant_map.numel() == 16 and not _same_map(quant_map, ops.nf4_codes()):
        problems.append(f"{key}.quant_map holds other values than NF4's")

    nested = codes.dtype == torch.uint8
    nested_blocksize: Any = entry("nested_blocksize", int) if nested else None
    if nested_blocksize is not None and nested_blocksize < 1:
        problems.append(f"nested_blocksize is {nested_blocksize}, expected a positive one")
        nested_blocksize = None
    offset = entry("nested_offset", (int, float)) if nested else None
    groups = None if blocks is None or nested_blocksize is None else -(-blocks // nested_blocksize)
    scale2 = take(f"{key}.nested_absmax", groups) if nested else None
    map2 = take(f"{key}.nested_quant_map", 256) if nested else None
    for name, tensor in ((f"{key}.absmax", None if nested else codes), (f"{key}.nested_absmax", scale2)):
        if tensor is not None and not tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype}, expected float32")
    if problems:
        raise ValueError(f"{_OP}: expected bitsandbytes' tensors of {key!r}, got: " + "; ".join(problems))

    if dtype_name not in _DTYPES:
        raise TypeError(f"{_OP}: expected dtype {', '.join(_DTYPES)}, got {dtype_name!r}")
    cols = shape[-1]
    if cols % 2 and numel:
        packed = _repack(packed, numel, numel, cols)
    packed = packed.reshape(*shape[:-1], (cols + 1) // 2)
    common = (torch.Size(shape), _DTYPES[dtype_name], blocksize)

    if scale2 is None or map2 is None:
        return packed, codes.float().contiguous().view(torch.uint8), None, *common
    offset = scale2.new_tensor([offset], dtype=torch.float32)
    return packed, *second_level(codes, scale2, map2, offset, nested_blocksize), *common


def second_level(
    codes: Tensor, scale2: Tensor, map2: Tensor, offset: Tensor, nested_blocksize: int
) -> tuple[Tensor, Tensor | None]:
    """(scales, nested) of an NF4Weight from 8-bit codes, a scale for each `nested_blocksize` of them, the map
    they index and an offset."""
    second = torch.cat((offset.reshape(1).float(), scale2.float()))
    same_blocks = nested_blocksize == checks.NESTED_BLOCKSIZE and map2.dtype == torch.float32
    if same_blocks and _same_map(map2, ops.nf4_dynamic_map()):
        return codes.contiguous(), second.view(torch.uint8)
    # Another second level than ours: decode it, in the two float32 roundings that bitsandbytes makes.
    scale_of_block = second[1:].repeat_interleave(nested_blocksize)[: codes.numel()]
    absmax = map2.float()[codes.int()] * scale_of_block + second[0]
    return absmax.view(torch.uint8), None


def write(weight: NF4Weight, prefix: str) -> dict[str, Tensor]:
    """The tensors of one weight, on its device, in the order bitsandbytes writes them."""
    if weight.offsets is not None:
        raise ValueError(
            "NF4Weight.to_bitsandbytes: expected a weight without offsets, for which its files have no "
            f"place, got one with {checks.group_count(weight.offsets)} groups a row"
        )
    key = _key(prefix)
    cols = weight.shape[-1]
    packed = weight.packed.reshape(-1)
    if cols % 2 and weight.numel():
        numel = weight.numel()
        packed = _repack(packed, numel, cols, numel)
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.blocksize,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    out = {key: packed.reshape(-1, 1)}
    if weight.nested is None:
        out[f"{key}.absmax"] = as_float32(weight.scales)
    else:
        second = as_float32(weight.nested)
        out[f"{key}.absmax"] = weight.scales
        state |= {
            "nested_blocksize": checks.NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": float(second[0]),
        }
    out[f"{key}.quant_map"] = ops.nf4_codes().to(weight.device)
    if weight.nested is not None:
        out[f"{key}.nested_absmax"] = second[1:].clone()
        out[f"{key}.nested_quant_map"] = ops.nf4_dynamic_map().to(weight.device)
    text = json.dumps(state).encode()
    out[f"{key}{_STATE}nf4"] = torch.tensor(list(text), dtype=torch.uint8, device=weight.device)
    return out
