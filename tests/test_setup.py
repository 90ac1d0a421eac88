"""The pieces of setup.py that decide what is built."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

import trt_kernels as tk
from trt_kernels.backends import native

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup_module(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("trt_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_architectures(setup_module, monkeypatch):
    for name in ("TRT_KERNELS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    assert setup_module.cuda_archs() == setup_module.DEFAULT_ARCHS
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 10.0+PTX")
    assert setup_module.cuda_archs() == "80-real;90a-real;100-real;100-virtual"
    monkeypatch.setenv("TRT_KERNELS_CUDA_ARCHS", "80,90")
    assert setup_module.cuda_archs() == "80;90"
    with pytest.raises(setup_module.BuildFailed, match="cannot read 'Hopper'"):
        setup_module.from_torch_list("Hopper")


def test_first_error(setup_module):
    output = "[1/3] Building\nx.cu(3): error: bad thing\nninja: build stopped\n"
    assert setup_module.first_error(output) == "x.cu(3): error: bad thing"
    assert setup_module.first_error("") == "no output"


def commands(folder, *options):
    """How CMake would compile the core, by source."""
    tools = Path(sys.executable).parent
    here = {
        name: shutil.which(name, path=tools) or shutil.which(name) for name in ("cmake", "ninja")
    }
    if None in here.values():
        pytest.skip("needs cmake and ninja")
    done = subprocess.run(
        [
            *(here["cmake"], "-GNinja", "-S", ROOT, "-B", folder),
            f"-DCMAKE_MAKE_PROGRAM={here['ninja']}",
            "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
            "-DTRT_KERNELS_WITH_PYTHON=OFF",
            *options,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads((folder / "compile_commands.json").read_text())
    return [(Path(entry["file"]), entry["command"]) for entry in entries]


def test_nothing_may_be_contracted(tmp_path):
    """On no level of the CPU: of the flags the last counts, and none may take it back."""
    found = commands(tmp_path, "-DTRT_KERNELS_WITH_TESTS=ON")
    assert {"lif_forward.cpp", "loss.cpp", "dispatch.cpp", "lif.cu"} <= {f.name for f, _ in found}
    for file, command in found:
        assert re.findall(r"-ffp-contract=\w+", command)[-1:] == ["-ffp-contract=off"], file
        assert not re.search(r"-ffast-math|-Ofast|-funsafe-math|-fassociative", command), file


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_nothing_may_be_contracted_on_a_gpu(tmp_path):
    options = (
        f"-DCMAKE_CUDA_COMPILER={shutil.which('nvcc')}",
        "-DCMAKE_CUDA_ARCHITECTURES=90-real",
    )
    found = commands(tmp_path, "-DTRT_KERNELS_WITH_CUDA=ON", *options)
    kernels = [(file, command) for file, command in found if file.suffix == ".cu"]
    assert {"lif.cu", "plain_lif.cu", "penalty.cu"} <= {file.name for file, _ in kernels}
    for file, command in kernels:
        assert re.findall(r"-fmad[= ](\w+)", command) == ["false"], file
        assert "use_fast_math" not in command, file


def build(tmp_path, **environment):
    """Builds the extension into tmp_path."""
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "-b", tmp_path / "lib", "-t", tmp_path / "temp"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_bad_settings_are_refused(tmp_path):
    done = build(tmp_path, TRT_KERNELS_CUDA="yes")
    assert done.returncode and "TRT_KERNELS_CUDA: got 'yes', needs 0 or 1" in done.stderr
    missing = {"TRT_KERNELS_CUDA": "1", "CUDA_HOME": "", "CUDA_PATH": "", "PATH": str(tmp_path)}
    done = build(tmp_path, **missing)
    assert done.returncode and "nvcc was not found" in done.stderr


@pytest.mark.slow
def test_a_failing_cuda_build_leaves_a_cpu_package_and_a_reason(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal error: broken on purpose' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    quick = {
        "CMAKE_ARGS": "-DTRT_KERNELS_ONLY_BASELINE=ON -DTRT_KERNELS_OPTIMIZE=0",
        "CUDA_HOME": str(tmp_path),
    }
    done = build(tmp_path, TRT_KERNELS_CUDA="", **quick)
    assert done.returncode == 0, done.stdout + done.stderr
    (library,) = (tmp_path / "lib").rglob("_C*")
    code = (
        "import torch, importlib.util as u\n"
        f"s = u.spec_from_file_location('_C', {str(library)!r})\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        "print(m.build_info()['cuda_missing'])\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "failed" in shown.stdout
    done = build(tmp_path, TRT_KERNELS_CUDA="1", **quick)
    assert done.returncode and "TRT_KERNELS_CUDA=1, but" in done.stderr


def test_the_version_stands_in_one_place(tmp_path):
    written = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[
        1
    ]
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path]

    def described(label):
        environment = {**os.environ, "TRT_KERNELS_LOCAL_VERSION": label}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    for label, version in (("", written), ("cu13", f"{written}+cu13")):
        described(label).check_returncode()
        info = (tmp_path / "trt_kernels.egg-info" / "PKG-INFO").read_text()
        assert f"\nVersion: {version}\n" in info
    assert "needs a label such as cu13" in described("+cu13").stderr
    assert tk.report().versions["trt_kernels"] == tk.__version__


def test_a_tree_that_is_not_installed_has_no_version(tmp_path):
    """-S leaves out site-packages, where an installation would be found; no torch is needed."""
    module = ROOT / "trt_kernels" / "version.py"
    code = f"import runpy; print(runpy.run_path({str(module)!r})['__version__'])"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "0+unknown\n"


def test_the_script_for_wheels_uses_every_public_name():
    """That is, every entry of the reference, which tests/test_docs.py keeps complete."""
    tree = ast.parse((ROOT / "tests" / "wheel" / "whole_package.py").read_text())
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    reference = (ROOT / "docs" / "api.md").read_text()
    names = re.findall(r"^::: trt_kernels\.(?:report\.|compat\.)?(\S+)", reference, re.MULTILINE)
    public = {name if name.startswith("trt.") else f"tk.{name}" for name in names}
    assert len(public) > 30 and public <= used, public - used


def signature(text):
    """(name where it can be given by name, type) of each argument but self, and the return type."""
    for written, meant in (
        ("typing.SupportsInt | typing.SupportsIndex", "int"),
        ("typing.SupportsFloat | typing.SupportsIndex", "float"),
        ("trt_kernels._C.", ""),
        ("collections.abc.", ""),
        ("_PenaltyRow", "tuple[DType, int, int, int, bool]"),
        ("Address", "int"),
        ("dict[str, Any]", "dict"),
    ):
        text = text.replace(written, meant)
    (function,) = ast.parse(f"def {text}: ...").body
    given = [*function.args.args, *function.args.kwonlyargs]
    found = [("", a) for a in function.args.posonlyargs]
    found += [("" if re.fullmatch(r"arg\d+", a.arg) else a.arg, a) for a in given]
    return (
        [(name, ast.unparse(a.annotation)) for name, a in found if a.arg != "self"],
        [a.arg for a in function.args.kwonlyargs],
        ast.unparse(function.returns),
    )


def stub_of(body, classes):
    """Names to signatures, of functions, and to None, of all else; a class has one in it."""
    names = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            names[node.name] = signature(re.sub(r"^def |:\s+\.\.\.$", "", ast.unparse(node)))
        elif isinstance(node, ast.ClassDef):
            inherited = [classes[base.id] for base in node.bases]
            names[node.name] = classes[node.name] = {}
            for part in (*inherited, stub_of(node.body, classes)):
                names[node.name] |= part
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) != "TypeAlias":
            names[node.target.id] = None
    return names


def compiled(names):
    found = {}
    for name, value in names.items():
        if isinstance(value, type):
            members = {"DType": value.__members__} if name == "DType" else {name: vars(value)}
            found[name] = compiled(members[name])
        elif name == "__init__" or name[0] != "_":
            text = (getattr(value, "__doc__", None) or "").split("\n")[0]
            found[name] = signature(text) if re.match(rf"{name}\(", text) else None
    return found


def test_the_stub_is_the_compiled_module():
    tree = ast.parse((ROOT / "trt_kernels" / "_C.pyi").read_text())
    written = stub_of(tree.body, {})
    del written["_Arguments"]
    if native._C.build_info()["cuda"] is None:
        for names in (written, *(part for part in written.values() if isinstance(part, dict))):
            for name in [n for n in names if n.startswith("cuda") and n != "cuda_devices"]:
                del names[name]
    assert compiled(vars(native._C)) == written
