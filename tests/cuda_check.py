"""What the compiler made of every CUDA kernel, on every architecture: registers, spills, instructions.

    make cuda-check                 # the architectures of CMakeLists.txt
    make cuda-check ARGS=--write    # and put the table into docs/cuda_kernels.md

Needs nvcc, and cuobjdump and nvdisasm (the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm). Fails
when a kernel spills, touches local memory, or lacks an instruction that its design counts on.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "cuda_kernels.md"
BEGIN, END = "<!-- make cuda-check: begin -->", "<!-- make cuda-check: end -->"

# kernel -> instructions it must hold (prefixes of SASS mnemonics).
EXPECTED = {
    "dequantize_flat": ["STG.E.128"],
    "nf4_slab<true>": ["STG.E.128"],
    "quantize<kAligned>": ["LDG.E.128"],
}
LOCAL_MEMORY = ("LDL", "STL")


@dataclass
class Kernel:
    file: str
    name: str
    arch: str
    registers: int
    stack: int
    instructions: Counter[str]

    def count(self, prefix: str) -> int:
        return sum(n for op, n in self.instructions.items() if op.startswith(prefix))

    def faults(self) -> list[str]:
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack")
        if any(self.count(op) for op in LOCAL_MEMORY):
            found.append("local-memory instructions")
        for wanted in EXPECTED.get(
            re.sub(r"k(?:Float32|BFloat16|Float16)(?:, )?", "", self.name), []
        ) + EXPECTED.get(self.name.split("<")[0], []):
            if not self.count(wanted):
                found.append(f"no {wanted}")
        return found


def find(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, in CUDA_HOME, or in the wheels of this Python."""
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    places += [str(p) for p in Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def tool(name: str) -> str:
    found = find(name)
    if found is None:
        sys.exit(f"cuda-check: expected {name} on PATH or from pip install nvidia-cuda-{name}; found none")
    return found


def architectures() -> list[str]:
    listed = re.search(r"set\(FASTLORA_CUDA_ARCHS ([\w ]+) CACHE", (ROOT / "CMakeLists.txt").read_text())
    assert listed is not None
    return listed[1].split()


ENUMS = {
    "(fastlora::DType)": {"0": "kFloat32", "1": "kBFloat16", "2": "kFloat16"},
    "(fastlora::cuda::(anonymous namespace)::Walk)": {"0": "kAligned", "1": "kFlat", "2": "kRagged"},
}


def readable(mangled: str) -> str:
    """fastlora::cuda::(anonymous namespace)::quantize<...>(...) to quantize<kBFloat16, kFlat>."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    for enum, values in ENUMS.items():
        for value, word in values.items():
            name = name.replace(enum + value, word)
    name = name.removeprefix("void ").replace("fastlora::cuda::(anonymous namespace)::", "")
    return re.sub(r"\(.*", "", name)


def inspect(source: Path, arch: str, folder: Path) -> list[Kernel]:
    cubin = folder / f"{source.stem}.{arch}.cubin"
    include = f"-I{ROOT / 'csrc' / 'include'}"
    command = [
        tool("nvcc"),
        "-std=c++20",
        "-O3",
        f"-arch=sm_{arch}",
        "-cubin",
        include,
        str(source),
        "-o",
        str(cubin),
    ]
    subprocess.run(command, check=True)
    cuobjdump = tool("cuobjdump")
    env = os.environ | {"PATH": f"{Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}"}

    def dump(option: str) -> str:
        return subprocess.run(
            [cuobjdump, option, str(cubin)], capture_output=True, text=True, check=True, env=env
        ).stdout

    sass = {}
    for part in re.split(r"\n\s*Function : ", dump("-sass"))[1:]:
        name, code = part.split("\n", 1)
        ops = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", code)
        sass[name.strip()] = Counter(ops)
    kernels = []
    usage = r"Function (\S+):\s+REG:(\d+) STACK:(\d+)"
    for name, registers, stack in re.findall(usage, dump("--dump-resource-usage")):
        kernels.append(
            Kernel(source.name, readable(name), arch, int(registers), int(stack), sass.get(name, Counter()))
        )
    return kernels


def table(kernels: list[Kernel]) -> str:
    """A row a kernel, a column an architecture: registers, and instructions in all."""
    archs = list(dict.fromkeys(k.arch for k in kernels))
    lines = ["| kernel | " + " | ".join(f"sm_{arch}" for arch in archs) + " |", "|---|" + "--:|" * len(archs)]
    for file, name in dict.fromkeys((k.file, k.name) for k in kernels):
        cells = []
        for arch in archs:
            (k,) = [k for k in kernels if (k.file, k.name, k.arch) == (file, name, arch)]
            cells.append(f"{k.registers}, {sum(k.instructions.values())}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--archs", type=lambda text: text.split(","), default=architectures(), help="e.g. 90a,120"
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/cuda_kernels.md")
    options = parser.parse_args()
    if find("nvcc") is None:
        print("cuda-check: no nvcc on this machine, so nothing was checked")
        return
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    jobs = [(source, arch) for source in sources for arch in options.archs]
    kernels: list[Kernel] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        done = pool.map(lambda job: inspect(*job, Path(folder)), jobs)
        for found in tqdm(
            done, total=len(jobs), desc="cuda-check", unit="file", disable=not sys.stderr.isatty()
        ):
            kernels += found
    print(table(kernels))
    faults = [f"{k.file} {k.name} sm_{k.arch}: {fault}" for k in kernels for fault in k.faults()]
    if faults:
        sys.exit("\n".join(faults))
    print(f"{len(kernels)} kernels: no spills, no local memory, and the instructions they were designed for")
    if options.write:
        text = DOCS.read_text()
        head, rest = text.split(BEGIN)
        new = DOCS.with_suffix(".tmp")
        new.write_text(head + BEGIN + "\n" + table(kernels) + "\n" + END + rest.split(END)[1])
        new.replace(DOCS)


if __name__ == "__main__":
    main()
