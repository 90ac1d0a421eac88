"""Builds the compiled module here for the Python of a machine that is lent for minutes.

python -m benchmarks.prebuild --python python3.12 --archs "90-real;90-virtual" --out prebuilt

The module is then copied into `trt_kernels/` there. It fits every PyTorch of that Python; the
newest glibc that it asks for is printed, and refused if it is newer than --glibc.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What setup.py imports; the first replaces Python's distutils by that of setuptools.
IMPORTED = ("_distutils_hack", "setuptools", "pybind11")


def newest_glibc(module: Path) -> tuple[int, int]:
    """The newest version of glibc's symbols that a shared library asks for."""
    table = subprocess.run(
        ["objdump", "-T", module], capture_output=True, text=True, check=True
    ).stdout
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", table)
    return max((int(major), int(minor)) for major, minor in versions)


def build_tools(folder: Path) -> dict[str, str]:
    """An environment with this Python's cmake and ninja, and in `folder` what setup.py imports.

    All that is missing here is installed into `folder` by pip."""
    places = {name: importlib.util.find_spec(name) for name in IMPORTED}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    programs = [shutil.which(name, path=path) for name in ("cmake", "ninja")]
    if all(programs) and all(places.values()):
        folder.mkdir()
        for name, place in places.items():
            if place is not None and place.origin is not None:
                (folder / name).symlink_to(Path(place.origin).parent)
    else:
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder)]
        subprocess.run([*command, "setuptools>=77", "pybind11", "cmake", "ninja"], check=True)
        path = os.pathsep.join((str(folder / "bin"), path))
    return {**os.environ, "PATH": path, "PYTHONPATH": str(folder)}


def build(python: str, archs: str, out: Path) -> Path:
    """The module for `python`, in `out`; with CUDA for `archs`, or without where that is empty.

    Nothing is installed into `python`, and nothing is written into the tree.

    Raises:
        subprocess.CalledProcessError: the build failed; its output has been shown.
        FileNotFoundError: it left no module.
    """
    with tempfile.TemporaryDirectory(prefix="trt_kernels_prebuild_") as scratch:
        folder = Path(scratch)
        environment = {**build_tools(folder / "tools"), "TRT_KERNELS_CUDA": "1" if archs else "0"}
        if archs:
            environment["TRT_KERNELS_CUDA_ARCHS"] = archs
        command = [
            python,
            "setup.py",
            "-q",
            "build_ext",
            "-b",
            folder / "lib",
            "-t",
            folder / "temp",
        ]
        subprocess.run(command, env=environment, cwd=ROOT, check=True)
        for module in (folder / "lib" / "trt_kernels").glob("_C.*so"):
            out.mkdir(parents=True, exist_ok=True)
            return Path(shutil.copy(module, out))
    raise FileNotFoundError(f"{' '.join(map(str, command))} left no compiled module")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, help="an interpreter; needs no package")
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
    if subprocess.run([options.python, "-c", code]).returncode:
        print(f"{module} cannot be imported by {options.python}")
        return 1
    print(f"{module} needs glibc {text}; copy it into trt_kernels/ there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
