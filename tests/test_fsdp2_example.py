"""examples/fsdp2_qlora.py, as a reader would run it."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import safetensors.torch
import torch
from needs import fsdp_of_bytes
from worlds import also_imports, worlds

import fastlora

if find_spec("transformers") is None:
    pytest.skip("the example needs transformers", allow_module_level=True)
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "fsdp2_qlora.py"
QUICK = ["--steps", "6", "--checkpoint-every", "4", "--rows", "2", "--context", "32", "--rank", "4"]
also_imports("transformers.models.llama.modeling_llama")
world = worlds(2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps, with a checkpoint after four, and what it printed."""
    out = tmp_path_factory.mktemp("fsdp2")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(EXAMPLE), *QUICK, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done


def example(monkeypatch=None):
    if str(EXAMPLE.parent) not in sys.path:
        if monkeypatch is None:
            sys.path.insert(0, str(EXAMPLE.parent))
        else:
            monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import fsdp2_qlora

    return fsdp2_qlora


@fsdp_of_bytes
def test_one_process_loads_the_adapter_and_finds_the_same_loss(finished, monkeypatch):
    out, done = finished
    ours = example(monkeypatch)
    before, after = map(float, re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", done.stdout).groups())
    assert after < before
    assert "28 layers in NF4" in done.stdout
    bars = re.findall(r" 6/6 \[.*?, loss", done.stderr)
    assert 1 <= len(bars) <= 2, bars  # of the first rank alone, which may draw its last state twice
    assert {path.name for path in out.iterdir()} == {"adapter", "checkpoint-4", "checkpoint-6"}
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    torch.manual_seed(0)
    subject = ours.llama(32)
    fastlora.convert(subject.model, rank=4, alpha=32, progress=False)
    fastlora.load_adapter(subject.model, out / "adapter")
    held_out = subject.encode(ours.english(seed=0).held_out)
    windows = ours.even_windows(held_out, 16, 32)
    with torch.no_grad():
        assert ours.next_token_loss(subject.model, windows).item() == pytest.approx(after, abs=2e-4)


def resume(rank, arguments):
    import os

    ours = example()
    os.environ["RANK"] = str(rank)
    sys.argv = ["fsdp2_qlora.py", *arguments]
    assert ours.run(ours.parse_arguments(), torch.device("cpu")) == 0


def refused(rank, arguments):
    with pytest.raises(ValueError, match=r"--resume: expected --rank 4, as .*checkpoint-4 has it, got 5"):
        resume(rank, [*arguments, "--rank", "5"])
    with pytest.raises(FileNotFoundError, match=r"--resume: expected a checkpoint in .*nothing, got none"):
        resume(rank, [*arguments, "--out", "nothing"])


@fsdp_of_bytes
def test_a_run_goes_on_where_it_was_interrupted(finished, world, tmp_path):
    out, _ = finished
    shutil.copytree(out / "checkpoint-4", tmp_path / "checkpoint-4")
    arguments = [*QUICK, "--out", str(tmp_path), "--resume"]
    world.run(refused, arguments)
    world.run(resume, arguments)
    want, got = (
        safetensors.torch.load_file(at / "adapter" / "adapter_model.safetensors") for at in (out, tmp_path)
    )
    assert got.keys() == want.keys()
    for key, t in want.items():
        assert torch.equal(got[key], t), key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        ([], "expected to be started by torchrun: torchrun --nproc-per-node 2"),
    ],
)
def test_refusals(arguments, message, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["fsdp2_qlora.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        example(monkeypatch).parse_arguments()
    assert message in capsys.readouterr().err


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fsdp2_qlora.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        example(monkeypatch).parse_arguments()
    printed = capsys.readouterr().out
    assert "torchrun --nproc-per-node 2" in printed
    for option in ("--resume", "--model FOLDER", "--text FILE", "--accumulate N", "--checkpoint-every N"):
        assert option in printed
