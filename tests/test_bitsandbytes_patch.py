"""patch_bitsandbytes(): bitsandbytes' layers and operators by our kernels. Its faults on a CPU, each shown on
its own code first, are in test_bitsandbytes_faults.py."""

import copy
import gc
import re
from importlib import metadata

import pytest
import torch
from needs import PATCHING, patches_bitsandbytes, skip_before
from tolerances import TOLERANCES, assert_within, linear_bound, relative_error

import fastlora
from fastlora import reference
from fastlora.integrations import bitsandbytes_patch, bitsandbytes_weight

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
F = bnb.functional
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REPACKS = F.has_avx512bf16()
needs_repacking = pytest.mark.skipif(not REPACKS, reason="bitsandbytes repacks where AVX512-BF16 is")


@pytest.fixture(autouse=True)
def unpatched():
    yield
    fastlora.unpatch_bitsandbytes()


@pytest.fixture
def patched():
    skip_before(*PATCHING)
    fastlora.patch_bitsandbytes()


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(n, k, *, dtype=None, nested=True, bias=False, storage=torch.uint8, blocksize=64, kind="nf4"):
    """A Linear4bit; dtype: what it computes in, None for x's."""
    made = bnb.nn.Linear4bit(
        k, n, bias, dtype, compress_statistics=nested, quant_type=kind, quant_storage=storage
    )
    made.weight = bnb.nn.Params4bit(
        randn(n, k, seed=1) * k**-0.5,
        quant_type=kind,
        compress_statistics=nested,
        quant_storage=storage,
        blocksize=blocksize,
        module=made,
    )
    if bias:
        made.bias.data = randn(n, seed=2)
    return made.to("cpu")


def absmax_of(state):
    return F.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax


def dense(made):
    """Its weight by definition, float64."""
    state, data = made.weight.quant_state, made.weight.data.contiguous().view(torch.uint8).reshape(-1)
    codes = reference.nf4_unpack(data, state.shape.numel())
    values = reference.nf4_dequantize(codes, absmax_of(state).float(), state.blocksize, torch.float32)
    return values.reshape(state.shape).double()


def check(made, x):
    """Forward, and the gradients of x and of a bias, against float64."""
    weight = dense(made)
    x = x.detach().requires_grad_()
    y = made(x)
    want = x.double() @ weight.T
    if made.bias is not None:
        want = want + made.bias.detach().to(x.dtype).double()
    bound = linear_bound(x.detach(), weight, None, None, 0.0, want.detach(), x.dtype)
    tolerance = TOLERANCES[x.dtype].frobenius
    assert_within("y", y.detach(), want.detach(), bound, tolerance)
    assert y.dtype == x.dtype
    dy = randn(*y.shape, dtype=x.dtype, seed=3)
    wanted = [x] if made.bias is None else [x, made.bias]
    dx, *dbias = torch.autograd.grad(y, wanted, dy)
    want = dy.double() @ weight
    assert_within("dx", dx, want, linear_bound(dy, weight.T, None, None, 0.0, want, x.dtype), tolerance)
    for found in dbias:
        assert found.dtype == made.bias.dtype
        sums = dy.double().reshape(-1, dy.shape[-1]).sum(0)
        assert torch.allclose(found.double(), sums, rtol=0.02, atol=0.02)
    with torch.no_grad():
        assert_within("y without gradients", made(x), y.detach().double(), 2 * bound, tolerance)


# --- the layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("n", "k"),
    [(64, 64), (1152, 430), (100, 128), (96, 100), (64, 123), (33, 65), (5, 123), (1, 2), (7, 1), (257, 320)],
)
def test_any_shape_against_float64(patched, n, k, training):
    for dtype in FLOATS:
        made = layer(n, k, dtype=dtype, bias=True).train(training)
        for m in (1, 3, 33):
            check(made, randn(m, k, dtype=dtype))


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 512, 2048, 4096])
def test_block_sizes(patched, blocksize, nested):
    made = layer(96, 160, dtype=torch.bfloat16, nested=nested, blocksize=blocksize)
    check(made, randn(5, 160, dtype=torch.bfloat16))
    check(made.eval(), randn(5, 160, dtype=torch.bfloat16))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_quant_storage(patched, storage):
    made = layer(64, 96, dtype=torch.bfloat16, storage=storage)
    assert made.weight.dtype == storage
    check(made.eval(), randn(2, 3, 96, dtype=torch.bfloat16))
    assert made.weight.dtype == storage


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_leading_dimensions_and_strides(patched, training):
    made = layer(64, 128, dtype=torch.bfloat16, bias=True).train(training)
    check(made, randn(128, dtype=torch.bfloat16))
    check(made, randn(2, 3, 4, 128, dtype=torch.bfloat16))
    check(made, randn(128, 5, dtype=torch.bfloat16).t())
    check(made, randn(5, 256, dtype=torch.bfloat16)[:, ::2])
    check(made, randn(1, 128, dtype=torch.bfloat16).expand(4, 128))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
def test_empty_batches(patched, lead, training):
    made = layer(64, 128, bias=True).train(training)
    x = torch.empty(*lead, 128, requires_grad=True)
    y = made(x)
    assert y.shape == (*lead, 64)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(made.bias.grad, torch.zeros(64))
    with torch.no_grad():
        assert made(x).shape == (*lead, 64)


@patches_bitsandbytes
def test_equals_stock_where_stock_is_right():
    made = layer(128, 192, bias=True)
    x, dy = randn(4, 192).requires_grad_(), randn(4, 128, seed=5)
    y = made(x)
    want = [y.detach(), *torch.autograd.grad(y, [x, made.bias], dy)]
    fastlora.patch_bitsandbytes()
    y = made(x)
    for got, expected in zip([y.detach(), *torch.autograd.grad(y, [x, made.bias], dy)], want, strict=True):
        assert relative_error(got, expected) < 1e-6


def test_computes_in_the_layers_compute_dtype_and_returns_xs(patched):
    made = layer(64, 128, dtype=torch.bfloat16)
    x = randn(4, 128)
    y = made(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, made(x.bfloat16()).float())
    assert not torch.equal(y, layer(64, 128, dtype=torch.float32)(x))
    unset = layer(64, 128)
    unset(x.bfloat16())
    assert unset.compute_dtype == torch.bfloat16  # of the first x, as bitsandbytes has it


def test_under_autocast(patched):
    made = layer(64, 128)
    x = randn(4, 128).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
        assert y.dtype == torch.float32
        half = made(x.bfloat16())
    want = x.double() @ dense(made).T
    assert relative_error(y.detach(), want.detach()) < 1e-6  # compute_dtype, float32 here, is what counts
    assert relative_error(half.detach(), want.detach()) < 5e-3
    y.sum().backward()
    assert relative_error(x.grad, dense(made).sum(0).expand(4, 128)) < 1e-6


@pytest.mark.parametrize("k", [128, 123])
def test_autocast_does_not_reach_the_products(patched, k):
    made = layer(64, k)
    state, x, dy = made.weight.quant_state, randn(4, k), randn(4, 64)
    args = (x, made.weight.data, state.shape, absmax_of(state), 64, "nf4")
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.ops.bitsandbytes.gemm_4bit(*args)
        stored = bitsandbytes_weight.of_state(made.weight, state)
        dx = torch.ops.fastlora.bitsandbytes_grad_input(dy, *stored)
    assert relative_error(y, x.double() @ dense(made).T) < 1e-6
    assert relative_error(dx, dy.double() @ dense(made)) < 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(patched, reentrant):
    made = layer(64, 64, dtype=torch.bfloat16)
    x = randn(4, 64, dtype=torch.bfloat16).requires_grad_()
    want = torch.autograd.grad(made(x).square().sum(), x)[0]
    y = torch.utils.checkpoint.checkpoint(made, x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert torch.equal(x.grad, want)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("k", [128, 123])
def test_compiles_in_one_graph(patched, training, k):
    made = layer(64, k, bias=True).train(training)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    x = randn(4, k).requires_grad_(training)
    with torch.set_grad_enabled(training):
        y, want = compiled(x), made(x)
    assert torch.equal(y, want)
    if training:
        for got, expected in zip(
            torch.autograd.grad(y.square().sum(), [x, made.bias]),
            torch.autograd.grad(want.square().sum(), [x, made.bias]),
            strict=True,
        ):
            assert relative_error(got, expected) < 1e-6


@patches_bitsandbytes
def test_compiled_models_follow_the_patch():
    made = layer(64, 430, dtype=torch.bfloat16)
    compiled = torch.compile(made, backend="aot_eager")
    x = randn(4, 430, dtype=torch.bfloat16)
    with torch.no_grad():
        before = compiled(x)
        fastlora.patch_bitsandbytes()
        assert torch.equal(compiled(x), made(x))
        fastlora.unpatch_bitsandbytes()
        assert torch.equal(compiled(x), before)


def test_inference_mode(patched):
    made = layer(64, 128, dtype=torch.bfloat16).eval()
    x = randn(4, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        want = made(x)
    with torch.inference_mode():
        assert torch.equal(made(x), want)
        assert torch.equal(bnb.matmul_4bit(x, made.weight, made.weight.quant_state), want)
        born = layer(64, 128, dtype=torch.bfloat16)
        assert torch.equal(born(x), want)
        born.weight.quant_state.state2.absmax.mul_(2)  # torch counts no writes to such tensors
        assert not torch.equal(born(x), want)
    check(made, x)


@patches_bitsandbytes
def test_peft_layers_over_it():
    peft = pytest.importorskip("peft", reason="needs PEFT")
    holder = torch.nn.Module()
    holder.linear, holder.is_loaded_in_4bit = layer(96, 128, dtype=torch.float32), True
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["linear"], init_lora_weights=False)
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config, holder)
    lora = holder.linear
    assert type(lora).__name__ == "Linear4bit"
    x = randn(4, 128).requires_grad_()
    wanted = [x, lora.lora_A["default"].weight, lora.lora_B["default"].weight]

    def run():
        y = lora(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]

    want = run()
    fastlora.patch_bitsandbytes()
    for got, expected in zip(run(), want, strict=True):
        assert relative_error(got, expected) < 1e-5
    lora.eval()
    with torch.no_grad():
        assert relative_error(lora(x), want[0]) < 1e-5
    lora.train()
    assert relative_error(run()[1], want[1]) < 1e-5
    before = dense(lora.base_layer) + lora.get_delta_weight("default").double()
    lora.merge()
    assert relative_error(dense(lora.base_layer), before) < 0.1


@patches_bitsandbytes
def test_embeddings_read_the_same_values():
    def run():
        made = bnb.nn.EmbeddingNF4(16, 128)
        made.weight = bnb.nn.Params4bit(
            randn(16, 128), quant_type="nf4", compress_statistics=False, module=made
        )
        return made.to("cpu")(torch.tensor([[3, 0, 15]]))

    want = run()
    fastlora.patch_bitsandbytes()
    assert torch.equal(run(), want)


@patches_bitsandbytes
def test_fp4_is_bitsandbytes_own():
    x = randn(4, 128, dtype=torch.bfloat16)

    def run():
        made = layer(64, 128, dtype=torch.bfloat16, kind="fp4")
        seen = x.clone().requires_grad_()
        y = made(seen)
        out = [made.weight.data.clone(), F.dequantize_4bit(made.weight.data, made.weight.quant_state), y]
        out += torch.autograd.grad(y.sum(), seen)
        with torch.no_grad():
            out.append(made.eval()(x))
            out.append(made.weight.data)
        state = F.quantize_4bit(x, quant_type="fp4")[1]
        args = (x, made.weight.data, made.weight.quant_state.shape, state.absmax, 64, "fp4")
        if not REPACKS:
            out.append(torch.ops.bitsandbytes.gemm_4bit(*args))
        return out

    want = run()
    fastlora.patch_bitsandbytes()
    for got, expected in zip(run(), want, strict=True):
        assert torch.equal(got, expected)
    made = layer(64, 128, kind="fp4")
    with pytest.raises(NotImplementedError, match="expected NF4"):
        F.dequantize_4bit(made.weight.data, made.weight.quant_state, out=torch.empty(64, 128))


# --- the operators ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (5, 123), (7,), (3, 5, 7), (16, 430), (1, 8193), (2, 64)])
@patches_bitsandbytes
def test_quantising_gives_the_same_bits(shape):
    for dtype in FLOATS:
        weights = [randn(*shape, dtype=dtype), torch.zeros(shape, dtype=dtype), randn(*shape, dtype=dtype)]
        weights[2].view(-1)[1] = float("nan")
        for blocksize in (32, 64, 4096):
            fastlora.unpatch_bitsandbytes()
            want = [F.quantize_4bit(w, blocksize=blocksize, quant_type="nf4") for w in weights]
            fastlora.patch_bitsandbytes()
            for weight, (data, state) in zip(weights, want, strict=True):
                got, got_state = F.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
                assert torch.equal(got, data)
                assert torch.equal(got_state.absmax.nan_to_num(-1.0), state.absmax.nan_to_num(-1.0))


def test_quantising_a_transposed_weight(patched):
    weight = randn(64, 96)
    assert torch.equal(
        F.quantize_4bit(weight.t(), quant_type="nf4")[0],
        F.quantize_4bit(weight.t().contiguous(), quant_type="nf4")[0],
    )


@pytest.mark.parametrize("shape", [(64, 64), (5, 123), (7,), (3, 5, 8), (16, 430), (0, 64)])
def test_dequantising(patched, shape):
    weight = randn(*shape)
    for storage in (torch.uint8, torch.float32) if torch.Size(shape).numel() % 8 == 0 else (torch.uint8,):
        for dtype in FLOATS:
            data, state = F.quantize_4bit(weight.to(dtype), quant_type="nf4", quant_storage=storage)
            got = F.dequantize_4bit(data, state)
            codes = reference.nf4_unpack(data.view(torch.uint8).reshape(-1), weight.numel())
            want = reference.nf4_dequantize(codes, state.absmax, 64, dtype).reshape(shape)
            assert torch.equal(got, want)
            out = torch.full(shape, 9.0, dtype=dtype)
            assert F.dequantize_4bit(data, state, out=out) is out
            assert torch.equal(out, want)


def test_the_operators_pass_torchs_own_check(patched):
    for k in (128, 123):
        made = layer(64, k)
        state, data = made.weight.quant_state, made.weight.data
        x, bias = randn(4, k).requires_grad_(), randn(64).requires_grad_()
        args = (x, data, state.shape, state.state2.absmax, 64, "nf4", bias)
        args += (state.absmax, state.state2.code, state.offset)
        torch.library.opcheck(torch.ops.bitsandbytes.gemm_4bit.default, args)
        args = (x, data, state.shape, absmax_of(state), 64, "nf4")
        torch.library.opcheck(torch.ops.bitsandbytes.gemm_4bit.default, args)
        dy = randn(4, 64).requires_grad_()
        stored = bitsandbytes_weight.of_state(data, state)
        torch.library.opcheck(torch.ops.fastlora.bitsandbytes_grad_input.default, (dy, *stored))
        torch.library.opcheck(
            torch.ops.bitsandbytes.dequantize_4bit.default,
            (data, absmax_of(state), 64, "nf4", state.shape, torch.bfloat16),
        )


def test_the_gemm_has_first_and_second_gradients(patched):
    made = layer(64, 128)
    weight = dense(made).float()
    x = randn(4, 128).requires_grad_()

    def gradients(product):
        y = product(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return [dx, *torch.autograd.grad(dx.square().sum(), x)]

    stored = bitsandbytes_weight.of_state(made.weight.data, made.weight.quant_state)
    data, shape, absmax, blocksize, *second = stored
    want = gradients(lambda x: x @ weight.T)
    op = torch.ops.bitsandbytes.gemm_4bit
    for product in (lambda x: op(x, data, shape, absmax, blocksize, "nf4", None, *second), made):
        for got, expected in zip(gradients(product), want, strict=True):
            assert relative_error(got, expected) < 1e-5


def test_too_few_bytes_are_refused(patched):
    data, state = F.quantize_4bit(randn(64, 64), quant_type="nf4")
    with pytest.raises(ValueError, match="expected 2048 bytes for 4096 weights, got 2000"):
        F.dequantize_4bit(data[:2000], state)


def test_a_weight_in_k_by_n_goes_the_way_it_went(patched):
    weight = randn(128, 64)
    data, state = F.quantize_4bit(weight, quant_type="nf4")
    with pytest.warns(DeprecationWarning, match="was quantized from a"):
        y = bnb.matmul_4bit(randn(4, 128), data, state)
    assert relative_error(y, randn(4, 128).double() @ F.dequantize_4bit(data, state).double()) < 1e-6


# --- what is kept ------------------------------------------------------------------------------------------


def test_a_changed_weight_is_read_again(patched):
    made, x = layer(64, 128), randn(4, 128)
    with torch.no_grad():
        y = made(x)
        made.weight.quant_state.state2.absmax.mul_(2)
        made.weight.quant_state.offset.mul_(2)
        assert torch.allclose(made(x), 2 * y, rtol=1e-5, atol=1e-6)
        made.weight.quant_state.state2.absmax = made.weight.quant_state.state2.absmax / 2
        made.weight.quant_state.offset = made.weight.quant_state.offset / 2
        assert torch.equal(made(x), y)
        made.weight.quant_state.state2.absmax.data = made.weight.quant_state.state2.absmax * 0
        made.weight.quant_state.offset.data = made.weight.quant_state.offset * 0
        assert not made(x).any()
        other = layer(64, 128)
        made.weight.data, made.weight.quant_state = other.weight.data, other.weight.quant_state
        assert torch.equal(made(x), y)


def test_another_map_of_the_scales(patched):
    made, x = layer(64, 128), randn(4, 128)
    made.weight.quant_state.state2.code = made.weight.quant_state.state2.code.square()
    check(made, x)


def test_what_is_kept_goes_with_the_weight(patched):
    made = layer(64, 128)
    made(randn(1, 128))
    count = len(bitsandbytes_weight._read)
    assert count
    del made
    gc.collect()  # a Params4bit and its layer hold each other
    assert len(bitsandbytes_weight._read) == count - 1


def test_copies_compute_for_themselves(patched):
    made, x = layer(64, 128), randn(4, 128)
    y = made(x)
    other = copy.deepcopy(made)
    other.weight.quant_state.state2.absmax.mul_(2)
    other.weight.quant_state.offset.mul_(2)
    assert torch.allclose(other(x), 2 * y, rtol=1e-5, atol=1e-6)
    assert torch.equal(made(x), y)


# --- patching ----------------------------------------------------------------------------------------------


def same_tensors(a, b):
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        same = [t.contiguous().view(-1).view(torch.uint8) for t in (tensor, b[name])]
        assert torch.equal(*same), name


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@patches_bitsandbytes
def test_the_state_dict_is_that_of_an_unpatched_layer(nested):
    want = layer(64, 128, nested=nested, bias=True).state_dict()
    fastlora.patch_bitsandbytes()
    made = layer(64, 128, nested=nested, bias=True)
    same_tensors(made.state_dict(), want)
    x = randn(4, 128, dtype=torch.bfloat16).requires_grad_()
    made(x).sum().backward()
    with torch.no_grad():
        made.eval()(x)
    same_tensors(made.state_dict(), want)
    stats = {name.removeprefix("weight."): t for name, t in made.state_dict().items() if "weight." in name}
    weight = bnb.nn.Params4bit.from_prequantized(made.state_dict()["weight"], stats, device="cpu")
    again = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
    again.weight, again.bias = weight, made.bias
    assert torch.equal(again(x), made(x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@patches_bitsandbytes
def test_unpatched_it_computes_exactly_as_before(training):
    x = randn(4, 128, dtype=torch.bfloat16)

    def run(made):
        seen = x.clone().requires_grad_(training)
        y = made(seen)
        return [y.detach(), *(torch.autograd.grad(y.sum(), seen) if training else ())]

    want = run(layer(64, 128, dtype=torch.bfloat16).train(training))
    made = layer(64, 128, dtype=torch.bfloat16).train(training)
    fastlora.patch_bitsandbytes()
    run(made)
    fastlora.patch_bitsandbytes()
    run(made)
    fastlora.unpatch_bitsandbytes()
    for got, expected in zip(run(made), want, strict=True):
        assert torch.equal(got, expected)
    fastlora.unpatch_bitsandbytes()  # nothing to undo
    assert bnb.nn.Linear4bit.forward.__module__ == "bitsandbytes.nn.modules"
    assert bnb.autograd._functions.MatMul4Bit.backward.__module__ == "bitsandbytes.autograd._functions"


@needs_repacking
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@patches_bitsandbytes
def test_a_repacked_layer_is_trained_and_given_back_as_it_was(nested, storage):
    x = randn(4, 128, dtype=torch.bfloat16)

    def evaluated():
        made = layer(64, 128, dtype=torch.bfloat16, nested=nested, storage=storage).eval()
        with torch.no_grad():
            return made, made(x)

    made, before = evaluated()
    data, absmax = made.weight.data.clone(), made.weight.quant_state.absmax.clone()
    attributes = set(vars(made.weight.quant_state))
    assert made.weight.quant_state.packing_format_for_cpu
    values = layer(64, 128, nested=nested)
    state = values.weight.quant_state  # the weight it was, with the scales that repacking rounded
    state.absmax, state.nested = absmax_of(state).bfloat16().float(), False

    fastlora.patch_bitsandbytes()
    made.train()(x)
    check(made, x)
    assert torch.equal(dense(made), dense(values))
    with torch.no_grad():
        assert relative_error(made.eval()(x), before) < 5e-3
    fastlora.unpatch_bitsandbytes()
    state = made.weight.quant_state
    assert state.packing_format_for_cpu
    assert torch.equal(made.weight.data, data)
    assert torch.equal(state.absmax, absmax)
    assert set(vars(state)) == attributes
    with torch.no_grad():
        assert torch.equal(made(x), before)

    want = evaluated()[0].state_dict()  # not what was loaded: bitsandbytes quantises the scales once more
    fastlora.patch_bitsandbytes()
    with torch.no_grad():
        made(x)
    same_tensors(made.state_dict(), want)


@needs_repacking
@patches_bitsandbytes
def test_a_repacked_layer_is_compiled():
    made, x = layer(64, 128, dtype=torch.bfloat16).eval(), randn(4, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        before = made(x)
        fastlora.patch_bitsandbytes()
        y = torch.compile(made, backend="aot_eager")(x)
        assert relative_error(y, before) < 5e-3
        assert torch.equal(y, made(x))
    fastlora.unpatch_bitsandbytes()
    assert made.weight.quant_state.packing_format_for_cpu
    with torch.no_grad():
        assert torch.equal(made(x), before)


@needs_repacking
@patches_bitsandbytes
def test_a_forward_that_was_bound_before_repacks_nothing():
    made, x = layer(64, 128, dtype=torch.bfloat16).eval(), randn(4, 128, dtype=torch.bfloat16)
    bound = made.forward
    fastlora.patch_bitsandbytes()
    data = made.weight.data.clone()
    with torch.no_grad():
        assert torch.equal(bound(x), made(x))
    assert torch.equal(made.weight.data, data)
    bound = made.forward
    fastlora.unpatch_bitsandbytes()
    with torch.no_grad():
        bound(x)
    assert made.weight.quant_state.packing_format_for_cpu


@pytest.mark.parametrize("found", ["0.49.2", "0.50.1", "0.51.0", "0.60.0.dev0"])
def test_other_versions_are_refused(monkeypatch, found):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    expected = f"patch_bitsandbytes: expected bitsandbytes >= 0.50.2, < 0.51, got {found}"
    with pytest.raises(ImportError, match=re.escape(expected)):
        fastlora.patch_bitsandbytes()
    assert bitsandbytes_patch._patch is None


def test_missing_libraries_are_named(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patching:
        patching.setattr(metadata, "version", missing)
        with pytest.raises(ImportError, match="got none installed"):
            fastlora.patch_bitsandbytes()
    monkeypatch.delattr(torch.library, "get_kernel", raising=False)
    with pytest.raises(ImportError, match=re.escape(f"expected torch >= 2.9, got {torch.__version__}")):
        fastlora.patch_bitsandbytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_refused(patched):
    with pytest.raises(RuntimeError, match="expected a CUDA device for cuda=True, found none"):
        fastlora.patch_bitsandbytes(cuda=True)
    assert bitsandbytes_patch._patch.device_types == ("cpu",)


@patches_bitsandbytes
def test_a_patch_that_fails_leaves_nothing(monkeypatch):
    from fastlora.integrations.bitsandbytes_ops import Operators

    made, x = layer(64, 128), randn(4, 128)
    want = made(x)
    monkeypatch.setattr(Operators, "dequantize_out", None)
    with pytest.raises(AttributeError):
        fastlora.patch_bitsandbytes()
    assert bitsandbytes_patch._patch is None
    assert bnb.nn.Linear4bit.forward.__module__ == "bitsandbytes.nn.modules"
    assert torch.equal(made(x), want)
