"""More than 2³¹ elements on the CPU, in little memory: a tensor whose pages repeat a small pattern.

The outputs of the compiled kernels go to such tensors too, where the writes of a pattern's repeats
fall together, and so must agree with it. GPUs: test_gpu.py, and csrc/huge_cuda_host.cpp.
"""

import ctypes
import math
import mmap
import os
import sys

import pytest
import torch

import trt_kernels as tk
from trt_kernels import ops, packing
from trt_kernels.backends import native, reference

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does"),
    pytest.mark.slow,
]
TIMES = 1024


@pytest.fixture
def repeated():
    """repeated(pattern, times): the pattern [rows, n], each row `times` over: [rows, n·times]."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    mapped = []

    def map_at(address, size, protection, flags, fd=-1, offset=0):
        found = libc.mmap(address, size, protection, flags, fd, offset)
        if found in (None, ctypes.c_void_p(-1).value):
            pytest.skip(f"no {size} bytes of addresses: {os.strerror(ctypes.get_errno())}")
        return found

    def make(pattern, times=TIMES):
        rows, size = len(pattern), pattern[0].nbytes
        assert size % mmap.PAGESIZE == 0
        fd = os.memfd_create("pattern")
        os.write(fd, pattern.contiguous().view(torch.uint8).numpy().tobytes())
        total = rows * size * times
        shared, fixed = mmap.MAP_SHARED, 0x10
        base = map_at(None, total, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
        mapped.append((base, total))
        for row in range(rows):
            for i in range(times):
                at = base + (row * times + i) * size
                map_at(at, size, mmap.PROT_READ | mmap.PROT_WRITE, shared | fixed, fd, row * size)
        os.close(fd)
        memory = (ctypes.c_ubyte * total).from_address(base)
        return torch.frombuffer(memory, dtype=pattern.dtype).view(rows, -1)

    yield make
    for base, total in mapped:
        libc.munmap(base, total)


def pattern_of(whole, rows):
    """What one repeat holds, the last."""
    size = whole.shape[1] // TIMES
    return whole.view(rows, -1)[:, -size:].clone()


STEPS, WIDTH = 3, 2**20
SHORT = torch.bfloat16


def test_lif(repeated):
    """[3, 2³⁰], forward and backward. What threads take besides does not grow with x."""
    x_small = torch.randn(STEPS, WIDTH).to(SHORT)
    grad_small = torch.randn(STEPS, WIDTH).to(SHORT)
    x, grad = repeated(x_small), repeated(grad_small)
    assert x.numel() > 2**31
    spikes, grad_x = (repeated(torch.zeros(STEPS, WIDTH, dtype=SHORT)) for _ in range(2))
    leaf = x_small.clone().requires_grad_()
    expected = tk.lif(leaf)
    expected.backward(grad_small)

    tk.functional._checked.clear()
    tk.lif(torch.zeros(1, 1))
    ((options, _),) = tk.functional._checked.values()
    handle = native.lif_handle(options)
    head = (native.DTYPES[SHORT], x.shape, 0, x.data_ptr())
    threads = torch.get_num_threads()
    handle.cpu_forward_plain(*head, spikes.data_ptr(), threads)
    assert torch.equal(pattern_of(spikes, STEPS), expected)
    handle.cpu_backward_plain(*head, grad.data_ptr(), grad_x.data_ptr(), threads)
    assert torch.equal(pattern_of(grad_x, STEPS), leaf.grad)


def test_penalty(repeated):
    """A sum over 3·2³⁰ weights, and its gradient."""
    small = torch.randn(1, WIDTH).to(SHORT)
    w, grad = repeated(small, 3 * TIMES), repeated(torch.zeros_like(small), 3 * TIMES)
    leaf = small.double().requires_grad_()
    settings = {"steps": 4, "weight": 1.0, "delta": 0.5}
    exact = tk.trt_penalty([leaf], **settings, backend="reference")
    assert float(tk.trt_penalty([w], **settings)) == pytest.approx(
        float(exact) * 3 * TIMES, rel=1e-6
    )
    parameter = torch.nn.Parameter(w)
    parameter.grad = grad
    # Of nothing: thousands of sums that fall together would be rounded, and race.
    tk.trt_penalty_([parameter], **settings, scale=0.0)
    assert not grad[0, -WIDTH:].any()


def test_loss(repeated):
    """2²¹ + 2¹⁰ rows of 1024 classes."""
    small = torch.randn(1, WIDTH).to(SHORT)
    logits = repeated(small, 2 * TIMES + 1).view(1, -1, 1024)
    assert logits.numel() > 2**31
    target = torch.randint(1024, (1024,))
    value = tk.temporal_loss(logits, target.repeat(2 * TIMES + 1), mse_ratio=0.5)
    exact = tk.temporal_loss(
        small.view(1, 1024, 1024).double(), target, mse_ratio=0.5, backend="reference"
    )
    assert float(value) == pytest.approx(float(exact), rel=1e-6)


def test_statistics(repeated):
    """Sums over 2³¹ numbers a channel keep the digits of float64."""
    small = torch.randn(1, WIDTH) + 100
    x = repeated(small, 2048)
    stats = ops.batch_statistics(x.view(1, -1), 0, 1e-5, 1, "cpu").double()
    exact = small.double()
    mean, variance = exact.mean(), exact.var(unbiased=False)
    assert float(stats[0] + stats[1]) == pytest.approx(float(mean), rel=1e-12)
    assert float(stats[2]) == pytest.approx(1 / math.sqrt(float(variance) + 1e-5), rel=1e-6)


def test_bits(repeated):
    spikes = repeated((torch.rand(1, WIDTH) < 0.3).to(SHORT), 2 * TIMES + 1)
    bits, binary = native.spike_pack(spikes, *packing._which("cpu"))
    assert binary and bits.numel() == spikes.numel() // 8
    rows = bits.view(-1, WIDTH // 8)
    expected = reference.spike_pack(spikes[0, :WIDTH])[0]
    for row in (0, TIMES, 2 * TIMES):  # the last is beyond 2³¹ spikes
        assert torch.equal(rows[row], expected[0])
