"""`pack_saved_spikes`: the same gradients from a thirtieth of the memory, and nothing mistaken for
spikes. Its kernels on every backend, against the reference."""

import contextlib
import gc
import itertools
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import trt_kernels as tk
from tests.conftest import serve
from trt_kernels import ops, packing
from trt_kernels.backends import native, reference
from trt_kernels.backends.layout import fold

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (0, 1, 7, 8, 9, 255, 256, 1000, 4099)


def run(backend, name, *arguments):
    """`spike_pack` or `spike_unpack` of a backend."""
    module = reference if backend == "reference" else ops.kernels(backend)
    if not hasattr(module, name):
        pytest.skip(f"backend {backend!r} has no {name} yet")
    return getattr(module, name)(*arguments, *packing._which(backend))


def random_spikes(shape, dtype=torch.float32):
    return (torch.rand(shape) < 0.3).to(dtype)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_reference_by_single_elements():
    x = random_spikes(21)
    bits, binary = reference.spike_pack(x)
    assert bits.shape == (1, 3) and bool(binary)
    assert [int(bits[0, i // 8]) >> i % 8 & 1 for i in range(24)] == [*x.int().tolist(), 0, 0, 0]
    outer, steps, inner = 3, 2, 5
    bits = torch.randint(256, (steps, 2), dtype=torch.uint8)
    got = reference.spike_unpack(bits, outer, steps, inner, torch.float32)
    for o, t, i in itertools.product(range(outer), range(steps), range(inner)):
        n = o * inner + i
        assert got[(o * steps + t) * inner + i] == (int(bits[t, n // 8]) >> n % 8 & 1)


def test_kernels_round_trip(kernels):
    for dtype, n, offset in itertools.product(DTYPES, SIZES, (0, 1, 3)):
        for x in (random_spikes(n, dtype), torch.ones(n, dtype=dtype), torch.zeros(n, dtype=dtype)):
            x = torch.cat([torch.full((offset,), 7.0, dtype=dtype), x])[offset:]
            bits, binary = run(kernels, "spike_pack", x)
            assert binary and torch.equal(bits, reference.spike_pack(x)[0])
            assert same_bits(run(kernels, "spike_unpack", bits, 1, 1, n, dtype), x)


def test_kernels_find_what_is_no_spike(kernels):
    for dtype, n in itertools.product(DTYPES, (1, 9, 600, 4099)):
        for stranger in (2.0, 0.5, -1.0, -0.0, float("nan"), float("inf"), 6e-8):
            for place in {0, n // 2, n - 1}:
                x = random_spikes(n, dtype)
                x[place] = stranger
                assert not run(kernels, "spike_pack", x)[1]
                assert not reference.spike_pack(x)[1]


def test_kernels_unpack_timesteps(kernels):
    for dtype, outer, steps, inner in itertools.product(
        DTYPES, (1, 3), (1, 4), (0, 1, 5, 8, 16, 130)
    ):
        bits = torch.randint(256, (steps, -(-outer * inner // 8)), dtype=torch.uint8)
        got = run(kernels, "spike_unpack", bits, outer, steps, inner, dtype)
        assert same_bits(got, reference.spike_unpack(bits, outer, steps, inner, dtype))


def test_kernels_on_several_threads(threads):
    x = random_spikes(300_001)
    late = x.clone()
    late[-1] = 2.0
    for count in (1, 2, 3):
        threads(count)
        bits, binary = native.spike_pack(x, "cpu")
        assert binary and torch.equal(bits, reference.spike_pack(x)[0])
        assert not native.spike_pack(late, "cpu")[1]
        got = native.spike_unpack(bits, 1, 1, x.numel(), x.dtype, "cpu")
        assert torch.equal(got, x)


# --- What is kept.


def kept_gradients(spikes, weight, view=lambda s: s):
    """Gradients through a product that keeps `view(spikes)`, with a report of what was kept."""
    with tk.pack_saved_spikes() as report:
        y = view(spikes) * weight
    return torch.autograd.grad(y, weight, torch.randn_like(y)), report


def bits_of(spikes, time_dim=0):
    """The bits that `lif` writes, for spikes in any dense layout."""
    outer, steps, inner = fold(spikes, time_dim)
    memory = spikes.as_strided((outer, steps, inner), (steps * inner, inner, 1))
    rows = [reference.spike_pack(memory[:, t].flatten())[0] for t in range(steps)]
    return torch.cat(rows)


VIEWS = {
    "itself": lambda s: s,
    "memory": lambda s: s.as_strided((s.numel(),), (1,)),
    "flatten": lambda s: s.flatten(0, 1),
    "unflatten": lambda s: s.unflatten(-1, (-1, 2)),
    "transposed": lambda s: s.transpose(0, -1),
    "detached": lambda s: s.detach(),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("time_dim", (0, 1))
@pytest.mark.parametrize("channels_last", (False, True))
def test_the_bits_of_lif_are_found(view, time_dim, channels_last, backend):
    run(backend, "spike_pack", random_spikes(8))
    spikes = random_spikes((3, 4, 6, 5, 4))
    if channels_last:
        spikes = spikes.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    with tk.pack_saved_spikes() as report:
        packing.remember(spikes, bits_of(spikes, time_dim), time_dim)
        x = VIEWS[view](spikes)
        weight = torch.randn(x.shape, requires_grad=True)
        y = x * weight
    (grad,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert torch.equal(grad, x)
    assert (report.from_lif, report.by_pass, report.left) == (1, 0, 0)
    assert report.bytes_before == spikes.nbytes
    assert report.bytes_after == bits_of(spikes, time_dim).nbytes


def test_bits_are_believed():
    """Not found by another pass: what is unpacked is what was remembered."""
    spikes = random_spikes((2, 300))
    with tk.pack_saved_spikes():
        packing.remember(spikes, bits_of(1 - spikes), 0)
        weight = torch.randn(2, 300, requires_grad=True)
        y = spikes * weight
    assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], 1 - spikes)


def change(spikes):
    spikes.mul_(2)
    return spikes


def change_and_alias(spikes):
    """Another count of versions, which is again at 0."""
    return change(spikes).data


@pytest.mark.parametrize(
    "other", (change, change_and_alias, lambda s: s[1:], lambda s: s.view(torch.int32).float())
)
def test_other_memory_is_not_mistaken_for_the_bits(other, backend):
    run(backend, "spike_pack", random_spikes(8))
    spikes = random_spikes((2, 300))
    with tk.pack_saved_spikes() as report:
        packing.remember(spikes, bits_of(1 - spikes), 0)  # wrong, to see them used
        x = other(spikes)
        weight = torch.randn(x.shape, requires_grad=True)
        y = x * weight
    assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], x)
    assert report.from_lif == 0 and report.by_pass + report.left == 1


def test_half_copies_are_packed_by_a_pass():
    spikes = random_spikes((4, 8, 40))
    linear = nn.Linear(40, 3)

    def grads(context):
        with context as report, torch.autocast("cpu", torch.bfloat16):
            loss = linear(spikes).square().sum()
        return torch.autograd.grad(loss, linear.parameters()), report

    expected, _ = grads(contextlib.nullcontext())
    with tk.pack_saved_spikes():  # the outer one, whose notes the inner one sees
        packing.remember(spikes, bits_of(spikes), 0)
        got, report = grads(tk.pack_saved_spikes())
    assert (report.from_lif, report.by_pass) == (0, 1)
    assert report.bytes_before == 16 * report.bytes_after == 2 * spikes.numel()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "x",
    (
        torch.rand(300),
        torch.cat([torch.zeros(300), torch.tensor([-0.0])]),
        torch.ones(255),
        torch.ones(300, 2)[:, 0],
        torch.ones(1).expand(300),
        torch.ones(300, dtype=torch.int64),
        torch.ones(300, dtype=torch.complex64),
        torch.zeros(300, dtype=torch.complex64).conj().imag,
    ),
    ids=lambda x: f"{x.dtype}-{tuple(x.shape)}-{tuple(x.stride())}",
)
def test_left_alone(x):
    weight = torch.randn(x.shape, requires_grad=True)
    y = x * weight
    (expected,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    with tk.pack_saved_spikes() as report:
        y = x * weight
    (got,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert torch.equal(got, expected)
    assert (report.from_lif, report.by_pass, report.left) == (0, 0, 1)
    assert report.bytes_before == report.bytes_after == 0


def test_sparse_tensors_are_left_alone():
    x, weight = random_spikes((20, 20)).to_sparse(), torch.randn(20, 3, requires_grad=True)
    with tk.pack_saved_spikes() as report:
        y = torch.sparse.mm(x, weight)
    y.sum().backward()
    assert report.by_pass == 0 and torch.equal(weight.grad[:, 0], x.to_dense().sum(0))


def test_parameters_are_left_alone():
    weight = torch.ones(20, 20, requires_grad=True)
    x = torch.randn(3, 20, requires_grad=True)
    with tk.pack_saved_spikes() as report:
        y = nn.functional.linear(x, weight)  # keeps a view of the weight
    y.sum().backward()
    assert report.left == 2 and report.by_pass == 0


def test_subclasses_are_left_alone():
    class Tagged(torch.Tensor):
        pass

    (grad,), report = kept_gradients(
        random_spikes(300).as_subclass(Tagged), torch.randn(300, requires_grad=True)
    )
    assert report.left == 1 and grad.shape == (300,)


def test_a_device_that_no_backend_serves_is_left_alone():
    with tk.use_backend("cuda"):  # not on a host
        _, report = kept_gradients(random_spikes(300), torch.randn(300, requires_grad=True))
    assert (report.by_pass, report.left) == (0, 1)


def test_the_reference_packs_too():
    spikes = random_spikes(300)
    with tk.use_backend("reference"):
        (grad,), report = kept_gradients(spikes, torch.ones(300, requires_grad=True))
    assert report.by_pass == 1 and torch.equal(grad != 0, spikes == 1)


def test_strides_are_kept():
    spikes = random_spikes((2, 3, 16, 16)).to(memory_format=torch.channels_last)
    seen = []

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x)
            return weight * 2

        @staticmethod
        def backward(ctx, grad):
            seen.append(ctx.saved_tensors[0])
            return None, grad * 2

    with tk.pack_saved_spikes() as report:
        y = Keep.apply(spikes, torch.randn(3, requires_grad=True))
    y.sum().backward()
    (x,) = seen
    assert report.by_pass == 1
    assert x.stride() == spikes.stride() and torch.equal(x, spikes)
    assert x.data_ptr() != spikes.data_ptr()


def test_what_several_layers_keep_is_packed_once(monkeypatch):
    passes = []
    pack = native.spike_pack
    monkeypatch.setattr(native, "spike_pack", lambda *a: passes.append(1) or pack(*a))
    spikes, analog = random_spikes((4, 100)), torch.randn(4, 100)
    layers = [nn.Linear(100, 3) for _ in range(3)]
    for x, count in ((spikes, 3), (analog, 0)):
        passes.clear()
        with tk.pack_saved_spikes() as report:
            sum(layer(x.view(2, 2, 100)) for layer in layers)
        assert len(passes) == (1 if count else 3)
        assert report.by_pass == count
        assert report.bytes_before == x.nbytes * (count > 0) == 32 * report.bytes_after


def test_the_report_reads_well():
    _, report = kept_gradients(random_spikes(2**20), torch.randn(2**20, requires_grad=True))
    assert str(report) == (
        "1 saved tensors kept as bits (0 from lif, 1 packed): "
        "4.00 MiB as 0.12 MiB, 32.0 times smaller; 0 left alone"
    )
    assert str(packing.PackingReport(left=2)).endswith("(0 from lif, 0 packed); 2 left alone")


# --- How long things live.


def test_bits_die_with_the_spikes_or_the_graph():
    with tk.pack_saved_spikes():
        spikes = random_spikes((2, 300))
        bits = bits_of(spikes)
        packing.remember(spikes, bits, 0)
        storage = weakref.ref(bits.untyped_storage())
        del bits
        assert storage() is not None
        weight = torch.randn(2, 300, requires_grad=True)
        y = spikes * weight
        kept = weakref.ref(spikes.untyped_storage())
        del spikes
        assert kept() is None  # the memory that this is about
        assert storage() is not None
        assert not packing._local.context.memories
        y.sum().backward()
        del y
        assert storage() is None


def test_nothing_old_is_found_where_memory_is_used_again():
    with tk.pack_saved_spikes() as report:
        for _ in range(20):
            spikes = random_spikes((2, 300))
            packing.remember(spikes, bits_of(1 - spikes), 0)
            address = spikes.data_ptr()
            del spikes
            spikes = random_spikes((2, 300))
            again = spikes.data_ptr() == address
            weight = torch.randn(2, 300, requires_grad=True)
            (grad,) = torch.autograd.grad((spikes * weight).sum(), weight)
            assert torch.equal(grad, spikes), again
    assert report.from_lif == 0


def test_a_result_that_its_function_keeps_is_no_cycle():
    gc.disable()
    try:
        with tk.pack_saved_spikes():
            y = torch.randn(300, requires_grad=True).sigmoid()
        storage = weakref.ref(y.untyped_storage())
        del y
        assert storage() is None
    finally:
        gc.enable()


def test_left_alone_and_changed_in_place_raises():
    x, weight = torch.randn(300), torch.randn(300, requires_grad=True)
    with tk.pack_saved_spikes():
        y = x * weight
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_packed_and_changed_in_place_later_is_as_it_was():
    x, weight = random_spikes(300), torch.randn(300, requires_grad=True)
    before = x.clone()
    with tk.pack_saved_spikes():
        y = x * weight
    x.mul_(2)
    assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], before)


# --- The context.


def test_nested_contexts_and_exceptions():
    assert not packing.active()
    x, weight = random_spikes(300), torch.randn(300, requires_grad=True)
    with tk.pack_saved_spikes() as outer:
        with pytest.raises(KeyError), tk.pack_saved_spikes() as inner:
            x * weight
            raise KeyError
        assert packing.active()
        x * weight
    assert not packing.active()
    assert inner.by_pass == outer.by_pass == 1  # the pass of the inner one serves both
    assert (inner.bytes_before, outer.bytes_before) == (1200, 0)
    y = x * weight
    assert torch.equal(y.grad_fn._saved_self, x)
    assert outer.by_pass == 1


def test_threads_are_apart():
    seen, enter, leave = [], threading.Event(), threading.Event()
    x, weight = random_spikes(300), torch.randn(300, requires_grad=True)

    def other():
        seen.append(packing.active())
        with tk.pack_saved_spikes() as report:
            enter.set()
            leave.wait()
            x * weight
        seen.append(report.by_pass)

    with tk.pack_saved_spikes() as report:
        thread = threading.Thread(target=other)
        thread.start()
        enter.wait()
        x * weight
        x * weight
    leave.set()
    thread.join()
    assert seen == [False, 1] and report.by_pass == 2


def test_second_derivatives():
    x, weight = random_spikes((3, 300)), torch.randn(300, requires_grad=True)

    def second(context):
        with context:
            y = (x * weight).square().sum()
            (grad,) = torch.autograd.grad(y, weight, create_graph=True)
            return torch.autograd.grad(grad.pow(3).sum(), weight, retain_graph=True)[0]

    assert torch.equal(second(tk.pack_saved_spikes()), second(contextlib.nullcontext()))


def test_backward_twice():
    x, weight = random_spikes(300), torch.randn(300, requires_grad=True)
    with tk.pack_saved_spikes():
        y = (x * weight).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert torch.equal(weight.grad, 2 * x)


# --- Networks. Their neurons run on each backend: with kernels, all bits are those of `lif`.


@pytest.fixture(params=("reference", "cpu", "cuda", "triton"))
def neurons(request):
    """The backend of the neurons and of packing."""
    with serve(request.param, request):
        if request.param == "triton":
            run("triton", "spike_pack", random_spikes(8))
        yield request.param


class Network(nn.Module):
    """[T, B, 3, 8, 8] -> [B, 4]; a residual sum makes two convolutions read the same spikes."""

    kept = 4  # spike tensors that convolutions and the linear layer keep, of which two are one

    def __init__(self, **settings):
        super().__init__()
        channels = (3, 4, 4, 4)
        pairs = list(itertools.pairwise(channels))
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        self.branch = nn.Conv2d(4, 4, 1)
        self.lif = tk.nn.LIF(**settings)
        self.head = nn.Linear(4 * 8 * 8, 4)
        self.wrap = lambda block, x: block(x)

    def block(self, index):
        def run_block(x):
            steps = x.shape[0]
            y = self.norms[index](self.convolutions[index](x.flatten(0, 1)))
            return self.lif(y.unflatten(0, (steps, -1)))

        return run_block

    def forward(self, x):
        first = self.wrap(self.block(0), x)
        second = self.wrap(self.block(1), first)
        third = self.wrap(self.block(2), second)
        branch = self.branch(first.flatten(0, 1)).mean((1, 2, 3)).sum()
        return self.head(third.flatten(2)).mean(0) + branch


def train(network, x, context, call=None):
    """Loss and gradients of one step from the same state."""
    network.zero_grad()
    for norm in network.norms:
        norm.reset_running_stats()
    with context as report:
        loss = (network if call is None else call)(x).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in network.parameters())], report


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


X = (3, 2, 3, 8, 8)


def test_network(neurons):
    network, x = Network(), torch.randn(X)
    expected, _ = train(network, x, contextlib.nullcontext())
    got, report = train(network, x, tk.pack_saved_spikes())
    assert same(got, expected)
    if neurons == "reference":  # what its own operations keep is packed as well
        assert report.from_lif == 0 and report.by_pass >= network.kept
    else:
        assert (report.from_lif, report.by_pass) == (network.kept, 0)
        assert report.bytes_before == 3 * 3 * 2 * 4 * 8 * 8 * 4 == 32 * report.bytes_after


@pytest.mark.parametrize("neurons", ("reference", "cpu"), indirect=True)
def test_network_in_half_precision(neurons):
    network, x = Network(), torch.randn(X)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return network(x)

    expected, _ = train(network, x, contextlib.nullcontext(), call)
    got, report = train(network, x, tk.pack_saved_spikes(), call)
    assert same(got, expected)
    assert report.from_lif + report.by_pass >= network.kept


@pytest.mark.parametrize("neurons", ("reference", "cpu"), indirect=True)
@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("inside", (False, True))
def test_network_with_checkpoints(neurons, reentrant, inside):
    network, x = Network(), torch.randn(X, requires_grad=True)
    network.wrap = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
    expected, _ = train(network, x, contextlib.nullcontext())
    if inside:  # the backward pass too
        with tk.pack_saved_spikes() as report:
            got, _ = train(network, x, contextlib.nullcontext())
    else:
        got, report = train(network, x, tk.pack_saved_spikes())
    assert same(got, expected)
    # The inputs of the second and third part, and what the branch and the head keep.
    assert report.from_lif + report.by_pass >= 4
    if neurons != "reference" and not inside:
        assert report.by_pass == 0


@pytest.mark.parametrize("neurons", ("reference", "cpu"), indirect=True)
def test_network_compiled(neurons):
    torch._dynamo.reset()
    network, x = Network(), torch.randn(X)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for _ in range(2):  # the first call runs differently
        got, report = train(network, x, tk.pack_saved_spikes(), compiled)
        assert report.from_lif == 0 and report.by_pass >= 3
        expected, _ = train(network, x, contextlib.nullcontext(), compiled)
        assert same(got, expected)


def test_entered_inside_what_is_compiled():
    torch._dynamo.reset()
    x, weight = random_spikes(300), torch.randn(300, requires_grad=True)
    reports = []

    def step(x):
        with tk.pack_saved_spikes() as report:
            y = (x * weight).sum()
        reports.append(report)
        return y

    for fullgraph in (False, True):
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=r"pack_saved_spikes: torch\.compile cannot"):
            torch.compile(step, backend="eager", fullgraph=fullgraph)(x)
    assert not reports and not packing.active()
    torch._dynamo.reset()
    uncompiled = torch.compiler.disable(step)
    torch.compile(lambda x: 2 * uncompiled(x + 0), backend="eager")(x).backward()
    assert torch.equal(weight.grad, 2 * x) and reports[-1].by_pass == 1


def held(network, x, context):
    """Bytes that a forward pass leaves for its backward pass."""

    def storages():
        gc.collect()
        found = {}
        for o in gc.get_objects():
            tensor = issubclass(type(o), torch.Tensor) and not torch.nn.parameter.is_lazy(o)
            if tensor and o.layout is torch.strided:
                found[o.untyped_storage()._cdata] = o.untyped_storage().nbytes()
        return found

    before = storages()
    with context:
        loss = network(x).square().sum()
    after = storages()
    assert loss.requires_grad
    return sum(size for key, size in after.items() if key not in before)


def plainly():
    """Hooks that keep everything as it is, so that `held` sees it too."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x)


@pytest.mark.parametrize("neurons", ("reference", "cpu"), indirect=True)
def test_memory_of_a_network(neurons):
    network, x = Network(), torch.randn(X)
    without, with_bits = held(network, x, plainly()), held(network, x, tk.pack_saved_spikes())
    layer = 3 * 2 * 4 * 8 * 8 * 4
    # Kept by a layer anyway: the convolution's result and the neuron's input.
    assert without - with_bits >= 3 * layer * 31 // 32 - 1024
