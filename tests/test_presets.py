"""Presets against the libraries that they imitate, bit for bit; the libraries must be there."""

import itertools

import pytest
import torch
from torch.nn import functional

import trt_kernels as tk
from tests import official
from tests.cases import quantised, relative_error
from trt_kernels import presets

STEPS, SHAPE = 7, (5, 4, 9)
# On a grid of tenths and eighths potentials meet the threshold exactly, before and after rounding.
INPUTS = {
    "random": lambda shape: torch.randn(shape) * 1.5,
    "tenths": lambda shape: quantised(shape, 1.5, 0.1),
    "eighths": lambda shape: quantised(shape, 1.5, 0.125),
}


def compare(x, theirs, options, *, learned=(), finite=False, time_dim=0):
    """Spikes and potentials of `theirs(x)`, (spikes, potentials), bit for bit; gradients to 1e-6.

    `finite` where the library's own gradient may be NaN: then only the rest is compared.
    """
    x = x.requires_grad_()
    spikes, potential = theirs(x)
    leaves = (x, *learned)
    grads = torch.randn_like(spikes)
    expected = torch.autograd.grad(spikes, leaves, grads, allow_unused=True)
    for backend in ("cpu", "reference"):
        out = tk.lif(
            x, **{"time_dim": time_dim, **options()}, return_potential=True, backend=backend
        )
        assert torch.equal(out.spikes, spikes.to(x.dtype))
        if potential is not None:
            assert torch.equal(out.potential, potential)
        found = torch.autograd.grad(out.spikes, leaves, grads, allow_unused=True)
        for a, b in zip(found, expected, strict=True):
            if finite:
                a, b = torch.where(b.isfinite(), a, 0), torch.where(b.isfinite(), b, 0)
            # A learned number's is a sum of float32 terms that cancel, in whatever order.
            scale = b.norm() if b.ndim else max(b.norm(), x.numel() ** 0.5)
            assert a.isfinite().all() and (a - b).norm() < 1e-6 * scale
    assert 0.02 < spikes.mean() < 0.98


# --- The official code, x [B, T, *].
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("v_reset", (0.0, -0.2, None))
def test_official_trt(kind, v_reset):
    surrogates = (("sigmoid", 2.0), ("triangle", 0.7), ("pseudo", 0.5))
    for tau, (name, parameter) in itertools.product((1.0, 2.0, 3.0, 5, 49.0), surrogates):
        settings = {
            "v_threshold": 0.5,
            "v_reset": v_reset,
            "tau": tau,
            "surrogate_type": name,
            "surrogate_param": parameter,
        }
        x = INPUTS[kind]((5, STEPS, 9)) * 0.5
        compare(
            x,
            lambda x, settings=settings: (official.LIFNode(**settings)(x), None),
            lambda settings=settings: presets.official_trt(**settings),
        )


def test_official_defaults():
    assert presets.official_trt() == presets.official_trt(
        v_threshold=0.5, v_reset=0.0, tau=5, surrogate_type="sigmoid", surrogate_param=2.0
    )


# --- SpikingJelly.
def spikingjelly_surrogates():
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
    return (
        (surrogate.Sigmoid(4.0), tk.Sigmoid(4.0)),
        (surrogate.ATan(2.0), tk.ATan(2.0)),
        (surrogate.PiecewiseQuadratic(0.7), tk.Triangle(1 / 0.7)),
        (surrogate.Rect(1.5), tk.Rectangle(1 / 1.5)),
        (surrogate.PiecewiseLeakyReLU(0.6, 0.0), tk.Rectangle(1.2)),
    )


def run_node(node):
    """Spikes and potentials before the reset; the library keeps those after it."""
    node.step_mode, node.store_v_seq = "m", True

    def run(x):
        node.reset()
        spikes = node(x)
        # Where nothing fired, nothing was reset.
        return spikes, node.v_seq

    return run


def compare_node(x, node, options, learned=()):
    """`compare`, with the potentials after the reset in the place of those before it."""
    run = run_node(node)
    compare(x, lambda x: (run(x)[0], None), options, learned=learned)
    after = node.v_seq
    out = tk.lif(x, **options(), return_potential=True, return_state=True)
    fired = out.spikes.bool()
    if options()["reset"] == "hard":
        expected = torch.where(fired, options()["v_reset"], out.potential)
    else:
        expected = out.potential - options()["threshold"] * out.spikes
    assert torch.equal(expected, after) and torch.equal(out.state, after[-1])


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("detach_reset", (False, True))
@pytest.mark.parametrize("v_reset", (0.0, -0.3, None))
def test_spikingjelly(kind, detach_reset, v_reset):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    given = {"v_threshold": 0.7, "v_reset": v_reset, "detach_reset": detach_reset}
    for theirs, ours in spikingjelly_surrogates():
        own, other = {**given, "surrogate": ours}, {**given, "surrogate_function": theirs}
        x = INPUTS[kind]((STEPS, *SHAPE))
        compare_node(x, neuron.IFNode(**other), lambda own=own: presets.spikingjelly_if(**own))
        for decay_input in (True, False):
            for tau in (2.0, 3.0, 100 / 7):
                node = neuron.LIFNode(tau=tau, decay_input=decay_input, **other)
                compare_node(
                    x * (tau if decay_input else 1),
                    node,
                    lambda own=own, tau=tau, decay_input=decay_input: presets.spikingjelly_lif(
                        tau=tau, decay_input=decay_input, **own
                    ),
                )
            node = neuron.ParametricLIFNode(2.3, decay_input=decay_input, **other)
            compare_node(
                x * (2.3 if decay_input else 1),
                node,
                lambda own=own, decay_input=decay_input, node=node: {
                    **presets.spikingjelly_plif(decay_input=decay_input, **own),
                    "decay": node.w.sigmoid(),
                },
                learned=(node.w,),
            )


# --- snnTorch.
def run_leaky(leaky):
    def run(x):
        mem, spikes, mems = leaky.reset_mem(), [], []
        for current in x:
            spike, mem = leaky(current, mem)
            spikes.append(spike)
            mems.append(mem)
        return torch.stack(spikes), torch.stack(mems)

    return run


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("reset_mechanism", ("subtract", "zero", "none"))
def test_snntorch(kind, reset_mechanism):
    snntorch = pytest.importorskip("snntorch")
    surrogate = pytest.importorskip("snntorch.surrogate")
    for theirs, ours in (
        (surrogate.atan(2.0), tk.ATan(2.0)),
        (surrogate.fast_sigmoid(25), tk.FastSigmoid(25)),
        (surrogate.sigmoid(25), tk.Sigmoid(25)),
        (surrogate.triangular(0.5), tk.SignedStep(0.5)),
    ):
        for beta in (0.9, 0.5, 1.2):
            leaky = snntorch.Leaky(
                beta,
                threshold=0.7,
                spike_grad=theirs,
                reset_mechanism=reset_mechanism,
                learn_beta=True,
                learn_threshold=True,
            )
            x = INPUTS[kind]((STEPS, *SHAPE)) * (0.4 if reset_mechanism == "none" else 1)
            compare(
                x,
                run_leaky(leaky),
                lambda leaky=leaky, ours=ours: presets.snntorch_leaky(
                    leaky.beta,
                    threshold=leaky.threshold,
                    reset_mechanism=reset_mechanism,
                    surrogate=ours,
                ),
                learned=(leaky.beta, leaky.threshold),
                finite=isinstance(ours, tk.Sigmoid),
            )


# --- Norse.
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("reset_method", ("value", "subtract"))
def test_norse(kind, reset_method):
    norse = pytest.importorskip("norse.torch.functional.lif_box")
    reset = pytest.importorskip("norse.torch.functional.reset")
    cell_type = pytest.importorskip("norse.torch").LIFBoxCell
    for method, ours in (("super", tk.FastSigmoid(1.0)), ("triangle", tk.Triangle(1.0))):
        for tau_mem_inv, v_leak in itertools.product((100.0, 300.0), (0.0, 0.25)):
            cell = cell_type(
                norse.LIFBoxParameters(
                    tau_mem_inv=torch.tensor(tau_mem_inv),
                    v_leak=torch.tensor(v_leak),
                    v_th=torch.tensor(0.4),
                    v_reset=torch.tensor(-0.1),
                    method=method,
                    alpha=1.0,
                    reset_method=getattr(reset, f"reset_{reset_method}"),
                )
            )

            def run(x, cell=cell):
                state, spikes = None, []
                for current in x:
                    spike, state = cell(current, state)
                    spikes.append(spike)
                return torch.stack(spikes), None

            options = presets.norse_lif_box(
                tau_mem_inv=tau_mem_inv,
                v_th=0.4,
                v_reset=-0.1,
                reset_method=reset_method,
                surrogate=ours,
            )
            x = (INPUTS[kind]((STEPS, *SHAPE)) * 4).requires_grad_()
            grads = torch.randn_like(x)
            spikes, _ = run(x)
            out = tk.lif(x + v_leak, v_init=v_leak, **options)
            assert torch.equal(out, spikes) and 0.02 < out.mean() < 0.98
            a, b = (torch.autograd.grad(s, x, grads)[0] for s in (out, spikes))
            assert relative_error(a, b) < 1e-6


# --- Arguments.
@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: presets.official_trt(decay_input=True), TypeError, "decay_input"),
        (lambda: presets.official_trt(tau=0), ValueError, "tau: got 0"),
        (lambda: presets.official_trt(surrogate_type="zo"), ValueError, "surrogate_type: got 'zo'"),
        (
            lambda: presets.official_trt(surrogate_type="pseudo", surrogate_param=2.0),
            ValueError,
            "surrogate_type: got 'pseudo' with surrogate_param 2.0",
        ),
        (lambda: presets.spikingjelly_if(tau=2.0), TypeError, "tau"),
        (lambda: presets.spikingjelly_lif(tau=1.0), ValueError, "tau: got 1.0, SpikingJelly's"),
        (lambda: presets.spikingjelly_lif(v_reset="0"), TypeError, "v_reset: got '0'"),
        (
            lambda: presets.spikingjelly_lif(surrogate=tk.FastSigmoid(25.0)),
            ValueError,
            "surrogate: got FastSigmoid.*SpikingJelly has Sigmoid, ATan, Triangle, Rectangle",
        ),
        (lambda: presets.spikingjelly_plif(tau=2.0), TypeError, "tau"),
        (lambda: presets.snntorch_leaky(), TypeError, "beta"),
        (
            lambda: presets.snntorch_leaky(0.9, reset_mechanism="hard"),
            ValueError,
            "reset_mechanism: got 'hard'",
        ),
        (
            lambda: presets.snntorch_leaky(0.9, surrogate=tk.Triangle()),
            ValueError,
            "surrogate: got Triangle.*snnTorch has",
        ),
        (lambda: presets.norse_lif_box(v_leak=0.1), ValueError, "v_leak: got 0.1"),
        (
            lambda: presets.norse_lif_box(surrogate=tk.FastSigmoid(2.0)),
            ValueError,
            "surrogate: got FastSigmoid",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_presets_serve_modules_and_the_block():
    x = torch.randn(4, 3, 5, 6)
    for options in (
        presets.spikingjelly_lif(v_reset=-0.2),
        presets.spikingjelly_if(v_reset=None),
        presets.snntorch_leaky(0.9),
        presets.norse_lif_box(),
    ):
        assert torch.equal(tk.nn.LIF(**options)(x), tk.lif(x, **options))
        block = tk.nn.BatchNormLIF(5, **options).eval()
        block.running_mean += 0.25
        y = functional.batch_norm(
            x.flatten(0, 1), block.running_mean, block.running_var, eps=block.eps
        )
        ours, theirs = block(x), tk.lif(y.view_as(x), **options)
        assert (ours != theirs).float().mean() < 1e-3
        ours, theirs = tk.nn.LIF(stateful=True, **options), tk.lif(x, **options)
        if options.get("reset") != "hard" or options["charge"] != "decay":
            assert torch.equal(torch.cat([ours(x[:1]), ours(x[1:])]), theirs)
