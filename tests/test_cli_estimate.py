"""fastlora estimate: counts against real models, and the numbers of the papers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fastlora
from fastlora import cli
from fastlora.commands import memory_model, model_sizes

runner = CliRunner()


def run(*args: object, code: int = 0) -> Any:
    result = runner.invoke(cli.app, ["estimate", *map(str, args)], env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    return result


def facts(*args: object) -> dict[str, Any]:
    return json.loads(run(*args, "--json").stdout)


def by_method(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in found["methods"]}


# --- the papers' numbers ----------------------------------------------------------------------------------


def test_one_layer_of_8192_by_8192() -> None:
    found = facts("--shape", "8192x8192", "--rank", 8)
    assert found["weights"] == 67_108_864
    assert found["trainable"] == 131_072
    assert "67,108,864 weights" in run("--shape", "8192x8192", "--rank", 8).stdout


def test_65_billion_weights_fit_48_gigabytes_with_qlora_alone() -> None:
    found = facts("--params", "65B", "--gpu-memory", "48GB", "--tokens", 512)
    assert {name: row["fits"] for name, row in by_method(found).items()} == {
        "full fine-tuning": False, "LoRA": False, "QLoRA": True, "QLoRA, paged": True,
    }  # fmt: skip
    full = by_method(facts("--params", "65B"))["full fine-tuning"]
    assert full["total"] == 780_000_000_000  # what the QLoRA paper counts


def test_gpt_3_trains_ten_thousand_times_fewer_weights() -> None:
    found = facts("--params", "175B", "--rank", 4, "--targets", "q_proj,v_proj")
    assert found["trainable"] == 96 * 2 * 4 * 2 * 12288  # 96 layers of 12288 features, as GPT-3 has
    assert 9_000 < found["fewer_trainable"] < 11_000


def test_qlora_takes_a_quarter_of_lora() -> None:
    rows = by_method(facts("--params", "65B", "--rank", 4))
    assert 3.6 < rows["LoRA"]["total"] / rows["QLoRA"]["total"] < 4


# --- against real things ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(64, 64), (5, 123), (1000, 4096)])
def test_bytes_of_nf4_are_those_of_a_packed_weight(n: int, k: int) -> None:
    assert memory_model.nf4_bytes(n, k) == fastlora.quantize_nf4(torch.randn(n, k)).nbytes


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 24},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2},
    "gpt_neox": {},
    "gpt2": {},
}


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_and_bytes_are_those_of_a_model(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind = family.partition("-")[0]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    if kind == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 32}
    config = transformers.AutoConfig.for_model(kind, vocab_size=96, **sizes, **CONFIGS[family])
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    found = facts(tmp_path, "--rank", 4)
    assert found == facts(tmp_path / "config.json", "--rank", 4) | {"model": str(tmp_path)}
    assert found["weights"] == model.num_parameters()
    if kind != "gpt2":  # whose layers are no torch.nn.Linear
        report = fastlora.convert(model, rank=4, skip_modules=["lm_head", "embed_out"], progress=False)
        assert found["trainable"] == report.trainable
        row = by_method(found)["QLoRA"]
        buffers = {b.data_ptr(): b.nbytes for b in model.buffers()}
        parameters = {id(p): p.nbytes for p in model.parameters()}
        assert row["weights"] == sum(parameters.values()), buffers
        assert row["gradients"] == 4 * report.trainable
        assert row["optimizer"] == 8 * report.trainable


def test_paging_moves_the_states_to_the_host() -> None:
    rows = by_method(facts("--params", "7B"))
    assert rows["QLoRA, paged"]["host"] == rows["QLoRA"]["optimizer"] > 0
    assert rows["QLoRA, paged"]["total"] == rows["QLoRA"]["total"] - rows["QLoRA"]["optimizer"]


def test_activations_by_the_formula() -> None:
    without, counted = facts("--params", "7B"), facts("--params", "7B", "--tokens", 100)
    sizes = model_sizes.of_count(7_000_000_000)
    live = 2 * (4 * 2 + 2 * 5) * sizes.hidden
    want = 100 * (2 * sizes.hidden * sizes.layers + live + 10 * sizes.vocab)
    for before, after in zip(without["methods"], counted["methods"], strict=True):
        assert (before["activations"], after["activations"]) == (0, want)
        assert after["total"] - before["total"] == want
    assert "Activations are not counted" in run("--params", "7B").stdout
    assert "those of 100 tokens" in run("--params", "7B", "--tokens", 100).stdout


# --- what is shown ----------------------------------------------------------------------------------------


def test_the_table_and_the_bars() -> None:
    text = run("--params", "65B", "--gpu-memory", "48GB").stdout
    table = {line[:18].strip(): line for line in text.splitlines() if " GB" in line}
    assert "780.0 GB" in table["full fine-tuning"]
    bars = {
        line[:18].strip(): line.count("█") for line in text.splitlines() if "█" in line and line[0] != " "
    }
    assert bars["full fine-tuning"] > bars["QLoRA"] > 0
    assert text.count("fits") == 2
    assert "\x1b" not in text


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run("--params", "65B", "--gpu-memory", "48GiB", "--plot", tmp_path / "memory.png")
    assert [p.name for p in tmp_path.iterdir()] == ["memory.png"]
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("--params", "65B", "--plot", tmp_path / "memory.png", code=2)
    assert result.stderr == "fastlora: --plot: expected matplotlib, got none; pip install 'matplotlib>=3.8'\n"
    assert not list(tmp_path.iterdir())


# --- what is wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected one of MODEL_CONFIG, --params and --shape"),
        (["--params", "7B", "--shape", "2x2"], "expected one of MODEL_CONFIG, --params and --shape"),
        (["--params", "many"], "--params: expected a number of weights as 65B or 350M, got 'many'"),
        (["--params", "0"], "--params: expected a number of weights"),
        (["--params", "1000"], "expected a model of a million weights at least, got 1000"),
        (["--shape", "8192"], "--shape: expected out x in as 8192x8192, got '8192'"),
        (["--params", "7B", "--gpu-memory", "big"], "--gpu-memory: expected a size as 48GB or 48GiB"),
        (["--params", "7B", "--targets", "c_attn"], "--targets: expected names of q_proj, "),
        (["--params", "7B", "--plot", "no/such/folder/a.png"], "--plot: expected a file in a folder"),
        (["no/such/folder"], "expected a config.json or a folder with one, got no/such/folder"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line_and_code_2(args: list[str], message: str) -> None:
    result = run(*args, code=2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON in"),
        ("[]", "expected model_type llama, mistral, qwen2, qwen3, gpt2, gpt_neox in"),
        ('{"model_type": "mamba"}', "got 'mamba'"),
        ('{"model_type": "llama", "hidden_size": 64}', "expected intermediate_size in"),
        ('{"model_type": "gpt2", "n_embd": "wide", "n_layer": 2}', "expected numbers for sizes in"),
    ],
)
def test_bad_configs(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    result = run(tmp_path, code=2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_size_in_both_kinds_of_units() -> None:
    assert facts("--params", "7B", "--gpu-memory", "48GB")["gpu_memory"] == 48 * 10**9
    assert facts("--params", "7B", "--gpu-memory", "48 GiB")["gpu_memory"] == 48 * 2**30
