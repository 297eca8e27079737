"""python -m fastlora info."""

import json
import os
import subprocess
import sys
from importlib import metadata

import torch
from typer.testing import CliRunner

import fastlora
from fastlora import _C, cli, info

runner = CliRunner()


def run(*args):
    result = runner.invoke(cli.app, list(args), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_tells_the_facts():
    facts = json.loads(run("info", "--json"))
    assert facts["fastlora"] == fastlora.__version__ == _C.__version__
    assert facts["torch"] == torch.__version__
    assert facts["level"] == fastlora.current_isa()
    assert facts["levels_available"] == fastlora.available_isas()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cuda_built"] == _C.cuda_built
    assert facts["packages"]["peft"] == metadata.version("peft")


def test_the_table_has_the_same_facts():
    text = run("info")
    lines = dict(line.split("  ", 1) for line in text.splitlines() if not line.startswith(" "))
    assert lines["level in force"].strip() == fastlora.current_isa()
    assert lines["levels available"].strip() == ", ".join(fastlora.available_isas())
    assert "\x1b" not in text


def test_the_level_in_force_is_followed():
    with fastlora.use_isa("scalar"):
        assert json.loads(run("info", "--json"))["level"] == "scalar"


def test_what_is_missing_comes_with_the_reason(monkeypatch):
    def version(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(info.metadata, "version", version)
    monkeypatch.setattr(info.isa, "available_isas", lambda: ["scalar"])
    facts = json.loads(run("info", "--json"))
    assert facts["packages"] == dict.fromkeys(info.OPTIONAL)
    for package in info.OPTIONAL:
        assert facts["missing"][package].startswith("not installed; for ")
    for level in ("avx2", "avx512", "amx"):
        assert facts["missing"][f"level {level}"].startswith(("needs A", "not built for "))
    text = run("info")
    for name, why in facts["missing"].items():
        assert f"{name}: {why}" in text


def test_a_build_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr(_C, "cuda_built", False)
    assert "not built" in json.loads(run("info", "--json"))["missing"]["CUDA kernels"]


def test_python_dash_m_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "fastlora", "info", "--json"],
        env={**os.environ, "FASTLORA_ISA": "scalar"},
        capture_output=True,
        text=True,
        check=True,
    )
    facts = json.loads(done.stdout)
    assert (facts["level"], facts["level_forced_by"]) == ("scalar", "FASTLORA_ISA")


def test_an_unknown_level_in_the_environment_is_an_error_not_a_fallback():
    done = subprocess.run(
        [sys.executable, "-m", "fastlora", "info"],
        env={**os.environ, "FASTLORA_ISA": "avx1024"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "isa: expected one of scalar, avx2" in done.stderr
    assert "got 'avx1024'" in done.stderr


def test_the_exports_are_there():
    assert set(fastlora.__all__) >= {
        "QLinear", "nf4_linear", "quantize_nf4", "NF4Weight", "convert", "save_adapter", "load_adapter",
        "use_isa", "current_isa", "available_isas", "__version__",
    }  # fmt: skip
    assert all(hasattr(fastlora, name) for name in fastlora.__all__)
