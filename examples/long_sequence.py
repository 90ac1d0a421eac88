"""Train on a sequence of a thousand steps, a chunk at a time, in seconds.

    python examples/long_sequence.py
    python examples/long_sequence.py --steps 4000 --chunk 50

The backward pass through a whole sequence needs what every layer kept at every step. Truncated
backpropagation keeps that of one chunk: the next one starts from the potential that the last one
ended with, cut from its graph.

    out = trt_kernels.lif(chunk, v_init=state, return_state=True)
    state = out.state.detach()

The forward pass is that of the whole sequence, spike by spike, which is checked first. The gradient
ends at the border of a chunk: it does not know what earlier chunks did to the potential. A neuron
that forgets half of it in seven steps, as here, loses little by that, which is measured last.
`trt_kernels.nn.LIF(stateful=True)` carries the state by itself, with `detach()` between chunks; the
network below trains that way, to tell a slow wave from its noise.

Needs nothing beside trt_kernels.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trt_kernels

INPUTS, NEURONS, BATCH = 8, 64, 16
NEURON = {"decay": 0.9, "threshold": 1.0}


class Network(nn.Module):
    """Noisy waves [T, B, INPUTS] -> the wave [T, B], as a weighted sum of spikes at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(INPUTS, NEURONS)
        self.lif = trt_kernels.nn.LIF(stateful=True, **NEURON)
        self.readout = nn.Linear(NEURONS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.lif(self.inputs(x))).squeeze(-1)


def make_data(steps: int) -> tuple[Tensor, Tensor]:
    """Waves of a random phase [T, B], and what the network sees of them [T, B, INPUTS]."""
    time = torch.arange(steps)[:, None]
    wave = torch.sin(2 * math.pi * (time / 200 + torch.rand(BATCH)))
    return wave, wave[..., None] + 0.5 * torch.randn(steps, BATCH, INPUTS)


def in_chunks(current: Tensor, chunk: int) -> Tensor:
    """The spikes of `lif` on a current [T, ...], a chunk of steps at a time."""
    state, spikes = None, []
    for part in current.split(chunk):
        out = trt_kernels.lif(part, v_init=state, return_state=True, **NEURON)
        state = out.state.detach()
        spikes.append(out.spikes)
    return torch.cat(spikes)


def losses(network: Network, x: Tensor, wave: Tensor, chunk: int) -> Iterator[Tensor]:
    """The share of each chunk in the mean squared error, to be differentiated before the next."""
    network.lif.reset()
    for part, truth in zip(x.split(chunk), wave.split(chunk), strict=True):
        network.lif.detach()
        yield F.mse_loss(network(part), truth, reduction="sum") / wave.numel()


def bytes_kept(forward: Callable[[], Tensor]) -> int:
    """What a forward pass keeps for its backward pass: bytes of distinct tensors."""
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor  # held, so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()
    del output
    return sum(tensor.nbytes for tensor in kept.values())


def gradient(network: Network, x: Tensor, wave: Tensor, chunk: int) -> Tensor:
    """Of all parameters, in one vector."""
    network.zero_grad()
    for loss in losses(network, x, wave, chunk):
        loss.backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def main(argv: Sequence[str] | None = None) -> None:
    """Checks the spikes, trains, and compares memory and gradient with the whole sequence's."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=1000, help="timesteps T")
    parser.add_argument("--chunk", type=int, default=100, help="timesteps of a chunk")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the sequence")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("steps", "chunk", "epochs"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name}: got {getattr(args, name)}, needs an int >= 1")
    torch.manual_seed(args.seed)
    wave, x = make_data(args.steps)
    network = Network()

    with torch.no_grad():
        current = network.inputs(x)
        whole = trt_kernels.lif(current, **NEURON)
        differing = int((in_chunks(current, args.chunk) != whole).sum())
    print(f"spikes that differ from the whole sequence's: {differing} of {whole.numel():,}")

    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for epoch in range(1, args.epochs + 1):
        total = 0.0
        for loss in losses(network, x, wave, args.chunk):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        if epoch in (1, args.epochs):
            print(f"epoch {epoch}: mean squared error {total:.3f}")

    kept = [
        bytes_kept(lambda steps=steps: next(losses(network, x, wave, steps))) / 1e6
        for steps in (args.steps, args.chunk)
    ]
    print(f"kept for the backward pass: {kept[0]:.2f} MB of the whole, {kept[1]:.2f} MB of a chunk")
    exact, truncated = (gradient(network, x, wave, n) for n in (args.steps, args.chunk))
    angle = F.cosine_similarity(exact, truncated, dim=0).item()
    print(f"truncated against exact gradient: cosine {angle:.4f}")


if __name__ == "__main__":
    main()
