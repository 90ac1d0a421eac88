"""The CUDA kernels as machine code: what can be known of their speed where there is no GPU."""

import re
import shutil
from functools import cache
from pathlib import Path

import pytest

from tests.machine_code import Kernel, disassemble, dump
from trt_kernels.backends import native

ARCHITECTURES = ("sm_80", "sm_90")
# Registers a thread, at most. With as many, an SM of 65,536 holds as many threads as stand beside.
BUDGET = {
    r"plain_(forward|backward)_kernel<float, \d>": 64,  # 1,024
    r"plain_forward_kernel<(BFloat16|Half), \d>": 72,  # 896
    r"plain_backward_kernel<(BFloat16|Half), \d>": 96,  # 640
    r"plain_(forward|backward)_kernel<double, \d>": 96,
    r"forward_kernel<(float|BFloat16|Half), \d, false>": 96,
    r"forward_kernel<double, \d, false>": 128,  # 512
    r"forward_kernel<\w+, \d, true>": 136,  # 384
    r"backward_kernel<(float|BFloat16|Half), \d, false>": 128,
    r"backward_kernel<double, \d, false>": 176,  # 256
    r"backward_kernel<\w+, \d, true>": 216,  # 256
    r"moments_kernel<\w+, \d, false>": 56,  # 1,152
    r"moments_kernel<\w+, \d, true>": 96,
    r"(rate|statistics)_kernel<\w+>": 32,  # 2,048
    r"channel_sums_kernel<\w+, \w+>": 32,
    r"(penalty|growth|terms)_kernel<\w+>": 64,
    r"(value|gradient)_kernel<float, (80|800)>": 48,  # 1,280: of the penalty
    r"(value|gradient)_kernel<double, (80|800)>": 96,
    r"(value|gradient)_kernel<(float|BFloat16|Half), (32|256)>": 96,  # of the loss
    r"(value|gradient)_kernel<double, (32|256)>": 176,
    r"(pack|unpack)_kernel<unsigned \w+>": 32,
    r"nothing\(?\)?": 16,
}
FULL = {"float": 4, "double": 2, "BFloat16": 8, "Half": 8}  # elements of a 16-byte access
# Neurons a thread of the kernels that do everything, and the access that moves them.
WIDE = {"float": (4, "128"), "double": (2, "128"), "BFloat16": (4, "64"), "Half": (4, "64")}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")


@cache
def kernels(architecture) -> list[Kernel]:
    found = disassemble(Path(native._C.__file__), architecture)
    assert found, f"nothing is compiled for {architecture}"
    return found


def named(architecture, pattern) -> list[Kernel]:
    found = [k for k in kernels(architecture) if re.fullmatch(pattern, k.name)]
    assert found, pattern
    return found


def test_ptx_for_what_comes_after():
    assert "sm_90.ptx" in dump(Path(native._C.__file__), "-lptx", None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_and_no_local_memory(architecture):
    for kernel in kernels(architecture):
        budgets = [b for pattern, b in BUDGET.items() if re.fullmatch(pattern, kernel.name)]
        assert budgets, f"no budget for {kernel.name}"
        assert kernel.registers <= min(budgets), kernel.name
        # A spill shows as stack, and as loads and stores of local memory.
        assert kernel.stack == kernel.local == kernel.count("LDL", "STL") == 0, kernel.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("storage", FULL)
def test_plain_lif_moves_sixteen_bytes_at_a_time(architecture, storage):
    """Where addresses allow; every access to global memory."""
    for direction in ("forward", "backward"):
        (plain,) = named(architecture, rf"plain_{direction}_kernel<{storage}, {FULL[storage]}>")
        assert plain.count("LDG.E.128") == plain.count("LDG", "LD.E") > 4
        assert plain.count("STG.E.128") == plain.count("STG", "ST.E") > 0
        # Potentials of the backward go through shared memory by as much.
        if direction == "backward":
            assert plain.count("LDS.128") == plain.count("LDS") > 0
            assert plain.count("STS.128") == plain.count("STS") > 0
        assert moves_in_a_loop(plain, "LDG.E.128") and moves_in_a_loop(plain, "STG.E.128")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("storage", WIDE)
def test_lif_moves_the_neurons_of_a_thread_at_once(architecture, storage):
    """With everything beside spikes: sequences by as much as a thread's neurons are."""
    width, bits = WIDE[storage]
    for direction in ("forward", "backward"):
        for kernel in named(architecture, rf"{direction}_kernel<{storage}, {width}, \w+>"):
            assert moves_in_a_loop(kernel, f"LDG.E.{bits}"), kernel.name
            assert moves_in_a_loop(kernel, f"STG.E.{bits}"), kernel.name
            assert loads_before_a_use(kernel, f"LDG.E.{bits}") >= 4, kernel.name


def moves_in_a_loop(kernel: Kernel, opcode: str) -> bool:
    return any(i.opcode.startswith(opcode) for loop in kernel.loops() for i in loop)


def loads_before_a_use(kernel: Kernel, opcode: str) -> int:
    """The most loads of a loop that are issued before something needs one of them."""
    longest = 0
    for loop in kernel.loops():
        pending: set[str] = set()
        for instruction in loop:
            registers = re.findall(r"\bR\d+", instruction.text)
            if instruction.opcode.startswith(opcode) and registers[0] not in pending:
                pending.add(registers[0])
                longest = max(longest, len(pending))
            elif pending.intersection(registers):
                pending.clear()
    return longest


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_loads_are_in_flight(architecture):
    for storage, width in FULL.items():
        for direction in ("forward", "backward"):
            (lif,) = named(architecture, rf"plain_{direction}_kernel<{storage}, {width}>")
            assert loads_before_a_use(lif, "LDG.E.128") >= 4, lif.name
            (lif,) = named(architecture, rf"plain_{direction}_kernel<{storage}, 1>")
            assert loads_before_a_use(lif, "LDG.E") >= (4 if storage == "double" else 8), lif.name
        for moments in named(architecture, rf"moments_kernel<{storage}, {width}, \w+>"):
            assert loads_before_a_use(moments, "LDG.E.128") >= 4, moments.name
    for loss in named(architecture, r"(value|gradient)_kernel<(float|BFloat16), (32|256)>"):
        assert loads_before_a_use(loss, "LDG.E") >= 8, loss.name
    for sums in named(architecture, r"channel_sums_kernel<\w+, \w+>"):
        assert loads_before_a_use(sums, "LDG.E") >= 4, sums.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_contracted_where_a_spike_is_decided(architecture):
    """The plain kernels, whose charge has no division: a division would bring its own FFMA."""
    for kernel in named(architecture, r"plain_\w+_kernel<(float|BFloat16|Half), \d>"):
        assert kernel.count("FFMA", "HFMA2.BF16", "HFMA2 ") == 0, kernel.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_penalty_moves_sixteen_bytes_and_shares_reciprocals(architecture):
    for kernel in named(architecture, r"(value|gradient)_kernel<float, (80|800)>"):
        assert kernel.count("LDG.E.128") >= 4
        assert kernel.count("STG.E.128") >= (4 if kernel.name.startswith("gradient") else 0)
    (value,) = named(architecture, r"value_kernel<float, 80>")
    # A loop over pairs of terms has 8 elements and a reciprocal for each, and little beside.
    pairs = [loop for loop in value.loops() if sum(i.opcode == "MUFU.RCP" for i in loop) == 8]
    assert pairs and min(map(len, pairs)) <= 64


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_spikes_are_packed_sixteen_bytes_at_a_time(architecture):
    for word, count in {"short": 1, "int": 2, "long": 4}.items():
        (pack,) = named(architecture, rf"pack_kernel<unsigned {word}>")
        (unpack,) = named(architecture, rf"unpack_kernel<unsigned {word}>")
        assert pack.count("LDG.E.128") == unpack.count("STG.E.128") == count


def test_no_atomics_on_floating_point():
    for architecture in ARCHITECTURES:
        for kernel in kernels(architecture):
            for instruction in kernel.code:
                if instruction.opcode.startswith(("ATOM", "RED")):
                    assert ".F" not in instruction.opcode, (kernel.name, instruction.text)
