"""fastlora quantize: what transformers gives, shard by shard, killed and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_models
import pytest
import safetensors.torch
import torch
from hf_models import load, same_bits, saved
from typer.testing import CliRunner

from fastlora import FastLoraConfig, QLinear, cli
from fastlora.commands import shard_run
from fastlora.commands.quantize import quantize_folder
from fastlora.integrations import transformers_hook, transformers_shards

transformers = hf_models.transformers
runner = CliRunner()
FAMILIES = ("llama", "qwen2", "qwen3", "mixtral", "gpt_oss")


def run(*args: object, code: int = 0) -> Any:
    result = runner.invoke(cli.app, ["quantize", *map(str, args)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for p in folder.glob("*.safetensors") for k, t in safetensors.torch.load_file(p).items()}


def same_tensors(one: Path, other: Path) -> None:
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys()
    for key, t in mine.items():
        assert t.dtype == theirs[key].dtype, key
        assert torch.equal(t.view(torch.uint8), theirs[key].view(torch.uint8)), key


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in bfloat16, each in several files; experts lie in more than one."""
    root = tmp_path_factory.mktemp("dense")
    for family in FAMILIES:
        saved(family, root / family, torch.bfloat16, max_shard_size="60KB")
        (root / family / "tokenizer.json").write_text("{}")
    return {family: root / family for family in FAMILIES}


# --- what comes out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_transformers_gives(dense: dict[str, Path], tmp_path: Path, family: str) -> None:
    result = json.loads(run(dense[family], tmp_path / "out", "--json").stdout)
    reference = load(dense[family], quantization_config=FastLoraConfig())
    reference.save_pretrained(tmp_path / "reference")
    same_tensors(tmp_path / "out", tmp_path / "reference")
    again = load(tmp_path / "out")
    same_bits(again, reference)
    assert again.config.quantization_config == FastLoraConfig()
    report = reference.hf_quantizer.report
    assert result["quantized"] == [layer.name for layer in report.converted]
    assert result["dense"] == {layer.name: layer.reason for layer in report.skipped}
    assert result["bytes_after"] == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == result["shards"] > 1
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not list((tmp_path / "out").glob(".*"))


def test_options_and_a_single_file(tmp_path: Path) -> None:
    saved("llama", tmp_path / "dense", torch.float32)
    options = ["--blocksize", 128, "--no-double-quant", "--skip", "lm_head", "--skip", "v_proj"]
    text = run(tmp_path / "dense", tmp_path / "out", *options).stdout
    assert "12 layers in NF4" in text
    assert "dense: model.layers.1.self_attn.v_proj: in skip_modules (v_proj)" in text
    config = FastLoraConfig(blocksize=128, double_quant=False, skip_modules=["lm_head", "v_proj"])
    load(tmp_path / "dense", quantization_config=config).save_pretrained(tmp_path / "reference")
    same_tensors(tmp_path / "out", tmp_path / "reference")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "dense").iterdir()}
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert FastLoraConfig.from_dict(stored["quantization_config"]) == config
    assert stored["dtype"] == "float32"


def test_experts_that_stay_dense_are_saved_as_the_files_had_them(
    dense: dict[str, Path], tmp_path: Path
) -> None:
    run(dense["mixtral"], tmp_path / "out", "--skip", "experts")
    config = FastLoraConfig(skip_modules=["experts"])
    load(dense["mixtral"], quantization_config=config).save_pretrained(tmp_path / "reference")
    same_tensors(tmp_path / "out", tmp_path / "reference")
    assert any(".experts.2." in key for key in tensors_of(tmp_path / "out"))


def test_tied_weights_that_are_in_the_files_twice(dense: dict[str, Path], tmp_path: Path) -> None:
    for name, change in (("same", 0.0), ("other", 1.0)):
        model = load(dense["qwen2"])
        folder = tmp_path / name
        model.save_pretrained(folder)
        tensors = tensors_of(folder)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        run(folder, tmp_path / f"{name}-out")
        reference = load(folder, quantization_config=FastLoraConfig())
        reference.save_pretrained(tmp_path / f"{name}-reference")
        same_tensors(tmp_path / f"{name}-out", tmp_path / f"{name}-reference")


def test_memory_holds_one_shard(
    dense: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizers = []
    quantize = transformers_shards.PieceQuantizer.quantize

    def watched(self: Any, piece: Any) -> Any:
        made = quantize(self, piece)
        quantizers.append(self)
        assert all(t.is_meta for t in self._model.state_dict().values())
        return made

    monkeypatch.setattr(transformers_shards.PieceQuantizer, "quantize", watched)
    run(dense["mixtral"], tmp_path / "out")
    assert len(quantizers) == len(quantizers[0].pieces)
    whole = sum(t.nbytes for t in tensors_of(tmp_path / "out").values())
    assert max(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) < whole


# --- killed and resumed -----------------------------------------------------------------------------------


class Killed(BaseException):
    """As a kill: nothing but `finally` runs."""


def test_killed_at_any_shard_and_resumed_it_gives_the_same_bytes(
    dense: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dense["mixtral"]
    shards = quantize_folder(source, tmp_path / "whole")["shards"]
    want, write = contents(tmp_path / "whole"), shard_run.ShardRun.write
    for shard in range(shards):
        left = shard

        def dies(self: Any, name: str, *rest: Any) -> None:
            nonlocal left
            if left == 0:
                (self.folder / f".{name}.tmp").write_bytes(b"half a file")
                raise Killed
            left -= 1
            write(self, name, *rest)

        out = tmp_path / f"out{shard}"
        with monkeypatch.context() as patch:
            patch.setattr(shard_run.ShardRun, "write", dies)
            with pytest.raises(Killed):
                quantize_folder(source, out)
        assert not (out / "config.json").exists()
        assert quantize_folder(source, out)["resumed"] == shard
        assert contents(out) == want


def test_a_process_that_is_killed(dense: dict[str, Path], tmp_path: Path) -> None:
    args = [str(dense["llama"]), str(tmp_path / "out")]
    code = f"""
import os, signal, sys
sys.modules['torchao'] = sys.modules['bitsandbytes'] = None  # slow to import
from fastlora import cli
replace = os.replace
def dies(source, target):
    if os.path.basename(target).startswith("model-00002"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = dies
sys.argv[1:] = ["quantize", *{args!r}]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    text = run(*args).stdout
    assert "1 of them from an earlier run" in text
    quantize_folder(dense["llama"], tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_options_do_not_go_on(
    dense: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(transformers_shards.PieceQuantizer, "quantize", dies)
        with pytest.raises(Killed):
            quantize_folder(dense["llama"], tmp_path / "out")
    refused(
        [dense["llama"], tmp_path / "out", "--blocksize", 32], "got another config; remove it to begin anew"
    )
    refused([dense["qwen2"], tmp_path / "out"], "got another source; remove it to begin anew")


# --- what is refused --------------------------------------------------------------------------------------


def refused(args: Any, message: str) -> None:
    result = run(*args, code=2)
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("fastlora: ")
    assert not result.stdout


def test_bad_paths_and_options(dense: dict[str, Path], tmp_path: Path) -> None:
    refused([tmp_path / "no", tmp_path / "out"], "expected a model's folder, got")
    refused([tmp_path, tmp_path / "out"], "expected config.json in")
    refused([dense["llama"], dense["llama"]], "expected a new folder to write")
    refused([dense["llama"], tmp_path / "out", "--blocksize", 48], "got 48")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused([tmp_path, tmp_path / "out"], "got ['pytorch_model.bin']")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_quantised_already(dense: dict[str, Path], tmp_path: Path) -> None:
    run(dense["llama"], tmp_path / "out")
    refused([tmp_path / "out", tmp_path / "twice"], "expected a dense model, got one quantised by 'fastlora'")


def test_a_weight_with_nan_leaves_nothing(dense: dict[str, Path], tmp_path: Path) -> None:
    model = load(dense["llama"])
    assert isinstance(model.model.layers[1].mlp.up_proj, torch.nn.Linear)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    refused([tmp_path / "dense", tmp_path / "out"], "model.layers.1.mlp.up_proj.weight")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_fit(dense: dict[str, Path], tmp_path: Path) -> None:
    load(dense["llama"]).save_pretrained(tmp_path / "dense")
    tensors = tensors_of(tmp_path / "dense")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    refused(
        [tmp_path / "dense", tmp_path / "out"],
        "missing from the checkpoint: model.layers.0.mlp.up_proj.weight",
    )


def test_a_class_that_transformers_lacks(dense: dict[str, Path], tmp_path: Path) -> None:
    load(dense["llama"]).save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {"architectures": ["MyModel"]}))
    refused([tmp_path / "dense", tmp_path / "out"], "to name a class of transformers")


def test_a_transformers_that_is_too_old(
    dense: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_hook.metadata, "version", lambda name: "5.22.1")
    monkeypatch.delitem(sys.modules, "fastlora.integrations.transformers_config")
    refused([dense["llama"], tmp_path / "out"], "expected transformers 5.23 or newer, got 5.22.1")


def test_a_config_with_adapters(dense: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="expected a config without adapters, got rank=4"):
        transformers_shards.PieceQuantizer(str(dense["llama"]), FastLoraConfig(rank=4))


def test_it_works_as_a_base(dense: dict[str, Path], tmp_path: Path) -> None:
    run(dense["llama"], tmp_path / "out")
    model = load(tmp_path / "out", quantization_config=FastLoraConfig(rank=4))
    assert sum(isinstance(m, QLinear) and m.rank == 4 for m in model.modules()) == 14
