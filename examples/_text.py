"""Text that every CPython installation carries: Python source, English, and the names of Unicode."""

from __future__ import annotations

import random
import sysconfig
import unicodedata
from dataclasses import dataclass
from pathlib import Path

# Directories that are not library source, are not always installed, or hold a domain that is fine-tuned on.
_NOT_SOURCE = frozenset(
    [
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "pydoc_data",
        "encodings",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "ensurepip",
        "__pycache__",
    ]
)


@dataclass(frozen=True)
class Domain:
    """A kind of text, in two parts that share no piece, and a prompt that a sample of it may start with."""

    name: str
    train: str
    held_out: str
    prompt: str


def split(name: str, pieces: list[str], prompt: str, seed: int, limit: int | None, held_out: float) -> Domain:
    """Shuffles whole pieces, so that no sentence is on both sides, and keeps about `limit` characters."""
    random.Random(seed).shuffle(pieces)
    text = "".join(pieces) if limit is None else "".join(pieces)[:limit]
    size, held = 0, []
    for piece in pieces:
        if size >= held_out * len(text):
            break
        held.append(piece)
        size += len(piece)
    return Domain(name, text[size:], text[:size], prompt)


def python_source(*, seed: int, limit: int | None = None) -> Domain:
    """The standard library's own modules (about 9 MB), whole files held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in root.rglob("*.py") if not _NOT_SOURCE & set(p.relative_to(root).parts))
    if not paths:
        raise RuntimeError(f"python_source: expected the standard library's source under {root}, found none")
    random.Random(seed).shuffle(paths)
    pieces, size = [], 0
    for path in paths:
        pieces.append(path.read_text(encoding="utf-8", errors="replace") + "\n")
        size += len(pieces[-1])
        if limit is not None and size >= limit:
            break
    return split("Python source", pieces, "    def read(self, ", seed, limit, held_out=0.03)


def english(*, seed: int, limit: int | None = None) -> Domain:
    """The language reference that `help()` prints (about 0.5 MB of English), whole topics held out."""
    from pydoc_data.topics import topics

    return split(
        "English", [f"{text}\n" for text in topics.values()], "The value ", seed, limit, held_out=0.1
    )


def unicode_names(*, seed: int, limit: int | None = None) -> Domain:
    """One character's name a line (about 0.7 MB of capitals), without Hangul syllables and numbered names."""
    names = (unicodedata.name(chr(code), "") for code in range(0x110000))
    lines = [
        f"{name}\n"
        for name in names
        if name and not name.startswith("HANGUL SYLLABLE") and not any(c.isdigit() for c in name)
    ]
    return split("Unicode names", lines, "\nLATIN ", seed, limit, held_out=0.1)
