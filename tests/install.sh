#!/usr/bin/env bash
# Installs the package every way that is promised, each into a virtual environment of its own that
# borrows torch, and uses it from outside the tree; last from the sdist, on every Python that is here.
#
# TRT_KERNELS_PYTHONS="PYTHON..." names the Pythons beside that of .venv. Otherwise they are those of
# 3.10 to 3.13 that are on PATH or in pyenv. One that imports torch runs the whole package, another
# the compiled module alone.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

check='
import torch, trt_kernels as tk
x = torch.randn(4, 100_000, requires_grad=True)
tk.lif(x).sum().backward()
print(tk.__file__)
print(tk.report())
'
site_of() { "$1" -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])'; }
environment() { # name, python: a virtual environment that sees its packages, but not this package
  "$2" -m venv "$work/$1"
  local site
  site=$(site_of "$2" 2>/dev/null) || return 0
  mkdir -p "$work/borrowed/$1"
  for entry in "$site"/*; do
    case $(basename "$entry") in
      *trt_kernels* | __editable__*) ;;
      *) ln -sfn "$entry" "$work/borrowed/$1/$(basename "$entry")" ;;
    esac
  done
  echo "$work/borrowed/$1" >"$(echo "$work/$1"/lib/python3*/site-packages)/borrowed.pth"
}
use() { (cd "$work" && "$work/$1/bin/python" -c "$check" >"$work/$1.txt") && head -2 "$work/$1.txt"; }

# Slow code that is built quickly.
quick="-DTRT_KERNELS_OPTIMIZE=0 -DCMAKE_CXX_FLAGS_RELEASE=-O0 -DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF"
export CMAKE_ARGS="$quick -DTRT_KERNELS_ONLY_BASELINE=ON"

mkdir "$work/tree" && git ls-files -z | xargs -0 cp --parents -t "$work/tree"

echo "== pip install . twice in a row, build isolation on"
environment twice .venv/bin/python
cd "$work/tree"
TRT_KERNELS_CUDA=0 "$work/twice/bin/pip" install --no-deps -q .
TRT_KERNELS_CUDA=0 "$work/twice/bin/pip" install --no-deps -q .
use twice

echo "== pip install -e . --no-build-isolation"
cd "$root"
environment editable .venv/bin/python
cd "$work/tree"
# Without isolation the build tools are the user's: cmake and ninja come from .venv.
"$work/editable/bin/pip" install -q "setuptools>=77"
TRT_KERNELS_CUDA=0 PATH="$root/.venv/bin:$PATH" \
  "$work/editable/bin/pip" install --no-deps --no-build-isolation -q -e .
use editable

echo "== an sdist, a wheel from it, installed outside the tree; its types"
# Of a fresh copy: the one above has what was built in it.
cd "$root"
mkdir "$work/fresh" && git ls-files -z | xargs -0 cp --parents -t "$work/fresh"
environment wheel .venv/bin/python
cd "$work/fresh"
"$root/.venv/bin/python" -c "
from setuptools import build_meta
build_meta.build_sdist('$work/dist')" >/dev/null 2>&1
# One architecture, which .ci/run builds nowhere else.
CMAKE_ARGS=$quick TRT_KERNELS_CUDA_ARCHS=75-real \
  "$work/wheel/bin/pip" wheel --no-deps -q -w "$work/dist" "$work"/dist/*.tar.gz
cd "$root"
.venv/bin/python tests/wheel/contents.py "$work"/dist/*.tar.gz "$work"/dist/*.whl
"$work/wheel/bin/pip" install --no-deps -q "$work"/dist/*.whl
use wheel
if command -v nvcc >/dev/null; then
  grep -q '^cuda  *[0-9]' "$work/wheel.txt" || { echo "the CUDA part is missing"; exit 1; }
fi
mkdir "$work/user" && cp tests/wheel/*.py "$work/user"
cd "$work/user"
"$work/wheel/bin/python" whole_package.py | tail -1
"$root/.venv/bin/mypy" --strict --python-executable "$work/wheel/bin/python" whole_package.py

pythons=${TRT_KERNELS_PYTHONS:-}
own=$("$root/.venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ -z "$pythons" ]; then
  for version in 3.10 3.11 3.12 3.13; do
    [ "$version" = "$own" ] && continue
    found=
    # A shim of pyenv is on PATH and fails, where its version is not chosen.
    for python in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
      "$python" -c 'import venv' 2>/dev/null && found=$python && break
    done
    [ -n "$found" ] && pythons+=" $found" || echo "== Python $version: NOT TESTED, none is here"
  done
fi
for python in $pythons; do
  name=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
  echo "== the sdist on $name ($python)"
  environment "$name" "$python"
  TRT_KERNELS_CUDA=0 "$work/$name/bin/pip" install --no-deps -q "$work"/dist/*.tar.gz
  if "$work/$name/bin/python" -c "import torch" 2>/dev/null; then
    "$work/$name/bin/python" whole_package.py | grep -E '^(torch|python) |works'
  else
    echo "no torch there: the extension alone"
    "$work/$name/bin/python" extension_alone.py
  fi
done
