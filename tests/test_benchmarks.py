"""The benchmark suite itself: its helper, its baselines and its report."""

import importlib
import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

import trt_kernels as tk
from benchmarks import baselines, clocks, peers, report
from benchmarks.clocks import EventClock, GPUClock, HostClock, Replay, WallClock, count_kernels
from benchmarks.measure import (
    Absent,
    Case,
    Variant,
    check,
    is_due,
    measure,
    optional,
    repeated,
    rounds_within,
)
from benchmarks.ours import ours
from benchmarks.parts import costs, most_alive, seconds_of_parts
from benchmarks.records import PARTS, Record, read
from benchmarks.steps import Backward, Expected, Mismatch, Step
from benchmarks.targets import findings
from examples.networks import SmallNet, SpikingNet
from examples.settings import Settings

MEGA = 1 << 20


@pytest.fixture(scope="module")
def bench(request):
    """Imports a file of cases, whose markers benchmarks/conftest.py knows."""
    for name in ("cpu", "cuda", "full"):
        request.config.addinivalue_line("markers", f"{name}: of benchmarks")
    return lambda stem: importlib.import_module(f"benchmarks.bench_{stem}")


class Clock:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()


def doubling(log, name, wrong=0.0):
    """A step that computes 2x, notes its name, and is wrong by a factor if asked to be."""

    def forward(x):
        log.append(name)
        return 2 * x * (1 + wrong)

    return Step(forward, [torch.rand(8, requires_grad=True)], [torch.ones(8)])


def make_case(ours, *others):
    return Case("table", "case", ours, others, 32, 8, "number", 32, {"steps": 3})


def truth(step, **tolerances):
    return Expected(Step(lambda x: x + x, step.inputs, step.grads), **tolerances)


def test_runs_variants_in_turn(monkeypatch):
    log = []
    monkeypatch.setattr("benchmarks.measure.SHORTEST_ROUND", 1e-12)
    a, b, c = (doubling(log, name) for name in "abc")
    case = make_case(
        Variant("a", a, truth(a)), Variant("b", b, truth(b)), Absent("d", "gone"), Variant("c", c)
    )
    clock = Clock()
    record = measure(clock, case, budget=1e-9)
    # Check, cost, three rounds with the others in rotation and ours last, memory.
    assert log == list("abc" + "abc" + "bca" + "cba" + "bca" + "abc")
    assert clock.extra_info == record
    assert list(record["variants"]) == list("abc")
    assert all(result["rounds"] == 3 for result in record["variants"].values())
    assert record["checked"] == ["a", "b"]
    assert record["skipped"] == {"d": "gone"}
    assert record["copy"]["moved"] == 64


@pytest.mark.parametrize(("limits", "budget"), [((1, 3), 10.0), ((5, 9), 1e-9)])
def test_a_case_limits_its_rounds(limits, budget):
    case = make_case(*(Variant(n, doubling([], n)) for n in "ab"))
    case.rounds = limits
    record = measure(Clock(), case, budget)
    expected = limits[1] if budget > 1 else limits[0]
    assert {result["rounds"] for result in record["variants"].values()} == {expected}


@pytest.mark.parametrize("culprit", ("ours", "other"))
@pytest.mark.parametrize("tolerance", (0.0, 1e-5))
def test_refuses_a_wrong_result(culprit, tolerance):
    log = []
    ours = doubling(log, "ours", 1e-2 if culprit == "ours" else 0.0)
    other = doubling(log, "other", 1e-2 if culprit == "other" else 0.0)
    clock = Clock()
    case = make_case(
        Variant("ours", ours, truth(ours, output=tolerance)),
        Variant("other", other, truth(other, output=tolerance), optional=True),
    )
    with pytest.raises(Mismatch, match=f"{culprit}: output 0"):
        measure(clock, case, budget=1e-9)
    assert clock.extra_info == {}


def test_refuses_a_wrong_gradient_and_nan():
    x = torch.rand(8, requires_grad=True)
    expected = Expected(Step(lambda x: x + x, [x], [torch.ones(8)]))
    cut = Step(lambda x: x + x.detach(), [x], [torch.ones(8)])
    with pytest.raises(Mismatch, match="cut: gradient 0: relative error 5"):
        Variant("cut", cut, expected).first(HostClock())
    nan = Step(lambda x: x + x, [x], [torch.full((8,), torch.nan)])
    with pytest.raises(Mismatch, match="nan: gradient 0"):
        Variant("nan", nan, expected).first(HostClock())


def test_leaves_out_an_optional_variant_that_fails():
    def broken(x):
        raise RuntimeError("no compiler\nmore")

    x = torch.rand(8, requires_grad=True)
    step = Step(broken, [x])
    ours = Variant("ours", doubling([], "ours"))
    record = measure(Clock(), make_case(ours, Variant("b", step, optional=True)), 1e-9)
    assert record["skipped"] == {"b": "RuntimeError: no compiler"}
    with pytest.raises(RuntimeError, match="no compiler"):
        measure(Clock(), make_case(ours, Variant("b", step)), 1e-9)

    def missing():
        raise ImportError("No module named 'peer'")

    absent = optional("peer", missing)
    assert isinstance(absent, Absent)
    assert "No module named 'peer'" in absent.reason


class Event:
    """Stands in for a GPU's event."""

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


def gpu_clocks():
    cpu = torch.device("cpu")
    return EventClock(cpu, Event), WallClock(cpu)


def test_gpu_clocks_time_calls_over_rotating_copies():
    for clock in gpu_clocks():
        seen = []

        def forward(x, seen=seen):
            seen.append(x.data_ptr())
            return 2 * x

        step = Step(forward, [torch.rand(8, requires_grad=True)], [torch.ones(8)])
        other = Variant("other", Step(lambda x: x + x, step.inputs, step.grads))
        case = make_case(Variant("ours", step, truth(step)), other)
        case.rounds = (20, 40)  # enough calls on a machine under load, too
        record = measure(Clock(), case, 1e-3, clock)
        assert len(set(seen)) == 16  # small tensors: as many copies as there ever are
        assert record["device"] == "cpu" and record["clock"] == clock.name
        assert record["failed"] == {}
        # As many bytes are copied as are moved.
        assert record["copy"]["moved"] == record["moved"]
        assert all(0 < v["median"] < 0.1 for v in record["variants"].values())


class SlowHost(EventClock):
    """A GPU that works through a queue, for 50 µs a call, and a host that needs `launching` s to
    launch one; time is counted, so that nothing depends on this machine."""

    def __init__(self, monkeypatch, launching):
        super().__init__(torch.device("cpu"), self.make_event)
        self.now = self.busy_until = 0.0
        self.launching = launching
        monkeypatch.setattr(clocks.time, "perf_counter", lambda: self.now)

    def launch(self, seconds):
        self.busy_until = max(self.now, self.busy_until) + seconds
        return self.busy_until

    def wait(self, seconds):
        self.launch(seconds)

    def call(self):
        self.now += self.launching
        self.launch(50e-6)

    def make_event(self):
        clock = self

        class Recorded:
            def record(self):
                self.at = clock.launch(0.0)

            def synchronize(self):
                clock.now = max(clock.now, self.at)

            def elapsed_time(self, later):
                return 1e3 * (later.at - self.at)

        return Recorded()


@pytest.mark.parametrize("launching", (10e-6, 850e-6, 4e-3))
def test_the_gpu_is_timed_and_not_the_host_that_launches(monkeypatch, launching):
    """The regularizer's calls cost the host 0.85 ms and the GPU 50 µs: eighty a round were timed at
    the host's speed."""
    clock = SlowHost(monkeypatch, launching)
    call = clock.call  # one object: by which the clock knows it again
    assert clock.seconds(call) == pytest.approx(50e-6)
    calls = min(80, clock.most_calls(call))
    assert calls == {10e-6: 80, 850e-6: 9, 4e-3: 2}[launching]
    run = repeated(call, int(calls))
    for _ in range(3):  # the first time, too
        assert clock.seconds(run) / calls == pytest.approx(50e-6)
    assert not clock.times_host(call)


def test_a_call_too_slow_to_launch_is_told_of(monkeypatch):
    clock = SlowHost(monkeypatch, 20e-3)
    call = clock.call
    assert clock.seconds(call) > 5e-3
    assert clock.most_calls(call) == 1 and clock.times_host(call)


@pytest.mark.parametrize("launching", (850e-6, 20e-3))
def test_a_record_has_the_time_of_the_gpu_or_says_so(monkeypatch, launching):
    """From the choice of calls to the record and its line in the report."""
    clock = SlowHost(monkeypatch, launching)

    def forward(x):
        clock.call()
        return 2 * x

    def step():
        return Step(forward, [torch.rand(8, requires_grad=True)], [torch.ones(8)])

    monkeypatch.setattr("benchmarks.measure.copy_of", lambda size, device: step())
    record = measure(Clock(), make_case(Variant("a", step()), Variant("b", step())), 1e-3, clock)
    remarks = "\n".join(report.notes([Record(record)]))
    if launching < clocks.LONGEST_WAIT:
        for result in (record["copy"], *record["variants"].values()):
            assert result["median"] == pytest.approx(50e-6)
        assert record["host_timed"] == [] and "launches" not in remarks
    else:
        assert record["host_timed"] == ["a", "b", "copy"]
        assert "case: a timed with the host's launches" in remarks


def test_copies_fill_the_cache_some_times():
    clock = GPUClock(torch.device("cpu"))
    assert clock.copies(8) == 16
    assert clock.copies(64 << 20) == 4
    assert clock.copies(1 << 30) == 2
    assert clock.copies(2 << 30) == 1
    assert clock.copied(5, 8 << 30) == 1 << 30
    step = Step(torch.add, [torch.rand(3, requires_grad=True), torch.rand(3)])
    rotation = clock.rotation(step)
    assert len({s.inputs[0].data_ptr() for s in rotation.steps}) == 16
    assert all(s.inputs[0].requires_grad for s in rotation.steps)
    again = clock.rotation(Step(torch.mul, step.inputs))
    assert again.steps[1].inputs[0] is rotation.steps[1].inputs[0]
    # A result is kept until its turn comes again.
    for _ in range(17):
        rotation()
    assert len({r.data_ptr() for r in rotation.results}) == 16


def test_a_replay_holds_what_it_reads():
    log = []
    replay = Replay(SimpleNamespace(replay=lambda: log.append(1)), captured := object())
    replay()
    assert log == [1] and replay.captured is captured


def test_backward_alone():
    calls = []

    def forward(x):
        calls.append(1)
        return x * x

    x, grad = torch.rand(8, requires_grad=True), torch.rand(8)
    step = Backward(forward, [x], [grad])
    for _ in range(3):
        assert torch.equal(step()[0], 2 * x.detach() * grad)
    assert len(calls) == 1
    assert isinstance(step.over([x], [grad]), Backward)


def test_part_of_a_result_is_checked():
    x = torch.rand(2, 100)
    few = Expected(Step(lambda x: 2 * x, [x[:, :3]]), part=lambda r: r[:, :3])
    Variant("right", Step(lambda x: x + x, [x]), few).first(HostClock())
    with pytest.raises(Mismatch, match="wrong: output 0"):
        Variant("wrong", Step(lambda x: x, [x]), few).first(HostClock())


def test_a_gpu_goes_on_without_a_variant_that_fails():
    x = torch.rand(8, requires_grad=True)
    right, wrong = doubling([], "right"), doubling([], "wrong", 1e-2)

    def broken(x):
        raise RuntimeError("no memory\nmore")

    case = make_case(
        Variant("ours", right, truth(right)),
        Variant("ours too", wrong, truth(wrong)),
        Variant("library", wrong, truth(wrong), optional=True),
        Variant("broken", Step(broken, [x])),
        Variant("relu", Step(torch.relu, [x])),
    )
    record = measure(Clock(), case, 1e-9, WallClock(torch.device("cpu")))
    assert list(record["variants"]) == ["ours", "relu"]
    assert record["failed"]["ours too"].startswith("Mismatch: ours too: output 0")
    assert record["failed"]["broken"] == "RuntimeError: no memory"
    assert record["skipped"]["library"].startswith("Mismatch")
    case.ours = Variant("ours", wrong, truth(wrong))
    with pytest.raises(Mismatch):
        measure(Clock(), case, 1e-9, WallClock(torch.device("cpu")))


def test_ours_on_each_device(monkeypatch):
    def chosen(device):
        best, rest = ours(tk.lif, torch.device(device), lambda f: Step(f, []), None)
        return best.name, [(type(v).__name__, v.name) for v in rest]

    assert chosen("cpu") == ("ours", [])
    reasons = {"cuda": None, "triton": None}
    monkeypatch.setattr("trt_kernels.backends.why_not", lambda name, device: reasons[name])
    assert chosen("cuda") == ("ours cuda", [("Variant", "ours triton")])
    reasons["cuda"] = "not built"
    assert chosen("cuda") == ("ours triton", [("Absent", "ours cuda")])
    reasons["triton"] = "not installed"
    with pytest.raises(RuntimeError, match="ours cuda: not built; ours triton: not installed"):
        chosen("cuda")


def test_counts_kernels_alone():
    kinds = torch.autograd.DeviceType
    events = [
        SimpleNamespace(device_type=kinds.CUDA, name=name)
        for name in ("value_kernel", "Memcpy HtoD", "Memset (Device)", "gradient_kernel")
    ]
    events.append(SimpleNamespace(device_type=kinds.CPU, name="cudaLaunchKernel"))
    assert count_kernels(events) == 2


def test_slow_variants_get_fewer_rounds():
    rounds = rounds_within(10.0, {"fast": 0.1, "slow": 1.0, "slowest": 9.0})
    assert rounds == {"fast": 33, "slow": 3, "slowest": 3}
    for few, total in ((3, 33), (7, 7), (1, 5), (5, 7)):
        assert sum(is_due(i, few, total) for i in range(total)) == few


def test_counts_kept_bytes():
    x = torch.rand(6, 10, requires_grad=True)
    step = Step(tk.lif, [x], [torch.rand(6, 10)])
    assert step.kept() == x.nbytes
    params = [w for name, w in SmallNet().named_parameters() if "bias" not in name]

    def penalty(*params):
        return tk.trt_penalty(params, steps=2, weight=1.0, delta=0.5)

    assert Step(penalty, params, [torch.ones(())]).kept() == sum(w.nbytes for w in params)


def test_what_autograd_dropped_is_not_kept():
    """As the last potential of a loop over time; and a storage counts once."""
    results = []

    def forward(x):
        x.exp()  # keeps its result, as long as there is one
        y = x.exp()
        results.append(TensorWeakRef(y))
        return y + x[:4].cos().sum()

    x = torch.rand(8, requires_grad=True)
    assert Step(forward, [x], [torch.ones(8)]).kept() == 2 * x.nbytes
    assert results[0]() is None  # counting leaves nothing behind


def test_counts_what_is_kept_instead_of_a_tensor():
    x, w = torch.rand(8, 64), torch.rand(64, 3)
    spikes = (x > 0.5).float()

    def product(s, w):
        return s @ w

    def packed(s, w):
        with tk.pack_saved_spikes():
            return s @ w

    inputs = [spikes * torch.ones((), requires_grad=True), w.requires_grad_()]
    assert Step(product, inputs, [torch.ones(8, 3)]).kept() == spikes.nbytes + w.nbytes
    assert Step(packed, inputs, [torch.ones(8, 3)]).kept() == spikes.nbytes // 32 + w.nbytes
    assert torch.autograd.graph.saved_tensors_hooks.__name__ == "saved_tensors_hooks"


@pytest.mark.parametrize("v_reset", (0.0, 0.5))
@pytest.mark.parametrize("shape", ((1, 3), (6, 5, 7), (33, 40)))
def test_official_lif_matches_the_reference(shape, v_reset):
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    official = Step(lambda x: baselines.official_lif(x, v_reset=v_reset), [x], [grad])
    same = Step(lambda x: tk.lif(x, v_reset=v_reset, backend="reference"), [x], [grad])
    Expected(same, gradient=1e-6).check("official", official.results())


def by_channel(x, decay, threshold):
    return tk.lif(x, decay=decay, threshold=threshold, channel_dim=2, backend="reference")


def test_learned_loop_matches_the_reference():
    x, grad = torch.randn(5, 2, 3, 7, requires_grad=True), torch.randn(5, 2, 3, 7)
    inputs = [x, *((0.3 + torch.rand(3)).requires_grad_() for _ in range(2))]
    expected = Expected(Step(by_channel, inputs, [grad]), gradient=1e-5)
    expected.check("loop", Step(baselines.learned_lif, inputs, [grad]).results())


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("library", (False, True))
def test_two_layers_match_the_block(bench, library, training):
    cpu, blocks = torch.device("cpu"), bench("batch_norm_lif")
    inputs = [torch.randn(4, 8, 3, 9, 9, requires_grad=True), *blocks.affine(3, cpu)]
    grad = [torch.randn(4, 8, 3, 9, 9)]
    options = {"backend": "reference", "fire_at_threshold": library}
    block = blocks.fused(3, cpu, training, **options)
    apart = baselines.NormLIF(3, cpu, training, tk.lif)
    if library:
        try:
            apart = peers.spikingjelly_norm(3, cpu, training)(peers.spikingjelly()[0])
        except ImportError as missing:
            pytest.skip(str(missing))
    expected = Expected(Step(block, inputs, grad), 1e-2, 1e-2)
    expected.check("two layers", Step(apart, inputs, grad).results())


def test_learned_time_constant_of_spikingjelly():
    try:
        forward, same = peers.spikingjelly_plif()
    except ImportError as missing:
        pytest.skip(str(missing))
    inputs = [torch.randn(6, 500, requires_grad=True), torch.tensor(0.3, requires_grad=True)]
    grad = [torch.randn(6, 500)]
    expected = Expected(Step(same, inputs, grad), gradient=1e-4)
    expected.check("PLIF", Step(forward, inputs, grad).results())


SMALL, LARGER, FLAT = (3, 2, 4, 5, 6), (4, 8, 8, 10, 10), (3, 130)
SINGLE, HALF = torch.float32, torch.bfloat16
# File, test, arguments, bytes of the ledger, bytes kept of ours (None: nothing is kept).
CASES = (
    ("batch_norm_lif", "test_training", (SMALL, SINGLE, "NCHW"), 32 * 720, 4 * 720 + 4 * 6 * 4),
    ("batch_norm_lif", "test_training", (LARGER, HALF, "channels_last"), 16 * 25600, None),
    ("batch_norm_lif", "test_inference", (SMALL, SINGLE, "NCHW"), 8 * 720, None),
    ("batch_norm_lif", "test_constant", (SMALL[1:], 3), (5 + 9) * 4 * 240, None),
    ("lif_options", "test_learned", (SMALL,), 20 * 720, None),
    ("lif_options", "test_time_constant", (FLAT,), 20 * 390, None),
    ("lif_options", "test_two_bits", ((4, 256), SINGLE), 16.5 * 1024, 1024 // 4),
    ("lif_options", "test_two_bits", ((4, 256), HALF), 8.5 * 1024, 1024 // 4),
    ("lif_options", "test_constant", ((130,), 3), 9 * 4 * 130, 4 * 130),
    ("lif_options", "test_rates", (FLAT,), 8 * 390, None),
    ("packing", "test_training", ((2, 3, 3, 8, 8), SINGLE), 32 * 160 * 384, None),
    ("acceleration", "test_loops", ((3, 2, 5), "subtract"), 44 * 30, None),
    ("acceleration", "test_loops", ((3, 2, 5), "zero"), 44 * 30, None),
    # SEW-ResNet-18 has 50,688 neurons for 32×32 pixels; two images, two timesteps.
    ("acceleration", "test_networks", ("sew_resnet18", (2, 2, 3, 32, 32)), 20 * 4 * 50688, None),
)


@pytest.mark.parametrize("file,test,arguments,moved,kept", CASES)
def test_small_cases_are_right_and_state_their_bytes(bench, file, test, arguments, moved, kept):
    cases = []
    getattr(bench(file), test)(cases.append, torch.device("cpu"), *arguments)
    (case,) = cases
    assert case.moved == moved
    checked = check(case, HostClock())
    assert not set(checked.skipped) - {"SpikingJelly"} and not checked.failed
    if kept is not None:
        assert case.ours.step.kept() == kept
    if file == "packing":
        usual = checked.variants["BatchNorm2d + LIF"].step.kept()
        assert case.ours.step.kept() < usual - 4 * case.elements


class TinyNet(SpikingNet):
    """A convolution, two residual blocks, a pooling and a readout of spiking neurons."""

    def __init__(self, classes=10, steps=4, **options):
        super().__init__(steps, **options)
        self.add_conv(3, 8)
        self.add_residuals(8, 12, 2, 2, spiking_shortcut=False)
        self.add_pool(nn.AvgPool2d(2))
        self.readout = nn.Sequential(
            nn.Linear(48, 16), tk.nn.LIF(**self.neuron), nn.Linear(16, classes)
        )


@pytest.fixture
def step_case(bench):
    """A training step of a tiny network, of images or of frames."""

    def make(sequences=False, half=None, kind=TinyNet):
        step = bench("step")
        published = Settings("tiny", 4, weight=1e-2, delta=0.5, mse_ratio=0.05)
        setting = step.Setting("tiny", kind, (3, 8, 8), sequences, published)
        return step.make_case(setting, 3, torch.device("cpu"), half)

    return make


@pytest.mark.parametrize("half", (None, torch.bfloat16))
@pytest.mark.parametrize("sequences", (False, True))
def test_training_steps_match_the_official_one(step_case, sequences, half):
    case = step_case(sequences, half)
    checked = check(case, HostClock())
    assert not set(checked.skipped) - {"SpikingJelly"} and not checked.failed
    ours = {"ours", "ours, packed", "ours, channels_last"}
    assert {*ours, "official", "ReLU network"} <= set(checked.variants)
    steps = {name: variant.step for name, variant in checked.variants.items()}
    official = steps["official"]
    assert len(official.spikes) == 6 and all(0 < s.float().mean() < 1 for s in official.spikes[:5])
    # Neurons of the first layer, then two in each block, then one of the readout.
    assert case.elements == 3 * 4 * (8 * 64 + 4 * 12 * 16 + 16)
    # Nothing that is measured changes the weights, so every round computes the same.
    before = [w.detach().clone() for w in steps["ours"].inputs]
    loss = float(steps["ours"].loss().detach())
    for _ in range(2):
        steps["ours"]()
    assert all(map(torch.equal, before, steps["ours"].inputs))
    assert float(steps["ours"].loss().detach()) == loss
    assert steps["ours, packed"].kept() < steps["ours"].kept() < official.kept()


def test_training_steps_that_are_wrong_are_refused(step_case):
    """Spikes of another neuron; and the right spikes with another gradient, of one parameter."""
    case = step_case(kind=lambda **options: TinyNet(tau=3.0, **options))
    with pytest.raises(Mismatch, match=r"BatchNormLIF: .* spikes differ from the official"):
        case.ours.first(HostClock())
    case = step_case(kind=lambda **options: TinyNet(detach_reset=True, **options))
    with pytest.raises(Mismatch, match="ours: gradient"):
        case.ours.first(HostClock())
    case = step_case()
    truth, scaled = case.ours.expected.step, case.ours.step
    wanted = Expected(truth, case.ours.expected.output, case.ours.expected.gradient)
    outputs, grads = scaled.results()
    wanted.check("ours", (outputs, grads))
    for index in range(len(grads)):
        wrong = [g * 1.01 if i == index else g for i, g in enumerate(grads)]
        with pytest.raises(Mismatch, match=f"ours: gradient {index}:"):
            wanted.check("ours", (outputs, wrong))


def test_parts_of_a_training_step(step_case):
    case = step_case()
    found = {}
    for variant in (case.ours, *case.others):
        if not isinstance(variant, Absent):
            facts = variant.step.facts(1.0)
            record = Record({"variants": {}})
            shares = record.parts({"median": 2.0, "parts": facts["parts"]})
            assert sum(shares.values()) == pytest.approx(2.0)
            assert all(facts[name] > 0 for name in ("peak", "kept", "operations"))
            found[variant.name] = facts
    usual = {"convolution", "BatchNorm", "LIF (or ReLU)", "loss", "optimizer", "other"}
    assert set(found["official"]["parts"]) == usual | {"regularizer"}
    assert set(found["ours"]["parts"]) == usual | {"regularizer", "BatchNorm + LIF"}
    assert set(found["ReLU network"]["parts"]) == usual
    assert found["ours"]["operations"] < found["official"]["operations"] / 4
    assert not any(
        getattr(m, hooks)
        for m in case.ours.step.net.modules()
        for hooks in ("_forward_hooks", "_forward_pre_hooks")
    )


def test_parts_are_found_forward_and_backward():
    """A layer that only waits, in one pass or the other, is found to take the time."""

    class Waiting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, forward, backward):
            ctx.backward = backward
            time.sleep(forward)
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            time.sleep(ctx.backward)
            return grad, None, None

    class Layer(nn.Conv2d):
        def __init__(self, *waits):
            super().__init__(1, 1, 1)
            self.waits = waits

        def forward(self, x):
            return Waiting.apply(super().forward(x), *self.waits)

    for waits in ((0.2, 0.0), (0.0, 0.2)):
        net = nn.Sequential(Layer(*waits), nn.ReLU())
        optimizer = torch.optim.SGD(net.parameters(), 0.0)

        def step(net=net):
            net(torch.rand(1, 1, 4, 4)).sum().backward()

        step.optimizer = optimizer
        assert costs(step, net, torch.device("cpu"), 0.2)["parts"]["convolution"] >= 0.2


def test_parts_of_a_gpu_are_those_of_its_kernels():
    kernel = SimpleNamespace(name="kernel", duration=3.0)
    shown = SimpleNamespace(name="convolution", duration=9.0)  # the range itself

    def event(name, number=-1, scope=0, around=None, launched=(), start=0):
        return SimpleNamespace(
            name=name,
            sequence_nr=number,
            scope=scope,
            cpu_parent=around,
            kernels=list(launched),
            time_range=SimpleNamespace(start=start),
        )

    layer = event("convolution", scope=7, launched=[shown])
    forward = event("aten::conv2d", 5, around=layer, launched=[kernel], start=1)
    node = event("autograd::engine::evaluate_function: ConvolutionBackward0", 5, start=2)
    backward = event("ConvolutionBackward0", 5, scope=1, around=node, start=3)
    deep = event("aten::mm", around=backward, launched=[kernel, kernel], start=4)
    add = event("aten::add_", launched=[kernel], start=5)
    found = seconds_of_parts([layer, forward, node, backward, deep, add], on_gpu=True)
    assert found == {"convolution": pytest.approx(9e-6), "other": pytest.approx(3e-6)}
    record = Record({"device": "cuda"})
    assert record.parts({"median": 1.0, "parts": {"loss": 0.75}}) == {"loss": 0.75, "idle": 0.25}


def test_most_alive():
    def change(at, nbytes, name="[memory]"):
        return SimpleNamespace(start_ns=lambda: at, nbytes=lambda: nbytes, name=lambda: name)

    changes = [change(3, -4), change(1, 4), change(4, 2), change(2, 8), change(2, 99, "aten::add")]
    assert most_alive(changes) == 12


def step_json(path, device="cpu"):
    """A training step of two networks."""
    parts = {"convolution": 6.0, "BatchNorm + LIF": 1.9, "regularizer": 0.1}
    benchmarks = []
    for network, official in (("ResNet-19", 1.5), ("VGGSNN", 1.7)):
        others = {"official": official, "ReLU network": 0.8}
        info = record("a training step", f"{network}, batch 4", 1.0, others, network=network)
        for name, result in info["variants"].items():
            result.update(parts=parts, peak=3 * MEGA, kept=2 * MEGA, operations=1234)
            if name == "official":
                result.update(peak=12 * MEGA, kept=5 * MEGA, operations=9876)
        if device == "cuda":
            info |= {"device": device, "clock": "wall", "failed": {}}
        benchmarks.append({"extra_info": info})
    path.write_text(json.dumps({"machine_info": {}, "benchmarks": benchmarks}))
    return path


def test_training_steps_are_judged_and_drawn(tmp_path):
    run = read([step_json(tmp_path / "step.json")])
    judged = [(f.target, f.value, report.verdict(f)) for f in findings(run) if "step" in f.target]
    official, kept = "official training step ÷ ours", "our training step keeps ÷ the official one"
    assert (official, 1.5, "**missed**") in judged and (official, 1.7, "met") in judged
    assert judged.count((kept, 0.4, "**missed**")) == 2
    text = report.markdown(run)
    assert "the parts of ours are the shares of a step that took 8 s under the profiler" in text
    assert "| ResNet-19, batch 4 | official | 1.5 s | 1.50× | 12.6 MB | 5.24 MB | 9,876 |" in text
    assert "| 75.0% | 23.8% | 1.3% |" in text
    pytest.importorskip("matplotlib")
    from benchmarks.plots import PART_COLOURS, draw

    (path,) = draw(run, tmp_path)
    assert path.name == "step.png" and path.read_bytes().startswith(b"\x89PNG")
    assert tuple(PART_COLOURS) == PARTS


def test_training_steps_on_a_gpu_are_judged(tmp_path):
    run = read([step_json(tmp_path / "step.json", "cuda")])
    judged = {f.target: (f.value, report.verdict(f)) for f in findings(run)}
    assert judged["official training step ÷ ours"] == (1.7, "**missed**")
    assert judged["our training step's peak memory ÷ the official one's"] == (0.25, "met")
    assert judged["our training step ÷ the same with ReLU"] == (1.25, "**missed**")
    # Kernels of 8 s cannot be within a step of 1 s: shares of what was measured.
    share, verdict = judged["the regularizer's share of our training step"]
    assert share == pytest.approx(0.0125) and verdict == "**missed**"


@pytest.mark.parametrize("steps", (1, 6))
def test_penalties_match_the_reference(steps):
    params = [torch.randn(s, requires_grad=True) for s in ((3, 2, 3, 3), (5,), (4, 7))]
    settings = {"steps": steps, "weight": 1e-2, "delta": 0.3}
    grad = [torch.tensor(2.0)]
    same = Step(lambda *p: tk.trt_penalty(p, backend="reference", **settings), params, grad)
    expected = Expected(same, output=1e-6, gradient=1e-6)

    def official(*p):
        named = [*zip("abc", p, strict=True), ("d.bias", torch.ones(3))]
        return baselines.official_penalty(named, **settings)

    for function in (official, baselines.closed_form(**settings)):
        expected.check("penalty", Step(function, params, grad).results())


@pytest.mark.parametrize("ratio", (0.0, 0.05, 1.0))
@pytest.mark.parametrize("loss", (baselines.official_loss, baselines.flat_loss))
def test_losses_match_the_reference(loss, ratio):
    logits = torch.randn(4, 8, 10, requires_grad=True)
    target = torch.randint(10, (8,))
    functions = (
        lambda o: tk.temporal_loss(o, target, mse_ratio=ratio, backend="reference"),
        lambda o: loss(o, target, mse_ratio=ratio),
    )
    same, plain = (Step(f, [logits], [torch.tensor(2.0)]) for f in functions)
    Expected(same, output=1e-6, gradient=1e-6).check("loss", plain.results())


@pytest.mark.parametrize(
    "make,error", ((peers.spikingjelly, 0), (peers.snntorch, 0), (peers.norse, 1e-2))
)
def test_peers_match_the_reference(make, error):
    compare_peer(make, torch.float32, error, error or 1e-6)


@pytest.mark.parametrize(
    "make,error,gradient", ((peers.spikingjelly, 0, 1e-2), (peers.spikingjelly_amp, 0.2, 0.1))
)
def test_spikingjelly_in_half_precision(make, error, gradient):
    compare_peer(make, torch.bfloat16, error, gradient)


def compare_peer(make, dtype, error, gradient):
    try:
        forward, same = make()
    except ImportError as missing:
        pytest.skip(str(missing))
    x, grad = torch.randn(6, 5000).to(dtype).requires_grad_(), torch.randn(6, 5000).to(dtype)
    expected = Expected(Step(same, [x], [grad]), output=error, gradient=gradient)
    expected.check("peer", Step(forward, [x], [grad]).results())


def record(table, case, ours, others, **about):
    variants = {"ours": {"median": ours, "iqr": 0.0, "rounds": 3, "kept": 4 * MEGA}}
    variants |= {
        name: {"median": median, "iqr": 0.0, "rounds": 3} for name, median in others.items()
    }
    return {
        "table": table,
        "case": case,
        "ours": "ours",
        "moved": 20 * MEGA,
        "elements": MEGA,
        "element": "neuron-step",
        "copy": {"median": 1e-3, "iqr": 0.0, "rounds": 3, "moved": 8 * MEGA},
        "variants": variants,
        "checked": ["ours"],
        "skipped": {"Norse": "not installed (No module named 'norse')"},
        **about,
    }


@pytest.fixture
def results(tmp_path):
    """A JSON as pytest-benchmark writes it."""
    lif = record(
        "lif, forward and backward",
        "(4, 1M) float32",
        4e-3,
        {"relu": 2e-3, "official loop": 4e-2, "compiled loop": 5e-3, "SpikingJelly": 3e-2},
        steps=4,
        neurons=MEGA,
    )
    lif["variants"]["compiled loop"]["compile"] = 12.3
    penalty = record(
        "trt_penalty, forward and backward",
        "ResNet-19, T = 6",
        1e-2,
        {"official loop": 0.5, "compiled closed form": 9e-3},
        steps=6,
        network="ResNet-19",
    )
    path = tmp_path / "bench.json"
    path.write_text(
        json.dumps(
            {
                "datetime": "2026-11-23T12:00:00",
                "machine_info": {
                    "cpu": {"brand_raw": "A Processor", "count": 2},
                    "trt_kernels": {"threads": 2, "level": "avx2", "torch": "2.13.0"},
                },
                "benchmarks": [{"extra_info": info} for info in (lif, penalty, {})],
            }
        )
    )
    return path


def test_report_writes_tables_and_plots(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    report.main([str(results), "--out", str(out)])
    text = (out / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "A Processor, 2 cores, 2 threads, avx2, torch 2.13.0; 2026-11-23" in text
    # 20 MiB in 4 ms, against 8 MiB copied in 1 ms.
    assert "| (4, 1M) float32 | 4 ms | 5.24 | 62% | 4 | 0.50× | 10.0× | 1.25× | 7.50× |" in text
    assert "compiled loop took 12.3 s to compile" in text
    assert "Norse left out: not installed" in text
    for name in ("lif.png", "penalty.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    saved = read([out / "report.json"])
    assert saved == read([results])
    assert report.markdown(saved) == text


def test_targets_are_judged_from_the_records(results):
    judged = {(f.target, f.limit): (f.value, f.met) for f in findings(read([results]))}
    assert judged["`lif` time ÷ `torch.relu` time", 1.5] == (2.0, False)
    assert judged["compiled loop time ÷ `lif` time", 1.4] == (1.25, False)
    assert judged["SpikingJelly time ÷ `lif` time", 4.5] == (7.5, True)
    assert judged["official loop time ÷ `lif` time", 7.0] == (10.0, True)
    assert judged["`lif` keeps, B per neuron-step", 4.0] == (4.0, True)
    value, met = judged["`trt_penalty` time ÷ compiled closed form time", 1.0]
    assert value == pytest.approx(10 / 9)
    assert not met
    assert judged["official loop time ÷ `trt_penalty` time", 40.0] == (50.0, True)


def more_json(path):
    """The cases of fused blocks, of many steps in two dtypes, of bits and of packed networks."""
    block = record(
        "batch_norm_lif, forward and backward",
        "(4, 32, 64) float32",
        4e-3,
        {"BatchNorm2d + lif": 8e-3, "BatchNorm2d + relu": 3e-3},
        x=4 * MEGA,
    )
    steps = [
        record("lif, more and more steps", f"T = {t} {dtype}", cost, {}, steps=t, dtype=dtype)
        for dtype, costs in (("torch.float32", (1e-3, 1.1e-3)), ("torch.bfloat16", (1e-3, 2e-3)))
        for t, cost in zip((10, 1000), costs, strict=True)
    ]
    network = record("a network with packed spikes", "3 blocks", 4e-3, {"BatchNorm2d + LIF": 4e-3})
    network["variants"]["BatchNorm2d + LIF"]["kept"] = 16 * MEGA
    benchmarks = [{"extra_info": info} for info in (block, *steps, network)]
    path.write_text(json.dumps({"machine_info": {}, "benchmarks": benchmarks}))
    return path


def test_listed_targets_of_a_cpu(tmp_path, results):
    judged = {}
    for f in findings(read([more_json(tmp_path / "more.json")])):
        judged.setdefault(f.target, []).append((f.value, report.verdict(f)))
    missed = "**missed**"
    assert judged["BatchNorm2d + lif ÷ `batch_norm_lif` time"] == [(2.0, "met")]
    assert judged["`batch_norm_lif` keeps ÷ x"] == [(1.0, "met")]
    each = judged["`lif`, dearest ÷ cheapest neuron-step"]
    assert each == [(pytest.approx(1.1), "met"), (pytest.approx(2.0), missed)]
    beside = judged["`lif` of any T keeps beside x, B per neuron-step"]
    assert beside == [(0.0, "met")] * 2 + [(2.0, missed)] * 2
    share = judged["packed network of fused blocks keeps ÷ usual network"]
    assert share == [(0.25, "met")]
    unmeasured = [(None, "not measured")]
    assert judged["`lif` with two bits keeps, B per neuron-step"] == unmeasured
    others = {f.target: report.verdict(f) for f in findings(read([results]))}
    assert others["BatchNorm2d + lif ÷ `batch_norm_lif` time"] == "not measured"


def test_plots_of_blocks_steps_and_memory(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plots import draw

    paths = draw(read([more_json(tmp_path / "more.json")]), tmp_path)
    assert {path.name for path in paths} == {"batch_norm_lif.png", "steps.png", "memory.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_report_of_nothing_is_an_error(tmp_path):
    path = tmp_path / "empty.json"
    path.write_text(json.dumps({"machine_info": {}, "benchmarks": []}))
    with pytest.raises(SystemExit):
        report.main([str(path)])


# --- A GPU's targets, and the command that runs everything on one.
def gpu_record(table, case, ours, others, **about):
    info = record(table, case, ours, others, device="cuda", clock="events", failed={}, **about)
    info["variants"] = {
        "ours cuda" if name == "ours" else name: {**result, "kept": kept}
        for (name, result), kept in zip(
            info["variants"].items(), (4 * MEGA, *[8 * MEGA] * len(others)), strict=True
        )
    }
    return {**info, "ours": "ours cuda", "checked": ["ours cuda", *others]}


GPU = {"name": "NVIDIA Test", "driver": "580", "torch": "2.11", "cuda": "13.0", "triton": "3.6"}


def gpu_json(path):
    """What `pytest benchmarks --device cuda` writes."""
    others = {"ours triton": 1.2e-3, "relu": 1e-3, "SpikingJelly triton": 2e-3}
    cases = [
        gpu_record(
            "lif, forward and backward",
            "(6, 11M) float32",
            1e-3,
            others,
            dtype="torch.float32",
            steps=6,
        ),
        *(
            gpu_record("lif, more and more steps", f"T = {t}", cost, {"relu": 1e-3}, steps=t)
            for t, cost in ((4, 1e-3), (1000, 1.3e-3))
        ),
        gpu_record(
            "trt_penalty, wall clock",
            "ResNet-19, T = 6",
            1e-4,
            {"official loop": 2e-2},
            **{"launches, ours cuda": 2, "launches, ours triton": "the profiler saw no kernel"},
        ),
    ]
    cases[0]["failed"] = {"snnTorch": "RuntimeError: no"}
    benchmarks = [{"extra_info": info} for info in cases]
    about = {"datetime": "2026-11-25", "machine_info": {"gpu": GPU}, "benchmarks": benchmarks}
    path.write_text(json.dumps(about))
    return path


def test_gpu_targets_are_judged_or_said_to_be_unmeasured(tmp_path, results):
    judged = {}
    for f in findings(read([gpu_json(tmp_path / "bench0.json")])):
        judged.setdefault(f.target, []).append((f.value, report.verdict(f)))
    missed = "**missed**"
    assert judged["`lif` time ÷ `torch.relu` time"] == [(1.0, "met")]
    assert judged["SpikingJelly's fastest ÷ `lif`, float32"] == [(2.0, "met")]
    assert judged["`lif` keeps ÷ SpikingJelly keeps"] == [(0.5, "met")]
    assert judged["`lif`, dearest ÷ cheapest neuron-step"] == [(pytest.approx(1.3), missed)]
    assert judged["`lif`, slower ÷ faster of CUDA and Triton"] == [(pytest.approx(1.2), missed)]
    assert judged["`trt_penalty`, kernel launches"] == [(2, "met")]
    assert judged["official loop ÷ `trt_penalty`, time of a call"] == [(200.0, "met")]
    unmeasured = (None, "not measured")
    assert judged["SpikingJelly under AMP ÷ `lif`"] == [unmeasured]
    assert judged["`lif` forward, fraction of copy bandwidth"] == [unmeasured]
    assert judged["`batch_norm_lif`, fraction of copy bandwidth"] == [unmeasured]
    assert judged["`batch_norm_lif` keeps ÷ x"] == [unmeasured]
    on_cpu = {f.target for f in findings(read([results]))}
    assert not on_cpu & {"`trt_penalty`, kernel launches", "SpikingJelly under AMP ÷ `lif`"}
