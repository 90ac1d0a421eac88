"""The benchmark suite itself: its helper, its baselines and its report."""

import json

import pytest
import torch

import trt_kernels as tk
from benchmarks import baselines, networks, peers, report
from benchmarks.measure import (
    Absent,
    Case,
    Expected,
    Mismatch,
    Step,
    Variant,
    is_due,
    measure,
    optional,
    rounds_within,
)
from benchmarks.records import read
from benchmarks.targets import findings

MEGA = 1 << 20


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
        Variant("cut", cut, expected).first()
    nan = Step(lambda x: x + x, [x], [torch.full((8,), torch.nan)])
    with pytest.raises(Mismatch, match="nan: gradient 0"):
        Variant("nan", nan, expected).first()


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


def test_slow_variants_get_fewer_rounds():
    rounds = rounds_within(10.0, {"fast": 0.1, "slow": 1.0, "slowest": 9.0})
    assert rounds == {"fast": 33, "slow": 3, "slowest": 3}
    for few, total in ((3, 33), (7, 7), (1, 5), (5, 7)):
        assert sum(is_due(i, few, total) for i in range(total)) == few


def test_counts_kept_bytes():
    x = torch.rand(6, 10, requires_grad=True)
    step = Step(tk.lif, [x], [torch.rand(6, 10)])
    assert step.kept() == x.nbytes
    params = [w for name, w in networks.resnet19() if "bias" not in name]

    def penalty(*params):
        return tk.trt_penalty(params, steps=2, weight=1.0, delta=0.5)

    assert Step(penalty, params, [torch.ones(())]).kept() == sum(w.nbytes for w in params)


def test_resnet19_size():
    assert sum(w.numel() for _, w in networks.resnet19()) == 12_630_858


@pytest.mark.parametrize("v_reset", (0.0, 0.5))
@pytest.mark.parametrize("shape", ((1, 3), (6, 5, 7), (33, 40)))
def test_official_lif_matches_the_reference(shape, v_reset):
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    official = Step(lambda x: baselines.official_lif(x, v_reset=v_reset), [x], [grad])
    same = Step(lambda x: tk.lif(x, v_reset=v_reset, backend="reference"), [x], [grad])
    Expected(same, gradient=1e-6).check("official", official.results())


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
    try:
        forward, same = make()
    except ImportError as missing:
        pytest.skip(str(missing))
    x, grad = torch.randn(6, 5000, requires_grad=True), torch.randn(6, 5000)
    expected = Expected(Step(same, [x], [grad]), output=error, gradient=error or 1e-6)
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


def test_report_of_nothing_is_an_error(tmp_path):
    path = tmp_path / "empty.json"
    path.write_text(json.dumps({"machine_info": {}, "benchmarks": []}))
    with pytest.raises(SystemExit):
        report.main([str(path)])
