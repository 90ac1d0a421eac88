"""What is Triton's own: kernels compiled without a device and read, launches, and who is served.

The tests of the operators run its kernels in Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trt_kernels as tk
from tests import cases, fake_gpu
from tests.machine_code import disassemble
from trt_kernels import ops
from trt_kernels.backends import triton as backend
from trt_kernels.backends.layout import CHECKPOINT_EVERY
from trt_kernels.options import LIFGrads, LIFTensors, LIFWanted

LIF = cases.LIF._replace(backend="triton")
PENALTY = cases.PENALTY._replace(steps=6, weight=1e-5, delta=0.25, backend="triton")
LOSS = cases.LOSS._replace(entropy_ratio=0.95, square_ratio=0.05, backend="triton")

# --- In a process of its own, without the interpreter: the operators' own launches, only compiled.


class NoDevice:
    """Takes the place of Triton's driver where there is no device, and says what to compile for."""

    def __init__(self, architecture):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("hip", architecture, 64)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_and_launch(architecture, folder, launched):
    """From here on a launch calls `launched` with its kernel's name and what was compiled.

    NVIDIA's kernels are launched on a fake GPU, by Triton's launcher; AMD's are only compiled.
    """
    import triton
    from triton.runtime.jit import JITFunction

    only_compiled = not architecture.startswith("sm_")
    if only_compiled:
        triton.runtime.driver.set_active(NoDevice(architecture))
    else:
        gpu = fake_gpu.install(architecture, Path(folder) / "driver")

    def launch(kernel, grid):
        def run(*arguments, **options):
            before = None if only_compiled else gpu.launches
            result = kernel.run(*arguments, grid=grid, warmup=only_compiled, **options)
            assert only_compiled or gpu.launches == before + 1, kernel.__name__
            launched(kernel.__name__, result)

        return run

    JITFunction.__getitem__ = launch


def run_lif(steps, dtype, *, neurons=4096, full=False, constant=False, **changed):
    """Both directions, of spikes alone or of everything that `lif` can return."""
    from trt_kernels.backends.triton import operators

    options = LIF._replace(**changed)
    x, tensors = torch.zeros(steps, neurons, dtype=dtype), LIFTensors()
    grads = LIFGrads(x)
    if constant:
        x, options = x[0], options._replace(steps=steps)
    if full:
        options = options._replace(phi="trt", return_state=True, return_potential=True)
        state = torch.zeros(neurons)
        tensors = LIFTensors(state, torch.ones(steps))
        grads = LIFGrads(x, state, x.float(), torch.ones(()))
    results = operators.lif_forward(x, tensors, True, options)
    kept = results.checkpoints, results.bits, None
    operators.lif_backward(x, tensors, *kept, grads, LIFWanted(v_init=full), options)


def run_by_channel(shape, dtype, *, norm=False, **changed):
    """Both directions with values by channel, and all their gradients; x is [T, B, C, *]."""
    from trt_kernels.backends.triton import operators

    options = LIF._replace(channel_dim=1, statistics=True, batch=norm, **changed)
    x, channels = torch.zeros(shape, dtype=dtype), shape[2]
    stats = None
    if norm:
        stats = operators.batch_statistics(x, 2, 1e-5, 1, "triton")
    weight = gains = None
    if norm:
        weight, gains = torch.ones(channels), torch.ones(shape[0], channels)
    tensors = LIFTensors(None, None, torch.ones(3, channels), stats, weight, weight, gains)
    results = operators.lif_forward(x, tensors, True, options)
    kept = results.checkpoints, results.bits, None
    wanted = LIFWanted(neuron=True, affine=norm, gains=norm)
    operators.lif_backward(x, tensors, *kept, LIFGrads(x), wanted, options)


def run_pack():
    from trt_kernels.backends.triton import operators

    bits, _ = operators.spike_pack(torch.zeros(4096))
    operators.spike_unpack(bits, 1, 1, 4096, SINGLE)


def run_penalty(sizes, dtype, scale=1.0, **changed):
    from trt_kernels.backends.triton import operators

    options = PENALTY._replace(**changed)
    params = [torch.zeros(size, dtype=dtype) for size in sizes]
    operators.trt_penalty_forward(params, options)
    operators.trt_penalty_backward(torch.ones(()), params, options)
    operators.trt_penalty_accumulate(params, params, scale, options)


def run_loss(batch, classes, dtype, *, probabilities=False, **changed):
    from trt_kernels.backends.triton import operators

    options = LOSS._replace(**changed)
    logits, target = torch.zeros(6, batch, classes, dtype=dtype), torch.zeros(batch).long()
    if probabilities:
        target = torch.zeros(batch, classes)
    value, *kept = operators.temporal_loss_forward(logits, target, None, options)
    operators.temporal_loss_backward(value, logits, target, None, *kept, options)


HALF, SINGLE = torch.bfloat16, torch.float32
BITS = {"surrogate": "rectangle", "detach_reset": True, "bits": 2}
CASES = {
    "lif 6 float32": lambda: run_lif(6, SINGLE),
    "lif 16 float32": lambda: run_lif(16, SINGLE),
    "lif 17 float32": lambda: run_lif(17, SINGLE),
    "lif 6 bfloat16": lambda: run_lif(6, HALF),
    "lif 16 bfloat16": lambda: run_lif(16, HALF),
    "lif 17 bfloat16": lambda: run_lif(17, HALF),
    "full 6 float32": lambda: run_lif(6, SINGLE, full=True, surrogate="sigmoid", reset="soft"),
    "full 6 bfloat16": lambda: run_lif(6, HALF, full=True, surrogate="atan"),
    "divide 6 float32": lambda: run_lif(6, SINGLE, charge="divide"),
    "scalars 6 float32": lambda: run_by_channel((6, 8, 1, 512), SINGLE),
    "channels 6 float32": lambda: run_by_channel((6, 8, 64, 64), SINGLE),
    "channels 6 bfloat16": lambda: run_by_channel((6, 8, 64, 64), HALF, charge="leak"),
    "channels 17 float32": lambda: run_by_channel((17, 8, 64, 64), SINGLE, charge="divide"),
    "tile 6 float32": lambda: run_by_channel((6, 512, 64), SINGLE),
    "norm 6 float32": lambda: run_by_channel((6, 8, 64, 64), SINGLE, norm=True),
    "norm 6 bfloat16": lambda: run_by_channel((6, 8, 64, 64), HALF, norm=True),
    "norm 17 float32": lambda: run_by_channel((17, 8, 64, 64), SINGLE, norm=True),
    "norm tile 16 bfloat16": lambda: run_by_channel((16, 512, 64), HALF, norm=True),
    "bits 6 float32": lambda: run_lif(6, SINGLE, **BITS),
    "bits 17 bfloat16": lambda: run_by_channel((17, 8, 64, 64), HALF, **BITS),
    "constant 6 float32": lambda: run_lif(6, SINGLE, constant=True),
    "pack": run_pack,
    "penalty 42 float32": lambda: run_penalty([9000] * 42, SINGLE),
    "penalty 3 bfloat16": lambda: run_penalty([9000] * 3, HALF),
    "loss 100 float32": lambda: run_loss(64, 100, SINGLE),
    "loss 1024 bfloat16": lambda: run_loss(64, 1024, HALF, label_smoothing=0.1),
    "loss 1024 float32": lambda: run_loss(64, 1024, SINGLE, probabilities=True),
}


def compile_cases(architecture, folder, cases=tuple(CASES)):
    """Launches `cases` and writes every kernel as `case kernel.extension`."""
    extensions = ("cubin", "ptx") if architecture.startswith("sm_") else ("amdgcn",)
    results = {}

    def keep(kernel, result):
        # A kernel that is launched in two ways has two names.
        known = results.setdefault(kernel, result)
        if known.hash != result.hash:
            results[f"{kernel} 2"] = result

    compile_and_launch(architecture, folder, keep)
    for case in cases:
        CASES[case]()
        for kernel, result in results.items():
            for extension in extensions:
                content = result.asm[extension]
                binary = content if isinstance(content, bytes) else content.encode()
                (Path(folder) / f"{case} {kernel}.{extension}").write_bytes(binary)
        results.clear()


def count_compilations(architecture, folder):
    """Writes how many kernels a change of sizes and settings adds, which must be none."""
    results = set()
    compile_and_launch(
        architecture, folder, lambda kernel, result: results.add((kernel, result.hash))
    )
    added = {}

    def add(change, before, after):
        before()
        known = len(results)
        after()
        added[change] = len(results) - known

    add("batch", lambda: run_lif(2, SINGLE), lambda: run_lif(2, SINGLE, neurons=80000))
    add("threshold", lambda: None, lambda: run_lif(2, SINGLE, threshold=0.9, decay=0.3))
    add("segments", lambda: run_lif(17, SINGLE), lambda: run_lif(65, SINGLE))
    add(
        "weights",
        lambda: run_penalty([1000, 7], SINGLE),
        lambda: run_penalty([9000, 160], SINGLE, steps=10, delta=0.5, scale=3.0),
    )
    add(
        "batch of channels",
        lambda: run_by_channel((2, 32, 64, 64), SINGLE, norm=True),
        lambda: run_by_channel((2, 48, 64, 64), SINGLE, norm=True, threshold=0.9),
    )
    add("samples", lambda: run_loss(64, 10, SINGLE), lambda: run_loss(33, 10, SINGLE))
    (Path(folder) / "added.json").write_text(json.dumps(added))


def in_own_process(function, architecture, folder, *arguments, triton=None):
    """Runs a function of this module where Triton compiles: the one in `triton`, if given."""
    path = [triton] if triton else []
    code = (
        f"import sys; sys.path[:0] = {path!r}\n"
        f"from tests.test_triton import {function} as f\n"
        f"f({architecture!r}, {str(folder)!r}, *{arguments!r})"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    warnings = ("-W", "error::UserWarning:triton", "-W", "error::UserWarning:triton.knobs")
    done = subprocess.run(
        [sys.executable, *warnings, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# --- What that process wrote.

# A thread owns four neurons of half precision, not eight, where it parks so many steps.
NARROW = ("lif 16 bfloat16 backward_kernel", "lif 17 bfloat16 backward_kernel")

# Registers a thread, of Triton 3.6 and 3.9: blocks have 128 threads, so that 128 registers leave
# four of them a multiprocessor, and 224 two.
MOST_REGISTERS = 128
BUDGET = {
    "lif 6 float32 forward_kernel": 48,
    "lif 6 float32 backward_kernel": 96,
    "lif 6 bfloat16 forward_kernel": 64,
    "lif 16 float32 forward_kernel": 64,
    "lif 16 float32 backward_kernel": 224,
    "lif 16 bfloat16 forward_kernel": 64,
    "lif 16 bfloat16 backward_kernel": 224,
    "lif 17 float32 forward_kernel": 80,
    "lif 17 float32 backward_kernel": 224,
    "lif 17 bfloat16 forward_kernel": 80,
    "lif 17 bfloat16 backward_kernel": 224,
    "penalty 42 float32 value_kernel": 96,
    "channels 17 float32 backward_kernel": 224,
    "norm 17 float32 backward_kernel": 255,
    "norm 17 float32 backward_kernel 2": 224,
    "norm tile 16 bfloat16 backward_kernel": 224,
    "norm tile 16 bfloat16 backward_kernel 2": 224,
}
# Every sum at once, of a long sequence and with gains by channel, is more than a thread holds.
SPILLS = {"norm 17 float32 backward_kernel": 32, "norm 17 float32 backward_kernel 2": 16}
PLAIN = ("lif", "full")


def cases_of(names):
    return {case for case in CASES for name in names if name.startswith(f"{case} ")}


@pytest.mark.slow
def test_machine_code_of_sm_90(tmp_path):
    in_own_process("compile_cases", "sm_90", tmp_path)
    kernels = {path.stem: disassemble(path)[0] for path in tmp_path.glob("*.cubin")}
    assert cases_of(kernels) == set(CASES)
    for name, kernel in kernels.items():
        assert kernel.count("LDL", "STL") <= SPILLS.get(name, 0), name
        if name.startswith(PLAIN):
            assert kernel.stack == kernel.local == 0, name
        assert kernel.registers <= BUDGET.get(name, MOST_REGISTERS), (name, kernel.registers)
        loads = [i.opcode for i in kernel.code if i.opcode.startswith("LDG")]
        stores = [i.opcode for i in kernel.code if i.opcode.startswith("STG")]
        case = name.split()[0]
        if case == "lif":
            widths = (".64", ".128") if name in NARROW else (".128",)
            assert loads and all(any(w in i for w in widths) for i in loads), name
            assert stores and all(any(w in i for w in widths) for i in stores), name
        if case in ("scalars", "channels", "tile", "norm") and "ward" in name:
            assert any(".64" in i or ".128" in i or ".EF" in i for i in loads), name
        if name.startswith(PLAIN) or case in ("scalars", "tile", "norm", "bits", "constant"):
            # A spike is decided without contraction; only the IEEE division of "divide" has FFMA.
            assert "ward" not in name or kernel.count("FFMA") == 0, name
        if case == "penalty" and "sum" not in name:
            assert any(".128" in i for i in loads), name
            assert "gradient" not in name or any(".128" in i for i in stores), name
    for direction in ("forward", "backward"):
        text = (tmp_path / f"divide 6 float32 {direction}_kernel.ptx").read_text()
        assert "div.rn.f32" in text and "fma.rn.f32" not in text


@pytest.mark.slow
def test_compiles_for_gfx942(tmp_path):
    in_own_process("compile_cases", "gfx942", tmp_path)
    texts = {path.stem: path.read_text() for path in tmp_path.glob("*.amdgcn")}
    assert cases_of(texts) == set(CASES)
    for name, text in texts.items():
        # Scalar registers may spill: into lanes of vector registers, not into memory.
        assert ".vgpr_spill_count: 0" in text, name
        if name.startswith("lif"):
            width = "dwordx2" if name in NARROW else "dwordx4"
            assert f"global_load_{width}" in text or f"buffer_load_{width}" in text, name
        if name.startswith("lif") and "forward" in name:  # AMD's divisions contain some
            assert "v_fma_f32" not in text and "v_fmac_f32" not in text, name


# Every kernel once, with the argument forms that Triton versions have taken differently.
SELECTION = (
    "full 6 float32",
    "divide 6 float32",
    "tile 6 float32",
    "norm 6 bfloat16",
    "constant 6 float32",
    "bits 6 float32",
    "pack",
    "penalty 3 bfloat16",
    "loss 100 float32",
)
# Where `make install` puts the oldest Triton that a supported PyTorch brings, and the test's name.
OLDEST = os.environ.get("TRT_KERNELS_TEST_TRITON")


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture,oldest",
    [("sm_80", False), ("sm_120", False), ("sm_90", True)],
    ids=("sm_80", "sm_120", "oldest Triton"),
)
def test_every_kernel_launches_on_a_fake_gpu(tmp_path, architecture, oldest):
    """With the installed Triton, sm_90 is that of the machine code's test."""
    if oldest and not OLDEST:
        pytest.skip("TRT_KERNELS_TEST_TRITON names no folder with an older Triton: make test does")
    path = str(Path(OLDEST).absolute()) if oldest else None
    in_own_process("compile_cases", architecture, tmp_path, SELECTION, triton=path)
    assert cases_of([path.stem for path in tmp_path.glob("*.cubin")]) == set(SELECTION)


def test_the_fake_gpu_refuses_what_a_gpu_would(tmp_path):
    """A grid of nothing, too many threads, and more shared memory than there is."""
    code = (
        "import ctypes, sys; from pathlib import Path; from tests import fake_gpu\n"
        "library = ctypes.CDLL(str(fake_gpu.build(Path(sys.argv[1]))))\n"
        "def launch(*config): return library.cuLaunchKernelEx((ctypes.c_uint * 7)(*config), 3)\n"
        "print(launch(1, 1, 1, 128, 1, 1, 99 << 10), launch(0, 1, 1, 128, 1, 1, 0),\n"
        "      launch(1, 1, 1, 2048, 1, 1, 0), launch(1, 70000, 1, 128, 1, 1, 0),\n"
        "      launch(1, 1, 1, 128, 1, 1, 100 << 10))\n"
        "print(library.fake_gpu_launches(), library.fake_gpu_bad_launches())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "FAKE_GPU": "120"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.stdout.split("\n") == ["0 1 1 1 1", "1 4", ""], done.stderr


def test_other_sizes_and_settings_compile_nothing_new(tmp_path):
    in_own_process("count_compilations", "sm_90", tmp_path)
    added = json.loads((tmp_path / "added.json").read_text())
    changes = ("batch", "threshold", "segments", "weights", "batch of channels", "samples")
    assert added == dict.fromkeys(changes, 0)


def test_tensors_share_launches():
    from trt_kernels.backends.triton.penalty import MOST_TENSORS, TILES, groups

    tensors = [torch.zeros(size) for size in [100_000, 0, 5, 64 * TILES] * 20]
    tensors += [t.half() for t in tensors[:20]]
    dealt = list(groups(tensors, 64))
    assert len(dealt) == 2 and len(dealt[0].members) == 60 <= MOST_TENSORS
    members = [i for group in dealt for i in group.members]
    assert sorted(members) == [i for i, t in enumerate(tensors) if t.numel()]
    for group in dealt:
        assert len({tensors[i].dtype for i in group.members}) == 1
        ends = [*group.firsts[1:], float(group.programs)]
        for i, first, end, whole, tail in zip(
            group.members, group.firsts, ends, group.wholes, group.tails, strict=True
        ):
            assert end - first == whole + (tail > 0)
            assert whole * 64 * TILES + tail == tensors[i].numel()
    many = list(groups([torch.zeros(1)] * (2 * MOST_TENSORS + 1), 64))
    assert [len(group.members) for group in many] == [MOST_TENSORS, MOST_TENSORS, 1]


def test_a_program_finds_its_tensor():
    """Tensors shorter and longer than a program's part, more than one launch takes."""
    sizes = [1, 40_000, 3, 70_001, 16, 65_536, 5] * 10
    params = [torch.full((size,), float(i + 1)) for i, size in enumerate(sizes)]
    params = [p.requires_grad_() for p in params]
    value = tk.trt_penalty(params, steps=1, weight=1.0, delta=0.5, backend="triton")
    expected = sum(size * (i + 1) ** 2 for i, size in enumerate(sizes))
    assert float(value.detach()) == pytest.approx(expected, rel=1e-6)
    for p, grad in zip(params, torch.autograd.grad(value, params), strict=True):
        assert torch.equal(grad, 2 * p.detach())


def test_long_sequences_over_several_programs():
    """Checkpoints of [outer][steps][inner], before a last segment that is whole, and one not."""
    for steps in (CHECKPOINT_EVERY, 2 * CHECKPOINT_EVERY, 2 * CHECKPOINT_EVERY + 3):
        x = torch.randn(5, steps, 7, requires_grad=True)
        grad = torch.randn(5, steps, 7)
        out = [tk.lif(x, time_dim=1, backend=name) for name in ("triton", "reference")]
        assert torch.equal(*out)
        ours, theirs = (torch.autograd.grad(o, x, grad)[0] for o in out)
        torch.testing.assert_close(ours, theirs)


def forget():
    backend.why_no_triton.cache_clear()
    ops._resolve.cache_clear()
    tk.functional._checked.clear()


@pytest.fixture
def forgetting():
    """What was remembered about backends is forgotten before the test and after it."""
    forget()
    yield
    forget()


def test_without_triton(monkeypatch, forgetting):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match=r"lif: backend 'triton' .*: pip install triton"):
        tk.lif(torch.zeros(2, 3), backend="triton")


def test_without_a_gpu(monkeypatch, forgetting):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.why_no_triton() == "no GPU that this PyTorch can use"


def test_a_gpu_too_old(monkeypatch, forgetting):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    assert "Tesla P100 has compute capability 6.0" in str(backend.why_no_triton())
    backend.why_no_triton.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert backend.why_no_triton() is None
