"""Cases and comparisons that the tests of several operators share."""

import torch
from torch import Tensor

import trt_kernels as tk
from trt_kernels.options import CHARGES, LIFOptions, LossOptions, PenaltyOptions

SURROGATES = (
    tk.Triangle(1.0),
    tk.Sigmoid(4.0),
    tk.ATan(2.0),
    tk.Rectangle(1.0),
    tk.FastSigmoid(25.0),
    tk.SignedStep(0.5),
)
RESETS = ("hard", "soft", "none")
PHIS = ("square", "trt", "range", "spike")
# (shape, time_dim): both time layouts, time last, runs shorter and longer than a vector or a block.
SHAPES = (
    ((1, 1), 0),
    ((2, 5), 0),
    ((4, 3, 33), 0),
    ((6, 2, 3, 7, 5), 0),
    ((10, 1, 260), 0),
    ((3, 4, 130), 1),
    ((5, 6, 2, 3), 1),
    ((129, 33), 1),
    ((33, 67), 0),
    ((2, 100, 40), 1),
)


# Options of the operators as they travel down, for the tests of what is below the functions.
LIF = LIFOptions(
    time_dim=0,
    steps=0,
    channel_dim=-1,
    decay=0.5,
    threshold=1.0,
    v_reset=0.0,
    reset="hard",
    detach_reset=False,
    surrogate="triangle",
    surrogate_parameter=1.0,
    fire_at_threshold=False,
    charge="decay",
    phi="",
    delta=0.0,
    eps=0.0,
    scale=1.0,
    batch=False,
    return_state=False,
    return_potential=False,
    statistics=False,
    bits=0,
    backend="cpu",
)
PENALTY = PenaltyOptions(steps=4, weight=1.0, delta=0.5, eps=1e-5, backend="cpu")
LOSS = LossOptions(
    time_dim=0,
    entropy_ratio=0.9,
    square_ratio=0.1,
    constant=None,
    label_smoothing=0.0,
    ignore_index=-100,
    backend="cpu",
)


def charges(reset: str) -> list[str]:
    """Those that go with a reset."""
    return [charge for charge in CHARGES if reset == "none" or charge != "delayed"]


def quantised(shape, scale: float = 1.0, step: float = 0.1) -> Tensor:
    """Normal numbers on a grid: their potentials meet the threshold exactly, again and again."""
    return (torch.randn(shape) * scale / step).round() * step


def relative_error(value: Tensor, reference: Tensor) -> float:
    """‖value - reference‖ / ‖reference‖, in float64."""
    value, reference = value.detach().double(), reference.detach().double()
    norm = reference.norm()
    difference = (value - reference).norm()
    return float(difference / norm) if norm > 0 else float(difference)


def without_time(shape, time_dim: int) -> tuple[int, ...]:
    shape = list(shape)
    del shape[time_dim]
    return tuple(shape)


def random_grads(out: tk.LIFOutput) -> list[Tensor]:
    return [torch.randn_like(o.detach()) for o in out if o is not None]


def lif_gradients(inputs, grads, **options) -> tuple[tk.LIFOutput, tuple[Tensor, ...]]:
    """All outputs of `lif`, and the gradients of (x, v_init) for given gradients of the outputs."""
    x, v_init = inputs
    out = tk.lif(x, v_init=v_init, return_state=True, return_potential=True, **options)
    present = [o for o in out if o is not None]
    if grads is None:
        return out, ()
    return out, torch.autograd.grad(present, inputs, grads)


def at_potentials(x: Tensor, v_init: Tensor, grads, potential: Tensor, **options):
    """Gradients of (x, v_init) in float64, evaluated at given float32 potentials.

    The reference's equations, with every potential replaced by the given one: a spike that rounding
    decides is then the same spike.
    """
    time_dim = options["time_dim"]
    surrogate = options["surrogate"]
    decay, threshold, v_reset = options["decay"], options["threshold"], options["v_reset"]
    steps = [h.double() for h in potential.unbind(time_dim)]
    grad_s, grad_state, grad_penalty, grad_h = (None if g is None else g.double() for g in grads)
    penalty = options.get("penalty")
    dv = grad_state
    dx = []
    for t in reversed(range(len(steps))):
        h = steps[t].requires_grad_()
        s = (h >= threshold if options["fire_at_threshold"] else h > threshold).double()
        ds = grad_s.select(time_dim, t)
        through = 0.0
        if penalty is not None:
            scale = grad_penalty * penalty.weight[t].double() / h.numel()
            if penalty.phi == "spike":
                ds = ds + scale
            else:
                through = scale * torch.autograd.grad(phi(penalty, t, h).sum(), h)[0]
        h = h.detach()
        if options["reset"] == "hard" and not options["detach_reset"]:
            ds = ds + (v_reset - h) * dv
        if options["reset"] == "soft" and not options["detach_reset"]:
            ds = ds - threshold * dv
        dh = ds * surrogate(h - threshold) + through + grad_h.select(time_dim, t)
        dh = dh + (dv * (1 - s) if options["reset"] == "hard" else dv)
        dx.append(dh)
        dv = decay * dh
    return torch.stack(dx[::-1], time_dim), dv


def phi(penalty: tk.MembranePenalty, t: int, h: Tensor) -> Tensor:
    if penalty.phi == "square":
        return h**2
    if penalty.phi == "trt":
        growth = torch.expm1(torch.tensor(penalty.delta * t, dtype=torch.float64))
        return h**2 / (1 + growth * (h.abs() + penalty.eps))
    return torch.minimum(h.abs(), (1 - h).abs()) ** 2
