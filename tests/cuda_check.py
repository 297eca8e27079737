"""What the compiler made of every CUDA kernel, on every architecture: registers, spills, instructions, loops.

    make cuda-check                 # the architectures of CMakeLists.txt
    make cuda-check ARGS=--write    # and put the tables into docs/cuda_kernels.md

Needs nvcc, and cuobjdump and nvdisasm (the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm). Fails
when nvcc has anything to say (that it serialised a wgmma, it says without calling it a warning); when a
kernel spills, touches local memory, lacks an instruction that its design counts on, or fits a processor fewer
times than designed; and when a main loop is longer, or a kernel fits fewer times, than the tables of
docs/cuda_kernels.md have it.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import _cuda_tables as tables
from _launches import Launch, launches_on
from _occupancy import blocks_per_processor
from _sass import Code, Usage, read_code, read_enums, read_usage, readable
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

# What a kernel must hold: its name, and an instruction; both as regular expressions.
OF_MATRICES = (
    r"(nf4_(linear|multi)_(decode|tile|grad_input_tile)|lora_(project|gradients)|"
    r"segmented_(shrink|expand|gradients))<"
)
EXPECTED = (
    (r"dequantize_flat<", r"STG\.E\.128"),
    (r"nf4_slab<true>", r"STG\.E\.128"),
    (r"adamw(_8bit)?<kFloat32>|adamw<", r"LDG\.E\.128"),
    (r"adamw(_8bit)?<kFloat32>|adamw<", r"STG\.E\.128"),
    (r"adamw_8bit<k(BFloat|Float)16>", r"LDG\.E\.64"),
    (r"quantize<\w+, kAligned>", r"LDG\.E\.128"),
    (r"(nf4_(linear|multi)_decode|lora_project|segmented_(shrink|expand))<", r"LDG\.E\.128"),
    (OF_MATRICES + "kBFloat16", r"HMMA\.16816\.F32\.BF16"),
    (OF_MATRICES + "kFloat16", r"HMMA\.16816\.F32$"),
    (r"segmented_(expand<|gradients<|zero$)", r"STG\.E\.128"),
    (r"(nf4_(linear|multi)_(decode|tile|grad_input_tile)|(lora|segmented)_gradients)<", r"LDGSTS\."),
    (r"(nf4_(linear|multi)_grad_input_tile|(lora|segmented)_gradients)<", r"LDSM\."),
    # Where weights are scaled, as pairs. bfloat16 has no product of its own before sm_90: there it is an FMA.
    (
        r"nf4_(?:linear|multi)_(tile<kBFloat16, .*(kWeights|kRagged)|grad_input_tile<kBFloat16)",
        r"HFMA2.*\.BF16",
    ),
    (
        r"nf4_(?:linear|multi)_(tile<kFloat16, .*(kWeights|kRagged)|grad_input_tile<kFloat16)",
        r"HFMA2(?!.*\.BF16)",
    ),
    (
        r"nf4_(?:linear|multi)_(tile<kFloat16, .*(kWeights|kRagged)|grad_input_tile<kFloat16)",
        r"HMUL2(?!.*\.BF16)",
    ),
)
SM90_EXPECTED = r"HGMMA\."  # of every kernel in a file *_sm90.cu
LOCAL_MEMORY = ("LDL", "STL")

# A product of 16 x 8 x 16 takes 256 weights, which 32 lanes make. What one may cost a lane, where nothing but
# the reading of W takes time: name, instructions.
LANE_WEIGHTS = 8
MOST_PER_WEIGHT = (
    (r"nf4_(linear|multi)_decode<\w+, 2>", 1.8),
    (r"nf4_(linear|multi)_decode<\w+, 1>", 1.9),
)
# How much longer than in docs/cuda_kernels.md a loop may be: another version of nvcc is worth a few percent.
SLACK = 1.15
# Loops that hold slow ways for addresses off 16 bytes beside the usual one: their length says little.
SLOW_WAYS_INSIDE = r"lora_|segmented_|.*(kRagged|, true)>"

# Blocks that a processor holds at once, at least, where the design counts on more than one.
DESIGNED = (
    (r"adamw(_8bit)?<", {"80": 4, "86": 4, "89": 4, "90a": 4, "100": 4, "120": 4}),
    (r"nf4_(linear|multi)_decode<\w+, 2>", {"80": 2, "90a": 3, "100": 3}),
    (r"nf4_(linear|multi)_decode<\w+, 1>", {"80": 2, "90a": 2, "100": 2}),
    (r"nf4_(linear_tile<\w+, [24]|multi_tile<\w+, 2), ", {"90a": 2, "100": 2}),
    (r"nf4_(linear|multi)_grad_input_tile<\w+, [12], ", {"90a": 2, "100": 2}),
)


@dataclass
class Kernel:
    file: str
    name: str
    arch: str
    usage: Usage
    code: Code
    launches: set[Launch]  # none: it is never chosen on this architecture

    def blocks(self, launch: Launch) -> int:
        return blocks_per_processor(self.arch, self.usage.registers, launch.threads, launch.shared)

    def most_blocks(self) -> int | None:
        return max(map(self.blocks, self.launches), default=None)

    def loop_length(self) -> float | None:
        """Instructions of the main loop for each product of matrices."""
        loop = self.code.main_loop()
        if loop is None or re.match(SLOW_WAYS_INSIDE, self.name):
            return None
        return loop.instructions / loop.products

    def row(self) -> tables.Row:
        loop = self.loop_length()
        per_weight = any(re.match(name, self.name) for name, _ in MOST_PER_WEIGHT)
        return tables.Row(
            self.name, self.arch, self.usage.registers, self.most_blocks(),
            loop / LANE_WEIGHTS if loop and per_weight else loop, per_weight,
        )  # fmt: skip

    def faults(self) -> list[str]:
        """What must hold of every kernel, and of this one by its name."""
        found = []
        counts = self.code.counts()
        if self.usage.stack:
            found.append(f"{self.usage.stack} bytes of stack")
        if self.usage.shared > 1024:
            found.append(f"{self.usage.shared} bytes of static shared memory, which occupancy leaves out")
        if any(op.startswith(LOCAL_MEMORY) for op in counts):
            found.append("local-memory instructions")
        expected = [wanted for name, wanted in EXPECTED if re.match(name, self.name)]
        if is_of_sm90(self.file):
            expected.append(SM90_EXPECTED)
        for wanted in expected:
            if not any(re.match(wanted, op) for op in counts):
                found.append(f"no {wanted}")
        loop = self.loop_length()
        for name, most in MOST_PER_WEIGHT:
            if re.match(name, self.name) and (loop is None or loop / LANE_WEIGHTS > most):
                each = "no loop" if loop is None else f"{loop / LANE_WEIGHTS:.3f} instructions"
                found.append(f"{each} for each weight of a lane, {most} at most")
        blocks = self.most_blocks()
        for name, least in DESIGNED:
            if blocks and re.match(name, self.name) and blocks < least.get(self.arch, 1):
                found.append(f"{blocks} blocks a processor, designed for {least[self.arch]}")
        return found

    def misfits(self) -> list[str]:
        """Launches that the architecture refuses."""
        return [
            f"{it.threads} threads with {it.shared} bytes of shared memory do not fit"
            for it in self.launches
            if not self.blocks(it)
        ]


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


def output_of(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def architectures() -> list[str]:
    listed = re.search(r"set\(FASTLORA_CUDA_ARCHS ([\w ]+) CACHE", (ROOT / "CMakeLists.txt").read_text())
    assert listed is not None
    return listed[1].split()


def is_of_sm90(file: str) -> bool:
    return file.endswith("_sm90.cu")


def has_kernels(source: Path) -> bool:
    return "FASTLORA_KERNEL(" in source.read_text(encoding="utf-8")


@dataclass
class Compiled:
    said: list[str]  # by the compiler: nothing, one hopes
    usage: dict[str, Usage]  # by readable name
    code: dict[str, Code]


def compile_for(source: Path, arch: str, folder: Path) -> Compiled:
    cubin = folder / f"{source.stem}.{arch}.cubin"
    flags = ["-std=c++20", "-O3", f"-arch=sm_{arch}", "-cubin", f"-I{CSRC / 'include'}"]
    done = subprocess.run(
        [tool("nvcc"), *flags, str(source), "-o", str(cubin)], capture_output=True, text=True, check=False
    )
    said = [
        f"{source.name} sm_{arch}: nvcc: {line}" for line in (done.stdout + done.stderr).splitlines() if line
    ]
    if done.returncode:
        sys.exit("\n".join(said))
    usage = read_usage(output_of(tool("cuobjdump"), "--dump-resource-usage", str(cubin)))
    code = read_code(output_of(tool("nvdisasm"), "-c", str(cubin)))
    enums = read_enums([*CSRC.glob("include/fastlora/*.h"), *CSRC.glob("cuda/*.cuh"), source])
    demangled = output_of("c++filt", text="\n".join(usage)).splitlines()
    names = {mangled: readable(name, enums) for mangled, name in zip(usage, demangled, strict=True)}
    return Compiled(
        said, {names[it]: usage[it] for it in usage}, {names[it]: code.get(it, Code([])) for it in usage}
    )


def inspect(archs: list[str]) -> tuple[list[Kernel], list[str]]:
    """Every kernel, and what the compiler said."""
    # The largest first, so that no processor ends alone with one.
    sources = sorted(filter(has_kernels, CSRC.glob("cuda/*.cu")), key=lambda it: -it.stat().st_size)
    jobs = [
        (source, arch)
        for source in sources
        for arch in archs
        if not is_of_sm90(source.name) or arch.endswith("90a")
    ]
    kernels: list[Kernel] = []
    said: list[str] = []
    # Without a terminal a line now and then: a log keeps all of them.
    every = 0.1 if sys.stderr.isatty() else 15
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        done = pool.map(lambda job: compile_for(*job, Path(folder)), jobs)
        launches = {arch: launches_on(arch) for arch in archs}
        progress = tqdm(done, total=len(jobs), desc="cuda-check", unit="file", mininterval=every)
        for (source, arch), compiled in zip(jobs, progress, strict=True):
            said += compiled.said
            for name, usage in compiled.usage.items():
                known = launches[arch].get(name, set())
                kernels.append(Kernel(source.name, name, arch, usage, compiled.code[name], known))
    kernels.sort(key=lambda it: (it.file, [int(part) if part.isdigit() else part for part in split(it.name)]))
    return kernels, said


def split(name: str) -> list[str]:
    """By numbers, so that 12 comes after 8."""
    return re.split(r"\b(\d+)\b", name)


def never_launched(kernels: list[Kernel]) -> list[str]:
    """Of these nothing but the registers is known."""
    launched = {it.name for it in kernels if it.launches}
    names = dict.fromkeys(it.name for it in kernels if it.name not in launched)
    return [f"{name}: no call of tests/_launches.py launches it" for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--archs", type=lambda text: text.split(","), default=architectures(), help="e.g. 90a,120"
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/cuda_kernels.md")
    options = parser.parse_args()
    if options.write and options.archs != architectures():
        sys.exit("cuda-check: expected --write without --archs, for the tables have all architectures")
    if find("nvcc") is None:
        print("cuda-check: no nvcc on this machine, so nothing was checked")
        return
    kernels, faults = inspect(options.archs)
    for it in kernels:
        faults += [f"{it.file} {it.name} sm_{it.arch}: {fault}" for fault in (*it.faults(), *it.misfits())]
    faults += never_launched(kernels)
    rows = [it.row() for it in kernels]
    if not options.write:
        faults += tables.losses(rows, tables.recorded(), SLACK)
    print(tables.text_of(rows))
    if faults:
        sys.exit("\n".join(faults))
    print(f"{len(kernels)} kernels: no spills, no local memory, and what they were designed for")
    if options.write:
        tables.write(rows)


if __name__ == "__main__":
    main()
