"""Every operator twice: the same bits, whatever ran between, for any number of threads, in any
memory. Under `torch.use_deterministic_algorithms`, as all tests are, and without."""

import multiprocessing

import pytest
import torch

import trt_kernels as tk
from trt_kernels.backends import native

SMALL = {"cpu": 1, "cuda": 20, "triton": 60}  # a share of the size, where a host plays the device


class Operators:
    """One call of each, on the same numbers every time; gives the outputs and the gradients."""

    def __init__(self, share):
        self.share = share

    def leaf(self, *shape, seed=0, positive=False):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(shape, generator=generator)
        return (values.abs() + 0.1 if positive else values).requires_grad_()

    def results(self, outputs, leaves):
        outputs = [o for o in outputs if o is not None]
        differentiable = [o for o in outputs if o.requires_grad]
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in differentiable]
        return [o.detach() for o in outputs] + list(
            torch.autograd.grad(differentiable, leaves, grads)
        )

    def lif(self):
        x, v_init = self.leaf(18, 30_000 // self.share), self.leaf(30_000 // self.share, seed=2)
        penalty = tk.MembranePenalty("trt", torch.ones(18))
        out = tk.lif(
            x,
            v_init=v_init,
            penalty=penalty,
            statistics=True,
            return_state=True,
            return_potential=True,
        )
        return self.results(out, (x, v_init))

    def spikes(self):
        x = self.leaf(18, 30_000 // self.share)
        return self.results([tk.lif(x)], (x,))

    def learnable(self):
        x = self.leaf(5, 6, 40, 240 // self.share + 3)
        rows = [self.leaf(40, seed=seed, positive=True) for seed in (3, 4, 5)]
        decay, threshold, v_reset = rows
        out = tk.lif(x, decay=decay, threshold=threshold, v_reset=v_reset, channel_dim=2)
        return self.results([out], (x, *rows))

    def batch_norm_lif(self):
        x = self.leaf(4, 6, 24, 500 // self.share + 3)
        weight, bias, gains = self.leaf(24, seed=3), self.leaf(24, seed=4), self.leaf(4, 24, seed=5)
        running = torch.zeros(24), torch.ones(24)
        out = tk.batch_norm_lif(x, *running, weight, bias, training=True, gains=gains)
        return [*running, *self.results([out], (x, weight, bias, gains))]

    def bits(self):
        x = self.leaf(6, 60_000 // self.share)
        options = {"memory": "bits", "surrogate": tk.Rectangle(), "detach_reset": True}
        return self.results([tk.lif(x, **options)], (x,))

    def packed(self):
        x, w = self.leaf(6, 60_000 // self.share), self.leaf(6, 60_000 // self.share, seed=2)
        with tk.pack_saved_spikes():
            return self.results([tk.lif(x) * w], (x, w))

    def trt_penalty(self):
        params = [self.leaf(n // self.share + 1, seed=n) for n in (100_000, 7, 33_000)]
        return self.results([tk.trt_penalty(params, steps=6, weight=1.0, delta=0.5)], params)

    def trt_penalty_(self):
        params = [self.leaf(n // self.share + 1, seed=n) for n in (100_000, 7, 33_000)]
        tk.trt_penalty_(params, steps=6, weight=1.0, delta=0.5)
        return [p.grad for p in params]

    def temporal_loss(self):
        logits = self.leaf(6, 400 // self.share + 3, 30)
        target = torch.arange(logits.shape[1]) % 30
        return self.results([tk.temporal_loss(logits, target, mse_ratio=0.2)], (logits,))

    def __getitem__(self, name):
        return getattr(self, name)()


NAMES = [
    name
    for name, value in vars(Operators).items()
    if callable(value) and not name.startswith("__") and name not in ("leaf", "results")
]


def same(results, others):
    for a, b in zip(results, others, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_twice(name, backend):
    """Between them other calls; the second finds its memory at other addresses."""
    operators = Operators(SMALL[backend])
    first = operators[name]
    other = NAMES[NAMES.index(name) - 1]
    kept = operators[other], torch.empty(3), torch.empty(12345)
    same(first, operators[name])
    assert kept


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads(name, threads):
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(Operators(1)[name])
    for other in results[1:]:
        same(results[0], other)


@pytest.mark.parametrize("name", NAMES)
def test_determinism_needs_no_flag(name, backend):
    operators = Operators(SMALL[backend])
    with_flag = operators[name]
    torch.use_deterministic_algorithms(False)
    same(with_flag, operators[name])
    torch.use_deterministic_algorithms(True, warn_only=True)
    same(with_flag, operators[name])


@pytest.mark.parametrize("level", native._C.cpu_levels())
def test_spikes_and_states_on_any_processor(level, level_setter):
    """Outputs of `lif` are the same at every instruction-set level; gradients and sums close."""
    names = ("lif", "spikes", "learnable", "bits")
    level_setter("baseline")
    expected = [Operators(1)[name] for name in names]
    level_setter(level)
    for name, theirs in zip(names, expected, strict=True):
        ours = Operators(1)[name]
        exact = {"lif": (0, 1, 3, 4)}.get(name, (0,))  # spikes, state, potential, rate
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if index in exact:
                assert torch.equal(a, b), (name, index)
            else:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def _in_child(queue):
    # Small enough for torch's own operators, which hang in a fork if they take threads.
    queue.put([r.tolist() for r in Operators(20)["lif"]])


def test_a_forked_child_has_the_same_bits():
    expected = [r.tolist() for r in Operators(20)["lif"]]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    got = queue.get(timeout=100)
    child.join()
    assert got == expected
