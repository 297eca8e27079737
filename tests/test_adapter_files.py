"""Adapter files: PEFT reads ours, we read PEFT's, and a misfit or a crash changes nothing."""

import copy
import json
import os

import pytest
import safetensors.torch
import torch
from torch import nn

import fastlora
from fastlora import QLinear, adapter_files

peft = pytest.importorskip("peft", reason="PEFT is the other side of these files")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(64, 48), nn.Linear(64, 48, bias=False)
        self.down = nn.Linear(48, 64)

    def forward(self, x):
        return x + self.down(torch.tanh(self.q_proj(x)) * self.v_proj(x))


class Model(nn.Module):
    """Two stacks, so that one name occurs in places that are adapted and in places that are not."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.vision = nn.ModuleList(Block() for _ in range(1))

    def forward(self, x):
        for layer in (*self.layers, *self.vision):
            x = layer(x)
        return x


def converted(targets=("q_proj", "v_proj"), **kwargs):
    """(our model, the dense model over the same, dequantised weights), with adapters that do something."""
    torch.manual_seed(0)
    dense = Model().eval()
    ours = copy.deepcopy(dense)
    fastlora.convert(ours, targets, skip_modules=("vision",), progress=False, **kwargs)
    randomise(ours)
    for name, layer in ours.named_modules():
        if isinstance(layer, QLinear):
            dense.get_submodule(name).weight.data.copy_(layer.dequantize())
    return ours, dense


def randomise(model):
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.2)


def bits(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def x():
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"rank": 4, "alpha": 8},
        {"rank": 7, "alpha": 16, "use_rslora": True, "dropout": 0.1},
        {"rank": 2, "alpha": 0.5, "adapter_dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_peft_loads_what_we_save(tmp_path, x, kwargs):
    ours, dense = converted(**kwargs)
    fastlora.save_adapter(ours, tmp_path)
    assert not torch.allclose(ours(x), dense(x), atol=1e-2)  # the adapter says something
    theirs = peft.PeftModel.from_pretrained(dense, str(tmp_path)).eval()
    torch.testing.assert_close(
        theirs(x), ours(x), rtol=2e-2 if "adapter_dtype" in kwargs else 1e-4, atol=1e-3
    )
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (
        kwargs["rank"], kwargs["alpha"], kwargs.get("use_rslora", False),
    )  # fmt: skip
    assert config.lora_dropout == kwargs.get("dropout", 0.0)


def test_layers_of_different_rank_and_alpha(tmp_path, x):
    torch.manual_seed(0)
    ours, dense = converted(["q_proj"], rank=4, alpha=8)
    fastlora.convert(ours, ["layers.1.down"], rank=2, alpha=6, use_rslora=True, progress=False)
    dense.layers[1].down.weight.data.copy_(ours.layers[1].down.dequantize())
    randomise(ours)
    fastlora.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(dense), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-4)
    want = ours(x)
    scalings = [m.scaling for m in ours.modules() if isinstance(m, QLinear)]
    for layer in (m for m in ours.modules() if isinstance(m, QLinear)):
        layer.reset_adapter()
        layer.set_alpha(1)
    fastlora.load_adapter(ours, tmp_path)
    assert [m.scaling for m in ours.modules() if isinstance(m, QLinear)] == pytest.approx(scalings)
    torch.testing.assert_close(ours(x), want)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_load_what_peft_saves(tmp_path, x, use_rslora):
    ours, dense = converted(rank=4, alpha=1)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        use_rslora=use_rslora,
        target_modules=r"layers\..*\.(q_proj|v_proj)",
        alpha_pattern={r"1\.v_proj": 20},
    )
    theirs = peft.get_peft_model(dense, config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    fastlora.load_adapter(ours, tmp_path)
    divisor = 2 if use_rslora else 4
    assert ours.layers[0].q_proj.scaling == 12 / divisor
    assert ours.layers[1].v_proj.scaling == 20 / divisor
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_a_transformers_model(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    ours = copy.deepcopy(dense)
    report = fastlora.convert(ours, rank=4, progress=False)
    assert len(report.converted) == 14
    randomise(ours)
    for c in report.converted:
        dense.get_submodule(c.name).weight.data.copy_(ours.get_submodule(c.name).dequantize())
    fastlora.save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    theirs = peft.PeftModel.from_pretrained(dense, str(tmp_path)).eval()
    ids = torch.randint(60, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-3, atol=1e-3)


def test_round_trip_is_bit_exact_and_leaves_two_files(tmp_path):
    ours, _ = converted(rank=3)
    want = bits(ours)
    fastlora.save_adapter(ours, tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    randomise(ours)
    assert not same(bits(ours), want)
    fastlora.load_adapter(ours, tmp_path / "new" / "folder")
    assert same(bits(ours), want)


def test_a_name_that_ends_another_keeps_its_own_rank_and_alpha(tmp_path):
    """PEFT's patterns match the end of a path: the outer layer's must not reach the inner one's."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Linear(64, 64)
            self.z = Block()

        def forward(self, x):
            return self.z(self.down(x))

    torch.manual_seed(0)
    dense = Outer().eval()
    ours, x = copy.deepcopy(dense), torch.randn(3, 64)
    fastlora.convert(ours, "down", rank=2, alpha=5, progress=False)
    fastlora.convert(ours, ["z.down", "q_proj"], rank=8, alpha=8, progress=False)
    randomise(ours)
    for name, layer in ours.named_modules():
        if isinstance(layer, QLinear):
            dense.get_submodule(name).weight.data.copy_(layer.dequantize())
    fastlora.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(dense, str(tmp_path)).eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    fastlora.load_adapter(ours, tmp_path)
    assert (ours.down.scaling, ours.z.down.scaling) == (2.5, 1.0)


def test_compiled_parts_leave_no_trace_in_the_file(tmp_path):
    """torch.compile renames what it wraps; the adapter still fits the model as it was."""
    ours, _ = converted(rank=3)
    want = bits(ours)
    ours.layers[0].q_proj = torch.compile(ours.layers[0].q_proj)
    ours.layers[1] = torch.compile(ours.layers[1])
    fastlora.save_adapter(torch.compile(ours), tmp_path)
    plain, _ = converted(rank=3)
    randomise(plain)
    fastlora.load_adapter(plain, tmp_path)
    assert same(bits(plain), want)
    randomise(ours)
    fastlora.load_adapter(ours, tmp_path)
    assert torch.equal(ours.layers[0].q_proj._orig_mod.lora_A, plain.layers[0].q_proj.lora_A)


def test_the_file_has_pefts_keys(tmp_path):
    ours, _ = converted(rank=3, alpha=6)
    fastlora.save_adapter(ours, tmp_path, task_type="FEATURE_EXTRACTION", base_model="some/model")
    keys = set(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors"))
    assert keys == {
        f"base_model.model.layers.{i}.{n}.lora_{x}.weight"
        for i in range(2)
        for n in ("q_proj", "v_proj")
        for x in "AB"
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    # The bare name would reach into `vision`, which has no adapter.
    assert config["target_modules"] == [f"layers.{i}.{n}" for n in ("q_proj", "v_proj") for i in range(2)]
    assert (config["peft_type"], config["task_type"]) == ("LORA", "FEATURE_EXTRACTION")
    assert config["base_model_name_or_path"] == "some/model"
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    whole = Model()
    fastlora.convert(whole, ["q_proj"], progress=False)
    fastlora.save_adapter(whole, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]


def test_a_compiled_model_saves_the_same_names(tmp_path):
    ours, _ = converted(rank=3)
    fastlora.save_adapter(torch.compile(ours), tmp_path)
    assert all(
        "_orig_mod" not in key for key in safetensors.torch.load_file(tmp_path / adapter_files.WEIGHTS_NAME)
    )
    fastlora.load_adapter(torch.compile(ours), tmp_path)


def test_a_misfit_lists_everything_and_changes_nothing(tmp_path):
    ours, _ = converted(rank=3, alpha=6)
    fastlora.save_adapter(ours, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / adapter_files.WEIGHTS_NAME)
    stem = "base_model.model.layers"
    del tensors[f"{stem}.0.q_proj.lora_A.weight"]
    tensors[f"{stem}.1.q_proj.lora_B.weight"] = torch.zeros(48, 5)
    tensors[f"{stem}.0.down.lora_magnitude_vector"] = torch.zeros(64)
    safetensors.torch.save_file(tensors, tmp_path / adapter_files.WEIGHTS_NAME)
    randomise(ours)
    before = bits(ours)
    with pytest.raises(ValueError, match="to fit the model, got") as caught:
        fastlora.load_adapter(ours, tmp_path)
    text = str(caught.value)
    assert f"1 missing from the file:\n    {stem}.0.q_proj.lora_A.weight" in text
    assert f"1 unexpected in the file:\n    {stem}.0.down.lora_magnitude_vector" in text
    assert f"1 of the wrong shape:\n    {stem}.1.q_proj.lora_B.weight: expected (48, 3), got (48, 5)" in text
    assert same(bits(ours), before)
    assert ours.layers[0].q_proj.scaling == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "ADALORA"}, "expected peft_type LORA .*got 'ADALORA'"),
        ({"use_dora": True}, "expected a plain LoRA adapter, got use_dora=True"),
        ({"lora_alpha": None}, "expected a number lora_alpha .*got None"),
    ],
    ids=str,
)
def test_other_kinds_of_adapter_are_refused(tmp_path, change, message):
    ours, _ = converted(rank=3)
    fastlora.save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    before = bits(ours)
    with pytest.raises(ValueError, match=f"load_adapter: {message}"):
        fastlora.load_adapter(ours, tmp_path)
    assert same(bits(ours), before)


def test_what_else_is_refused(tmp_path):
    ours, dense = converted(rank=3)
    with pytest.raises(ValueError, match="save_adapter: expected a model with QLinear layers of rank > 0"):
        fastlora.save_adapter(dense, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected adapter_config\.json in"):
        fastlora.load_adapter(ours, tmp_path)
    fastlora.save_adapter(ours, tmp_path)
    ours.eval().layers[0].q_proj.merge()
    with pytest.raises(
        RuntimeError, match=r"expected unmerged layers, got 1 that are not: layers\.0\.q_proj"
    ):
        fastlora.load_adapter(ours, tmp_path)
    with pytest.raises(RuntimeError, match="expected materialised layers"):
        fastlora.load_adapter(converted(rank=3)[0].to("meta"), tmp_path)
    (tmp_path / adapter_files.WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected adapter_model\.safetensors in"):
        fastlora.load_adapter(ours, tmp_path)
    (tmp_path / "adapter_config.json").write_text("[1")
    with pytest.raises(ValueError, match="load_adapter: expected JSON in"):
        fastlora.load_adapter(ours, tmp_path)


@pytest.mark.parametrize("when", ["first write", "second write", "flush"])
def test_a_failed_save_leaves_the_old_files_whole(tmp_path, monkeypatch, when):
    ours, _ = converted(rank=3)
    fastlora.save_adapter(ours, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    randomise(ours)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    def half(tensors, to, **kwargs):
        to.write_bytes(b"half")
        fail()

    if when == "first write":
        monkeypatch.setattr(safetensors.torch, "save_file", half)
    elif when == "second write":
        monkeypatch.setattr("pathlib.Path.write_text", fail)
    else:
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        fastlora.save_adapter(ours, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


# --- several adapters in one model ----------------------------------------------------------------------


def three_files(folder, dense):
    """Three directories as stock PEFT writes them: other layers, ranks, alphas and dtypes in each."""
    configs = {
        "one": peft.LoraConfig(r=4, lora_alpha=8, target_modules=r"layers\..*\.(q_proj|v_proj)"),
        "two": peft.LoraConfig(
            r=6, lora_alpha=3, use_rslora=True, target_modules=r"layers\..*\.(q_proj|down)", lora_dropout=0.1,
            rank_pattern={r"1\.down": 9}, alpha_pattern={r"0\.q_proj": 20},
        ),
        "three": peft.LoraConfig(r=1, lora_alpha=2, target_modules=["layers.1.v_proj"]),
    }  # fmt: skip
    model = copy.deepcopy(dense)
    for i, (name, config) in enumerate(configs.items()):
        if i:
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name)
    randomise(model)
    for name, p in model.named_parameters():
        if ".two." in name:
            p.data = p.data.bfloat16()
    model.save_pretrained(folder)  # a subfolder for each, as none is called "default"
    return model.float().eval()


def base_only():
    ours, dense = converted(("q_proj", "v_proj", "down"), rank=0)
    return ours, dense


@pytest.mark.parametrize("rank", [0, 5], ids=["base", "own_adapter"])
def test_several_peft_adapters_in_one_model(tmp_path, x, rank):
    ours, dense = converted(("q_proj", "v_proj", "down"), rank=rank)
    theirs = three_files(tmp_path, dense)
    names = ("one", "two", "three")
    for name in names:
        fastlora.load_adapter(ours, tmp_path / name, name=name)
    assert ours.layers[0].q_proj.adapter_names == (("default",) if rank else ()) + ("one", "two")
    assert ours.layers[1].down.adapter("two").rank == 9
    assert ours.layers[0].q_proj.adapter("two").scaling == pytest.approx(20 / 6**0.5)
    assert ours.layers[1].down.adapter("two").dropout == 0.1
    assert ours.vision[0].q_proj.__class__ is nn.Linear
    rows = ["two", "one", None, "three", "two"]
    with torch.no_grad():
        with fastlora.adapters(ours, rows):
            mixed = ours(x)
        adapter_names = ["__base__" if name is None else name for name in rows]
        torch.testing.assert_close(mixed, theirs(x, adapter_names=adapter_names), rtol=1e-4, atol=1e-4)
        for i, name in enumerate(rows):
            if name is None:
                continue
            theirs.set_adapter(name)
            torch.testing.assert_close(mixed[i : i + 1], theirs(x[i : i + 1]), rtol=1e-4, atol=1e-4)


def test_each_is_saved_as_it_was_and_stock_peft_loads_it(tmp_path, x):
    ours, dense = base_only()
    three_files(tmp_path / "peft", dense)
    for name in ("one", "two", "three"):
        fastlora.load_adapter(ours, tmp_path / "peft" / name, name=name)
        fastlora.save_adapter(ours, tmp_path / "ours" / name, name=name)
        before, after = (
            safetensors.torch.load_file(tmp_path / who / name / adapter_files.WEIGHTS_NAME)
            for who in ("peft", "ours")
        )
        assert before.keys() == after.keys()
        for key, t in before.items():
            assert (after[key].dtype, after[key].shape) == (t.dtype, t.shape), key
            assert torch.equal(after[key], t), key
    again, plain = None, copy.deepcopy(dense)
    for name in ("one", "two", "three"):
        if again is None:
            again = peft.PeftModel.from_pretrained(plain, str(tmp_path / "ours" / name), adapter_name=name)
        else:
            again.load_adapter(str(tmp_path / "ours" / name), name)
    again = again.float().eval()
    assert again.peft_config["two"].lora_dropout == 0.1
    rows = ["two", "one", None, "three", "two"]
    adapter_names = ["__base__" if name is None else name for name in rows]
    with torch.no_grad(), fastlora.adapters(ours, rows):
        torch.testing.assert_close(again(x, adapter_names=adapter_names), ours(x), rtol=1e-4, atol=1e-4)


def test_what_has_been_trained_is_saved_in_the_dtype_it_needs(tmp_path):
    ours, dense = base_only()
    three_files(tmp_path, dense)
    fastlora.load_adapter(ours, tmp_path / "two", name="two")
    with torch.no_grad():
        ours.layers[0].down.adapter("two").lora_A[0, 0] += 1e-6
    fastlora.save_adapter(ours, tmp_path / "new", name="two")
    saved = safetensors.torch.load_file(tmp_path / "new" / adapter_files.WEIGHTS_NAME)
    wide = {key for key, t in saved.items() if t.dtype == torch.float32}
    assert wide == {"base_model.model.layers.0.down.lora_A.weight"}
    assert torch.equal(saved[wide.pop()], ours.layers[0].down.adapter("two").lora_A)


def test_loading_under_a_name_that_is_there_swaps_in_place(tmp_path, x):
    ours, _ = converted(rank=3, alpha=6)
    fastlora.save_adapter(ours, tmp_path / "default")
    fastlora.load_adapter(ours, tmp_path / "default", name="copy")
    layer = ours.layers[0].q_proj
    held = layer.adapter("copy").lora_A
    with torch.no_grad(), fastlora.adapters(ours, ["copy"] * 5):
        torch.testing.assert_close(ours(x), converted(rank=3, alpha=6)[0](x))
        other, _ = converted(rank=7, alpha=2)
        fastlora.save_adapter(other, tmp_path / "other")
        fastlora.load_adapter(ours, tmp_path / "other", name="copy")
        torch.testing.assert_close(ours(x), other(x))
    assert layer.adapter("copy").lora_A is held
    assert layer.adapter("copy")[2:4] == (7, 2)
    fastlora.save_adapter(ours, tmp_path / "back", name="copy")
    assert (tmp_path / "back" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "other" / "adapter_model.safetensors"
    ).read_bytes()
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["target_modules"] == [
        f"layers.{i}.{n}" for n in ("q_proj", "v_proj") for i in range(2)
    ]


def test_named_adapters_that_do_not_fit_change_nothing(tmp_path):
    ours, dense = converted(rank=3)
    with pytest.raises(ValueError, match=r"expected a model with an adapter 'x', got \['default'\]"):
        fastlora.save_adapter(ours, tmp_path, name="x")
    three_files(tmp_path, dense)
    fastlora.load_adapter(ours, tmp_path / "three", name="x")
    before = bits(ours)
    stem = "base_model.model.layers"
    with pytest.raises(ValueError, match="to fit the model, got") as caught:  # "down" is no QLinear here
        fastlora.load_adapter(ours, tmp_path / "two", name="y")
    assert f"{stem}.0.down.lora_A.weight" in str(caught.value)
    assert same(bits(ours), before)
    fastlora.load_adapter(ours, tmp_path / "one", name="x")
    before = bits(ours)
    with pytest.raises(ValueError, match="6 missing from the file"):  # three other layers have "x" now
        fastlora.load_adapter(ours, tmp_path / "three", name="x")
    assert same(bits(ours), before)
    tensors = safetensors.torch.load_file(tmp_path / "one" / adapter_files.WEIGHTS_NAME)
    del tensors[f"{stem}.0.q_proj.lora_B.weight"]
    tensors[f"{stem}.1.q_proj.lora_A.weight"] = torch.zeros(2, 3)
    safetensors.torch.save_file(tensors, tmp_path / "one" / adapter_files.WEIGHTS_NAME)
    with pytest.raises(ValueError, match="1 missing from the file") as caught:
        fastlora.load_adapter(ours, tmp_path / "one", name="z")
    assert f"{stem}.1.q_proj.lora_A.weight: expected (2, 64), got (2, 3)" in str(caught.value)
    assert all(
        "y" not in m.adapter_names and "z" not in m.adapter_names
        for m in ours.modules()
        if isinstance(m, QLinear)
    )
    ours.eval().layers[1].v_proj.merge()
    with pytest.raises(
        RuntimeError, match=r"expected unmerged layers, got 1 that are not: layers\.1\.v_proj"
    ):
        fastlora.load_adapter(ours, tmp_path / "three", name="w")
