"""Builds the compiled module here for the Python of a machine that is lent for minutes.

python -m benchmarks.prebuild --python python3.12 --archs "90-real;90-virtual" --out prebuilt

The module is then copied into `trt_kernels/` there. It fits every PyTorch of that Python; the
newest glibc that it asks for is printed, and refused if it is newer than --glibc.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def newest_glibc(module: Path) -> tuple[int, int]:
    """The newest version of glibc's symbols that a shared library asks for."""
    table = subprocess.run(
        ["objdump", "-T", module], capture_output=True, text=True, check=True
    ).stdout
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", table)
    return max((int(major), int(minor)) for major, minor in versions)


def module_of(wheel: Path, out: Path) -> Path:
    """Takes the compiled module out of a wheel.

    Raises:
        FileNotFoundError: it has none.
    """
    with zipfile.ZipFile(wheel) as content:
        for name in content.namelist():
            if re.fullmatch(r"trt_kernels/_C\.[^/]*so", name):
                out.mkdir(parents=True, exist_ok=True)
                target = out / Path(name).name
                with content.open(name) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
                return target
    raise FileNotFoundError(f"{wheel.name} has no compiled module")


def build(python: str, archs: str, out: Path) -> Path:
    """The module for `python`, in `out`; with CUDA for `archs`, or without where that is empty."""
    with tempfile.TemporaryDirectory(prefix="trt_kernels_prebuild_") as folder:
        environment = {**os.environ, "TRT_KERNELS_CUDA": "1" if archs else "0"}
        if archs:
            environment["TRT_KERNELS_CUDA_ARCHS"] = archs
        command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(ROOT)]
        subprocess.run(command, env=environment, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        return module_of(wheel, out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, help="an interpreter with pip")
    parser.add_argument("--archs", default="90-real;90-virtual", help="empty: without CUDA")
    parser.add_argument("--out", type=Path, default=Path("prebuilt"))
    parser.add_argument("--glibc", default="2.34", help="the newest that may be asked for")
    options = parser.parse_args(arguments)
    module = build(options.python, options.archs, options.out)
    needed = newest_glibc(module)
    text = ".".join(map(str, needed))
    if needed > tuple(map(int, options.glibc.split("."))):
        print(f"{module} needs glibc {text}, newer than {options.glibc}")
        return 1
    code = f"import sys; sys.path.insert(0, {str(module.parent)!r}); import _C"
    print(f"{module} needs glibc {text}; copy it into trt_kernels/ there")
    return subprocess.run([options.python, "-c", code]).returncode


if __name__ == "__main__":
    sys.exit(main())
