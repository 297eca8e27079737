"""What must agree between files that no compiler compares."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastlora

ROOT = Path(__file__).resolve().parent.parent


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pinned() -> dict[str, str]:
    lines = re.findall(
        r"^([\w.-]+)==([\w.]+)(?:; python_version >= .*)?$", text_of("constraints.txt"), re.MULTILINE
    )
    return dict(lines)


def test_every_kernel_source_is_built() -> None:
    listed = set(re.findall(r"csrc/[\w/]+\.(?:cpp|cu)\b", text_of("CMakeLists.txt")))
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".cu"}}
    assert listed == there


def test_the_map_names_every_source_and_nothing_else() -> None:
    folders = ("bench", "cpu", "cuda", "emulator", "include")
    path = rf"`((?:{'|'.join(folders)})/[\w/]+\.(?:cpp|h|cu|cuh)|bindings\.cpp)`"
    named = set(re.findall(path, text_of("csrc/README.md")))
    csrc = ROOT / "csrc"
    there = {str(p.relative_to(csrc)) for folder in folders for p in (csrc / folder).rglob("*.*")}
    assert named == there | {"bindings.cpp"}


def test_every_op_is_on_the_map() -> None:
    bindings = "".join(
        text_of(f"csrc/{name}.cpp") for name in ("bindings", "bindings_adamw", "bindings_segmented")
    )
    pattern = r'm\.def\("(nf4_\w+|lora_\w+|segmented_\w+|adamw\w*)"'
    ops = set(re.findall(pattern, bindings)) - {"nf4_double_quantize"}
    missing = [op for op in ops if f"`{op}`" not in text_of("csrc/README.md")]
    assert not missing


PAGES = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text_of(name)):
        if not target.startswith("http"):
            assert ((ROOT / name).parent / target).exists(), target


def test_every_page_is_in_the_sites_nav() -> None:
    nav = re.search(r"^nav:\n((?: .*\n)+)", text_of("mkdocs.yml"), re.MULTILINE)
    assert nav is not None
    listed = re.findall(r"[\w/]+\.md", nav[1])
    assert len(listed) == len(set(listed))
    assert {f"docs/{page}" for page in listed} == {name for name in PAGES if name.startswith("docs/")}


def test_the_api_pages_have_every_public_name() -> None:
    pages = "".join(text_of(name) for name in PAGES if name.startswith("docs/api/"))
    shown = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    names = {name for name in fastlora.__all__ if not name.startswith("__")} | {"FastLoraConfig"}
    assert not names - {name.rpartition(".")[2] for name in shown}
    text = "".join(text_of(name) for name in PAGES)
    imported = set(re.findall(r"from (fastlora\.integrations\.\w+) import", text))
    assert imported  # which makes them public
    assert not imported - shown
    assert "fastlora.methods" in shown  # its modules come by themselves


def test_one_version_everywhere() -> None:
    version = re.search(r'^version = "(.+)"$', text_of("pyproject.toml"), re.MULTILINE)
    cmake = re.search(r"^ *VERSION ([\d.]+)$", text_of("CMakeLists.txt"), re.MULTILINE)
    assert version is not None
    assert cmake is not None
    assert version[1] == cmake[1] == fastlora.__version__
    assert f"({version[1]})" in text_of("CHANGELOG.md")
    assert f"\nversion: {version[1]}\n" in text_of("CITATION.cff")


def test_pins_agree() -> None:
    pins = pinned()
    assert f"torch=={pins['torch']}" in text_of("Makefile")
    hooks = re.findall(r"\[(ruff|clang-format)==([\w.]+)\]", text_of(".pre-commit-config.yaml"))
    assert hooks
    assert {(name, pins[name]) for name, _ in hooks} == set(hooks)
    assert f"bitsandbytes=={pins['bitsandbytes']}" in text_of("pyproject.toml")


def test_the_type_stub_matches_the_module() -> None:
    stub = set(re.findall(r"^def (\w+)", text_of("python/fastlora/_C.pyi"), re.MULTILINE))
    files = ("bindings", "bindings_adamw", "bindings_segmented", "nf4_linear_direct")
    sources = "".join(text_of(f"csrc/{name}.cpp") for name in files)
    assert stub == set(re.findall(r'(?:m\.def\(|^    {)"(\w+)"', sources, re.MULTILINE))


def test_readme_table_is_what_was_measured() -> None:
    command = [sys.executable, str(ROOT / "bench" / "readme_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run python bench/readme_table.py\n{done.stderr}"


def test_sanitize_runs_every_group_of_checks() -> None:
    run = re.search(r"^CHECKED := ((?:.*\\\n)*.*)$", text_of("Makefile"), re.MULTILINE)
    assert run is not None
    listed = {
        (words[0], name) for words in map(str.split, re.findall(r"'(.+?)'", run[1])) for name in words[1:]
    }
    there = {
        (program, name)
        for program, source in (("kernel_tests", "kernel_tests"), ("emulator_tests", "emulator_main"))
        for name in re.findall(r'\{"(\w+)", test_\w+\}', text_of(f"csrc/tests/{source}.cpp"))
    }
    assert listed == there
