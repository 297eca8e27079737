"""AdamW with one fused pass a parameter and states that may leave memory.

:class:`PagedAdamW` keeps both moments in float32 and computes torch.optim.AdamW's update;
:class:`PagedAdamW8bit` keeps them in 8 bits. Their states lie in a :class:`~fastlora.paged_store.PagedStore`,
those of parameters on a CUDA device in a :class:`~fastlora.pinned_store.PinnedStore`: while one parameter is
updated, the next one's states are fetched, and the last one's may go. Parameters are in float32, bfloat16 or
float16, gradients in any of these; under FSDP2 a rank updates its shards.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import _C
from .checks import DTYPE_CODE, block_count
from .ops_adamw import BLOCKSIZE
from .paged_store import PagedStore
from .pinned_store import Cuda, PinnedStore
from .sharded import is_sharded

# Smaller states stay in ordinary memory: they are no burden, and a file of its own is one for them.
_PAGED_BYTES = 1 << 16
# What torch's AdamW can be told and these cannot: a state dict with them is refused.
_UNSUPPORTED = ("amsgrad", "maximize")
#: (shape, dtype) of a state by name.
_Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class _Kept:
    """Hides a tensor from Optimizer.load_state_dict, which would cast it to its parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Stores:
    """Where an optimiser's states lie: in mapped files, and beside each CUDA device in pinned memory."""

    def __init__(self, directory: str | os.PathLike[str] | None, resident_bytes: int | None) -> None:
        self.cpu = PagedStore(directory, resident_bytes)
        self.cuda: dict[torch.device, PinnedStore] = {}

    def of(self, device: torch.device) -> PagedStore | PinnedStore:
        if device.type == "cpu":
            return self.cpu
        if device not in self.cuda:
            self.cuda[device] = PinnedStore(Cuda(device), self.cpu.resident_bytes)
        return self.cuda[device]

    def options(self) -> tuple[os.PathLike[str], int | None]:
        return self.cpu.directory, self.cpu.resident_bytes


class PagedAdamW(Optimizer):
    """AdamW (Loshchilov, Hutter, 2019) with float32 moments in mapped files or pinned memory.

    The update is torch.optim.AdamW's, in float32 whatever the parameter's dtype, rounded to it once. For
    float32 parameters the bits are those of ``AdamW(fused=True)`` on a CPU with FMA; the default, not fused,
    one differs from both only where its library's square root is not the nearest.

    lr, betas, eps, weight_decay: as torch.optim.AdamW. directory: as
    :class:`~fastlora.paged_store.PagedStore`. resident_bytes: as there, or on a CUDA device as
    :class:`~fastlora.pinned_store.PinnedStore`. State dicts are torch's: ``step``, ``exp_avg``,
    ``exp_avg_sq``, and load into torch.optim.AdamW and back (of parameters that are not in float32 torch
    rounds the moments).

    Raises ValueError for numbers out of range; from ``step``, before anything is updated, TypeError for
    parameters of other dtypes and RuntimeError for parameters on other devices, sparse gradients, a build
    without CUDA kernels, and while a CUDA graph is captured, which would keep the number of its step.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        directory: str | os.PathLike[str] | None = None,
        resident_bytes: int | None = None,
    ) -> None:
        self._stores = _Stores(directory, resident_bytes)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    # --- torch.optim.Optimizer ----------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        name = type(self).__name__
        numbers = {**self.defaults, **param_group}
        for key in ("lr", "eps", "weight_decay"):
            if not 0.0 <= float(numbers[key]) < math.inf:
                raise ValueError(f"{name}: expected {key} from 0, got {numbers[key]}")
        betas = tuple(numbers["betas"])
        if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
            raise ValueError(f"{name}: expected betas of two numbers in [0, 1), got {numbers['betas']}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure` did."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, _ in work:
            self._check(p)
        for p, _ in work:
            if not self.state[p]:
                self.state[p] = self._fresh(p)
        self._fetch(work[:1])
        for i, (p, group) in enumerate(work):
            self._fetch(work[i + 1 : i + 2])
            store, tensors = self._stores.of(p.device), self._tensors(p)
            store.ready(*tensors)
            self._update(p, group)
            store.done_with(*tensors)
        for pinned in self._stores.cuda.values():
            pinned.relieve()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's. What has left a CUDA device is in it as a tensor in pinned memory."""
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every moment keeps its dtype and is copied into the store."""
        handle = self.register_load_state_dict_pre_hook(_keep_dtypes)  # after those of others
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**super().__getstate__(), "paging": self._stores.options()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From a pickle, or from load_state_dict with what it was given, checked before anything is taken."""
        state = dict(state)
        stores = _Stores(*(state.pop("paging", None) or self._stores.options()))
        groups = {p: group for group in state["param_groups"] for p in group["params"]}
        for group in state["param_groups"]:
            for key in _UNSUPPORTED:
                if group.get(key):
                    name = type(self).__name__
                    raise ValueError(f"{name}: expected a state dict without {key}, got {key}=True")
        for p, values in state["state"].items():
            if p in groups:
                self._check_loaded(p, values)
        adopted = {
            p: self._adopt(stores, p, values) if p in groups else values
            for p, values in state["state"].items()
        }
        super().__setstate__(state)
        self.state.clear()
        self.state.update(adopted)
        self._stores = stores

    # --- states -------------------------------------------------------------------------------------------

    def _layout(self, p: Tensor) -> _Layout:
        shape = tuple(_local(p).shape)
        return {"exp_avg": (shape, torch.float32), "exp_avg_sq": (shape, torch.float32)}

    def _fresh(self, p: Tensor) -> dict[str, Tensor]:
        state = {"step": torch.tensor(0.0)}
        for name, (shape, dtype) in self._layout(p).items():
            state[name] = self._cut(p, name, self._zeros(self._stores, p, shape, dtype))
        return state

    def _zeros(self, stores: _Stores, p: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._may_leave(p) and math.prod(shape) * dtype.itemsize >= _PAGED_BYTES:
            return stores.of(p.device).zeros(shape, dtype)
        return torch.zeros(shape, dtype=dtype, device=p.device)

    def _may_leave(self, p: Tensor) -> bool:
        """DTensors stay on a CUDA device: their mesh is there."""
        return p.device.type == "cpu" or not is_sharded(p)

    def _cut(self, p: Tensor, name: str, local: Tensor) -> Tensor:
        """This rank's part of a state as the state: of a sharded parameter a DTensor, sharded alike."""
        if not is_sharded(p):
            return local
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )

    def _check_loaded(self, p: Tensor, values: dict[str, Any]) -> None:
        name, layout = type(self).__name__, self._layout(p)
        for key, (shape, _) in layout.items():
            if key not in values:
                raise ValueError(
                    f"{name}: expected a state with {', '.join(layout)}, got {', '.join(values)}"
                )
            found = tuple(_local(_opened(values[key])).shape)
            if found != shape:
                raise ValueError(f"{name}: expected {key} of shape {shape}, got {found}")
        if "step" not in values:
            raise ValueError(f"{name}: expected a state with step, got {', '.join(values)}")

    def _adopt(self, stores: _Stores, p: Tensor, values: dict[str, Any]) -> dict[str, Tensor]:
        state = {"step": torch.tensor(float(_opened(values["step"])))}
        for name, (shape, dtype) in self._layout(p).items():
            local = self._zeros(stores, p, shape, dtype)
            local.copy_(_local(_opened(values[name])))
            stores.of(p.device).done_with(local)
            state[name] = self._cut(p, name, local)
        return state

    def _tensors(self, p: Tensor) -> list[Tensor]:
        states = [t for name, t in self.state[p].items() if name not in {"step", "shard"}]
        return [t.to_local() if is_sharded(t) else t for t in states]

    def _fetch(self, work: Iterable[tuple[Tensor, dict[str, Any]]]) -> None:
        for p, _ in work:
            self._stores.of(p.device).will_need(*self._tensors(p))

    def _settle(self) -> None:
        for store in self._stores.cuda.values():
            store.settle()

    # --- the update ---------------------------------------------------------------------------------------

    def _check(self, p: Tensor) -> None:
        name = type(self).__name__
        if p.dtype not in DTYPE_CODE:
            raise TypeError(f"{name}: expected parameters in float32, bfloat16 or float16, got {p.dtype}")
        if p.device.type not in {"cpu", "cuda"}:
            raise RuntimeError(
                f"{name}: expected parameters on a CPU or a CUDA device, got one on {p.device}"
            )
        if p.device.type == "cuda":
            if not _C.cuda_built:
                raise RuntimeError(
                    f"{name}: expected a build with CUDA kernels for parameters on {p.device}, got none"
                )
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{name}: expected a step that no CUDA graph captures, got one: its number is the host's"
                )
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise RuntimeError(f"{name}: expected dense gradients, got one with layout {p.grad.layout}")

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        state["step"] += 1
        beta1, beta2 = group["betas"]
        local = _local(p)
        given = local.contiguous()
        self._kernel(given, _local(p.grad), state)(
            float(group["lr"]), float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"]),
            int(state["step"].item()),
        )  # fmt: skip
        if given is not local:
            local.copy_(given)

    def _kernel(self, p: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Callable[..., None]:
        m, v = _local(state["exp_avg"]), _local(state["exp_avg_sq"])
        return lambda *numbers: torch.ops.fastlora.adamw(p, grad, m, v, *numbers)


class PagedAdamW8bit(PagedAdamW):
    """The same with moments of 8 bits (Dettmers et al., 8-bit optimizers, 2022): 2.03 bytes a weight, not 8.

    Blocks of 256 weights share a float32 scale; codes index bitsandbytes' dynamic maps, signed for the first
    moment and unsigned for the second. A second moment above 0 never becomes 0. Parameters of fewer than
    ``min_8bit_size`` elements keep float32 moments. A gradient that is not finite leaves no finite moment in
    its block, and no finite weight after the next step.

    State dicts hold ``step``, ``state1``, ``state2`` (uint8, the parameter's shape), ``absmax1``, ``absmax2``
    (float32, one a block); small parameters' are PagedAdamW's. Blocks are of a rank's own shard, so under
    FSDP2 each rank saves and loads its own state dict, checked by ``shard``; those of
    torch.distributed.checkpoint, which cut tensors anew, are not supported.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = 4096,
        directory: str | os.PathLike[str] | None = None,
        resident_bytes: int | None = None,
    ) -> None:
        if min_8bit_size < 0:
            raise ValueError(f"PagedAdamW8bit: expected min_8bit_size from 0, got {min_8bit_size}")
        self._min_8bit_size = min_8bit_size
        super().__init__(
            params, lr, betas, eps, weight_decay, directory=directory, resident_bytes=resident_bytes
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "min_8bit_size": self._min_8bit_size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self._min_8bit_size = state.pop("min_8bit_size", getattr(self, "_min_8bit_size", 4096))
        super().__setstate__(state)

    def _in_8bit(self, p: Tensor) -> bool:
        return p.numel() >= self._min_8bit_size

    def _layout(self, p: Tensor) -> _Layout:
        if not self._in_8bit(p):
            return super()._layout(p)
        local = _local(p)
        shape, blocks = tuple(local.shape), (block_count(local.numel(), BLOCKSIZE),)
        layout: _Layout = {"state1": (shape, torch.uint8), "state2": (shape, torch.uint8)}
        layout |= {"absmax1": (blocks, torch.float32), "absmax2": (blocks, torch.float32)}
        return layout

    def _may_leave(self, p: Tensor) -> bool:
        return self._in_8bit(p) or super()._may_leave(p)

    def _cut(self, p: Tensor, name: str, local: Tensor) -> Tensor:
        return local if self._in_8bit(p) else super()._cut(p, name, local)

    def _fresh(self, p: Tensor) -> dict[str, Tensor]:
        return super()._fresh(p) | self._shard(p)

    def _adopt(self, stores: _Stores, p: Tensor, values: dict[str, Any]) -> dict[str, Tensor]:
        return super()._adopt(stores, p, values) | self._shard(p)

    def _check_loaded(self, p: Tensor, values: dict[str, Any]) -> None:
        super()._check_loaded(p, values)
        want = self._shard(p).get("shard")
        found = _opened(values["shard"]) if "shard" in values else None
        if (want is None) != (found is None) or (
            want is not None and found is not None and want.tolist() != found.tolist()
        ):
            raise ValueError(
                "PagedAdamW8bit: expected the state of this rank's shard (sizes and offsets "
                f"{None if want is None else want.tolist()}), got "
                f"{None if found is None else found.tolist()}; each rank loads the state dict that it saved"
            )

    def _shard(self, p: Tensor) -> dict[str, Tensor]:
        """Which part of a sharded parameter this rank has: its sizes, then its offsets."""
        if not is_sharded(p) or not self._in_8bit(p):
            return {}
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sizes, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        return {"shard": torch.tensor([*sizes, *offsets])}

    def _kernel(self, p: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Callable[..., None]:
        if "state1" not in state:
            return super()._kernel(p, grad, state)
        states = [state[name] for name in ("state1", "state2", "absmax1", "absmax2")]
        return lambda *numbers: torch.ops.fastlora.adamw_8bit(p, grad, *states, *numbers)


def _keep_dtypes(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        key: {name: _Kept(t) if isinstance(t, Tensor) else t for name, t in values.items()}
        if isinstance(values, dict)
        else values
        for key, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _opened(value: Any) -> Any:
    return value.tensor if isinstance(value, _Kept) else value


def _local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor; others as they are."""
    return t.to_local() if is_sharded(t) else t.detach()
