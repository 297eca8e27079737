"""after_import, on modules made for it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fastlora.integrations.after_import import after_import


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable package "zoo" with a module "zoo.lion"."""
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "__init__.py").write_text("from . import lion\n")
    (tmp_path / "zoo" / "lion.py").write_text("roar = 'loud'\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield tmp_path / "zoo"
    sys.meta_path[:] = finders
    for name in ("zoo", "zoo.lion"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def test_before_and_after_the_import(package: Path) -> None:
    seen: list[tuple[str, object]] = []
    finders = len(sys.meta_path)

    def first(module: ModuleType) -> None:
        seen.append((module.__name__, module.roar))  # the module is whole

    def second(module: ModuleType) -> None:
        seen.append(("second", module.roar))

    after_import("zoo.lion", first)
    after_import("zoo.lion", first)  # once
    after_import("zoo.lion", second)
    assert not seen
    zoo = importlib.import_module("zoo")
    assert sorted(seen) == [("second", "loud"), ("zoo.lion", "loud")]
    assert len(sys.meta_path) == finders
    assert type(zoo.lion.__loader__).__name__ == "SourceFileLoader"  # as without us
    assert zoo.lion.__spec__.loader is zoo.lion.__loader__
    after_import("zoo.lion", first)
    assert len(seen) == 3
    importlib.reload(zoo.lion)
    assert len(seen) == 3


def test_an_import_that_fails_is_waited_for_again(package: Path) -> None:
    seen: list[ModuleType] = []
    after_import("zoo.lion", seen.append)
    whole = (package / "lion.py").read_text()
    (package / "lion.py").write_text("raise OSError('asleep')\n")
    with pytest.raises(OSError, match="asleep"):
        importlib.import_module("zoo")
    assert not seen
    (package / "lion.py").write_text(whole + "# and so on\n")
    importlib.invalidate_caches()
    importlib.import_module("zoo")
    assert [module.__name__ for module in seen] == ["zoo.lion"]


def test_other_imports_are_left_alone(package: Path) -> None:
    after_import("zoo.lion", lambda module: pytest.fail("nobody asked for it"))
    with pytest.raises(ModuleNotFoundError, match="there_is_no_tiger"):
        importlib.import_module("there_is_no_tiger")
    (package / "__init__.py").write_text("")
    assert importlib.import_module("zoo").__name__ == "zoo"
