#!/usr/bin/env bash
# Installs the package every way that is promised, each into a virtual environment of its own that
# borrows torch from .venv, and uses it from outside the tree.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$(.venv/bin/python -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])')

check='
import torch, trt_kernels as tk
x = torch.randn(4, 100_000, requires_grad=True)
tk.lif(x).sum().backward()
print(tk.__file__)
print(tk.report())
'
environment() { # name: a virtual environment that sees .venv'"'"'s packages, but not this package
  .venv/bin/python -m venv "$work/$1"
  mkdir -p "$work/borrowed"
  for entry in "$site"/*; do
    case $(basename "$entry") in
      *trt_kernels* | __editable__*) ;;
      *) ln -sfn "$entry" "$work/borrowed/$(basename "$entry")" ;;
    esac
  done
  echo "$work/borrowed" >"$(echo "$work/$1"/lib/python3*/site-packages)/borrowed.pth"
}
use() { (cd "$work" && "$work/$1/bin/python" -c "$check" >"$work/$1.txt") && head -2 "$work/$1.txt"; }

# Slow code that is built quickly.
export CMAKE_ARGS="-DTRT_KERNELS_ONLY_BASELINE=ON -DTRT_KERNELS_OPTIMIZE=0"

mkdir "$work/tree" && git ls-files -z | xargs -0 cp --parents -t "$work/tree"
cd "$work/tree"

echo "== pip install . twice in a row, build isolation on"
cd "$root" && environment twice && cd "$work/tree"
TRT_KERNELS_CUDA=0 "$work/twice/bin/pip" install --no-deps -q .
TRT_KERNELS_CUDA=0 "$work/twice/bin/pip" install --no-deps -q .
use twice

echo "== pip install -e . --no-build-isolation"
cd "$root" && environment editable && cd "$work/tree"
# Without isolation the build tools are the user's: cmake and ninja come from .venv, and an old
# setuptools would need the package wheel.
"$work/editable/bin/pip" install -q "setuptools>=70.1"
TRT_KERNELS_CUDA=0 PATH="$root/.venv/bin:$PATH" \
  "$work/editable/bin/pip" install --no-deps --no-build-isolation -q -e .
use editable

echo "== a wheel, installed outside the tree"
cd "$root" && environment wheel && cd "$work/tree"
# One architecture, which .ci/run builds nowhere else.
CMAKE_ARGS=-DTRT_KERNELS_OPTIMIZE=0 TRT_KERNELS_CUDA_ARCHS=75-real "$work/wheel/bin/pip" wheel --no-deps -q -w "$work/dist" .
"$work/wheel/bin/pip" install --no-deps -q "$work"/dist/*.whl
use wheel
if command -v nvcc >/dev/null; then
  grep -q '^cuda  *[0-9]' "$work/wheel.txt" || { echo "the CUDA part is missing"; exit 1; }
fi
