"""TRT against TET and the plain objective (SDT), over several seeds.

    python -m examples.compare                         # event streams of digits, 5 seeds
    python -m examples.compare --data digits --limit 200 --seeds 3

Options are those of `examples.train`, without --method and --resume. Each run is a folder
METHOD-SEED below `--out`; one that is finished is not trained again, one that was interrupted goes
on. Writes comparison.json, comparison.md and comparison.png: accuracy with its spread,
generalisation gap, Fisher information and loss landscape of every method.

The gap is that between the test set and the training samples (augmented as in training), both in
evaluation mode.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import trt_kernels as tk
from examples import observe, plots, train
from examples.networks import SpikingNet

METHODS = tuple(plots.METHODS)
ROWS = {
    "test_accuracy": "test accuracy (%)",
    "accuracy_gap": "training - test accuracy (points)",
    "loss_gap": "test - training cross entropy",
    "centroid": "Fisher centroid (timestep)",
    "sharpness": "training loss a quarter of a filter away",
}


def observed_epochs(epochs: int) -> list[int]:
    """The first, the last, and some between them."""
    return sorted({1, *(max(1, round(epochs * part)) for part in (0.25, 0.5, 0.75, 1))})


def one_run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains a network, if it is not trained yet, and says what was found."""
    epochs = observed_epochs(args.epochs)
    found = train.load(args)
    seen = observe.training_batches(args, found, args.batches)

    def fisher(model: SpikingNet, epoch: int) -> list[float] | None:
        return observe.fisher_information(model, seen).tolist() if epoch in epochs else None

    done = train.run(args, found, fisher)
    with tk.use_backend(args.backend):
        training = train.training_data(args, found)
        loss, accuracy = train.evaluate(done.model, training.epoch(0), args.device)
        distances, losses = observe.landscape(done.model, seen[:2], directions=3, points=13)
    last = done.history[-1]
    rows = [done.observed[epoch] for epoch in epochs]
    centroids = [observe.centroid(torch.tensor(row, dtype=torch.float64)) for row in rows]
    quarter = (distances.abs() - 0.25).abs() < 1e-6
    return {
        "method": args.method,
        "seed": args.seed,
        "samples": training.batches.count,
        "test_accuracy": last["test_accuracy"],
        "accuracy_gap": accuracy - last["test_accuracy"],
        "loss_gap": last["test_loss"] - loss,
        "observed_epochs": epochs,
        "fisher": rows,
        "centroids": centroids,
        "centroid": centroids[-1],
        "distances": distances.tolist(),
        "losses": losses.tolist(),
        "sharpness": float(losses[:, quarter].mean()),
    }


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Mean and standard deviation over the seeds, in Markdown."""
    lines = [
        f"| | {' | '.join(method.upper() for method in runs)} |",
        "|---" * (len(runs) + 1) + "|",
    ]
    for key, name in ROWS.items():
        cells = []
        for found in runs.values():
            mean, spread = plots.mean_and_spread([[run[key]] for run in found])
            cells.append(f"{float(mean):.3g} ± {float(spread):.2g}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.compare", description=__doc__.partition("\n")[0]
    )
    train.add_options(parser)
    parser.set_defaults(data="digit-events", method=None)
    parser.add_argument("--seeds", type=train.number(int, 1), default=5, help="how many")
    parser.add_argument("--batches", type=train.number(int, 1), default=4, help="to observe")
    args = parser.parse_args(argv)
    train.alone(parser)
    if args.method is not None:
        parser.error("argument --method: all are compared")
    if args.resume:
        parser.error("argument --resume: the same command goes on by itself")
    if args.out is None:
        args.out = Path("out") / f"compare-{args.data}"
    return train.complete(parser, args)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains every method with every seed, draws, and prints the table."""
    args = parse_arguments(argv)
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    with train.told("the same command goes on from the last checkpoint"):
        for seed in range(args.seed, args.seed + args.seeds):
            for method in METHODS:
                options = {**vars(args), "method": method, "seed": seed}
                options["out"] = args.out / f"{method}-{seed}"
                options["out"].mkdir(exist_ok=True)
                options["resume"] = (options["out"] / "checkpoint.pt").is_file()
                del options["seeds"]
                runs[method].append(one_run(argparse.Namespace(**options)))
        samples = runs["trt"][0]["samples"]
        about = (
            f"{args.data}, {samples} training samples, {args.network} network, T = {args.steps}, "
            f"{args.epochs} epochs, {args.seeds} seeds"
        )
        (args.out / "comparison.json").write_text(json.dumps({"about": about, "runs": runs}) + "\n")
        written = table(runs)
        (args.out / "comparison.md").write_text(f"{about}: mean ± standard deviation\n\n{written}")
        plots.comparison(runs, about, args.out / "comparison.png")
        print(f"{about}: mean ± standard deviation, in {args.out}\n\n{written}")


if __name__ == "__main__":
    main()
