"""The neurons of other libraries, each set as near to the official TRT neuron as it can be.

Every function returns `(forward, expected)`: the library's forward over time as its users call it,
and the same neuron of this package's reference, which its results are held to. Where the library
is not installed the import raises.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import trt_kernels as tk

Forward = Callable[[Tensor], Tensor]
CPU = torch.device("cpu")


def spikingjelly(
    device: torch.device = CPU, implementation: str = "auto"
) -> tuple[Forward, Forward]:
    """LIFNode, multi-step, tau 2, undecayed input, triangle surrogate; fires at h >= threshold.

    On half precision the node would loop over time with a state in half (`spikingjelly_amp`): its
    multi-step function is given a float32 state there. `implementation`: on a GPU "cuda" (compiled
    where it was installed), "triton" or "auto".

    Raises:
        ImportError: not installed, or the implementation cannot be had, and why.
    """
    from spikingjelly.activation_based import functional

    node = spikingjelly_node()
    choose = spikingjelly_choice(device, implementation)

    def forward(x: Tensor) -> Tensor:
        choose()
        if x.dtype == torch.float32:
            node.reset()
            return node(x)
        v = torch.zeros_like(x[0], dtype=torch.float32)
        return functional.lif_multi_step(x, v, 2.0, False, 1.0, 0.0, node.surrogate_function)[0]

    return forward, spikingjelly_neuron


def spikingjelly_amp(device: torch.device = CPU) -> tuple[Forward, Forward]:
    """LIFNode as it is called under autocast: on half precision a loop with a state in half."""
    node = spikingjelly_node()
    choose = spikingjelly_choice(device, "auto")

    def forward(x: Tensor) -> Tensor:
        choose()
        node.reset()
        with torch.autocast(x.device.type, x.dtype):
            return node(x)

    return forward, spikingjelly_neuron


def spikingjelly_norm(
    channels: int, device: torch.device = CPU, training: bool = True
) -> Callable[[Forward], Callable[..., Tensor]]:
    """Its BatchNorm2d, multi-step, before one of its neurons; weight and bias come with x."""
    from spikingjelly.activation_based import layer

    norm = layer.BatchNorm2d(channels, step_mode="m").to(device).train(training)

    def before(neuron: Forward) -> Callable[..., Tensor]:
        def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            affine = {"weight": weight, "bias": bias}
            return neuron(torch.func.functional_call(norm, affine, x))

        return forward

    return before


def spikingjelly_plif(device: torch.device = CPU) -> tuple[Callable[..., Tensor], Any]:
    """ParametricLIFNode, multi-step, decayed input; (x, w) -> spikes, fired at h >= threshold."""
    from spikingjelly.activation_based import neuron, surrogate

    node = neuron.ParametricLIFNode(
        surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0), step_mode="m"
    ).to(device)

    def forward(x: Tensor, w: Tensor) -> Tensor:
        node.reset()
        return torch.func.functional_call(node, {"w": w}, x)

    def same(x: Tensor, w: Tensor) -> Tensor:
        return tk.lif(
            x, decay=w.sigmoid(), charge="leak", fire_at_threshold=True, backend="reference"
        )

    return forward, same


def spikingjelly_node() -> Any:
    from spikingjelly.activation_based import neuron, surrogate

    return neuron.LIFNode(
        tau=2.0,
        decay_input=False,
        v_reset=0.0,
        surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0),
        step_mode="m",
    )


def spikingjelly_neuron(x: Tensor) -> Tensor:
    """What LIFNode is held to: the same neuron of the reference."""
    return tk.lif(x, fire_at_threshold=True, backend="reference")


def spikingjelly_choice(device: torch.device, implementation: str) -> Callable[[], None]:
    """A function that makes SpikingJelly use an implementation: before each call, since several are
    compared in one process. It sets what SJ_LIF_CUDA_IMPLEMENTATION sets for a process."""
    if device.type == "cpu":
        return lambda: None
    if implementation == "triton" and os.environ.get("TRT_KERNELS_BENCH_TRITON") == "0":
        raise ImportError("not asked for: make gpu TRITON=1")
    from spikingjelly._ops.lif import _selection

    found: dict[Any, Any] = {}  # what the library remembers of a choice

    def choose() -> None:
        _selection._requested, _selection._selections = implementation, found

    choose()
    try:
        _selection.diagnostics(device)
    except RuntimeError as error:
        raise ImportError(str(error)) from error
    return choose


def snntorch(device: torch.device = CPU) -> tuple[Forward, Forward]:
    """Leaky, beta 0.5, reset to zero (always detached), its default ATan surrogate."""
    import snntorch

    leaky = snntorch.Leaky(beta=0.5, reset_mechanism="zero").to(device)

    def forward(x: Tensor) -> Tensor:
        membrane = leaky.reset_mem()
        spikes = []
        for current in x.unbind():  # kinder than x[t], whose backward fills all of x each step
            spike, membrane = leaky(current, membrane)
            spikes.append(spike)
        return torch.stack(spikes)

    return forward, lambda x: tk.lif(
        x, surrogate=tk.ATan(2.0), detach_reset=True, backend="reference"
    )


def norse(device: torch.device = CPU) -> tuple[Forward, Forward]:
    """LIFBoxCell, dt/tau 0.5; it halves its input and rounds in another order (some spikes differ).

    Its SuperSpike surrogate has slope 1: version 1.1 leaves the slope that it is given unused.
    """
    from norse.torch import LIFBoxCell
    from norse.torch.functional.lif_box import LIFBoxParameters

    cell = LIFBoxCell(LIFBoxParameters(tau_mem_inv=torch.tensor(0.5, device=device)), dt=1.0)

    def forward(x: Tensor) -> Tensor:
        state = None
        spikes = []
        for current in x.unbind():
            spike, state = cell(current, state)
            spikes.append(spike)
        return torch.stack(spikes)

    return forward, lambda x: tk.lif(0.5 * x, surrogate=tk.FastSigmoid(1.0), backend="reference")
