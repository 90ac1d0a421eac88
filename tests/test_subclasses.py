"""Tensors that are no ordinary ones: the right results of the right class, or an error that names
the argument. A kernel never gets an address of what has no memory of its own."""

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map

import trt_kernels as tk


class Plain(torch.Tensor):
    """Has memory, and no rules."""


class Recording(torch.Tensor):
    """Has memory, and sees the functions that are called."""

    seen = ()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        Recording.seen += (function,)
        return super().__torch_function__(function, types, args, kwargs or {})


class Scaled(torch.Tensor):
    """Has no memory: twice another tensor, as quantised weights are something else's product."""

    @staticmethod
    def __new__(cls, half):
        like = {"strides": half.stride(), "dtype": half.dtype, "device": half.device}
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, **like)

    def __init__(self, half):
        self.half = half

    def data_ptr(self):
        raise AssertionError("a kernel asked for its memory")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def whole(t):
            return 2 * t.half if isinstance(t, Scaled) else t

        return function(*tree_map(whole, args), **tree_map(whole, kwargs or {}))


def uncounted(x):
    """Of memory in which another sign or place is meant."""
    return torch.complex(x, -x).conj().imag


# What stands for a tensor of the same values, and the class of results.
KINDS = {
    "plain": (lambda x: x.as_subclass(Plain), Plain),
    "recording": (lambda x: x.as_subclass(Recording), Recording),
    "two": (lambda x: TwoTensor(x, 2 * x), TwoTensor),
    "scaled": (lambda x: Scaled(x / 2), torch.Tensor),
    "parameter": (nn.Parameter, torch.Tensor),
    "buffer": (nn.Buffer, torch.Tensor),
    "negated": (lambda x: torch._neg_view(-x), torch.Tensor),
    "imaginary part": (uncounted, torch.Tensor),
    "gaps": (lambda x: torch.stack([x, x + 1], -1)[..., 0], torch.Tensor),
}
X, V, C = torch.randn(4, 5, 6), torch.randn(5, 6), torch.rand(6) + 0.5
PENALTY = {"steps": 4, "weight": 1.0, "delta": 0.5}
TARGET = torch.tensor([0, 5, 3, 1, 2])
# A function of one tensor, and the values that it gets.
ARGUMENTS = {
    "lif: x": (tk.lif, X),
    "lif: x beside a state": (lambda x: tk.lif(x, v_init=V, return_state=True).state, X),
    "lif: x and its rates": (lambda x: tk.lif(x, statistics=True).rate, X),
    "lif: v_init": (lambda v: tk.lif(X, v_init=v), V),
    "lif: decay": (lambda decay: tk.lif(X, decay=decay, channel_dim=2), C),
    "lif: threshold": (lambda threshold: tk.lif(X, threshold=threshold, channel_dim=2), C),
    "batch_norm_lif: x": (lambda x: tk.batch_norm_lif(x, None, None, training=True), X),
    "batch_norm_lif: running_mean": (lambda mean: tk.batch_norm_lif(X, mean, C), C),
    "batch_norm_lif: gains": (
        lambda gains: tk.batch_norm_lif(X, None, None, training=True, gains=gains),
        C[:4],
    ),
    "trt_penalty: params": (lambda p: tk.trt_penalty([p, V], **PENALTY), X),
    "temporal_loss: logits": (lambda logits: tk.temporal_loss(logits, TARGET, mse_ratio=0.1), X),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_the_same_results(kind, argument, backend):
    if backend == "triton" and kind not in ("two", "scaled"):
        return  # its interpreter is slow, and what reaches it is the same
    (make, result), (function, value) = KINDS[kind], ARGUMENTS[argument]
    if kind in ("parameter", "buffer") and argument.endswith("running_mean"):
        value = value.clone()
        make = nn.Buffer
    found, expected = function(make(value.clone())), function(value)
    assert type(found) is result
    if kind == "two":
        assert torch.equal(found.b, function(2 * value))
        found = found.a
    assert torch.equal(found.detach().as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("kind", ("plain", "recording", "two", "negated", "imaginary part", "gaps"))
def test_the_same_gradients(kind, backend):
    make, _ = KINDS[kind]
    for argument in ("lif: x", "lif: v_init", "trt_penalty: params", "temporal_loss: logits"):
        function, value = ARGUMENTS[argument]
        leaf, plain = make(value.clone()).detach().requires_grad_(), value.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(plain).sum(), plain)
        (found,) = torch.autograd.grad(function(leaf).sum(), leaf)
        if kind == "two":
            assert type(found) is TwoTensor
            found = found.a
        assert torch.equal(found.as_subclass(torch.Tensor), expected), argument


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_of_another_class(kind, backend):
    """What arrives in the backward pass."""
    make, _ = KINDS[kind]
    x, up = X.clone().requires_grad_(), torch.randn(4, 5, 6)
    (expected,) = torch.autograd.grad(tk.lif(x), x, up)
    (found,) = torch.autograd.grad(tk.lif(x), x, make(up.clone()).detach())
    found = found.a if kind == "two" else found
    assert torch.equal(found.as_subclass(torch.Tensor), expected)


def test_functions_are_seen():
    """As a subclass with rules of its own sees what a loop in plain torch calls."""
    Recording.seen = ()
    tk.lif(X.as_subclass(Recording))
    assert Recording.seen


def test_zeros_without_memory(backend):
    for name, (function, value) in ARGUMENTS.items():
        if "params" in name or not value.ndim > 1:
            continue
        found = function(torch._efficientzerotensor(value.shape))
        assert torch.equal(found, function(torch.zeros(value.shape))), name


def test_meta_tensors():
    for function, value in ARGUMENTS.values():
        with pytest.raises((RuntimeError, ValueError), match="meta"):
            function(value.to("meta"))
    out = tk.lif(X.to("meta"), backend="reference", return_state=True)
    assert out.spikes.is_meta and out.spikes.shape == X.shape and out.state.shape == V.shape


def quantised(x):
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def nested(layout):
    return lambda x: torch.nested.nested_tensor(list(x), layout=layout)


REFUSED = {
    "sparse": (lambda x: x.to_sparse(), ValueError, "got layout torch.sparse_coo"),
    "compressed": (lambda x: x.to_sparse_csr(), ValueError, "got layout torch.sparse_csr"),
    "mkldnn": (lambda x: x.to_mkldnn(), ValueError, "got layout torch._mkldnn"),
    "nested": (nested(torch.strided), ValueError, "got a nested tensor"),
    "jagged": (nested(torch.jagged), ValueError, "got a nested tensor"),
    "quantised": (quantised, TypeError, "got dtype torch.qint8"),
    "complex": (lambda x: x.cfloat(), TypeError, "got dtype torch.complex64"),
    "bool": (lambda x: x > 0, TypeError, "got dtype torch.bool"),
    "uninitialised": (
        lambda x: nn.UninitializedParameter(),
        ValueError,
        "got an uninitialised parameter",
    ),
}
NAMES = {"params": r"params\[0\]"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind):
    make, error, message = REFUSED[kind]
    for argument, (function, value) in ARGUMENTS.items():
        name = argument.split(": ")[1].split(" ")[0]
        function(value)  # of which a call that looks the same might be taken
        for trial in (value, value[0]):  # with as many dimensions, where it can have them
            try:
                given = make(trial)
            except (RuntimeError, TypeError, IndexError):
                continue  # there is no such tensor
            with pytest.raises(error, match=f"{NAMES.get(name, name)}: {message}"):
                function(given)


@pytest.mark.filterwarnings("ignore")
def test_a_class_without_rules_for_an_operator():
    """Whoever made it says what it lacks; nothing reads its memory."""
    masked = torch.masked.masked_tensor(X, X > 0)
    for argument in ("lif: x", "trt_penalty: params", "temporal_loss: logits"):
        with pytest.raises(TypeError, match="MaskedTensor"):
            ARGUMENTS[argument][0](masked)
