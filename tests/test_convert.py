"""fastlora.convert: what it swaps, what it leaves and says so, ties, memory, the report."""

import copy
import math
import weakref

import pytest
import torch
from torch import nn

import fastlora
from fastlora import QLinear


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        x = x + self.v_proj(x) * torch.sigmoid(self.q_proj(x))
        return self.norm(x + self.down(torch.relu(self.up(x))))


class Model(nn.Module):
    def __init__(self, width=64, vocab=50, depth=2, tied=False):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.lm_head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def convert(model, *args, **kwargs):
    return fastlora.convert(model, *args, progress=False, **kwargs)


def quantised(model):
    return [name for name, m in model.named_modules() if isinstance(m, QLinear)]


def test_all_linear_but_the_head_then_it_trains(model):
    dense = copy.deepcopy(model)
    report = convert(model, rank=4, alpha=8)
    names = [f"layers.{i}.{n}" for i in range(2) for n in ("q_proj", "v_proj", "up", "down")]
    assert quantised(model) == names == [c.name for c in report.converted]
    assert [(s.name, s.reason) for s in report.skipped] == [("lm_head", "in skip_modules (lm_head)")]
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"{n}.lora_{x}" for n in names for x in "AB"}

    ids = torch.randint(50, (4, 16))
    for name in names:  # the reference: a dense model with the dequantised weights
        with torch.no_grad():
            dense.get_submodule(name).weight.copy_(model.get_submodule(name).dequantize())
    torch.testing.assert_close(model(ids), dense(ids), rtol=1e-4, atol=1e-4)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        (["q_proj"], ["layers.0.q_proj", "layers.1.q_proj"]),
        (["layers.1.up", "down"], ["layers.0.down", "layers.1.up", "layers.1.down"]),
        (r"layers\.0\.(q|v)_proj", ["layers.0.q_proj", "layers.0.v_proj"]),
        (("lm_head", "v_proj"), ["layers.0.v_proj", "layers.1.v_proj"]),  # skip_modules wins
    ],
    ids=str,
)
def test_targets(model, targets, want):
    convert(model, targets)
    assert sorted(quantised(model)) == sorted(want)


def test_skip_modules_take_whole_subtrees_and_can_be_empty(model):
    convert(model, skip_modules=["layers.0"])
    assert all(not name.startswith("layers.0") for name in quantised(model))
    assert "lm_head" in quantised(model)
    other = Model()
    convert(other, skip_modules=())
    assert "lm_head" in quantised(other)


def test_options_reach_the_layers_and_a_second_call_adds_others(model):
    convert(
        model, ["q_proj"], rank=8, alpha=4, dropout=0.1, blocksize=128, double_quant=False, use_rslora=True
    )
    layer = model.layers[0].q_proj
    assert (layer.rank, layer.alpha, layer.dropout) == (8, 4, 0.1)
    assert (layer.blocksize, layer.double_quant, layer.use_rslora) == (128, False, True)
    bits = layer.weight.clone()
    report = convert(model, rank=2)
    assert model.layers[0].q_proj is layer
    assert torch.equal(layer.weight, bits)
    assert layer.lora_A.requires_grad
    assert model.layers[0].up.rank == 2
    assert ("layers.0.q_proj", "already a QLinear") in [(s.name, s.reason) for s in report.skipped]


def test_dtype_mode_and_bias_follow_the_dense_layers(model):
    model.to(torch.bfloat16).eval()
    bias = model.layers[0].up.bias
    convert(model, rank=2)
    layer = model.layers[0].up
    assert layer.bias is bias
    assert not layer.training
    assert layer.dequantize().dtype == torch.bfloat16
    assert layer.lora_A.dtype == torch.float32
    assert model(torch.zeros(1, 3, dtype=torch.long)).dtype == torch.bfloat16


def test_a_head_tied_to_the_embedding_stays_dense():
    model = Model(tied=True)
    report = convert(model, skip_modules=())
    assert model.lm_head.weight is model.embed.weight
    assert ("lm_head", "its weight is also embed's (Embedding), which stays dense") in [
        (s.name, s.reason) for s in report.skipped
    ]


def test_layers_that_share_a_weight_share_its_packed_form_and_not_the_adapter(model):
    first, second = model.layers[0].q_proj, model.layers[1].q_proj
    second.weight = first.weight
    report = convert(model, rank=3)
    first, second = model.layers[0].q_proj, model.layers[1].q_proj
    for name in ("weight", "weight_scales", "weight_nested"):
        assert getattr(first, name) is getattr(second, name)
    assert first.lora_A is not second.lora_A
    entry = next(c for c in report.converted if c.name == "layers.1.q_proj")
    assert (entry.shares_with, entry.bytes_after) == ("layers.0.q_proj", 0)

    first.eval().lora_B.data.normal_()
    kept = second.weight.clone()
    first.merge()  # must not reach the other
    assert torch.equal(second.weight, kept)
    first.unmerge()
    assert first.weight is second.weight


def test_sharing_with_a_layer_that_stays_dense_keeps_both_dense(model):
    model.layers[0].q_proj.weight = model.layers[0].v_proj.weight
    report = convert(model, skip_modules=["layers.0.v_proj"])
    assert type(model.layers[0].q_proj) is nn.Linear
    reasons = {s.name: s.reason for s in report.skipped}
    assert reasons["layers.0.q_proj"] == "its weight is also layers.0.v_proj's (Linear), which stays dense"


def test_one_layer_under_two_names_stays_one_layer(model):
    model.layers[1].up = model.layers[0].up
    report = convert(model)
    assert isinstance(model.layers[0].up, QLinear)
    assert model.layers[0].up is model.layers[1].up
    assert len(report.converted) == 7


def test_layers_that_cannot_be_swapped_are_left_and_the_reason_given():
    class Odd(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "odd": Odd(8, 8),
            "wide": nn.Linear(8, 8, dtype=torch.float64),
            "hooked": nn.Linear(8, 8),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "empty": nn.Linear(0, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "encoder": nn.TransformerEncoderLayer(8, 2, 16),
        }
    )
    model["hooked"].register_forward_hook(lambda *a: None)
    report = convert(model)
    assert [c.name for c in report.converted] == ["plain"]
    reasons = {s.name: s.reason for s in report.skipped}
    assert reasons == {
        "odd": "a Odd, which may compute in its own way",
        "wide": "its weight is torch.float64, not float32, bfloat16 or float16",
        "hooked": "it has hooks, which a replacement would lose",
        "normed": "a ParametrizedLinear, which may compute in its own way",
        "empty": "its weight is empty",
        "attention.out_proj": "a NonDynamicallyQuantizableLinear, which may compute in its own way",
        "encoder.self_attn.out_proj": "a NonDynamicallyQuantizableLinear, which may compute in its own way",
        "encoder.linear1": "torch.nn.TransformerEncoderLayer reads this weight itself in evaluation",
        "encoder.linear2": "torch.nn.TransformerEncoderLayer reads this weight itself in evaluation",
    }
    with torch.no_grad():  # the library's own fast paths still run
        model["encoder"].eval()(torch.randn(3, 1, 8))
        model["attention"].eval()(*[torch.randn(3, 1, 8)] * 3)


def test_a_named_target_that_is_no_linear_layer_is_reported(model):
    report = convert(model, ["q_proj", "norm"])
    assert ("layers.0.norm", "not a torch.nn.Linear but a LayerNorm") in [
        (s.name, s.reason) for s in report.skipped
    ]


def test_each_dense_weight_is_let_go_before_the_next_layer_is_packed(model, monkeypatch):
    order = ["layers.0.q_proj", "layers.0.v_proj", "layers.0.up", "layers.0.down"]
    alive = {name: weakref.ref(model.get_parameter(f"{name}.weight")) for name in order}
    real = QLinear.from_linear.__func__
    seen = []

    def watching(cls, linear, **kwargs):
        seen.append(sum(ref() is not None for ref in alive.values()))
        return real(cls, linear, **kwargs)

    monkeypatch.setattr(QLinear, "from_linear", classmethod(watching))
    convert(model, order)
    assert seen == [4, 3, 2, 1]
    assert all(ref() is None for ref in alive.values())


def test_meta_models_convert():
    with torch.device("meta"):
        model = Model(tied=True)
    report = convert(model)
    assert len(report.converted) == 8
    assert all(p.is_meta for p in model.parameters())


def test_the_report_counts_bytes_and_weights():
    model = Model(width=256, vocab=10, depth=2, tied=True)
    weights = sum(p.numel() for p in model.parameters())
    report = convert(model, rank=4)
    assert report.bytes_before == 4 * weights
    assert report.bytes_after == sum(p.nbytes for p in model.parameters())
    assert report.bytes_after < report.bytes_before / 4
    adapters = 2 * sum(4 * (i + o) for i, o in ((256, 256), (256, 256), (256, 512), (512, 256)))
    assert (report.trainable, report.total) == (adapters, weights + adapters)
    up = next(c for c in report.converted if c.name == "layers.0.up")
    assert (up.out_features, up.in_features, up.rank) == (512, 256, 4)
    assert up.bytes_before == 4 * 512 * 256
    assert up.bytes_after == pytest.approx(up.bytes_before * 4.127 / 32, rel=0.01)


def test_the_report_prints_as_an_aligned_table(model):
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    text = str(convert(model, rank=4))
    lines = text.splitlines()
    head = lines[0]
    assert head.split() == ["layer", "count", "out", "x", "in", "rank", "MiB", "before", "MiB", "after"]
    up = next(line for line in lines if line.startswith("layers.*.up"))
    assert up.split() == ["layers.*.up", "2", "128", "x", "64", "4", "0.06", "0.01"]
    assert len(up) == len(head)
    assert any(line.startswith("layers.*.q_proj (shared)") for line in lines)
    assert any(line.split() == ["lm_head", "in", "skip_modules", "(lm_head)", "1"] for line in lines)
    assert lines[-1].startswith("8 layers converted, 1 left as they were; ")
    assert "\x1b" not in text


def test_targets_that_match_nothing_change_nothing(model):
    for targets, quoted in ((["q_proj", "k_proj"], "k_proj"), (r".*\.k_proj", "k_proj"), ([], r"\[\]")):
        with pytest.raises(
            ValueError, match=f"expected target_modules that match modules, got no match for .*{quoted}"
        ):
            convert(model, targets)
    with pytest.raises(ValueError, match="expected target_modules as a regular expression, got"):
        convert(model, "layers.(")
    with pytest.raises(
        ValueError, match=r"expected a layer that can be converted, got none .lm_head: in skip_modules"
    ):
        convert(model, ["lm_head"])
    with pytest.raises(ValueError, match=r"the model holds no torch.nn.Linear"):
        convert(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"got a linear layer; use QLinear\.from_linear"):
        convert(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="expected rank >= 0, got -1"):
        convert(model, rank=-1)
    assert not quantised(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_weight_that_is_not_finite_is_named(model):
    with torch.no_grad():
        model.layers[0].v_proj.weight[2, 5] = math.inf
    with pytest.raises(
        ValueError, match=r"convert: layers\.0\.v_proj: .*1 NaN or Inf.*\(1 of 8 layers converted\)"
    ):
        convert(model)


def test_the_progress_bar_goes_to_stderr_and_can_be_off(model, capfd):
    fastlora.convert(model, ["q_proj"])
    out, err = capfd.readouterr()
    assert "quantising" in err
    assert not out
    fastlora.convert(model, ["v_proj"], progress=False)
    assert capfd.readouterr() == ("", "")
