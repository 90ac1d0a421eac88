"""The compiled module of an installed wheel, without PyTorch, which the package imports.

It takes addresses, so arrays of the standard library serve. For Pythons that have no PyTorch here.
"""

import importlib.util
import random
from array import array
from pathlib import Path

origin = importlib.util.find_spec("trt_kernels").origin
(library,) = Path(origin).parent.glob("_C.*.so")
spec = importlib.util.spec_from_file_location("trt_kernels._C", library)
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)

STEPS, NEURONS = 6, 10_000
random.seed(0)
# Multiples of 0.1, so that many potentials meet the threshold exactly.
x = array("f", (random.randrange(-5, 15) / 10 for _ in range(STEPS * NEURONS)))
lif = _C.LIF(
    charge="decay",
    reset="hard",
    surrogate="triangle",
    phi="",
    decay=0.5,
    tau=2.0,
    threshold=1.0,
    v_reset=0.0,
    detach_reset=False,
    fire_at_threshold=False,
    surrogate_parameter=1.0,
    delta=0.0,
    eps=0.0,
    scale=1.0,
    batch=False,
    bits=0,
)


def address(values):
    return values.buffer_info()[0]


def rounded(value):
    """To float32: a sum of two float32 that is rounded twice, once to float64, is the same."""
    return array("f", [value])[0]


expected = array("f", bytes(4 * len(x)))
for neuron in range(NEURONS):
    v = 0.0
    for i in range(neuron, len(x), NEURONS):
        h = rounded(0.5 * v + x[i])
        expected[i] = h > 1.0
        v = 0.0 if expected[i] else h
assert 0 < sum(expected) < len(x)

for level in _C.cpu_levels():
    _C.set_cpu_level(level)
    for threads in (1, 2):
        spikes = array("f", bytes(4 * len(x)))
        lif.cpu_forward_plain(
            _C.DType.float32, [STEPS, NEURONS], 0, address(x), address(spikes), threads
        )
        assert spikes == expected, (level, threads)
print(library)
print(_C.build_info())
print("the extension works without PyTorch, at the levels", ", ".join(_C.cpu_levels()))
