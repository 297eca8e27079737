"""Adapters taken out of the difference of weights, of pairs and of whole checkpoints."""

import copy
import json

import pytest
import safetensors.torch
import torch
from tolerances import relative_error
from torch import nn
from typer.testing import CliRunner

import fastlora
from fastlora import QLinear, cli
from fastlora.methods.extraction import Extraction, extract_adapter, extract_pair

runner = CliRunner()
N, K = 40, 72


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(11, K)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(K, N), "down": nn.Linear(N, K)}) for _ in "01"
        )
        self.lm_head = nn.Linear(K, 11, bias=False)


def low_rank(r, n, k, seed):
    torch.manual_seed(seed)
    return 0.1 * torch.randn(n, r) @ torch.randn(r, k)


def tuned(*names, r=3):
    """The net with changes of rank r in these layers."""
    net = Net()
    with torch.no_grad():
        for seed, name in enumerate(names):
            weight = net.get_submodule(name).weight
            weight += low_rank(r, *weight.shape, seed)
    return net


def product(folder, name):
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    stem = f"base_model.model.{name}"
    return tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]


def sharded(folder, net, config=None):
    """Its files, two tensors in each."""
    folder.mkdir()
    items, weight_map = list(net.state_dict().items()), {}
    for i in range(0, len(items), 2):
        name = f"model-{i // 2}.safetensors"
        safetensors.torch.save_file(dict(items[i : i + 2]), folder / name)
        weight_map |= {key: name for key, _ in items[i : i + 2]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config or {"architectures": ["NetForCausalLM"]}))
    return folder


# --- two matrices -----------------------------------------------------------------------------------------


def test_a_pair():
    base = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    changed = base + low_rank(4, N, K, 1)
    for scaling, niter in ((1.0, None), (2.0, None), (2.0, 4)):
        a, b = extract_pair(base, changed, 4, scaling=scaling, niter=niter)
        assert relative_error(scaling * b @ a, (changed - base).double()) < 1e-4
    layer = QLinear.from_linear(nn.Linear(K, N), rank=4, alpha=8)
    before = copy.deepcopy(layer)
    layer.set_adapter_values(*extract_pair(base, changed, 4, scaling=layer.scaling))
    torch.testing.assert_close(
        layer.merged_weight() - before.dequantize(), changed - base, rtol=1e-3, atol=1e-4
    )
    with pytest.raises(ValueError, match=r"two matrices of one shape, got \(40, 72\) and \(72, 40\)"):
        extract_pair(base, base.T, 2)
    with pytest.raises(ValueError, match="expected rank >= 1 and a scaling other than 0, got 2 and 0"):
        extract_pair(base, base, 2, scaling=0)


# --- checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["modules", "state dicts", "files", "folders", "sharded"])
def test_a_change_of_low_rank_comes_back(source, tmp_path):
    nets = Net(), tuned("blocks.0.up", "blocks.1.down")
    given = list(nets)
    if source == "state dicts":
        given = [net.state_dict() for net in nets]
    elif source in ("files", "folders"):
        for i, net in enumerate(nets):
            (tmp_path / str(i)).mkdir()
            safetensors.torch.save_file(net.state_dict(), tmp_path / str(i) / "model.safetensors")
            given[i] = tmp_path / str(i) / ("model.safetensors" if source == "files" else "")
    elif source == "sharded":
        given = [sharded(tmp_path / str(i), net) for i, net in enumerate(nets)]
    out = tmp_path / "out"
    found = extract_adapter(*given, out, 5, progress=False)
    assert isinstance(found, Extraction)
    assert [layer.name for layer in found.layers] == ["blocks.0.up", "blocks.1.down"]
    assert found.left == {}
    for layer in found.layers:
        weights = [net.get_submodule(layer.name).weight.detach().double() for net in nets]
        want = weights[1] - weights[0]
        assert layer.rank == 5
        assert layer.change == pytest.approx((want.norm() / weights[0].norm()).item(), rel=1e-5)
        assert layer.error < 1e-5
        assert relative_error(product(out, layer.name), want) < 1e-5
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert config["target_modules"] == ["blocks.0.up", "blocks.1.down"]
    of_folder = source == "sharded"
    assert config["task_type"] == ("CAUSAL_LM" if of_folder else None)
    on_disk = source in ("files", "folders", "sharded")
    assert config["base_model_name_or_path"] == (str(given[0]) if on_disk else None)
    assert len(safetensors.torch.load_file(out / "adapter_model.safetensors")) == 4


@pytest.mark.parametrize("niter", [None, 4])
def test_what_the_rank_leaves(niter, tmp_path):
    nets = Net(), tuned("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", r=8)
    found = extract_adapter(*nets, tmp_path / "out", 2, niter=niter, progress=False)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == [
        "up",
        "down",
    ]
    for layer in found.layers:
        weights = [net.get_submodule(layer.name).weight.detach().double() for net in nets]
        change = weights[1] - weights[0]
        s = torch.linalg.svdvals(change)
        least = (s[2:].norm() / s.norm()).item()
        assert least * (1 - 1e-4) < layer.error < least * (1.1 if niter else 1 + 1e-4)
        off = (product(tmp_path / "out", layer.name) - change).norm() / change.norm()
        assert layer.error == pytest.approx(off.item(), rel=1e-4)


def test_a_rank_above_a_matrixs_own(tmp_path):
    nets = Net(), tuned("blocks.0.up", "lm_head")
    found = extract_adapter(
        *nets,
        tmp_path / "out",
        20,
        target_modules=["up", "lm_head"],
        task_type="X",
        base_model="b",
        progress=False,
    )
    assert {layer.name: layer.rank for layer in found.layers} == {"blocks.0.up": 20, "lm_head": 11}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {"lm_head": 11}
    assert (config["task_type"], config["base_model_name_or_path"]) == ("X", "b")


def test_what_no_adapter_holds_is_listed(tmp_path):
    net = tuned("blocks.0.up", "blocks.0.down", "embed_tokens", "lm_head")
    with torch.no_grad():
        net.blocks[1]["up"].bias += 1
    state = net.state_dict() | {"new.weight": torch.ones(3, 3), "blocks.1.down.bias": torch.zeros(2)}
    base = Net().state_dict() | {"old.weight": torch.ones(3, 3)}
    found = extract_adapter(base, state, tmp_path / "out", 4, target_modules=["0.up"], progress=False)
    assert [layer.name for layer in found.layers] == ["blocks.0.up"]
    other = "not among the target modules"
    assert found.left == {
        "old.weight": "not in the tuned model",
        "embed_tokens.weight": other,
        "blocks.0.down.weight": other,
        "blocks.1.up.bias": "no matrix",
        "blocks.1.down.bias": "(72,) in the base, (2,) in the tuned model",
        "lm_head.weight": other,
        "new.weight": "not in the base",
    }
    found = extract_adapter(base, state, tmp_path / "more", 4, progress=False)
    assert [layer.name for layer in found.layers] == ["blocks.0.up", "blocks.0.down"]
    assert found.left["lm_head.weight"] == found.left["embed_tokens.weight"] == other


def test_weights_of_two_dtypes(tmp_path):
    nets = Net().bfloat16(), Net().bfloat16().float()
    weight = nets[1].blocks[0]["up"].weight
    with torch.no_grad():
        weight += low_rank(2, N, K, 0)
    found = extract_adapter(*nets, tmp_path / "out", 2, progress=False)
    assert [layer.name for layer in found.layers] == ["blocks.0.up"]
    assert relative_error(product(tmp_path / "out", "blocks.0.up"), low_rank(2, N, K, 0).double()) < 1e-4


def test_fastlora_loads_it(tmp_path):
    base, net = Net(), tuned("blocks.0.up", "blocks.1.up")
    extract_adapter(base, net, tmp_path / "out", 4, progress=False)
    fastlora.convert(base, rank=0, progress=False)
    fastlora.load_adapter(base, tmp_path / "out", name="tuned")
    layer = base.blocks[1]["up"]
    quantised = layer.dequantize()
    layer.set_adapter("tuned")
    want = net.blocks[1]["up"].weight - Net().blocks[1]["up"].weight
    torch.testing.assert_close(layer.merged_weight() - quantised, want, rtol=1e-3, atol=1e-4)


def test_peft_loads_it_and_gives_the_tuned_models_logits(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    import hf_models

    hf_models.saved("qwen2", tmp_path / "base", max_shard_size="60KB")
    model = hf_models.make("qwen2")
    with torch.no_grad():
        for seed, (name, p) in enumerate(model.named_parameters()):
            if name.endswith(("q_proj.weight", "down_proj.weight")):
                p.add_(low_rank(4, *p.shape, seed))
    model.save_pretrained(tmp_path / "tuned", max_shard_size="50KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    found = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", 4, progress=False)
    assert len(found.layers) == 4
    dense = hf_models.load(tmp_path / "base")
    ids = hf_models.ids()
    with torch.no_grad():
        want, before = model(ids).logits, dense(ids).logits
        got = peft.PeftModel.from_pretrained(dense, tmp_path / "out")(ids).logits
    assert (before - want).norm() > 0.1 * want.norm()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


# --- the command ------------------------------------------------------------------------------------------


def run(*args, code=0):
    result = runner.invoke(cli.app, ["extract", *map(str, args)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


def folders(tmp_path):
    net = tuned("blocks.0.up", "blocks.1.down")
    with torch.no_grad():
        net.blocks[0]["up"].bias += 1
    return sharded(tmp_path / "base", Net()), sharded(tmp_path / "tuned", net)


def test_the_command(tmp_path):
    given = folders(tmp_path)
    text = run(*given, tmp_path / "one", "--rank", 2).stdout
    found = json.loads(run(*given, tmp_path / "two", "--rank", 2, "--json").stdout)
    want = extract_adapter(*given, tmp_path / "three", 2, progress=False)
    names = ["adapter_model.safetensors", "adapter_config.json"]
    for name in names:
        contents = {(tmp_path / out / name).read_bytes() for out in ("one", "two", "three")}
        assert len(contents) == 1
    assert found["layers"] == [vars(layer) for layer in want.layers]
    assert found["left"] == {"blocks.0.up.bias": "no matrix"}
    assert found["destination"] == str(tmp_path / "two")
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "rank", "change", "/", "weight", "left", "/", "change"]
    first = want.layers[0]
    assert lines[1].split() == ["blocks.0.up", "2", f"{first.change:.2e}", f"{first.error:.2e}"]
    assert f"{tmp_path / 'one'}: an adapter of 2 layers" in text
    assert "  not in it: blocks.0.up.bias: no matrix" in text
    found = json.loads(run(*given, tmp_path / "x", "--target", "1.down", "--niter", "4", "--json").stdout)
    assert [layer["name"] for layer in found["layers"]] == ["blocks.1.down"]
    assert found["layers"][0]["rank"] == 16
    assert found["left"]["blocks.0.up.weight"] == "not among the target modules"


def test_a_terminal_has_a_bar_on_stderr(tmp_path, monkeypatch):
    given = folders(tmp_path)
    assert "extracting" not in run(*given, tmp_path / "one", "--json").stderr
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = run(*given, tmp_path / "two", "--json")
    assert "extracting" in result.stderr
    json.loads(result.stdout)


def refused(args, message, options=()):
    out = args[2]
    was = out.exists()
    result = run(*args, *options, code=2)
    assert message in result.stderr
    assert result.stderr.startswith("fastlora: ")
    assert result.stderr.count("\n") == 1
    assert not result.stdout
    assert out.exists() == was


def test_what_is_refused(tmp_path):
    base, changed = folders(tmp_path)
    out = tmp_path / "out"
    refused((tmp_path / "no", changed, out), "expected a model's folder, got")
    refused((base, base, out), "expected layers that changed, got 4 that are the same in both")
    refused((base, changed, out), "expected rank as an int >= 1, got 0", ["--rank", "0"])
    refused((base, changed, out), "expected niter >= 1 or none, got 0", ["--niter", "0"])
    refused((base, changed, out), "names of the model's layers, got ['x_proj']", ["--target", "x_proj"])
    refused((base, changed, base), "expected a new folder to write, got")
    other = Net()
    other.blocks[0]["up"] = nn.Linear(K, 7)
    wide = sharded(tmp_path / "wide", other)
    refused((base, wide, out), "of the same layers, got blocks.0.up.weight (40, 72) and (7, 72)")
    broken = tuned("blocks.0.up")
    with torch.no_grad():
        broken.blocks[0]["up"].weight[0, 0] = float("nan")
    refused(
        (base, sharded(tmp_path / "nan", broken), out), "finite weights, got NaN or Inf in blocks.0.up.weight"
    )
    gpt2 = sharded(tmp_path / "gpt2", Net(), {"model_type": "gpt2"})
    refused((base, gpt2, out), "expected a model of linear layers, got 'gpt2', whose weights are transposed")
    packed = sharded(tmp_path / "packed", Net(), {"quantization_config": {"quant_method": "fastlora"}})
    refused((packed, changed, out), "expected a dense model, got one quantised by 'fastlora'")
    (base / "model-1.safetensors").unlink()
    refused((base, changed, out), "got no model-1.safetensors")
    with pytest.raises(ValueError, match="expected target_modules as a list, got 'up'"):
        extract_adapter(Net(), Net(), out, 2, target_modules="up")
    with pytest.raises(ValueError, match="of the same layers, got none that both have"):
        extract_adapter({"a.weight": torch.ones(2, 2)}, {"b.weight": torch.ones(2, 2)}, out, 2)
    with pytest.raises(FileNotFoundError, match="expected a safetensors file or a folder of such, got"):
        extract_adapter(tmp_path / "no.safetensors", Net(), out, 2)
