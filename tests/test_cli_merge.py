"""fastlora merge: against PEFT's merge_and_unload, killed at every step, and what does not fit."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from fastlora import cli, quantize_nf4
from fastlora.commands import merge as merge_command
from fastlora.commands import shard_run
from fastlora.commands.merge import merge_folder

runner = CliRunner()
H, LAYERS = 32, 3
TEXTS = {"config.json": '{"model_type": "llama"}', "tokenizer.json": '{"vocab": 1}'}


def run(*args: object, code: int = 0) -> Any:
    result = runner.invoke(cli.app, ["merge", *map(str, args)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


def base(
    folder: Path, dtype: torch.dtype = torch.bfloat16, prefix: str = "model."
) -> dict[str, torch.Tensor]:
    """A model's files: a layer in each, an embedding in the first."""
    torch.manual_seed(3)
    folder.mkdir(parents=True)
    every: dict[str, torch.Tensor] = {}
    weight_map = {}
    for i in range(LAYERS):
        tensors = {f"{prefix}layers.{i}.{name}.weight": torch.randn(H, H).to(dtype) for name in ("q", "v")}
        tensors[f"{prefix}layers.{i}.norm.weight"] = torch.ones(H, dtype=dtype)
        if i == 0:
            tensors[f"{prefix}embed.weight"] = torch.randn(7, H).to(dtype)
        name = f"model-{i + 1:05d}-of-{LAYERS:05d}.safetensors"
        safetensors.torch.save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        every |= tensors
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return every


def adapter(
    folder: Path, extra: dict[str, torch.Tensor] | None = None, **config: Any
) -> dict[str, torch.Tensor]:
    """On q of each layer, of rank 2, but 4 in the last one."""
    torch.manual_seed(5)
    folder.mkdir(parents=True)
    tensors = dict(extra or {})
    for i in range(LAYERS):
        rank = 4 if i == LAYERS - 1 else 2
        stem = f"base_model.model.model.layers.{i}.q"
        tensors |= {
            f"{stem}.lora_A.weight": torch.randn(rank, H),
            f"{stem}.lora_B.weight": torch.randn(H, rank),
        }
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    stored = {"peft_type": "LORA", "r": 2, "lora_alpha": 3} | config
    (folder / "adapter_config.json").write_text(json.dumps(stored))
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for p in folder.glob("*.safetensors") for k, t in safetensors.torch.load_file(p).items()}


# --- the sum ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_the_sum_is_the_equations(tmp_path: Path, dtype: torch.dtype, rslora: bool) -> None:
    dense = base(tmp_path / "base", dtype)
    config = {"rank_pattern": {"layers.2.q": 4}, "alpha_pattern": {"layers.2.q": 5}, "use_rslora": rslora}
    parts = adapter(tmp_path / "adapter", **config)
    found = json.loads(run(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--json").stdout)
    out = tensors_of(tmp_path / "out")
    assert out.keys() == dense.keys()
    changes, roundings, packed = {}, {}, {}
    for key, weight in dense.items():
        if key.endswith("q.weight"):
            stem = f"base_model.model.{key.removesuffix('.weight')}"
            a, b = parts[f"{stem}.lora_A.weight"], parts[f"{stem}.lora_B.weight"]
            alpha, rank = (5, 4) if ".2." in key else (3, 2)
            change = b.double() @ a.double() * alpha / (math.sqrt(rank) if rslora else rank)
            changes[key] = (change.norm() / weight.double().norm()).item()
            wanted = weight.double() + change
            nf4 = quantize_nf4(wanted.float()).dequantize(torch.float32)
            roundings[key] = ((out[key].double() - wanted).norm() / change.norm()).item()
            packed[key] = ((nf4 - wanted).norm() / change.norm()).item()
            torch.testing.assert_close(
                out[key].double(), weight.double() + change, rtol=torch.finfo(dtype).eps, atol=4e-6
            )
        else:
            assert torch.equal(out[key], weight), key
        assert out[key].dtype == dtype
    assert found["merged"] == LAYERS
    assert found["changes"] == pytest.approx(changes, rel=1e-5)
    assert found["roundings"] == pytest.approx(roundings, rel=1e-3, abs=1e-6)
    assert found["nf4_roundings"] == pytest.approx(packed, rel=1e-4)
    assert found["largest_change"] == pytest.approx(max(changes.values()), rel=1e-5)
    assert changes[found["largest_change_at"]] == max(changes.values())


def test_it_is_what_peft_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"],
        rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"down_proj": 3}, use_rslora=True,
    )  # fmt: skip
    model = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    run(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    want = model.merge_and_unload().state_dict()
    for name, t in merged.state_dict().items():
        torch.testing.assert_close(t, want[name], rtol=1e-6, atol=1e-6)
    assert torch.equal(merged.lm_head.weight, want["lm_head.weight"])


def test_a_base_whose_keys_lack_the_models_prefix(tmp_path: Path) -> None:
    base(tmp_path / "base", prefix="")
    adapter(tmp_path / "adapter")
    run(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    base(tmp_path / "whole")
    run(tmp_path / "whole", tmp_path / "adapter", tmp_path / "other")
    assert tensors_of(tmp_path / "other")["model.layers.1.q.weight"].equal(
        tensors_of(tmp_path / "out")["layers.1.q.weight"]
    )


def test_what_is_written_beside_the_weights(tmp_path: Path) -> None:
    base(tmp_path / "base")
    adapter(tmp_path / "adapter")
    text = run(tmp_path / "base", tmp_path / "adapter", tmp_path / "new" / "out").stdout
    assert "3 weights changed, 3 files" in text
    assert "largest relative change: " in text
    assert "largest rounding as stored: " in text
    assert "largest rounding in NF4: " in text
    out = tmp_path / "new" / "out"
    assert contents(out).keys() == contents(tmp_path / "base").keys()
    assert (out / "tokenizer.json").read_text() == TEXTS["tokenizer.json"]
    assert json.loads((out / "config.json").read_text()) == json.loads(TEXTS["config.json"])
    index, was = (
        json.loads((d / "model.safetensors.index.json").read_text()) for d in (out, tmp_path / "base")
    )
    assert index["weight_map"] == was["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())


def test_an_adapter_that_learnt_nothing(tmp_path: Path) -> None:
    dense = base(tmp_path / "base")
    tensors = adapter(tmp_path / "adapter")
    nothing = {key: torch.zeros_like(t) if "lora_B" in key else t for key, t in tensors.items()}
    safetensors.torch.save_file(nothing, tmp_path / "adapter" / "adapter_model.safetensors")
    found = json.loads(run(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--json").stdout)
    assert found["largest_change"] == 0
    assert found["roundings"] == found["nf4_roundings"] == {}
    for key, t in tensors_of(tmp_path / "out").items():
        assert torch.equal(t, dense[key])


# --- killed and resumed -----------------------------------------------------------------------------------


class Killed(BaseException):
    """As a kill: nothing but `finally` runs."""


def test_killed_at_any_step_and_resumed_it_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base(tmp_path / "base")
    adapter(tmp_path / "adapter")
    args = tmp_path / "base", tmp_path / "adapter"
    monkeypatch.setattr(shard_run, "_fsync", lambda path: None)  # which takes most of the time
    want_report = merge_folder(*args, tmp_path / "whole")
    want, replace = contents(tmp_path / "whole"), os.replace
    resumed = set()
    for step in range(1, 100):
        left = step

        def dies(source: Path, target: Path) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                Path(source).write_bytes(b"half a file")
                raise Killed
            replace(source, target)

        out = tmp_path / f"out{step}"
        monkeypatch.setattr(shard_run.os, "replace", dies)
        try:
            merge_folder(*args, out)
        except Killed:
            assert not (out / "config.json").exists()
        else:
            break
        monkeypatch.setattr(shard_run.os, "replace", replace)
        report = merge_folder(*args, out)
        resumed.add(report["resumed"])
        assert report == want_report | {"destination": str(out), "resumed": report["resumed"]}
        assert contents(out) == want, step
    assert step == 1 + 1 + 2 * LAYERS + 3  # progress, each shard and its note, tokenizer, index, config
    assert resumed == {0, 1, 2, 3}


@pytest.mark.parametrize("shard", [1, 3])
def test_a_process_that_is_killed(tmp_path: Path, shard: int) -> None:
    base(tmp_path / "base")
    adapter(tmp_path / "adapter")
    args = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    code = f"""
import os, signal, sys
from fastlora import cli
replace = os.replace
def dies(source, target):
    if os.path.basename(target).startswith("model-0000{shard}"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = dies
sys.argv[1:] = ["merge", *{args!r}]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "out" / shard_run.PROGRESS).is_file()
    result = json.loads(run(*args, "--json").stdout)
    assert result["resumed"] == shard - 1
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- what is refused --------------------------------------------------------------------------------------


def half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    base(tmp_path / "base")
    adapter(tmp_path / "adapter")
    args = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"

    def dies(*_: object) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(merge_command, "_merge_shard", dies)
        with pytest.raises(Killed):
            merge_folder(*args)
    return args


def refused(args: Any, message: str) -> None:
    result = run(*args, code=2)
    assert message in result.stderr
    assert result.stderr.startswith("fastlora: ")
    assert result.stderr.count("\n") == 1
    assert not result.stdout


def test_a_destination_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = half_done(tmp_path, monkeypatch)
    with (tmp_path / "adapter" / "adapter_config.json").open("a") as file:
        file.write("\n")
    refused(args, "to be left by a run like this one, got another adapter; remove it to begin anew")
    (args[2] / shard_run.PROGRESS).write_text("{")
    refused(args, "expected progress of a run in")
    shutil.rmtree(args[2])
    args[2].mkdir()
    run(*args)  # an empty folder will do
    before = contents(args[2])
    refused(args, "expected a new folder to write, or one that a killed run left")
    assert contents(args[2]) == before
    file = tmp_path / "file"
    file.write_text("mine")
    refused((*args[:2], file), "expected a new folder to write")
    assert file.read_text() == "mine"


def test_two_runs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = half_done(tmp_path, monkeypatch)
    what = json.loads((args[2] / shard_run.PROGRESS).read_text())["what"]
    with shard_run.ShardRun(args[2], what, [], 0):
        refused(args, "to be free, got one that another process writes")
    run(*args)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = half_done(tmp_path, monkeypatch)

    def unsupported(*_: object) -> None:
        raise OSError(errno.EBADF, "bad file descriptor")

    monkeypatch.setattr(shard_run.fcntl, "flock", unsupported)
    run(*args)
    assert (args[2] / "config.json").is_file()


def test_the_bar_of_a_terminal_goes_to_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base(tmp_path / "base")
    adapter(tmp_path / "adapter")
    args = [tmp_path / n for n in ("base", "adapter", "out")]
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = run(*args, "--json")
    assert "merging" in result.stderr
    assert json.loads(result.stdout)["merged"] == LAYERS


def test_a_disk_without_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base(tmp_path / "base")
    adapter(tmp_path / "adapter")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shard_run.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused([tmp_path / n for n in ("base", "adapter", "out")], "free for")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "merge: expected peft_type LORA in"),
        ({"use_dora": True}, "merge: expected a plain LoRA adapter, got use_dora=True"),
        ({"lora_alpha": None}, "merge: expected a number lora_alpha in"),
    ],
)
def test_another_kind_of_adapter(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    base(tmp_path / "base")
    adapter(tmp_path / "adapter", **config)
    refused([tmp_path / n for n in ("base", "adapter", "out")], message)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"base_model.model.model.layers.9.q.lora_A.weight": torch.ones(2, H)}, "no place for base_model."),
        ({"base_model.model.model.embed.lora_embedding_A": torch.ones(2, 7)}, "lora_embedding_A (2, 7)"),
        ({"base_model.model.model.embed.weight": torch.ones(8, H)}, "model.embed.weight (8, 32)"),
        ({"base_model.model.model.layers.0.v.lora_A.weight": torch.ones(2, H),
          "base_model.model.model.layers.0.v.lora_B.weight": torch.ones(5, 2)}, "and B @ A (5, 32)"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    base(tmp_path / "base")
    adapter(tmp_path / "adapter", extra)
    refused([tmp_path / n for n in ("base", "adapter", "out")], message)
    assert not (tmp_path / "out").exists()


def test_a_sum_that_overflows_leaves_nothing(tmp_path: Path) -> None:
    base(tmp_path / "base", torch.float16)
    adapter(tmp_path / "adapter", lora_alpha=1e8)
    refused([tmp_path / n for n in ("base", "adapter", "out")], "expected a finite sum in torch.float16")
    assert not (tmp_path / "out").exists()


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    base(tmp_path / "base")
    adapter(tmp_path / "adapter")
    out = tmp_path / "out"
    refused((tmp_path / "no", tmp_path / "adapter", out), "expected a model's folder, got")
    refused((tmp_path / "base", tmp_path / "no", out), "expected an adapter's folder, got")
    refused((tmp_path / "adapter", tmp_path / "adapter", out), "expected config.json in")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    refused((tmp_path / "base", tmp_path / "adapter", out), "expected adapter_model.safetensors in")
    (tmp_path / "base" / "model-00002-of-00003.safetensors").write_bytes(b"no")
    refused((tmp_path / "base", tmp_path / "adapter", out), "expected a safetensors file, got")
    (tmp_path / "base" / "model-00002-of-00003.safetensors").unlink()
    refused((tmp_path / "base", tmp_path / "adapter", out), "got no model-00002-of-00003.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    refused(
        (tmp_path / "base", tmp_path / "adapter", out), "expected a dense model, got one quantised by 'gptq'"
    )
