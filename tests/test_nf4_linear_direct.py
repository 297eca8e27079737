"""The short way to the kernel (fastlora/direct.py): the op's bits where nothing watches, else the op."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from linear_cases import FLOATS, SHAPES, Case, make_inputs
from test_ops_contract import BAD_INPUTS, linear_args
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora import autograd, direct

if not direct.AVAILABLE:
    pytest.skip("this torch does not let its tensors be read from C", allow_module_level=True)

op = torch.ops.fastlora.nf4_linear.default


def directly(x, packed, scales, nested, blocksize, *rest) -> Tensor | None:
    """direct.linear with the arguments of the op."""
    *rest, offsets, gain = rest
    assert gain is None, "which the short way does not take"
    return direct.linear(x, (packed, scales, nested, blocksize, offsets), *rest)


@pytest.fixture
def op_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("the call went through torch's dispatcher")

    monkeypatch.setattr(autograd, "_linear", fail)


@pytest.fixture
def layer() -> fastlora.QLinear:
    torch.manual_seed(0)
    layer = fastlora.QLinear(72, 40, rank=4, dtype=torch.bfloat16).eval().requires_grad_(False)
    return layer


x = torch.randn(3, 72, generator=torch.Generator().manual_seed(1)).bfloat16()


def through_the_op(layer: fastlora.QLinear, x: Tensor = x) -> Tensor:
    return op(
        x, layer.weight, layer.weight_scales, layer.weight_nested, layer.blocksize, layer.bias, layer.lora_A,
        layer.lora_B, layer.scaling,
    )  # fmt: skip


# --- a plain call -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_the_op(isa: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, k = shape
    for m, r, float32_adapters, double_quant, bias in (
        (1, 16, True, True, True), (5, 7, False, False, False), (33, 0, True, True, True),
        (20, 3, True, True, True),
    ):  # fmt: skip
        case = Case(m, n, k, r, 64, dtype, float32_adapters, double_quant, bias, 0.25)
        args = make_inputs(case).linear
        got = directly(*args)
        assert got is not None
        assert torch.equal(got, op(*args))
        assert (got.dtype, got.shape, got.stride()) == (dtype, (m, n), (n, 1))
        args = make_inputs(replace(case, offsets=True)).linear
        got = directly(*args)
        assert got is not None
        assert torch.equal(got, op(*args))


@pytest.mark.usefixtures("op_forbidden")
def test_a_plain_call_does_not_meet_the_dispatcher(layer: fastlora.QLinear) -> None:
    want = through_the_op(layer)
    assert torch.equal(layer(x), want)  # gradients are on, and nothing needs one
    with torch.no_grad():
        assert torch.equal(layer(x), want)
        assert torch.equal(layer(x.reshape(1, 3, 1, 72)), want.reshape(1, 3, 1, 40))
        assert torch.equal(layer(x[0]), through_the_op(layer, x[0]))
    with torch.inference_mode():
        y = layer(x)
        assert y.is_inference()
        assert torch.equal(y, want)
        assert torch.equal(layer(x.clone()), want)
    y = layer(x)
    assert not y.is_inference()
    assert y.untyped_storage().resizable()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x.float()), want)


@pytest.mark.usefixtures("op_forbidden")
def test_from_other_threads(layer: fastlora.QLinear) -> None:
    want, outcome = through_the_op(layer), []

    def run() -> None:
        with torch.inference_mode():
            outcome.append(all(torch.equal(layer(x), want) for _ in range(200)))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcome == [True] * 3


def test_gradients_still_flow(layer: fastlora.QLinear) -> None:
    inputs = x.clone().requires_grad_()
    assert layer(inputs).grad_fn is not None
    with torch.no_grad():
        assert layer(inputs).grad_fn is None


# --- what the checks refuse, it leaves alone --------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [bad for name, bad, _, _ in BAD_INPUTS if name == "nf4_linear" and "gain" not in bad], ids=str
)
def test_bad_input_is_left_to_the_op(changes: dict) -> None:
    args = linear_args() | changes
    assert directly(*linear_args().values()) is not None
    assert directly(*args.values()) is None


@pytest.mark.parametrize("name", ["x", "packed", "scales", "nested", "bias", "lora_a", "lora_b"])
def test_every_size_is_compared(name: str) -> None:
    args = linear_args()
    good = args[name]
    for dim in range(good.dim()):
        if good.size(dim) > 1 and (name, dim) != ("x", 0):
            shorter = good.narrow(dim, 0, good.size(dim) - 1).clone()
            assert directly(*(args | {name: shorter}).values()) is None
    if name != "x":
        assert directly(*(args | {name: good.unsqueeze(0)}).values()) is None


class Subclass(Tensor):
    pass


def odd_tensors() -> dict[str, tuple[str, Tensor]]:
    args = linear_args()
    x, a = args["x"], args["lora_a"]
    emptied = args["packed"].clone()
    emptied.untyped_storage().resize_(0)
    return {
        "strided x": ("x", torch.stack([x, x], -1)[..., 0]),
        "strided weight": ("packed", torch.stack([args["packed"]] * 2, -1)[..., 0]),
        "strided adapter": ("lora_a", a.t().contiguous().t()),
        "expanded x": ("x", x[:1].expand(3, -1)),
        "negated view": ("x", torch._neg_view(x)),
        "negated adapter": ("lora_a", torch._neg_view(a)),
        "subclass": ("x", x.as_subclass(Subclass)),
        "subclass of the weight": ("packed", args["packed"].as_subclass(Subclass)),
        "no rows": ("x", x[:0]),
        "sparse": ("x", x.float().to_sparse()),
        "freed storage": ("packed", emptied),
    }


@pytest.mark.parametrize("which", odd_tensors())
def test_odd_tensors_are_left_to_the_op(which: str) -> None:
    name, tensor = odd_tensors()[which]
    assert directly(*(linear_args() | {name: tensor}).values()) is None


def test_a_negated_view_gives_the_op_s_result(layer: fastlora.QLinear) -> None:
    assert torch.equal(layer(torch._neg_view(x)), layer(x.neg()))


def test_nothing_is_remembered_of_tensors_that_change(layer: fastlora.QLinear) -> None:
    layer(x)
    other = fastlora.QLinear(72, 40, rank=4, dtype=torch.bfloat16)
    for name in ("weight", "weight_scales", "weight_nested", "bias", "lora_A", "lora_B"):
        getattr(layer, name).data = getattr(other, name).data
    assert torch.equal(layer(x), through_the_op(other))
    for name in ("weight", "weight_scales", "weight_nested", "bias", "lora_A", "lora_B"):
        parameter = getattr(layer, name)
        kept = parameter.data
        shorter = kept.t() if name == "lora_A" else kept[:-1]
        for changed in (shorter, shorter.clone()):  # at the same address, and at another
            parameter.data = changed
            with pytest.raises(ValueError, match=r"^nf4_linear: expected "):
                layer(x)
        parameter.data = kept
        parameter.resize_(1)  # in place: the storage stays
        with pytest.raises(ValueError, match=r"^nf4_linear: expected "):
            layer(x)
        parameter.resize_(kept.shape)
    assert torch.equal(layer(x), through_the_op(other))


def test_parameters_that_moved_out_of_the_module_s_table(layer: fastlora.QLinear) -> None:
    want = layer(x)
    tensor = layer.lora_A.detach()
    del layer._parameters["lora_A"]
    layer.lora_A = tensor  # as FSDP's flat views and torch.nn.utils.parametrize leave it
    assert torch.equal(layer(x), want)


# --- whatever watches, sees the op ------------------------------------------------------------------------


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Dispatched, Called])
def test_modes(layer: fastlora.QLinear, mode: type) -> None:
    with torch.no_grad(), mode() as watching:
        layer(x)
    assert op in watching.seen


def test_default_device(layer: fastlora.QLinear) -> None:
    want = layer(x)
    with torch.device("meta"):
        y = layer(x)
    assert torch.equal(y, want)


def test_fake_tensors(layer: fastlora.QLinear) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        y = layer(mode.from_tensor(x))
        z = layer(x)
    assert type(y) is type(z) is type(mode.from_tensor(x))
    assert y.shape == z.shape == (3, 40)


def test_flop_counter(layer: fastlora.QLinear) -> None:
    counts = {torch.ops.fastlora.nf4_linear: lambda *shapes, out_shape=None, **kwargs: 7}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=counts) as counter:
        layer(x)
    assert counter.get_total_flops() == 7


def test_selective_checkpoint(layer: fastlora.QLinear) -> None:
    seen = []

    def policy(context, func, *args, **kwargs):
        seen.append(func)
        return CheckpointPolicy.MUST_SAVE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    learns = torch.ones(3, 1, dtype=torch.bfloat16, requires_grad=True)
    y = checkpoint(lambda t: t * layer(x), learns, use_reentrant=False, context_fn=contexts)
    y.sum().backward()
    assert op in seen


def test_profiler(layer: fastlora.QLinear) -> None:
    with torch.no_grad(), torch.profiler.profile() as profiler:
        layer(x)
    assert "fastlora::nf4_linear" in {event.key for event in profiler.key_averages()}
    with torch.no_grad(), torch.autograd.profiler.profile() as older:
        layer(x)
    assert "fastlora::nf4_linear" in {event.key for event in older.key_averages()}


def test_vmap(layer: fastlora.QLinear) -> None:
    batch = torch.stack([x, 2 * x])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it loops over an op without a batching rule
        assert torch.equal(torch.vmap(layer)(batch), torch.stack([layer(x), layer(2 * x)]))


@pytest.mark.parametrize("kind", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx(layer: fastlora.QLinear, kind: str, pre_dispatch: bool) -> None:
    with torch.no_grad():
        graph = make_fx(layer, tracing_mode=kind, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(x)
        assert op in {node.target for node in graph.graph.nodes}
        assert torch.equal(graph(2 * x), layer(2 * x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(layer: fastlora.QLinear, strict: bool) -> None:
    with torch.no_grad():
        program = torch.export.export(layer, (x,), strict=strict)
    assert op in {node.target for node in program.graph.nodes}
    assert torch.equal(program.module()(2 * x), layer(2 * x))


def test_a_compiled_layer_notices_autocast(layer: fastlora.QLinear) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert compiled(x.float()).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(compiled(x.float()), layer(x))
        assert compiled(x.float()).dtype == torch.float32
    torch._dynamo.reset()


def test_compile_without_gradients(layer: fastlora.QLinear) -> None:
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))
    assert op in seen
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(layer: fastlora.QLinear) -> None:
    with torch.no_grad():
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        assert "fastlora::nf4_linear" in str(traced.inlined_graph)
        assert torch.equal(traced(2 * x), layer(2 * x))


def test_functional_call(layer: fastlora.QLinear) -> None:
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        doubled = torch.func.functional_call(layer, {"lora_A": 2 * layer.lora_A}, (x,))
        layer.lora_A.mul_(2)
        assert torch.equal(doubled, layer(x))


def test_a_torch_without_the_names_takes_the_op():
    """They are not part of torch's promises; a layer works without them."""
    program = """
import torch
del torch._C._dispatch_tls_local_include_set, torch._C._is_any_autocast_enabled
import fastlora
from fastlora import direct
assert not direct.AVAILABLE
layer = fastlora.QLinear(64, 32, rank=4)
x = torch.randn(3, 64)
weight = layer.packed_weight()
with torch.no_grad():
    assert direct.linear(x, weight, None, None, None, 1.0) is None
    assert layer(x).shape == (3, 32)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
