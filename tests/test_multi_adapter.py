"""Several adapters on one layer and in one batch: QLinear's named adapters and fastlora.adapters."""

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from needs import needs_torch
from tolerances import TOLERANCES, relative_error
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import QLinear, active, reference

K, N = 72, 40
RANKS = {"a": 3, "b": 8}
ROWS = ["b", None, "default", "a", "b", "b", None]


def make_layer(rank=4, ranks=RANKS, *, k=K, n=N, seed=0, dropouts=None, **kwargs):
    """A layer whose adapters all do something."""
    torch.manual_seed(seed)
    layer = QLinear(k, n, rank=rank, **kwargs)
    for i, (name, r) in enumerate(ranks.items()):
        layer.add_adapter(name, r, 4.0 + i, dropout=(dropouts or {}).get(name, 0.0))
    for name in layer.adapter_names:
        nn.init.normal_(layer.adapter(name).lora_B, std=0.2)
    return layer


class Model(nn.Module):
    """Two routed layers with what is between them."""

    def __init__(self, layers=2, **kwargs):
        super().__init__()
        self.layers = nn.ModuleList(make_layer(k=K, n=K, seed=i, **kwargs) for i in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return x


def draw(*shape, seed=7, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(layer, x, rows):
    """In float64, a row at a time; and the leaves."""
    leaves = {
        n: tuple(p.detach().double().requires_grad_() for p in layer.adapter(n)[:2])
        for n in layer.adapter_names
    }
    dense = layer.dequantize(torch.float32).double()
    out = []
    for xi, name in zip(x.reshape(-1, x.shape[-1]), rows, strict=True):
        y = dense @ xi + layer.bias.detach().double()
        if name is not None:
            a, b = leaves[name]
            y = y + layer.adapter(name).scaling * (b @ (a @ xi))
        out.append(y)
    return torch.stack(out).reshape(*x.shape[:-1], -1), [p for n in layer.adapter_names for p in leaves[n]]


def adapter_parameters(layer):
    return [p for name in layer.adapter_names for p in layer.adapter(name)[:2]]


def assert_joined(layer):
    """Every adapter's parameters are rows of the pools, and what is computed with them is what they hold."""
    table = layer._table
    assert set(table.names) == set(layer.adapter_names)
    for name in layer.adapter_names:
        parts, first = layer.adapter(name), table.entries[0, table.slot(name), 0].item()
        (pair,) = table.parameters(name)
        assert pair[0] is parts.lora_A
        assert pair[1] is parts.lora_B
        if not parts.lora_A.is_meta:
            assert parts.lora_A.data_ptr() == table.a[0][first].data_ptr()
            assert parts.lora_B.data_ptr() == table.b[0][first].data_ptr()
            assert torch.equal(parts.lora_A, table.a[0][first : first + parts.rank])


def routed(layer, x, rows=ROWS, **kwargs):
    with fastlora.adapters(layer, rows, **kwargs):
        return layer(x)


# --- adding, setting, deleting --------------------------------------------------------------------------


def test_a_layer_without_named_adapters_is_what_it_was():
    torch.manual_seed(0)
    layer = QLinear(K, N, rank=4)
    assert layer.adapter_names == ("default",)
    assert layer.active_adapter == "default"
    assert list(layer.state_dict()) == [
        "weight",
        "weight_scales",
        "weight_nested",
        "bias",
        "lora_A",
        "lora_B",
    ]
    plain, x = copy.deepcopy(layer), draw(3, K)
    adapter = layer.add_adapter("a", 3, 8)
    assert adapter is layer.adapters["a"]
    assert list(layer.state_dict())[4:] == ["lora_A", "lora_B", "adapters.a.lora_A", "adapters.a.lora_B"]
    torch.testing.assert_close(layer(x), plain(x))
    layer.delete_adapter("a")
    assert torch.equal(layer(x), plain(x))
    assert repr(layer) == repr(plain)
    assert layer.lora_B.is_contiguous()
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert QLinear(K, N, rank=0).adapter_names == ()
    assert QLinear(K, N, rank=0).active_adapter is None


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rank", [0, 4])
def test_set_adapter_sends_all_rows(rank, dtype):
    layer, x = make_layer(rank), draw(5, K, dtype=dtype)
    for name in (*layer.adapter_names, None, "a"):
        layer.set_adapter(name)
        assert layer.active_adapter == name
        y = layer(x)
        assert relative_error(y, exact(layer, x.double(), [name] * 5)[0]) < TOLERANCES[dtype].frobenius
        assert relative_error(routed(layer, x, [name] * 5), y) < TOLERANCES[dtype].frobenius


def test_the_adapter_that_is_set_alone_learns():
    layer = make_layer()
    layer.set_adapter("b")
    loss = layer(draw(5, K)).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in layer.adapter("b")[:2])
    assert layer.lora_A.grad is None
    assert layer.adapter("a").lora_B.grad is None
    x64 = draw(5, K).double()
    y, leaves = exact(layer, x64, ["b"] * 5)
    for p, w in zip(layer.adapter("b")[:2], torch.autograd.grad(y.square().sum(), leaves[4:]), strict=True):
        assert relative_error(p.grad, w) < 1e-5
        assert p.grad.stride() == p.stride()


def test_set_adapter_none_on_an_ordinary_layer_is_its_base():
    layer = QLinear(K, N, rank=4)
    nn.init.normal_(layer.lora_B)
    layer.set_adapter(None)
    x = draw(3, K)
    torch.testing.assert_close(layer(x), F.linear(x, layer.dequantize(), layer.bias))
    layer.set_adapter("default")
    assert not torch.allclose(layer(x), F.linear(x, layer.dequantize(), layer.bias))


def test_alpha_may_change():
    layer, x = make_layer(), draw(7, K)
    layer.set_alpha(1.5)
    layer.adapters["b"].set_alpha(2.0, use_rslora=True)
    assert layer.adapter("b").scaling == pytest.approx(2 / 8**0.5)
    assert relative_error(routed(layer, x), exact(layer, x.double(), ROWS)[0]) < 1e-5
    for name in layer.adapter_names:
        layer.set_adapter(name)
        layer.set_adapter_alpha(name, 7.0)
        assert relative_error(layer(x), exact(layer, x.double(), [name] * 7)[0]) < 1e-5


def test_replacing_in_place_inside_a_block():
    layer, x = make_layer(), draw(7, K)
    held = layer.adapter("b").lora_A
    with fastlora.adapters(layer, ROWS):
        layer(x)
        for rank in (8, 5, 20):
            layer.replace_adapter("b", draw(rank, K, seed=rank), draw(N, rank, seed=1), 3.0)
            assert layer.adapters["b"].rank == rank
            assert relative_error(layer(x), exact(layer, x.double(), ROWS)[0]) < 1e-5
    assert layer.adapter("b").lora_A is held
    assert_joined(layer)


# --- a batch of many ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_each_row_has_its_adapter_and_gradients_go_to_it(layer_device, dtype, batch_invariant):
    if batch_invariant and dtype == torch.float32 and layer_device != "cpu":
        pytest.skip("on CUDA a product in float32 is torch's")
    layer = make_layer()
    layer.add_adapter("idle", 6, 8)
    x = draw(7, K, dtype=dtype).requires_grad_()
    y = routed(layer, x, batch_invariant=batch_invariant)
    dy = draw(7, N, seed=8, dtype=dtype)
    y.backward(dy)
    x64 = x.detach().double().requires_grad_()
    want, leaves = exact(layer, x64, ROWS)
    assert relative_error(y, want) < TOLERANCES[dtype].frobenius
    grads = torch.autograd.grad(want, (x64, *leaves), dy.double(), materialize_grads=True)
    for p, w in zip((x, *adapter_parameters(layer)), grads, strict=True):
        assert relative_error(p.grad, w) < 2 * TOLERANCES[dtype].frobenius
    assert not layer.adapter("idle").lora_A.grad.any()
    assert relative_error(layer.bias.grad, dy.double().sum(0)) < TOLERANCES[dtype].frobenius


def test_a_row_does_not_depend_on_its_neighbours_where_that_is_asked_for():
    layer, x = make_layer(k=256, n=192), draw(40, 256, dtype=torch.bfloat16)
    rows = (ROWS * 6)[:40]
    with torch.no_grad():
        together = routed(layer, x, rows, batch_invariant=True)
        for i in (0, 1, 2, 3, 39):
            assert torch.equal(
                routed(layer, x[i : i + 1], rows[i : i + 1], batch_invariant=True)[0], together[i]
            )


def test_names_by_prompt_serve_the_prompts_and_then_a_token_each():
    layer = make_layer()
    prompts, names = draw(3, 5, K), ["a", None, "b"]
    with torch.no_grad(), fastlora.adapters(layer, names):
        y, token = layer(prompts), layer(prompts[:, -1:])
        deep = layer(prompts.reshape(3, 1, 5, K))
    each = [name for name in names for _ in range(5)]
    assert relative_error(y, exact(layer, prompts.double(), each)[0]) < 1e-5
    assert relative_error(token, exact(layer, prompts[:, -1:].double(), names)[0]) < 1e-5
    assert torch.equal(deep.reshape(y.shape), y)
    assert torch.equal(y, routed(layer, prompts, each))


def test_a_model_generates_for_all_at_once_what_it_generates_for_each():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, eos_token_id=None, bos_token_id=None, pad_token_id=None,
        )
    ).eval()  # fmt: skip
    fastlora.convert(model, rank=4, progress=False)
    layers = [m for m in model.modules() if isinstance(m, QLinear)]
    for layer in layers:
        layer.add_adapter("a", 3, 8)
        layer.add_adapter("b", 6, 8)
        for name in layer.adapter_names:
            nn.init.normal_(layer.adapter(name).lora_B, std=1.0)
    ids, names = torch.randint(60, (4, 6)), ["a", "b", None, "default"]
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(4, 6, dtype=torch.int64)}
    with fastlora.adapters(model, names):
        together = model.generate(ids, **options)
    assert len({tuple(row[6:].tolist()) for row in together}) > 1
    for i, name in enumerate(names):
        for layer in layers:
            layer.set_adapter(name)
        options["attention_mask"] = torch.ones(1, 6, dtype=torch.int64)
        assert torch.equal(model.generate(ids[i : i + 1], **options)[0], together[i])


def test_a_block_used_in_inference_mode_trains():
    layer, x = make_layer(), draw(7, 3, K)
    with torch.inference_mode():
        block = fastlora.adapters(layer, ROWS)
        with block:
            layer(x)
            layer(x[:, 0])
        layer.set_adapter("a")
        layer(x)
    with block:
        (layer(x).sum() + layer(x[:, 0]).sum()).backward()
    layer(x).sum().backward()
    assert layer.adapter("b").lora_A.grad.any()


def test_blocks_nest_and_end():
    layer, x = make_layer(), draw(2, K)
    plain, a, b = layer(x), routed(layer, x, ["a", "a"]), routed(layer, x, ["b", None])
    block = fastlora.adapters(layer, ["a", "a"])
    with block:
        assert torch.equal(layer(x), a)
        with fastlora.adapters(layer, ["b", None]):
            assert torch.equal(layer(x), b)
            with block:  # the same one again
                assert torch.equal(layer(x), a)
            assert torch.equal(layer(x), b)
        assert torch.equal(layer(x), a)
        with pytest.raises(KeyError), fastlora.adapters(layer, ["b", None]):
            raise KeyError
        assert torch.equal(layer(x), a)
    assert torch.equal(layer(x), plain)
    with block:
        assert torch.equal(layer(x), a)
    assert not layer.place.routers


def test_a_kept_block_follows_its_layers():
    layer, x = make_layer(), draw(2, K)
    block = fastlora.adapters(layer, ["b", "default"])
    with block:
        layer(x)
    layer.delete_adapter("a")
    for i in range(9):  # the slots grow, and the one that "a" had is taken
        layer.add_adapter(f"more {i}", 2, 4)
    with block:
        assert relative_error(layer(x), exact(layer, x.double(), ["b", "default"])[0]) < 1e-5
    layer.delete_adapter("b")
    with pytest.raises(ValueError, match=r"adapters: expected names of adapters, got \['b'\]"), block:
        pass


def test_a_layer_that_lacks_a_name_others_have_computes_its_base():
    model = nn.ModuleList(
        [make_layer(), make_layer(ranks={"a": 2}), QLinear(K, N, rank=0), QLinear(K, N, rank=3)]
    )
    for layer in model:
        nn.init.normal_(layer.bias)
    x, rows = draw(3, K), ["b", "a", "default"]
    with fastlora.adapters(model, rows):
        found = [layer(x) for layer in model]
    for layer, y in zip(model, found, strict=True):
        has = [name if name in layer.adapter_names else None for name in rows]
        assert relative_error(y, exact(layer, x.double(), has)[0]) < 1e-5


def test_layers_that_give_names_other_slots_are_routed_apart():
    first, second = make_layer(), make_layer(ranks={"b": 2, "a": 5})
    model, x = nn.ModuleList([first, second, make_layer()]), draw(7, K)
    block = fastlora.adapters(model, ROWS)
    with block:
        assert len(set(map(id, block._routers.values()))) == 2
        for layer in model:
            assert relative_error(layer(x), exact(layer, x.double(), ROWS)[0]) < 1e-5


def test_threads_have_blocks_of_their_own():
    layer, x = make_layer(), draw(2, K)
    names = [["a", "a"], ["b", None], [None, "default"], None]
    want = [layer(x) if rows is None else routed(layer, x, rows) for rows in names]
    barrier, found = threading.Barrier(len(names)), [None] * len(names)

    def call(i):
        with torch.no_grad():
            if names[i] is None:
                barrier.wait()
                found[i] = [layer(x) for _ in range(20)]
            else:
                with fastlora.adapters(layer, names[i]):
                    barrier.wait()
                    found[i] = [layer(x) for _ in range(20)]
            barrier.wait()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for many, y in zip(found, want, strict=True):
        assert all(torch.equal(one, y) for one in many)
    assert not layer.place.routers


# --- training -------------------------------------------------------------------------------------------


def test_adapters_trained_together_are_those_trained_apart():
    """A loss and a group of parameters each; what one learns does not depend on who else is in the batch."""
    x, target = draw(24, K), draw(24, K, seed=9)
    rows = ["a", "b", "default"] * 8

    def optimizer_of(model, names):
        groups = [
            {"params": [p for layer in model.layers for p in layer.adapter(name)[:2]], "lr": lr}
            for name, lr in names.items()
        ]
        return torch.optim.AdamW(groups, fused=True)

    rates = {"a": 1e-2, "b": 3e-2, "default": 2e-2}
    together = Model()
    optimizer = optimizer_of(together, rates)
    for _ in range(5):
        with fastlora.adapters(together, rows):
            losses = (together(x) - target).square().mean(-1)
        optimizer.zero_grad()
        sum(losses[[i for i, row in enumerate(rows) if row == name]].mean() for name in rates).backward()
        optimizer.step()
    for name, lr in rates.items():
        alone, mine = Model(), [i for i, row in enumerate(rows) if row == name]
        optimizer = optimizer_of(alone, {name: lr})
        for layer in alone.layers:
            layer.set_adapter(name)
        for _ in range(5):
            optimizer.zero_grad()
            (alone(x[mine]) - target[mine]).square().mean().backward()
            optimizer.step()
        for one, other in zip(alone.layers, together.layers, strict=True):
            for p, q in zip(one.adapter(name)[:2], other.adapter(name)[:2], strict=True):
                torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    for layer in together.layers:
        assert_joined(layer)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("resumed", [False, True])
def test_an_optimiser_goes_on_when_the_layer_gets_a_second_adapter(fused, resumed):
    """lora_B's strides change with it, which torch's fused steps would not notice by themselves."""

    def train(steps):
        layer = make_layer(ranks={})
        optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-2, fused=fused)
        for step in range(6):
            for change in steps.get(step, ()):
                if change == "add":
                    layer.add_adapter("a", 3, 8)
                elif change == "delete":
                    layer.delete_adapter("a")
                elif resumed:
                    state = copy.deepcopy(optimizer.state_dict())
                    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-2, fused=fused)
                    optimizer.load_state_dict(state)
            for half in (slice(0, 8), slice(8, 16)):
                (layer(draw(16, K)[half]) - draw(16, N, seed=9)[half]).square().mean().backward()
                if half.start == 0 and step == 3:
                    for change in steps.get("half", ()):
                        layer.add_adapter(change, 3, 8)
            optimizer.step()
            optimizer.zero_grad()
        return layer

    want = train({})
    for steps in ({2: ["add", "load"]}, {2: ["load", "add"], 4: ["delete", "load"]}, {"half": ["a"]}):
        got = train(steps)
        for p, q in zip((got.lora_A, got.lora_B), (want.lora_A, want.lora_B), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpoints_replay_the_routing_they_had(reentrant, dropout):
    """Two batches of unlike adapters wait for one backward pass, after their blocks and another batch's."""
    model = Model(dropout=dropout, dropouts={"a": dropout / 2})
    batches = [(draw(7, K), ROWS), (draw(2, 5, K, seed=8), ["a", "b"]), (draw(3, K, seed=9), None)]

    def forward(x, rows, wrap):
        if rows is None:
            return wrap(wrap(x))
        with fastlora.adapters(model, rows):
            return wrap(wrap(x))

    def run(wrap):
        model.zero_grad()
        torch.manual_seed(3)
        xs = [x.clone().requires_grad_() for x, _ in batches]
        ys = [forward(x, rows, wrap) for x, (_, rows) in zip(xs, batches, strict=True)]
        with torch.no_grad():
            forward(draw(1, K), ["b"], wrap)
        sum(y.square().sum() for y in ys).backward()
        return [*ys, *(x.grad for x in xs), *(p.grad for p in model.parameters() if p.requires_grad)]

    plain = run(model)
    again = run(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    inside = run(
        lambda x: checkpoint(
            lambda x: model(checkpoint(model, x, use_reentrant=reentrant)), x, use_reentrant=reentrant
        )
    )
    twice = run(lambda x: model(model(x)))
    assert all(torch.equal(p, c) for p, c in zip(plain, again, strict=True))
    assert all(torch.equal(p, c) for p, c in zip(twice, inside, strict=True))
    assert not active._LOCAL.replays


def test_blocks_are_not_remembered_without_end(monkeypatch):
    monkeypatch.setattr(active, "_MOST", 3)
    model, x = Model(), draw(1, K).requires_grad_()
    own = active._LOCAL.history = active._History()
    losses = []
    for _ in range(5):
        with fastlora.adapters(model, ["a"]):
            losses.append(checkpoint(model, x, use_reentrant=False).sum())
    with torch.no_grad():
        for _ in range(9):
            with fastlora.adapters(model, ["b"]):
                model(x)
    assert len(own.batches) == 3  # blocks without a node leave nothing
    losses[-1].backward()
    with pytest.raises(
        RuntimeError, match="expected to replay one of the last 3 blocks of adapters, got an older"
    ):
        losses[0].backward()
    active._HISTORIES.remove(own)
    active._LOCAL.history = active._History()


@pytest.mark.parametrize("same", [True, False])
def test_dropout_is_each_adapters_own(layer_device, same):
    p = {"default": 0.4, "a": 0.4 if same else 0.7, "b": 0.4 if same else 0.0}
    layer = make_layer(dropout=p["default"], dropouts=p)
    x = draw(7, K).requires_grad_()
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, (1,)))  # what the layer draws
    torch.manual_seed(5)
    y = routed(layer, x)
    y.square().sum().backward()
    masks = {
        q: reference.lora_dropout(torch.ones_like(x), seed, q) if q else torch.ones_like(x)
        for q in p.values()
    }
    mask = torch.stack([masks[p[name]][i] if name else torch.ones(K) for i, name in enumerate(ROWS)])
    dense = layer.dequantize(torch.float32).double()
    x64 = x.detach().double().requires_grad_()
    term, leaves = exact(layer, x64 * mask, ROWS)
    want = term + (x64 - x64 * mask) @ dense.t()  # the base sees all of x
    assert relative_error(y, want) < 1e-5
    grads = torch.autograd.grad(want.square().sum(), (x64, *leaves))
    for q, w in zip((x, *adapter_parameters(layer)), grads, strict=True):
        assert relative_error(q.grad, w) < 1e-5
    layer.eval()
    assert relative_error(routed(layer, x), exact(layer, x.double(), ROWS)[0]) < 1e-5
    layer.train().set_adapter("a")
    torch.manual_seed(5)
    y = layer(x)
    term, _ = exact(layer, x64 * masks[p["a"]], ["a"] * 7)
    assert relative_error(y, term + (x64 - x64 * masks[p["a"]]) @ dense.t()) < 1e-5


def test_autocast():
    layer, x = make_layer(), draw(7, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = routed(layer, x)
        layer.set_adapter("b")
        one = layer(x)
    assert (y.dtype, one.dtype) == (torch.bfloat16, torch.bfloat16)
    y.float().square().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32
    assert relative_error(y, exact(layer, x.double(), ROWS)[0]) < 2 * TOLERANCES[torch.bfloat16].frobenius


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", [ROWS, "a", None, "default"], ids=str)
@pytest.mark.usefixtures("_fresh_dynamo")
def test_in_one_compiled_graph(rows):
    model = Model()
    compiled = torch.compile(model, fullgraph=True)
    if rows is not ROWS:
        for layer in model.layers:
            layer.set_adapter(rows)
    with fastlora.adapters(model, rows) if rows is ROWS else contextlib.nullcontext():
        for x in (draw(7, K), draw(7, 5, K), draw(7, 6, K)):
            found = []
            for f in (compiled, model):
                model.zero_grad()
                mine = x.clone().requires_grad_()
                y = f(mine)
                y.square().sum().backward()
                found.append([y, mine.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
            for got, want in zip(*found, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.usefixtures("_fresh_dynamo")
def test_another_block_or_another_adapter_in_place_compiles_nothing_anew():
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    counters = torch._dynamo.utils.counters["stats"]
    graphs = []
    for i in range(4):
        with torch.no_grad(), fastlora.adapters(model, ROWS[i:] + ROWS[:i]):
            for layer in model.layers:
                layer.replace_adapter("a", draw(3, K, seed=i), draw(K, 3, seed=i), 2.0)
            for x in (draw(7, 3, K), draw(7, 4, K), draw(7, 5, K), draw(7, 1, K)):
                torch.testing.assert_close(compiled(x), model(x))
        graphs.append(counters["unique_graphs"])
    assert graphs[1:] == graphs[:1] * 3


@pytest.mark.usefixtures("_fresh_dynamo")
@needs_torch("2.9", "errors that are raised within a graph keep their message")
def test_a_compiled_layer_refuses_two_threads():
    layer, x = make_layer(), draw(1, K)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    entered, done = threading.Event(), threading.Event()

    def other():
        with fastlora.adapters(layer, ["a"]):
            entered.set()
            done.wait()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    try:
        with torch.no_grad(), fastlora.adapters(layer, ["b"]):
            layer(x)
            with pytest.raises(Exception, match="expected one thread at a time"):
                compiled(x)
    finally:
        done.set()
        thread.join()
    torch._dynamo.reset()
    with torch.no_grad(), fastlora.adapters(layer, ["b"]):
        assert torch.equal(compiled(x), layer(x))


# --- what torch does to a module ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m,
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to("cpu"),
        lambda m: m.half().float(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: copy.deepcopy(m).bfloat16(),
        lambda m: nn.Sequential(m).double().float()[0],
        lambda m: m.share_memory(),
    ],
    ids=[
        "as it is",
        "deepcopy",
        "pickle",
        "to",
        "half",
        "bfloat16",
        "float16",
        "copied and cast",
        "double",
        "shared",
    ],
)
def test_parameters_stay_rows_of_the_pools(change):
    layer = make_layer()
    x = draw(7, K)
    want = routed(layer, x).detach()
    other = change(layer)
    assert_joined(other)
    layer.set_adapter("a")
    close = {"rtol": 3e-2, "atol": 3e-2} if other.lora_A.dtype != torch.float32 or other is layer else {}
    torch.testing.assert_close(routed(other, x), want, **close)
    with torch.no_grad():
        for p in adapter_parameters(other):
            p.mul_(0.5)
    assert relative_error(routed(other, x), exact(other, x.double(), ROWS)[0]) < 1e-5
    other.set_adapter("b")
    other(x).sum().backward()
    assert other.adapter("b").lora_A.grad.any()


def test_a_block_finds_parameters_that_were_put_in_behind_the_tables_back():
    layer, x = make_layer(), draw(7, K)
    layer.adapters["b"].lora_A = nn.Parameter(draw(8, K, seed=1))
    layer.adapters["a"].lora_B.data = draw(N, 3, seed=2)
    layer.lora_B.data = layer.lora_B.detach().contiguous()
    assert relative_error(routed(layer, x), exact(layer, x.double(), ROWS)[0]) < 1e-5
    assert_joined(layer)
    layer.adapters.half()
    with pytest.raises(TypeError, match="expected adapters of one dtype and device, got"):
        routed(layer, x)


def test_copies_are_their_own():
    layer, x = make_layer(), draw(7, K)
    want = routed(layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            for p in adapter_parameters(other):
                p.zero_()
        other.delete_adapter("a")
    assert torch.equal(routed(layer, x), want)


def test_a_copied_optimiser_follows_the_copied_model():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    with fastlora.adapters(model2, ["a"]):
        model2(draw(1, K)).square().sum().backward()
    before = model2.layers[0].adapters["a"].lora_B.clone()
    optimizer2.step()
    assert not torch.equal(model2.layers[0].adapters["a"].lora_B, before)
    assert_joined(model2.layers[0])


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip_is_bit_exact(tmp_path, assign):
    layer, x = make_layer(), draw(7, K)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = make_layer(seed=5)
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True), assign=assign)
    assert_joined(other)
    for name in layer.adapter_names:
        other.set_adapter_alpha(name, layer.adapter(name).alpha)
    assert torch.equal(routed(other, x), routed(layer, x))
    for (key, p), (_, q) in zip(layer.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(p, q), key
    with pytest.raises(RuntimeError, match=r"adapters\.a\.lora_A"):
        QLinear(K, N, rank=4).load_state_dict(layer.state_dict())


def test_torch_save_of_a_whole_layer_is_no_larger_than_it(tmp_path):
    layer, x = make_layer(), draw(7, K)
    layer.join_table()._rows[0].grow(5000)
    layer._table._allocate()
    torch.save(layer, tmp_path / "layer.pt")
    assert (tmp_path / "layer.pt").stat().st_size < 60_000  # the pools are 2 MB
    other = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert_joined(other)
    assert torch.equal(routed(other, x), routed(layer, x))


def test_meta_and_back():
    with torch.device("meta"):
        layer = QLinear(K, N, rank=4)
        layer.add_adapter("a", 3, 8)
    assert all(p.is_meta for p in layer.parameters())
    with fastlora.adapters(layer, ["a", None]):
        assert layer(torch.empty(2, K, device="meta")).shape == (2, N)
    layer.set_adapter("a")
    assert layer(torch.empty(5, K, device="meta")).is_meta
    layer.to_empty(device="cpu")
    source = make_layer(ranks={"a": 3})
    layer.load_state_dict(source.state_dict())
    layer.set_adapter_alpha("a", 4.0)
    assert_joined(layer)
    rows = ["a", None, "default"]
    assert torch.equal(routed(layer, draw(3, K), rows), routed(source, draw(3, K), rows))


def test_merging_folds_the_adapter_that_is_set():
    layer, x = make_layer().eval(), draw(7, K)
    layer.set_adapter("b")
    parts = layer.adapter("b")
    summed = layer.dequantize() + parts.scaling * (parts.lora_B @ parts.lora_A).detach()
    y = layer(x)
    layer.merge()
    assert layer.quantized_weight == fastlora.quantize_nf4(summed)
    torch.testing.assert_close(layer(x), F.linear(x, layer.dequantize(), layer.bias))
    for refused in (
        lambda: layer.set_adapter("a"),
        lambda: layer.add_adapter("c", 2, 2),
        lambda: layer.delete_adapter("a"),
    ):
        with pytest.raises(RuntimeError, match="expected an unmerged layer, got a merged one"):
            refused()
    with pytest.raises(RuntimeError, match="adapters: expected unmerged layers, got 1 that are merged"):
        routed(layer, x)
    layer.unmerge()
    assert torch.equal(layer(x), y)
    with torch.no_grad(), fastlora.adapters(layer, ROWS):
        layer.merge()
        with pytest.raises(
            RuntimeError, match=r"expected an unmerged layer inside adapters\(\), got a merged one"
        ):
            layer(x)
    layer.unmerge()
    layer.set_adapter(None)
    layer.merge()
    assert not layer.merged


def test_conversion_leaves_named_adapters_learning():
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    fastlora.convert(model, ["0"], rank=2, progress=False)
    model[0].add_adapter("a", 3, 8)
    fastlora.convert(model, ["1"], rank=2, progress=False)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"{i}.lora_{x}" for i in range(2) for x in "AB"} | {
        f"0.adapters.a.lora_{x}" for x in "AB"
    }


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: m.set_adapter("x"),
            ValueError,
            r"set_adapter: .* name of an adapter, got 'x'; this layer has \['default', 'a', 'b'\]",
        ),
        (
            lambda m: m.add_adapter("a", 2, 2),
            ValueError,
            r"add_adapter: expected a new name, got 'a'; this layer has \['default', 'a', 'b'\]",
        ),
        (
            lambda m: m.add_adapter("default", 2, 2),
            ValueError,
            "add_adapter: expected a new name, got 'default'",
        ),
        (
            lambda m: m.add_adapter("a.b", 2, 2),
            ValueError,
            "add_adapter: expected a name without a dot, got 'a.b'",
        ),
        (lambda m: m.add_adapter("c", 0, 2), ValueError, "add_adapter: expected rank >= 1, got 0"),
        (lambda m: m.add_adapter("c", 2.0, 2), TypeError, "add_adapter: expected rank as an int, got 2.0"),
        (
            lambda m: m.add_adapter("c", 2, float("inf")),
            ValueError,
            "add_adapter: expected a finite alpha, got inf",
        ),
        (
            lambda m: m.add_adapter("c", 2, 2, dropout=1.0),
            ValueError,
            r"add_adapter: expected dropout in \[0, 1\), got 1.0",
        ),
        (
            lambda m: m.add_adapter("c", 2, 2, dtype=torch.bfloat16),
            TypeError,
            "expected dtype torch.float32, as the layer's other adapters",
        ),
        (
            lambda m: m.delete_adapter("default"),
            ValueError,
            "delete_adapter: expected the name of an added adapter, got 'default'",
        ),
        (lambda m: m.adapter("x"), ValueError, "QLinear: expected the name of an adapter, got 'x'"),
        (
            lambda m: fastlora.adapters(m, ["a", "x", "x"]),
            ValueError,
            r"adapters: .* got \['x'\]; this model has \['a', 'b', 'default'\]",
        ),
        (
            lambda m: fastlora.adapters(m, "a"),
            TypeError,
            "adapters: expected a sequence of names, one a row or a prompt, got 'a'",
        ),
        (
            lambda m: routed(m, draw(3, K), ["a"] * 2),
            ValueError,
            r"expected x of 2 rows or of 2 prompts, .* got x of shape \(3, 72\)",
        ),
        (
            lambda m: routed(m, draw(4, K), ["a"] * 2),
            ValueError,
            r"expected x of 2 rows or of 2 prompts, .* got x of shape \(4, 72\)",
        ),
        (
            lambda m: routed(m, draw(3, 2, K), ["a"] * 2),
            ValueError,
            r"expected x of 2 rows or of 2 prompts, .* got x of shape \(3, 2, 72\)",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    layer = make_layer()
    with pytest.raises(error, match=message):
        call(layer)
    assert layer.adapter_names == ("default", "a", "b")
    assert not layer.place.routers
    assert_joined(layer)


def test_changes_that_a_block_does_not_allow():
    layer = make_layer()
    with fastlora.adapters(layer, ["a"]):
        for refused in (lambda: layer.add_adapter("c", 2, 2), lambda: layer.delete_adapter("b")):
            with pytest.raises(RuntimeError, match=r"expected to be called outside adapters\(\)"):
                refused()
    layer.set_adapter("b")
    with pytest.raises(RuntimeError, match="delete_adapter: expected another adapter to be set, got 'b'"):
        layer.delete_adapter("b")
    with pytest.raises(ValueError, match="this layer has none"):
        QLinear(K, N, rank=0).set_adapter("a")
