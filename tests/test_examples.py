"""The demo and README's example, run as a reader would run them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "finetune.py"
PERSONAS = ROOT / "examples" / "personas.py"


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, str(DEMO), *arguments], capture_output=True, text=True, check=False, env=environment
    )


def test_demo(tmp_path: Path) -> None:
    done = run_demo("--quick", "--out", str(tmp_path), "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nyes ") == 3
    assert "NF4 + English adapter" in done.stdout
    assert "PEFT on bitsandbytes" in done.stdout
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    for adapter in ("english", "unicode_names"):
        names = {p.name for p in (tmp_path / "adapters" / adapter).iterdir()}
        assert names == {"adapter_model.safetensors", "adapter_config.json"}
    # Any bit of the base decides: with one flipped the new process must disagree.
    base = tmp_path / "base.safetensors"
    data = bytearray(base.read_bytes())
    data[-1] ^= 1
    before = verify(tmp_path)
    base.write_bytes(bytes(data))
    assert verify(tmp_path) != before


def verify(folder: Path) -> dict[str, str]:
    done = run_demo("--verify", str(folder))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_demo_fails_when_nothing_is_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(DEMO.parent))
    import finetune

    idle = replace(
        finetune.QUICK, pretrain_steps=2, finetune_steps=2, finetune_rate=0.0, sample_tokens=1, rounds=1
    )
    monkeypatch.setattr(finetune, "QUICK", idle)
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--quick", "--out", str(tmp_path)])
    assert finetune.main() == 1
    assert re.search(r"NO\s+fine-tuning lowered", capsys.readouterr().out)


def test_personas(tmp_path: Path) -> None:
    command = [sys.executable, str(PERSONAS), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "120"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nyes ") == 4
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    for name, rank in (("english", 16), ("unicode", 8), ("calendar", 12)):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (rank, 2 * rank)
        assert f" {name} │" in done.stdout


def test_personas_fail_when_nothing_is_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(DEMO.parent))
    import personas

    idle = replace(personas.QUICK, pretrain_steps=2, steps=2, rate=0.0, answer=1)
    monkeypatch.setattr(personas, "QUICK", idle)
    monkeypatch.setattr(sys, "argv", ["personas.py", "--quick", "--out", str(tmp_path)])
    assert personas.main() == 1
    printed = capsys.readouterr().out
    assert re.search(r"NO\s+training together lowered", printed)
    assert re.search(r"yes\s+the files give every adapter back", printed)


def tiny_llama(folder: Path) -> None:
    """A random Llama with a tokenizer of single bytes, saved as Hugging Face saves one."""
    transformers = pytest.importorskip("transformers", reason="the demo's --model needs transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(letters),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def test_demo_on_a_hugging_face_model(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    done = run_demo("--quick", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nyes ") == 3
    config = json.loads((tmp_path / "out" / "adapters" / "english" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"


def test_demo_refuses_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = run_demo("--quick", "--model", str(tmp_path / "nothing"), "--out", str(tmp_path))
    assert done.returncode != 0
    assert "expected a folder that holds a Hugging Face model" in done.stderr


def test_readme_example() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    layer = names["layer"]
    assert layer.quantized_weight.nbytes / 2**20 == pytest.approx(8.3, abs=0.05)
    assert layer.lora_B.abs().max() > 0
    assert layer.weight.grad is None
    assert len(blocks[0].strip().splitlines()) <= 11


def test_readme_example_of_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastlora

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
    exec(compile(blocks[1], "README.md", "exec"), {"fastlora": fastlora, "model": model})
    assert all(isinstance(layer, fastlora.QLinear) for layer in model)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_readme_example_of_several_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastlora

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
    fastlora.convert(model, rank=0, progress=False)
    for i, name in enumerate(("english", "unicode")):
        for layer in model:
            layer.add_adapter(name, 2 + i, 4)
            torch.nn.init.normal_(layer.adapters[name].lora_B)
        fastlora.save_adapter(model, f"adapters/{name}", name=name)
        for layer in model:
            layer.delete_adapter(name)
    names: dict = {"fastlora": fastlora, "model": model, "x": torch.randn(3, 64)}
    exec(compile(blocks[2], "README.md", "exec"), names)
    rows = []
    for i, name in enumerate(("english", None, "unicode")):
        for layer in model:
            layer.set_adapter(name)
        rows.append(model(names["x"][i]))
    torch.testing.assert_close(names["y"], torch.stack(rows))
