"""`temporal_loss` on every backend with kernels, `TRTLoss` and `TETLoss`, against the reference
and torch."""

import copy
import itertools

import pytest
import torch
from torch.nn import functional

import trt_kernels as tk
from tests.cases import relative_error

OPTIONS = (
    {},
    {"mse_ratio": 0.05},
    {"mse_ratio": 1.0},
    {"mse_ratio": 0.3, "label_smoothing": 0.1},
    {"mse_ratio": 0.2, "class_weight": True},
    {"mse_ratio": 0.2, "class_weight": True, "label_smoothing": 0.2},
    {"mse_ratio": 0.2, "ignore_index": 0},
    {"ignore_index": 0, "class_weight": True, "label_smoothing": 0.2},
)


def arguments(options, classes, batch=9, probabilities=False):
    options = dict(options)
    if options.pop("class_weight", False):
        options["class_weight"] = torch.rand(classes) + 0.1
    if probabilities:
        options.pop("ignore_index", None)
        return torch.softmax(torch.randn(batch, classes), 1), options
    target = torch.randint(0, classes, (batch,))
    target[0], target[-1] = 0, classes - 1
    return target, options


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("probabilities", (False, True))
def test_matches_reference(options, probabilities, kernels):
    for classes, dtype in itertools.product((2, 10, 33, 1000), (torch.float32, torch.float64)):
        target, chosen = arguments(options, classes, probabilities=probabilities)
        logits = (torch.randn(6, 9, classes) * 3).to(dtype).requires_grad_()
        results = []
        for backend, time_dim in itertools.product(("reference", kernels), (0, 1)):
            given = logits if time_dim == 0 else logits.transpose(0, 1)
            value = tk.temporal_loss(given, target, time_dim=time_dim, backend=backend, **chosen)
            results.append((value, torch.autograd.grad(value * 5, logits)[0]))
        (value, grad), *others = results
        bound = 2e-6 if dtype == torch.float32 else 1e-12
        for other_value, other_grad in others:
            assert other_value.dtype == dtype and other_value.shape == ()
            torch.testing.assert_close(other_value, value, rtol=bound, atol=0)
            assert relative_error(other_grad, grad) < bound


def test_is_torch_cross_entropy(backend):
    logits, target = torch.randn(5, 8, 10), torch.randint(0, 10, (8,))
    expected = torch.stack([functional.cross_entropy(o, target) for o in logits]).mean()
    torch.testing.assert_close(tk.temporal_loss(logits, target), expected)
    onehot = functional.one_hot(target, 10).float()
    torch.testing.assert_close(
        tk.temporal_loss(logits, target, mse_ratio=1.0),
        functional.mse_loss(logits, onehot.expand(5, 8, 10)),
    )


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_gradients_survive_the_upstream_scale(dtype, backend):
    """Multiplied by 2^15 before rounding: a gradient rounded first would flush to zero."""
    logits = (torch.randn(4, 64, 100) * 4).to(dtype)
    target = torch.randint(0, 100, (64,))
    exact = logits.double().requires_grad_()
    (tk.temporal_loss(exact, target, mse_ratio=0.05, backend="reference") * 2**15).backward()
    ours = logits.clone().requires_grad_()
    value = tk.temporal_loss(ours, target, mse_ratio=0.05)
    (value * 2**15).backward()
    assert value.dtype == torch.float32 and ours.grad.dtype == dtype
    rounded = exact.grad.to(dtype)
    assert relative_error(ours.grad, exact.grad) <= 1.05 * relative_error(rounded, exact.grad)
    # A norm is that of the large ones: the smaller half by itself.
    size = exact.grad.abs()
    half = size < size.median()
    lost = relative_error(rounded[half], exact.grad[half])
    assert relative_error(ours.grad[half], exact.grad[half]) <= 1.05 * lost


def test_gradcheck(backend):
    logits = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 4, 2, 2])
    options = {"mse_ratio": 0.3, "label_smoothing": 0.1}
    assert torch.autograd.gradcheck(lambda o: tk.temporal_loss(o, target, **options), logits)


def test_extreme_logits(backend):
    logits = torch.tensor([[[1e4, -1e4, 0.0], [-float("inf"), 2.0, 1.0]]], requires_grad=True)
    value = tk.temporal_loss(logits, torch.tensor([1, 1]))
    (grad,) = torch.autograd.grad(value, logits)
    reference = functional.cross_entropy(logits[0], torch.tensor([1, 1]))
    torch.testing.assert_close(value, reference)
    torch.testing.assert_close(grad, torch.autograd.grad(reference, logits)[0])
    nan = torch.full((1, 1, 3), float("nan"))
    assert tk.temporal_loss(nan, torch.tensor([1])).isnan()


def test_all_rows_ignored_is_nan_as_in_torch(backend):
    logits = torch.randn(2, 3, 4)
    target = torch.full((3,), -100)
    assert tk.temporal_loss(logits, target).isnan()
    assert functional.cross_entropy(logits[0], target).isnan()


def test_empty_batch_is_nan_as_in_torch(backend):
    for shape in ((2, 0, 4), (0, 3, 4)):
        logits = torch.zeros(shape, requires_grad=True)
        value = tk.temporal_loss(logits, torch.zeros(shape[1], dtype=torch.long))
        assert value.isnan()
        assert torch.autograd.grad(value, logits)[0].shape == torch.Size(shape)


def test_views_and_layouts(backend):
    base = torch.randn(5, 7, 24)
    target = torch.randint(0, 10, (7,))
    for view in (
        base[..., 3:13],
        base[..., :20:2],
        base[..., :10].transpose(0, 1).contiguous().transpose(0, 1),
        base[:, :1, :10].expand(5, 7, 10),
    ):
        view = view.detach().requires_grad_()
        results = []
        for chosen in (backend, "reference"):
            value = tk.temporal_loss(view, target, mse_ratio=0.2, backend=chosen)
            results.append((value, torch.autograd.grad(value, view)[0]))
        for a, b in zip(*results, strict=True):
            assert relative_error(a, b) < 1e-6


def test_repeats_its_bits_for_any_number_of_threads(threads):
    logits = torch.randn(10, 500, 30, requires_grad=True)
    target = torch.randint(0, 30, (500,))
    results = []
    for count in (1, 2, 5, 2):
        threads(count)
        value = tk.temporal_loss(logits, target, mse_ratio=0.05)
        results.append((value.detach(), *torch.autograd.grad(value, logits)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_keeps_the_logits_and_a_number_a_row():
    logits = torch.randn(6, 50, 10, requires_grad=True)
    target = torch.randint(0, 10, (50,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tk.temporal_loss(logits, target, mse_ratio=0.05)
    own = {t.data_ptr(): t.numel() for t in kept if t is not None}
    del own[logits.data_ptr()], own[target.data_ptr()]
    assert list(own.values()) == [6 * 50]


def test_double_backward_raises(backend):
    logits = torch.randn(2, 3, 4, requires_grad=True)
    value = tk.temporal_loss(logits, torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="temporal_loss cannot be differentiated twice"):
        torch.autograd.grad(value, logits, create_graph=True)


O = torch.zeros(2, 3, 4)  # noqa: E741
Y = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    "logits,target,options,error,message",
    [
        (O[0], Y, {}, ValueError, r"logits: got shape \(3, 4\)"),
        (O.long(), Y, {}, TypeError, "logits: got dtype"),
        (torch.zeros(2, 3, 0), Y, {}, ValueError, "logits: .* at least one class"),
        (O, Y[:2], {}, ValueError, r"target: got shape \(2,\), needs \(3,\)"),
        (O, Y.int(), {}, TypeError, "target: got dtype torch.int32"),
        (O, torch.rand(3, 5), {}, ValueError, r"target: got shape \(3, 5\), needs \(3, 4\)"),
        (O, torch.rand(3, 4, requires_grad=True), {}, ValueError, "target: requires grad"),
        (O, Y.to("meta"), {}, ValueError, "target: got a tensor on meta"),
        (O, torch.tensor([0, 4, 1]), {}, ValueError, "target: got class 4, needs 0 to 3"),
        (O, torch.tensor([0, -1, 1]), {}, ValueError, "target: got class -1"),
        (O, torch.tensor([0, -1, 9]), {"ignore_index": -1}, ValueError, "target: got class 9"),
        (O, Y, {"mse_ratio": 1.5}, ValueError, "mse_ratio: got 1.5"),
        (O, Y, {"mse_ratio": -0.1}, ValueError, "mse_ratio: got -0.1"),
        (O, Y, {"mse_ratio": float("nan")}, ValueError, "mse_ratio: got nan"),
        (O, Y, {"time_dim": 2}, ValueError, "time_dim: got the class dimension"),
        (O, Y, {"time_dim": 3}, ValueError, "time_dim: got 3"),
        (O, Y, {"label_smoothing": 2}, ValueError, "label_smoothing: got 2"),
        (O, Y, {"ignore_index": 0.5}, TypeError, "ignore_index: got 0.5"),
        (O, Y, {"ignore_index": 10**30}, ValueError, "ignore_index: got 1000"),
        (O, Y, {"class_weight": torch.ones(3)}, ValueError, r"class_weight: got shape \(3,\)"),
        (O, Y, {"class_weight": [1.0]}, TypeError, "class_weight: got list"),
        (
            O,
            Y,
            {"class_weight": torch.ones(4, requires_grad=True)},
            ValueError,
            "class_weight: req",
        ),
        (O, Y, {"check": 1}, TypeError, "check: got 1"),
        (O, Y, {"backend": "cuda"}, RuntimeError, "temporal_loss: backend 'cuda'"),
    ],
)
def test_bad_input(logits, target, options, error, message):
    with pytest.raises(error, match=message):
        tk.temporal_loss(logits, target, **options)


def test_kernel_gives_nan_for_a_class_out_of_range(backend):
    """What a GPU shows where nobody looks: the op itself, without the check before it."""
    logits = torch.zeros(2, 3, 4)
    options = (0, 1.0, 0.1, None, 0.0, -100, backend)
    registered = torch.ops.trt_kernels
    for wrong in (4, -1, 2**40):
        target = torch.tensor([0, wrong, 1])
        value, *kept = registered.temporal_loss_forward(logits, target, None, *options)
        assert value.isnan()
        upstream = torch.ones(())
        grad = registered.temporal_loss_backward(upstream, logits, target, None, *kept, *options)
        assert grad[:, 1].isnan().all() and grad[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_many_classes(dtype, backend):
    """Rows so long that a GPU gives each to a block."""
    logits = (torch.randn(2, 2, 100_000) * 3).to(dtype).requires_grad_()
    target = torch.tensor([0, 99_999])
    results = []
    for chosen in (backend, "reference"):
        value = tk.temporal_loss(logits, target, mse_ratio=0.1, backend=chosen)
        results.append((value, *torch.autograd.grad(value, logits)))
    (value, grad), (true_value, true_grad) = results
    torch.testing.assert_close(value, true_value, rtol=2e-6, atol=0)
    assert relative_error(grad, true_grad) < (2e-6 if dtype == torch.float32 else 1e-2)


def model():
    return torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 4, bias=True)
    )


def test_trt_loss(backend):
    net = model()
    logits = torch.randn(6, 3, 4, requires_grad=True)
    loss = tk.TRTLoss(net, weight=1e-2, delta=0.5, mse_ratio=0.05)
    regularized = [p for name, p in net.named_parameters() if "bias" not in name]
    assert len(regularized) == 3  # the normalisation's gain among them
    expected = tk.temporal_loss(logits, Y, mse_ratio=0.05) + tk.trt_penalty(
        regularized, steps=6, weight=1e-2, delta=0.5
    )
    assert torch.equal(loss(logits, Y), expected)
    loss(logits, Y).backward()
    assert all((p.grad is not None) == ("bias" not in n) for n, p in net.named_parameters())
    assert list(loss.parameters()) == [] and loss.state_dict() == {}
    named = tk.TRTLoss(net.named_parameters(), weight=1e-2, delta=0.5, mse_ratio=0.05)
    assert torch.equal(named(logits, Y), expected)
    batch_first = tk.TRTLoss(net, weight=1e-2, delta=0.5, mse_ratio=0.05, time_dim=1)
    torch.testing.assert_close(batch_first(logits.transpose(0, 1), Y), expected)
    assert "weight=0.01" in repr(loss)


def test_trt_loss_of_weight_0_leaves_the_regularizer_out():
    net = model()
    loss = tk.TRTLoss(net, weight=0, delta=0.5, mse_ratio=0.05)
    loss.regularized = None  # not even looked up
    logits = torch.randn(6, 3, 4, requires_grad=True)
    value = loss(logits, Y)
    assert torch.equal(value, tk.temporal_loss(logits, Y, mse_ratio=0.05))
    value.backward()
    assert all(p.grad is None for p in net.parameters())


def test_trt_loss_sees_a_replaced_parameter():
    net = model()
    loss = tk.TRTLoss(net, weight=1.0, delta=0.5, mse_ratio=0.0)
    net[0] = torch.nn.Linear(6, 5)
    assert net[0].weight is loss.regularized()[0]
    other = copy.deepcopy(net)
    assert len(loss.regularized()) == len(list(other.named_parameters())) - 3


def test_tet_loss(backend):
    logits = torch.randn(6, 3, 4, requires_grad=True)
    expected = 0.95 * tk.temporal_loss(logits, Y) + 0.05 * (logits - 1.0).square().mean()
    for chosen in (backend, "reference"):
        loss = tk.TETLoss(mean=1.0, weight=0.05, backend=chosen)
        torch.testing.assert_close(loss(logits, Y), expected)
        ours = torch.autograd.grad(loss(logits, Y), logits)[0]
        theirs = torch.autograd.grad(expected, logits, retain_graph=True)[0]
        assert relative_error(ours, theirs) < 1e-6


def test_bad_loss_settings():
    net = model()
    good = {"weight": 1.0, "delta": 0.5, "mse_ratio": 0.0}
    for changed, message in (
        ({"weight": float("inf")}, "weight: got inf"),
        ({"delta": -1}, "delta: got -1"),
        ({"mse_ratio": 2}, "mse_ratio: got 2"),
        ({"eps": -1}, "eps: got -1"),
        ({"time_dim": 5}, "time_dim: got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            tk.TRTLoss(net, **{**good, **changed})
    with pytest.raises(ValueError, match="parameters: got none"):
        tk.TRTLoss([("bias", torch.zeros(3))], **good)
    for wrong in (net.parameters(), net.state_dict(), torch.zeros(3), None):
        with pytest.raises(TypeError, match=r"parameters: got .* needs"):
            tk.TRTLoss(wrong, **good)
    with pytest.raises(TypeError, match=r"TRTLoss: unknown options \['foo'\]"):
        tk.TRTLoss(net, **good, foo=1)
    with pytest.raises(TypeError, match=r"TETLoss: unknown options \['foo'\]"):
        tk.TETLoss(mean=1.0, weight=0.1, foo=1)
    with pytest.raises(ValueError, match="logits: got no timestep"):
        tk.TRTLoss(net, **good)(torch.zeros(0, 3, 4), Y)
    with pytest.raises(ValueError, match="weight: got 2"):
        tk.TETLoss(mean=1.0, weight=2)
    with pytest.raises(ValueError, match="mean: got nan"):
        tk.TETLoss(mean=float("nan"), weight=0.1)
