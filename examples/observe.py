"""What the paper observes in a network: Fisher information over time, and the loss around it.

    python -m examples.observe out/digits-trt
    python -m examples.observe out/cifar10-trt --data-root DATA --batches 20

Reads the checkpoint of `examples.train` in that folder, and writes observations.json, fisher.png
and landscape.png beside it.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import trt_kernels as tk
from examples import checkpoint, data, plots, train
from examples.checkpoint import CheckpointError
from examples.data import seed_of

Batch = tuple[Tensor, Tensor]  # input of the network, labels


def fisher_information(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """How much the answer after each timestep depends on the weights: I [T], float64.

        I_t = Σ over batches, over parameters θ of (∂/∂θ CE(mean of O_0 .. O_t, labels))²

    The network runs in evaluation mode, once forward and T times backward a batch.

    Source: Kim et al., AAAI 2023 (arXiv 2211.14406), whose "temporal information concentration" the
    paper follows.
    """
    was_training = model.training
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros((), dtype=torch.float64)
    for x, labels in batches:
        logits = model(x).float()  # [T, B, classes]
        sums, squares = logits.cumsum(0), []
        for t, so_far in enumerate(sums.unbind(), start=1):
            loss = F.cross_entropy(so_far / t, labels)
            grads = torch.autograd.grad(
                loss, parameters, retain_graph=t < len(sums), allow_unused=True
            )
            norm = nn.utils.get_total_norm([g for g in grads if g is not None])
            squares.append(norm.double().square())
        total = total + torch.stack(squares).cpu()
    model.train(was_training)
    return total


def centroid(information: Tensor) -> float:
    """IC = Σ t·I_t / Σ I_t, t from 1: the earlier the information, the smaller."""
    steps = torch.arange(1, len(information) + 1, dtype=information.dtype)
    return float((steps * information).sum() / information.sum())


def direction(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """A random direction in the space of the weights, each filter as long as the network's own.

    Biases and the parameters of normalisations stay: Li et al. 2018, arXiv 1712.09913.
    """
    made = {}
    for name, w in model.named_parameters():
        if w.ndim > 1:
            random = torch.randn(w.shape, generator=generator).to(w)
            dims = tuple(range(1, w.ndim))
            wanted, length = (
                torch.linalg.vector_norm(v, dim=dims, keepdim=True) for v in (w.detach(), random)
            )
            made[name] = random * (wanted / length.clamp(min=1e-12))
    return made


@torch.no_grad()
def landscape(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    directions: int = 5,
    points: int = 21,
    radius: float = 0.5,
    seed: int = 0,
    progress: Callable[[], Any] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """The loss along straight lines through the trained weights.

    Returns:
        distances [points], from -radius to radius, and losses [directions, points]: the cross
        entropy of the mean over time, in evaluation mode.
    """
    was_training = model.training
    model.eval()
    weights = dict(model.named_parameters())
    distances = torch.linspace(-radius, radius, points)
    losses = torch.zeros(directions, points)
    count = sum(len(labels) for _, labels in batches)
    for line in range(directions):
        generator = torch.Generator().manual_seed(seed_of("direction", seed, line))
        way = direction(model, generator)
        for point, distance in enumerate(distances.tolist()):
            moved = {name: weights[name] + distance * d for name, d in way.items()}
            for x, labels in batches:
                logits = torch.func.functional_call(model, moved, (x,)).float()
                loss = F.cross_entropy(logits.mean(0), labels, reduction="sum")
                losses[line, point] += loss.cpu() / count
            progress()
    model.train(was_training)
    return distances, losses


def training_batches(args: argparse.Namespace, found: data.Data, count: int) -> list[Batch]:
    """The first batches of the training samples, augmented as in training, always the same ones."""
    return [
        (train.as_input(x, args.device), labels.to(args.device))
        for x, labels in islice(train.training_data(args, found).epoch(0), count)
    ]


def parse_arguments(
    argv: Sequence[str] | None,
) -> tuple[argparse.Namespace, argparse.Namespace, dict[str, Tensor]]:
    """The options, those of the training whose checkpoint is observed, and its weights."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.observe", description=__doc__.partition("\n")[0]
    )
    add, number = parser.add_argument, train.number
    add("folder", type=Path, help="--out of a training run")
    add("--data-root", type=Path, help="folder that holds the data set")
    add("--backend", choices=train.BACKENDS, default="auto", help="which kernels run")
    add("--workers", type=number(int, 0), help="processes that read data")
    add("--batches", type=number(int, 1), default=10, help="of the training set to observe")
    add("--directions", type=number(int, 1), default=5, help="lines through the weights")
    add("--points", type=number(int, 3), default=21, help="of each line")
    add("--radius", type=number(float, 1e-6), default=0.5, help="of the lines, in filter lengths")
    args = parser.parse_args(argv)
    train.alone(parser)
    try:
        found = checkpoint.load(args.folder / "checkpoint.pt")
    except CheckpointError as error:
        parser.error(f"argument folder: {error}")
    now = {"backend": args.backend, "data_root": args.data_root, "workers": args.workers}
    of_training = argparse.Namespace(
        **{**found["settings"], **now, "out": args.folder, "resume": True, "tensorboard": False}
    )
    return args, train.complete(parser, of_training), found["model"]


def main(argv: Sequence[str] | None = None) -> None:
    """Observes, draws, and prints the centroid."""
    args, of_training, weights = parse_arguments(argv)
    with train.told("nothing was written"):
        found = train.load(of_training)
        model = train.make_network(of_training, found).to(of_training.device)
        train.restore(model, weights)
        observe(args, of_training, found, model)


def observe(
    args: argparse.Namespace,
    of_training: argparse.Namespace,
    found: data.Data,
    model: nn.Module,
) -> None:
    """Everything that the paper observes, written to the folder and printed."""
    batches = training_batches(of_training, found, args.batches)
    with tk.use_backend(args.backend):
        information = fisher_information(model, tqdm(batches, "Fisher information", unit="batch"))
        bar = tqdm(desc="loss landscape", total=args.directions * args.points, unit="point")
        shape = {name: getattr(args, name) for name in ("directions", "points", "radius")}
        distances, losses = landscape(model, batches, **shape, progress=bar.update)
        bar.close()

    method, middle = of_training.method, centroid(information)
    observations = {
        "fisher_information": information.tolist(),
        "fisher_centroid": middle,
        "landscape": {"distances": distances.tolist(), "losses": losses.tolist()},
    }
    (args.folder / "observations.json").write_text(json.dumps(observations, indent=2) + "\n")
    plots.fisher({method: [information.tolist()]}, args.folder / "fisher.png")
    plots.landscape(distances.tolist(), {method: losses.tolist()}, args.folder / "landscape.png")
    print(f"Fisher information by timestep: {', '.join(f'{i:.3g}' for i in information.tolist())}")
    print(f"its centroid: {middle:.2f} of {len(information)} timesteps; plots in {args.folder}")


if __name__ == "__main__":
    main()
