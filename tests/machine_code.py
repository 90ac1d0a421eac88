"""Reads the machine code of compiled kernels, by the disassembler in Triton's package."""

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One line of machine code, such as `@!P0 STG.E.128 desc[UR4][R2.64], R8`."""

    address: int
    text: str

    @property
    def opcode(self) -> str:
        """What it does, with its modifiers and without its predicate: STG.E.128."""
        words = self.text.split()
        return words[1] if words[0].startswith("@") else words[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if self.opcode.startswith("BRA") and found else None


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture; registers a thread, bytes of stack and of local memory."""

    name: str
    architecture: str
    registers: int
    stack: int
    local: int
    code: tuple[Instruction, ...]

    def count(self, *opcodes: str) -> int:
        """Instructions whose opcode begins with one of `opcodes`."""
        return sum(i.opcode.startswith(opcodes) for i in self.code)

    def loops(self) -> list[tuple[Instruction, ...]]:
        """The code of every loop: from the target of a branch back to that branch."""
        return [
            tuple(j for j in self.code if i.target <= j.address <= i.address)
            for i in self.code
            if i.target is not None and i.target < i.address  # not the trap that ends a kernel
        ]


@cache
def tool(name: str) -> Path:
    """A program of NVIDIA's toolkit, as Triton's package carries it."""
    spec = find_spec("triton")
    assert spec is not None and spec.origin is not None, "pip install triton, for its disassembler"
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name


def dump(binary: Path, what: str, architecture: str | None) -> str:
    """What cuobjdump says of a binary, its names demangled."""
    only = ["-arch", architecture] if architecture else []
    command = [tool("cuobjdump"), what, *only, binary]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout


def disassemble(binary: Path, architecture: str | None = None) -> list[Kernel]:
    """The kernels of a cubin, or of one architecture in a shared library."""
    usage = {}
    for name, values in re.findall(
        r"Function (.+):\n\s+(REG:.*)", dump(binary, "-res-usage", architecture)
    ):
        usage[short(name)] = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", values)}
    kernels = []
    found = architecture or ""
    for part in re.split(r"(?=code for sm_|Function : )", dump(binary, "-sass", architecture)):
        if part.startswith("code for"):
            found = part.split()[2]
        elif part.startswith("Function : "):
            name = short(part.splitlines()[0].removeprefix("Function : "))
            lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;", part)
            code = tuple(Instruction(int(address, 16), text) for address, text in lines)
            used = usage[name]
            kernels.append(Kernel(name, found, used["REG"], used["STACK"], used["LOCAL"], code))
    return kernels


def short(name: str) -> str:
    """A demangled kernel without its return type, namespaces and arguments."""
    name = re.sub(r"\(anonymous namespace\)::|trt::(cuda::|device::)?", "", name.strip())
    return re.sub(r"^void |\(.*$", "", name)


def resident(registers: int) -> int:
    """Threads that an SM with 65,536 registers holds at most, in blocks of 128."""
    of_block = 128 * -(-registers // 8) * 8
    return min(2048, 65536 // of_block * 128)


def table(binary: Path, architecture: str) -> str:
    """The kernels of one architecture, as Markdown."""
    head = (
        "kernel",
        "registers",
        "threads an SM",
        "16-byte loads",
        "stores",
        "FFMA",
        "local memory",
    )
    rows = [
        (
            f"`{k.name}`",
            k.registers,
            resident(k.registers),
            f"{k.count('LDG.E.128')} of {k.count('LDG')}",
            f"{k.count('STG.E.128')} of {k.count('STG')}",
            k.count("FFMA"),
            k.count("LDL", "STL"),
        )
        for k in sorted(disassemble(binary, architecture), key=lambda k: k.name)
    ]
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    from trt_kernels import _C

    print(f"""# The CUDA kernels as machine code, sm_90

Counted, not timed: what the compiler made of each kernel, by `python -m tests.machine_code`
(nvcc {_C.build_info()["cuda"]}). A kernel of `lif` is named by storage type, neurons a thread and
whether these are of several channels. The plain ones serve spikes alone, as in most training; the
others everything else: channels, normalised input, bits, sums. Loads and stores are counted in the
code, all branches together, and not as often as they run.
""")
    print(table(Path(_C.__file__), "sm_90"))
