"""Builds the core with CMake; everything else about the package is in pyproject.toml.

Environment: TRT_KERNELS_CUDA=0|1 forbids or demands the CUDA part, which is built otherwise where
nvcc is found; TRT_KERNELS_CUDA_ARCHS (or TORCH_CUDA_ARCH_LIST) chooses its architectures;
CMAKE_ARGS has further arguments for CMake; TRT_KERNELS_LOCAL_VERSION=cu13 makes the version that of
pyproject.toml with +cu13 behind it, as the wheels with CUDA are named.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# Turing to Hopper as machine code; PTX for what comes after.
DEFAULT_ARCHS = "75-real;80-real;90-real;90-virtual"


class BuildFailed(Exception):
    pass


def find_nvcc():
    """Path of nvcc, or None."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def cuda_archs():
    """CMAKE_CUDA_ARCHITECTURES, from the environment, the GPU present, or the default list."""
    if os.environ.get("TRT_KERNELS_CUDA_ARCHS"):
        return os.environ["TRT_KERNELS_CUDA_ARCHS"].replace(",", ";").replace(" ", ";")
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return from_torch_list(os.environ["TORCH_CUDA_ARCH_LIST"])
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        capabilities = sorted(set(re.findall(r"^(\d+)\.(\d+)$", found, re.MULTILINE)))
    except (OSError, subprocess.SubprocessError):
        capabilities = []
    return ";".join(f"{major}{minor}" for major, minor in capabilities) or DEFAULT_ARCHS


def from_torch_list(text):
    """'8.0;9.0+PTX' as CMake writes it: '80-real;90-real;90-virtual'."""
    archs = []
    for item in re.split(r"[;, ]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", item)
        if not match:
            raise BuildFailed(f"TORCH_CUDA_ARCH_LIST: cannot read {item!r}; give 8.0;9.0+PTX")
        number = match[1] + match[2]
        archs += [f"{number}-real"] + ([f"{number}-virtual"] if match[3] else [])
    return ";".join(archs)


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        wanted = os.environ.get("TRT_KERNELS_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"TRT_KERNELS_CUDA: got {wanted!r}, needs 0 or 1")
        nvcc = find_nvcc()
        missing = "forbidden by TRT_KERNELS_CUDA=0" if wanted == "0" else "nvcc was not found"
        if wanted == "1" and not nvcc:
            raise SystemExit("TRT_KERNELS_CUDA=1, but nvcc was not found")
        if nvcc and wanted != "0":
            try:
                self.build_core(target, nvcc=nvcc)
                return
            except BuildFailed as error:
                if wanted == "1":
                    raise SystemExit(f"TRT_KERNELS_CUDA=1, but {error}") from error
                missing = str(error)
                print(f"trt_kernels: no CUDA kernels: {missing}", file=sys.stderr)
        try:
            self.build_core(target, missing=missing)
        except BuildFailed as error:
            raise SystemExit(f"trt_kernels: {error}") from error

    def build_core(self, target, nvcc=None, missing=""):
        """Configures from scratch (an isolated build's tools are gone by the next), then builds."""
        import pybind11

        folder = Path(self.build_temp).resolve() / ("cuda" if nvcc else "cpu")
        folder.mkdir(parents=True, exist_ok=True)
        # CMake hands this text to the compiler within quotes.
        missing = re.sub(r"[^\w .,:=/()+-]+", " ", missing)[:300]
        configure = [
            "cmake",
            "--fresh",
            "-GNinja",
            f"-S{ROOT}",
            f"-B{folder}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTRT_KERNELS_CUDA_MISSING={missing}",
            f"-DTRT_KERNELS_WITH_CUDA={'ON' if nvcc else 'OFF'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        if nvcc:
            configure += [
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
                f"-DCMAKE_CUDA_ARCHITECTURES={cuda_archs()}",
            ]
        for command in (configure, ["cmake", "--build", str(folder), "--target", "_C"]):
            try:
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            except FileNotFoundError as error:
                raise BuildFailed(f"{command[0]} was not found: pip install cmake ninja") from error
            print(done.stdout)
            if done.returncode:
                raise BuildFailed(f"{' '.join(command[:2])} failed: {first_error(done.stdout)}")


def first_error(output):
    """The line of a build's output that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    return (errors or lines or ["no output"])[0]


def local_version():
    """What stands behind the version: '+cu13', or nothing."""
    label = os.environ.get("TRT_KERNELS_LOCAL_VERSION", "")
    if not re.fullmatch(r"([a-z0-9]+(\.[a-z0-9]+)*)?", label):
        raise SystemExit(f"TRT_KERNELS_LOCAL_VERSION: got {label!r}, needs a label such as cu13")
    return f"+{label}" if label else ""


setup(
    options={"egg_info": {"tag_build": local_version()}},
    ext_modules=[Extension("trt_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
