"""python -m fastlora: info, bench, and what all commands have."""

import json
import math
import os
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastlora
from fastlora import _C, cli, info
from fastlora.commands import bench, common

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


# --- all commands -----------------------------------------------------------------------------------------


def test_the_list_of_commands():
    text = run("--help")
    for command in ("info", "quantize", "merge", "extract", "estimate", "bench"):
        assert f" {command} " in text


@pytest.mark.parametrize("command", ["quantize", "merge", "extract", "estimate", "bench"])
def test_help_has_examples(command):
    text = run(command, "--help")
    assert "\\b" not in text  # click's mark for lines to be left as they are
    assert f"  fastlora {command} " in text.partition("Example")[2]


def test_json_is_json(capsys):
    common.print_json({"changes": {"a": math.inf, "b": 0.5}, "rows": [math.nan, (1, "inf")]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "changes": {"a": None, "b": 0.5},
        "rows": [None, [1, "inf"]],
    }


def test_an_unknown_option_is_code_2():
    result = runner.invoke(cli.app, ["merge", "a", "b", "c", "--fast"])
    assert result.exit_code == 2
    assert "--fast" in result.stderr


# --- bench ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout():
    try:
        bench.suite()
    except FileNotFoundError:
        pytest.skip("fastlora is installed, not imported from a checkout: the suites are not beside it")


@pytest.mark.usefixtures("checkout")
def test_bench_gives_its_arguments_and_exit_code_on(monkeypatch):
    seen = []

    def ran(command, check):
        seen.append(command)
        return types.SimpleNamespace(returncode=3)

    monkeypatch.setattr(bench.subprocess, "run", ran)
    result = runner.invoke(cli.app, ["bench", "--suite", "linear", "--quick"])
    assert result.exit_code == 3
    assert seen == [[sys.executable, str(bench.suite()), "--suite", "linear", "--quick"]]
    assert bench.suite().parts[-2:] == ("bench", "run.py")


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize("code", [0, 1])
def test_bench_as_json_is_one_object_on_stdout(monkeypatch, code):
    def ran(command, check, stdout):
        assert command[2:5] == ["--suite", "linear", "--json"]
        assert stdout == subprocess.DEVNULL
        Path(command[5]).write_text('{"about": {}, "absent": {}, "rows": []}\n')
        return types.SimpleNamespace(returncode=code)

    monkeypatch.setattr(bench.subprocess, "run", ran)
    result = runner.invoke(cli.app, ["bench", "--suite", "linear", "--json"])
    assert result.exit_code == code  # what was measured before something failed is there too
    assert json.loads(result.stdout) == {"about": {}, "absent": {}, "rows": []}


@pytest.mark.usefixtures("checkout")
def test_bench_as_json_with_a_wrong_argument(capfd):
    result = runner.invoke(cli.app, ["bench", "--suite", "none", "--json"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "expected some of" in capfd.readouterr().err


@pytest.mark.usefixtures("checkout")
def test_the_suites_own_json_takes_a_file(monkeypatch):
    seen = []

    def ran(command, check):
        seen.append(command)
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(bench.subprocess, "run", ran)
    run("bench", "--quick", "--", "--json", "rows.json")
    assert seen[0][2:] == ["--quick", "--json", "rows.json"]


def test_bench_without_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "lib" / "fastlora" / "commands" / "bench.py"))
    result = runner.invoke(cli.app, ["bench"])
    assert result.exit_code == 2
    assert "bench: expected fastlora imported from a checkout" in result.stderr
    assert result.stderr.count("\n") == 1
