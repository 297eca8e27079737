"""What the toolkit's disassemblers say of a compiled kernel, read into names, instructions and loops."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

PRODUCTS = ("HMMA", "HGMMA")  # of matrices

_FUNCTION = re.compile(r"^\.text\.(\S+):$", re.MULTILINE)
# A label, or an instruction with the label that it names, if any: `(.L_x_7).
_LINE = re.compile(
    r"^(\.L_\w+):"
    r"|^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(?:[^;\n]*`\((\.L_\w+)\))?",
    re.MULTILINE,
)
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_ENUM = re.compile(r"enum class (\w+)[^{;]*\{([^}]*)\}")


@dataclass(frozen=True)
class Loop:
    instructions: int
    products: int  # among them


@dataclass
class Code:
    """The instructions of a function in order, without their predicates and operands."""

    instructions: list[str]
    branches: list[tuple[int, int]] = field(default_factory=list)  # (from, to), as indices

    def counts(self) -> Counter[str]:
        return Counter(self.instructions)

    def main_loop(self) -> Loop | None:
        """The innermost loop with the most products of matrices; of those with as many, the shortest, for a
        copy of a loop that checks the bounds of what it touches does more.

        A loop is a branch back and all that lies between its target and itself.
        """
        loops = []
        for last, first in self.branches:
            if first <= last:
                products = sum(it.startswith(PRODUCTS) for it in self.instructions[first : last + 1])
                if products:
                    loops.append((first, last, products))
        innermost = [
            Loop(last + 1 - first, products)
            for first, last, products in loops
            if not any((a, b) != (first, last) and first <= a and b <= last for a, b, _ in loops)
        ]
        return min(innermost, key=lambda loop: (-loop.products, loop.instructions), default=None)


def read_code(text: str) -> dict[str, Code]:
    """Mangled name -> code, of what `nvdisasm -c` prints."""
    pieces = _FUNCTION.split(text)
    functions = {}
    for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
        code, labels, targets = Code([]), {}, []
        for label, instruction, target in _LINE.findall(body):
            if label:
                labels[label] = len(code.instructions)
                continue
            if target and instruction.split(".")[0] == "BRA":
                targets.append((len(code.instructions), target))
            code.instructions.append(instruction)
        code.branches = [(at, labels[target]) for at, target in targets if target in labels]
        functions[name] = code
    return functions


@dataclass(frozen=True)
class Usage:
    registers: int
    stack: int  # bytes, as is what follows
    shared: int  # static; from sm_90 on with the 1024 that the driver takes


def read_usage(text: str) -> dict[str, Usage]:
    """Mangled name -> what a launch takes, of what `cuobjdump --dump-resource-usage` prints."""
    return {name: Usage(*map(int, numbers)) for name, *numbers in _USAGE.findall(text)}


def read_enums(sources: Iterable[Path]) -> dict[str, dict[int, str]]:
    """Name -> value -> enumerator of every enum class in these files."""
    enums = {}
    for source in sources:
        for name, body in _ENUM.findall(source.read_text(encoding="utf-8")):
            value, values = -1, {}
            for item in re.sub(r"//.*", "", body).split(","):
                word, _, given = (part.strip() for part in item.partition("="))
                if word:
                    value = int(given) if given else value + 1
                    values[value] = word
            enums[name] = values
    return enums


def readable(demangled: str, enums: dict[str, dict[int, str]]) -> str:
    """void fastlora::cuda::(anonymous namespace)::tile<(fastlora::DType)1, 2>(...) to tile<kBFloat16, 2>."""
    name = re.sub(r"(?:\w+|\(anonymous namespace\))::", "", demangled).removeprefix("void ")
    name = re.sub(r"\((\w+)\)(\d+)", lambda it: enums[it[1]][int(it[2])], name)
    return name.split("(", 1)[0]
