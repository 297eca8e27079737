"""What a layer launches on a device, in order; and that it may be captured into a graph: replayed on new
values, the launches alone give what a new call gives."""

from __future__ import annotations

from typing import Any, NamedTuple

import devices
import pytest
import torch
from linear_cases import Case, make_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import QLinear

pytest.importorskip("fastlora._emulator", reason="this build holds no emulator")
from _launches import listed

op = torch.ops.fastlora
DEVICE = "cuda_emulated"
# Rows of x, and the product's kernel of each direction.
SIZES = pytest.mark.parametrize(
    ("m", "forward", "backward"),
    [
        (4, "nf4_linear_decode<kBFloat16, 1>", "nf4_linear_grad_input_tile<kBFloat16, 1, false>"),
        (12, "nf4_linear_tile<kBFloat16, 2, kSums>", "nf4_linear_grad_input_tile<kBFloat16, 1, false>"),
        (100, "nf4_linear_tile<kBFloat16, 8, kWeights>", "nf4_linear_grad_input_tile<kBFloat16, 8, false>"),
    ],
    ids=["m4", "m12", "m100"],
)


def names(launches: list) -> list[str]:
    return [launch.kernel for launch in launches]


# --- which kernels ------------------------------------------------------------------------------------------


@SIZES
def test_a_forward_is_u_and_the_product(m: int, forward: str, backward: str) -> None:
    inputs = make_inputs(Case(m, 48, 128, 16, 64, torch.bfloat16))
    project = f"lora_project<kBFloat16, {1 if m <= 8 else 4}, 1>"
    with devices.device(DEVICE), listed(run=True) as kept:
        op.nf4_linear_with_u(*inputs.linear)
    with devices.device(DEVICE), listed(run=True) as without:
        op.nf4_linear(*inputs.linear)
    assert names(kept) == names(without) == [project, forward]
    # The product begins before u is there, and waits for it where it needs it.
    assert [launch.overlaps for launch in kept] == [False, True]


@SIZES
def test_without_adapters_it_is_the_product_alone(m: int, forward: str, backward: str) -> None:
    inputs = make_inputs(Case(m, 48, 128, 0, 64, torch.bfloat16))
    with devices.device(DEVICE), listed(run=True) as launches:
        op.nf4_linear(*inputs.linear)
    assert names(launches) == [forward]
    assert not launches[0].overlaps


def test_a_contraction_that_is_split_is_summed_in_the_end() -> None:
    """A small product on a device with processors to spare."""
    inputs = make_inputs(Case(12, 48, 1024, 0, 64, torch.bfloat16))
    with devices.device(DEVICE), listed(run=True) as launches:
        op.nf4_linear(*inputs.linear)
    assert names(launches) == ["nf4_linear_tile<kBFloat16, 2, kSums>", "split_sum<kBFloat16, 4>"]
    assert launches[0].grid == (1, 1, 3)


@SIZES
def test_a_backward_reads_dy_twice_and_x_once(m: int, forward: str, backward: str) -> None:
    """v and dB of one pass over dy, dx of another, dA of one over x."""
    inputs = make_inputs(Case(m, 48, 128, 16, 64, torch.bfloat16))
    u = torch.randn(m, 16).to(torch.bfloat16)
    with devices.device(DEVICE), listed(run=True) as launches:
        _, v, _ = op.nf4_linear_backward(inputs.dy, u, *inputs.grad_input[1:])
        op.lora_grad_a(v, inputs.x, torch.float32)
    assert names(launches) == [
        "lora_gradients<kBFloat16, 1, kBoth>", "lora_sum", backward,
        "lora_gradients<kBFloat16, 1, kGram>", "lora_sum",
    ]  # fmt: skip


def test_float32_is_dequantised_for_torch() -> None:
    inputs = make_inputs(Case(12, 48, 128, 16, 64, torch.float32))
    with devices.device(DEVICE), listed(run=True) as launches:
        op.nf4_linear(*inputs.linear)
    assert names(launches) == ["dequantize_flat<kFloat32, true>"]


# --- a graph, without a device ------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call of an entry point: what a capture keeps of it; and its tensors, so that their memory stays."""

    kernel: str
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor | None, ...]
    numbers: tuple[float, ...]
    addresses: tuple[int, ...]


def addresses_of(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if t is None else t.data_ptr() for t in tensors)


class Recorder(devices.EmulatedDevice):
    def __init__(self) -> None:
        super().__init__(seed=1)
        self.calls: list[Call] = []

    def call(self, kernel: str, inputs: Any, outputs: Any, *numbers: float) -> int:
        inputs, outputs = tuple(inputs), tuple(outputs)
        self.calls.append(Call(kernel, inputs, outputs, numbers, addresses_of(*inputs, *outputs)))
        return super().call(kernel, inputs, outputs, *numbers)

    def replay(self) -> None:
        for call in self.calls:
            assert call.addresses == addresses_of(*call.inputs, *call.outputs)
            assert super().call(call.kernel, call.inputs, call.outputs, *call.numbers) == 0


class Operators(TorchDispatchMode):
    """Collects what torch computes: all but allocations and views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not func.is_view and not func.name().startswith("aten::empty"):
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def trained_layer(**kwargs: Any) -> QLinear:
    torch.manual_seed(0)
    layer = QLinear(128, 48, rank=16, dtype=torch.bfloat16, **kwargs)
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    layer.bias.requires_grad_(False)  # its gradient is torch's sum
    return layer


def step(layer: QLinear, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The output of a layer and all of its gradients."""
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy)]


def draw(seed: int, m: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(m, size, generator=generator).to(torch.bfloat16) for size in (128, 48))


@SIZES
def test_the_launches_of_a_training_step_replay_on_new_values(m: int, forward: str, backward: str) -> None:
    layer, recorder, operators = trained_layer(), Recorder(), Operators()
    x, dy = draw(1, m)
    x.requires_grad_()
    with devices.device(DEVICE, emulated=recorder), operators:
        captured = step(layer, x, dy)
    assert operators.names == set()  # nothing that a graph of these launches would lack
    assert [call.kernel for call in recorder.calls] == [
        "nf4_linear",
        "nf4_linear_grad_input",
        "lora_gradients",
    ]
    before = [t.clone() for t in captured]

    new_x, new_dy = draw(2, m)
    with torch.no_grad():
        x.copy_(new_x)
        dy.copy_(new_dy)
        for call in recorder.calls:  # whatever is read must have been written by a launch before
            for t in call.outputs:
                if t is not None:
                    t.view(torch.uint8).fill_(0xFF)
    recorder.replay()
    with devices.device(DEVICE):
        fresh = step(layer, x, dy)
    for was, got, want in zip(before, captured, fresh, strict=True):
        assert torch.equal(got, want)
        assert not torch.equal(got, was)


@pytest.mark.parametrize("m", [4, 40])
def test_the_launches_of_an_inference_replay_on_new_values(m: int) -> None:
    layer, recorder, operators = trained_layer().eval(), Recorder(), Operators()
    x, _ = draw(1, m)
    with torch.no_grad(), devices.device(DEVICE, emulated=recorder), operators:
        y = layer(x)
    assert operators.names == set()
    x.copy_(draw(2, m)[0])
    recorder.replay()
    with torch.no_grad(), devices.device(DEVICE):
        assert torch.equal(y, layer(x))


def test_dropout_draws_anew_from_its_seed_on_replay() -> None:
    recorder = Recorder()
    x, seed = torch.randn(200), torch.tensor([3])
    with devices.device(DEVICE, emulated=recorder):
        got = op.lora_dropout(x, seed, 0.5)
    before = got.clone()
    seed.fill_(4)
    recorder.replay()
    assert torch.equal(got, op.lora_dropout(x, seed, 0.5))
    assert not torch.equal(got, before)


def test_torch_computes_where_there_is_no_kernel() -> None:
    """The collector sees it: its silence above means something."""
    weight, x = fastlora.quantize_nf4(torch.randn(48, 128)), torch.randn(4, 128)
    operators = Operators()
    with devices.device(DEVICE), operators:
        fastlora.nf4_linear(x, weight)
    assert operators.names == {"aten::mm.out"}
