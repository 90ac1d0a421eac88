"""The neurons of other libraries, each set as near to the official TRT neuron as it can be.

Every function returns `(forward, expected)`: the library's forward over time as its users call it,
and the same neuron of this package's reference, which its results are held to. Where the library
is not installed the import raises.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import trt_kernels as tk

Forward = Callable[[Tensor], Tensor]


def spikingjelly() -> tuple[Forward, Forward]:
    """LIFNode, multi-step, tau 2, undecayed input, triangle surrogate; fires at h >= threshold."""
    from spikingjelly.activation_based import neuron, surrogate

    node = neuron.LIFNode(
        tau=2.0,
        decay_input=False,
        v_reset=0.0,
        surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0),
        step_mode="m",
    )

    def forward(x: Tensor) -> Tensor:
        node.reset()
        return node(x)

    return forward, lambda x: tk.lif(x, fire_at_threshold=True, backend="reference")


def snntorch() -> tuple[Forward, Forward]:
    """Leaky, beta 0.5, reset to zero (always detached), its default ATan surrogate."""
    import snntorch

    leaky = snntorch.Leaky(beta=0.5, reset_mechanism="zero")

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


def norse() -> tuple[Forward, Forward]:
    """LIFBoxCell, dt/tau 0.5; it halves its input and rounds in another order (some spikes differ).

    Its SuperSpike surrogate has slope 1: version 1.1 leaves the slope that it is given unused.
    """
    from norse.torch import LIFBoxCell
    from norse.torch.functional.lif_box import LIFBoxParameters

    cell = LIFBoxCell(LIFBoxParameters(tau_mem_inv=torch.tensor(0.5)), dt=1.0)

    def forward(x: Tensor) -> Tensor:
        state = None
        spikes = []
        for current in x.unbind():
            spike, state = cell(current, state)
            spikes.append(spike)
        return torch.stack(spikes)

    return forward, lambda x: tk.lif(0.5 * x, surrogate=tk.FastSigmoid(1.0), backend="reference")
