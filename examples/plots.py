"""Pictures of training runs and of what is observed in them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

import trt_kernels as tk

BLUE, ORANGE, GREY = "#2458a6", "#d9730d", "#6b7280"
METHODS = {"sdt": GREY, "tet": ORANGE, "trt": BLUE}  # the baseline, a peer, the paper's


def finish(figure: Any, path: Path) -> None:
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def curves(history: Sequence[Mapping[str, float]], title: str, path: Path) -> None:
    """Loss and accuracy of every epoch, side by side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    epochs = [record["epoch"] for record in history]
    # A line of one point is invisible without a marker.
    line = {"lw": 2, "marker": "o" if len(epochs) == 1 else None}
    left.plot(epochs, [record["loss"] for record in history], color=BLUE, **line)
    left.set(title="Training loss", ylabel="loss", ylim=(0, None))
    for name, color in (("train", ORANGE), ("test", BLUE)):
        values = [record[f"{name}_accuracy"] for record in history]
        right.plot(epochs, values, color=color, label=f"{name}, last {values[-1]:.1f} %", **line)
    right.set(title="Accuracy", ylabel="correct (%)")
    right.legend(loc="lower right", frameon=False)
    for ax in (left, right):
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y", color="#e5e7eb")
    figure.suptitle(title)
    finish(figure, path)


def some(layers: Sequence[Any], count: int) -> list[Any]:
    """The first, the last, and others evenly between them."""
    count = min(count, len(layers))
    return [layers[round(i * (len(layers) - 1) / max(1, count - 1))] for i in range(count)]


@torch.no_grad()
def spikes(model: nn.Module, x: Tensor, labels: Sequence[int], path: Path, shown: int = 64) -> None:
    """For a few samples: the input, spikes of some neurons of three layers, and the readout."""
    model.eval()
    neurons = [m for m in model.modules() if isinstance(m, tk.nn.LIF | tk.nn.BatchNormLIF)]
    chosen = some(list(enumerate(neurons, start=1)), 3)
    fired: dict[int, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda *call, depth=depth: fired.update({depth: call[-1]}))
        for depth, module in chosen
    ]
    logits = model(x).float().cpu()  # [T, B, classes]
    for hook in hooks:
        hook.remove()

    rows, columns = len(labels), 2 + len(chosen)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.4 * columns, 2.3 * rows), layout="constrained", squeeze=False
    )
    heat = {"aspect": "auto", "interpolation": "nearest", "vmin": 0, "vmax": 1}
    images = (x if x.ndim == 4 else x.sum(0)).float().cpu().mean(1)
    for row, (first, *middle, last) in enumerate(axes):
        first.imshow(images[row].numpy(), cmap="gray_r")
        first.set(title=f"test sample: {labels[row]}", xticks=[], yticks=[])
        for ax, (depth, _) in zip(middle, chosen, strict=True):
            layer = fired[depth][:, row].flatten(1).T.float().numpy(force=True)  # [neurons, T]
            picked = torch.linspace(0, len(layer) - 1, min(shown, len(layer))).long().numpy()
            ax.imshow(layer[picked], cmap=ListedColormap(["#f3f4f6", BLUE]), **heat)
            ax.set(title=f"layer {depth}, rate {layer.mean():.2f}", ylabel=f"{len(picked)} neurons")
            ax.set_yticks([])
        last.imshow(logits[:, row].softmax(-1).T.numpy(), cmap="Blues", **heat)
        answer = logits[:, row].mean(0).argmax()
        last.set(title=f"readout: {answer}", ylabel="class")
        last.yaxis.set_major_locator(MaxNLocator(10, integer=True))
        last.tick_params(axis="y", labelsize=7)
        for ax in (*middle, last):
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            for step in range(1, len(logits)):
                ax.axvline(step - 0.5, color="white", lw=1.5)
    for ax in axes[-1, 1:]:
        ax.set_xlabel("timestep")
    figure.suptitle("Spikes over time (rate: spikes per neuron and step) and class probabilities")
    finish(figure, path)


def mean_and_spread(rows: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Over the rows; of one row the spread is 0."""
    values = torch.tensor(rows, dtype=torch.float64)
    return values.mean(0), values.std(0, correction=1 if len(rows) > 1 else 0)


def band(ax: Any, x: Any, rows: Sequence[Sequence[float]], method: str) -> None:
    """The mean of the rows as a line, their standard deviation as a band."""
    mean, spread = mean_and_spread(rows)
    color = METHODS[method]
    ax.plot(x, mean, color=color, lw=2, marker="o", ms=3.5, label=method.upper())
    ax.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)


def shares(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Each row divided by its sum."""
    return [[value / sum(row) for value in row] for row in rows]


def draw_fisher(ax: Any, information: Mapping[str, Sequence[Sequence[float]]]) -> None:
    for method, rows in information.items():
        band(ax, range(1, len(rows[0]) + 1), shares(rows), method)
    ax.set(title="Fisher information", xlabel="timestep", ylabel="share of all", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False)


def draw_landscape(
    ax: Any, distances: Sequence[float], losses: Mapping[str, Sequence[Sequence[float]]]
) -> None:
    for method, rows in losses.items():
        band(ax, distances, rows, method)
    ax.set(title="Training loss on lines through the weights", ylabel="cross entropy")
    ax.set(xlabel="distance, in lengths of each filter", yscale="log")
    ax.legend(frameon=False)


def fisher(information: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """For each method the shares of the timesteps, of every run a row."""
    figure, ax = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    draw_fisher(ax, information)
    finish(figure, path)


def landscape(
    distances: Sequence[float], losses: Mapping[str, Sequence[Sequence[float]]], path: Path
) -> None:
    """For each method the loss along lines, of every line a row."""
    figure, ax = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    draw_landscape(ax, distances, losses)
    finish(figure, path)


def comparison(runs: Mapping[str, Sequence[Mapping[str, Any]]], title: str, path: Path) -> None:
    """Methods side by side: every run a dot, their mean a line; and what was observed in them."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.2), layout="constrained")
    panels = {
        "test_accuracy": ("Test accuracy", "correct (%)"),
        "accuracy_gap": ("Generalisation gap: training - test", "accuracy (points)"),
        "loss_gap": ("Generalisation gap: test - training", "cross entropy"),
    }
    for ax, (key, (name, unit)) in zip(axes[0], panels.items(), strict=True):
        for place, (method, found) in enumerate(runs.items()):
            values = [run[key] for run in found]
            ax.scatter([place] * len(values), values, color=METHODS[method], alpha=0.6)
            mean = sum(values) / len(values)
            ax.hlines(mean, place - 0.3, place + 0.3, color=METHODS[method], lw=2.5)
        ax.set(title=name, ylabel=unit, xticks=range(len(runs)), xlim=(-0.6, len(runs) - 0.4))
        ax.set_xticklabels([method.upper() for method in runs])
        ax.grid(axis="y", color="#e5e7eb")
    draw_fisher(axes[1, 0], {m: [run["fisher"][-1] for run in found] for m, found in runs.items()})
    ax = axes[1, 1]
    for method, found in runs.items():
        band(ax, found[0]["observed_epochs"], [run["centroids"] for run in found], method)
    ax.set(title="Fisher centroid in training", xlabel="epoch", ylabel="timestep")
    ax.legend(frameon=False)
    distances = next(iter(runs.values()))[0]["distances"]
    lines = {m: [line for run in found for line in run["losses"]] for m, found in runs.items()}
    draw_landscape(axes[1, 2], distances, lines)
    figure.suptitle(title)
    finish(figure, path)
