"""Registers and spills of every Triton kernel, for every architecture and Triton that is here.

python -m tests.fake_gpu [--out FILE]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fake_gpu import ARCHITECTURES
from tests.machine_code import disassemble
from tests.test_triton import OLDEST, in_own_process


def version(folder: str | None) -> str:
    code = f"import sys; sys.path[:0] = {[folder] if folder else []!r}; import triton"
    command = [sys.executable, "-c", f"{code}; print(triton.__version__)"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def measured(architecture: str, triton: str | None) -> dict[str, str]:
    """Of each kernel its registers, and behind a plus its spills."""
    with tempfile.TemporaryDirectory() as folder:
        in_own_process("compile_cases", architecture, Path(folder), triton=triton)
        found = {}
        for path in Path(folder).glob("*.cubin"):
            kernel = disassemble(path)[0]
            spills = kernel.count("LDL", "STL")
            found[path.stem] = str(kernel.registers) + (f" + {spills}" if spills else "")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    columns = {}
    for triton in dict.fromkeys((None, OLDEST)):
        for architecture in ARCHITECTURES:
            name = f"Triton {version(triton)}, {architecture}"
            print(name, file=sys.stderr, flush=True)
            columns[name] = measured(architecture, triton)
    kernels = sorted({kernel for column in columns.values() for kernel in column})
    rows = [["kernel", *columns], ["---", *["---:"] * len(columns)]]
    rows += [[k, *(column.get(k, "") for column in columns.values())] for k in kernels]
    lines = [
        "# The Triton kernels as machine code",
        "",
        "Counted, not timed, by `make fake-gpu`: registers a thread, and after a plus the accesses",
        "to local memory. Every kernel was launched, on a driver that computes nothing.",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    text = "\n".join(lines) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
