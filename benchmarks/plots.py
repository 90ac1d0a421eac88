"""Bar plots of a run: every variant's time relative to ours, one panel a case."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from benchmarks.records import Record, Run
from benchmarks.report import duration, times
from benchmarks.targets import BLOCK, PACKED, PENALTY, STEP, STEPS, TRAINING

PLOTS = {
    "lif.png": (TRAINING, "lif: forward and backward, time relative to ours"),
    "batch_norm_lif.png": (BLOCK, "batch_norm_lif: forward and backward, time relative to ours"),
    "penalty.png": (PENALTY, "trt_penalty: forward and backward, time relative to ours"),
}
OURS, ALSO_OURS, YARDSTICK, OTHER = "#1b6e53", "#7db59f", "#8a8f98", "#c9743a"
YARDSTICKS = ("relu", "sum of squares", "BatchNorm2d + relu")
COLUMNS = 2
PART_COLOURS = {
    "convolution": "#b9bec6",
    "BatchNorm": "#d9a441",
    "LIF (or ReLU)": "#c9743a",
    "BatchNorm + LIF": "#1b6e53",
    "regularizer": "#7a4f9a",
    "loss": "#4a7fb5",
    "optimizer": "#5b6470",
    "compiled": "#d98cb3",
    "other": "#e4e6ea",
    "idle": "#ffffff",
}


def colour_of(name: str, ours: str) -> str:
    if name == ours:
        return OURS
    if name in YARDSTICKS:
        return YARDSTICK
    return ALSO_OURS if name.startswith("ours") else OTHER


def draw(run: Run, folder: Path) -> list[Path]:
    """Writes a PNG for each kind of case that the run holds; returns their paths."""
    written = []
    for name, (table, title) in PLOTS.items():
        records = run.of(table)
        if records:
            path = folder / name
            plot(records, title, f"{run.machine}; {run.date}", path)
            written.append(path)
    records = sorted(run.of(STEPS), key=lambda record: int(record.info["steps"]))
    if records:
        written.append(folder / "steps.png")
        plot_steps(records, f"{run.machine}; {run.date}", written[-1])
    records = run.of(PACKED)
    if records:
        written.append(folder / "memory.png")
        plot_memory(records, f"{run.machine}; {run.date}", written[-1])
    records = run.of(STEP)
    if records:
        written.append(folder / "step.png")
        plot_step(records, f"{run.machine}; {run.date}", written[-1])
    return written


def plot_step(records: list[Record], caption: str, path: Path) -> None:
    """What a training step of each variant spends its time on, one panel a case."""
    bars = max(len(record.info["variants"]) for record in records)
    height = len(records) * (0.42 * bars + 0.9) + 1.3
    figure, grid = plt.subplots(len(records), 1, figsize=(10, height), squeeze=False)
    drawn: dict[str, Any] = {}
    for axes, record in zip(grid.flat, records, strict=True):
        variants = record.info["variants"]
        ends = dict.fromkeys(variants, 0.0)
        for part, colour in PART_COLOURS.items():
            seconds = {n: record.parts(result).get(part, 0.0) for n, result in variants.items()}
            if any(seconds.values()):
                drawn[part] = axes.barh(
                    list(variants),
                    list(seconds.values()),
                    left=list(ends.values()),
                    color=colour,
                    edgecolor="white" if part != "idle" else "#b9bec6",
                    linewidth=0.4,
                    height=0.72,
                )
                ends = {name: ends[name] + seconds[name] for name in ends}
        for position, (name, result) in enumerate(variants.items()):
            label = f"{duration(result['median'])}, {times(result['median'] / record.seconds)}"
            text = label if name != record.info["ours"] else duration(record.seconds)
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(text, (result["median"], position), fontsize=8.5, **place)
        axes.set_xlim(0, 1.18 * max(result["median"] for result in variants.values()))
        listed(axes, record.case)
    grid.flat[-1].set_xlabel("seconds a step")
    figure.suptitle(
        "a training step: forward, loss, backward, optimizer",
        fontsize=13,
        fontweight="bold",
        x=0.02,
        ha="left",
    )
    order = [part for part in PART_COLOURS if part in drawn]
    figure.legend(
        [drawn[part] for part in order],
        order,
        loc="upper left",
        bbox_to_anchor=(0.01, 1 - 0.42 / height),
        ncols=len(order),
        frameon=False,
        fontsize=8.5,
    )
    figure.text(0.02, 0.012, caption, fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1 - 0.5 / height))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def listed(axes: Axes, title: str) -> None:
    """The look of horizontal bars, the first on top."""
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", which="major", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def plot_memory(records: list[Record], caption: str, path: Path) -> None:
    """What each variant keeps for the backward pass, one panel a case."""
    bars = max(len(record.info["variants"]) for record in records)
    height = len(records) * (0.4 * bars + 0.6) + 1.1
    figure, grid = plt.subplots(len(records), 1, figsize=(8, height), sharex=True, squeeze=False)
    for axes, record in zip(grid.flat, records, strict=True):
        ours = record.info["ours"]
        kept = {n: record.kept(result) or 0.0 for n, result in record.info["variants"].items()}
        colours = [colour_of(name, ours) for name in kept]
        drawn = axes.barh(list(kept), list(kept.values()), color=colours, height=0.72)
        axes.bar_label(drawn, [f"{number:.3g}" for number in kept.values()], padding=4, fontsize=9)
        listed(axes, record.case)
    grid.flat[-1].set_xlabel("bytes kept for the backward pass, per neuron-step")
    figure.suptitle(
        "pack_saved_spikes: what a network keeps", fontsize=13, fontweight="bold", x=0.02, ha="left"
    )
    figure.text(0.02, 0.012, caption, fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_steps(records: list[Record], caption: str, path: Path) -> None:
    """The cost of a neuron-step over the number of steps."""
    figure, axes = plt.subplots(figsize=(8, 4.6))
    dtypes = list(dict.fromkeys(record.info.get("dtype") for record in records))
    for dtype, style in zip(dtypes, ("-", "--"), strict=False):
        some = [record for record in records if record.info.get("dtype") == dtype]
        suffix = f", {dtype.removeprefix('torch.')}" if len(dtypes) > 1 else ""
        for name in dict.fromkeys(name for record in some for name in record.info["variants"]):
            points = [
                (r.info["steps"], r.info["variants"][name]["median"] / r.info["elements"] * 1e12)
                for r in some
                if name in r.info["variants"]
            ]
            colour = colour_of(name, some[0].info["ours"])
            line = {"marker": "o", "label": f"{name}{suffix}", "color": colour, "linestyle": style}
            axes.plot(*zip(*points, strict=True), **line)
    some = [record for record in records if record.info.get("dtype") == dtypes[0]]
    copies = [(r.info["steps"], r.seconds * r.of_copy / r.info["elements"] * 1e12) for r in some]
    label = "a copy of the same bytes"
    axes.plot(*zip(*copies, strict=True), linestyle=":", label=label, color=YARDSTICK)
    axes.set_xscale("log")
    axes.set_xticks(sorted({record.info["steps"] for record in records}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda steps, _: f"{steps:g}"))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("T, steps (as many neuron-steps for all)")
    axes.set_ylabel("ps a neuron-step")
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.suptitle(
        "lif: forward and backward, from few to many steps",
        fontsize=13,
        fontweight="bold",
        x=0.02,
        ha="left",
    )
    figure.text(0.02, 0.012, caption, fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot(records: list[Record], title: str, caption: str, path: Path) -> None:
    """A grid of panels over one shared logarithmic scale."""
    columns = min(COLUMNS, len(records))
    rows = -(-len(records) // columns)
    bars = max(len(record.others) for record in records) + 1
    height = rows * (0.34 * bars + 0.75) + 1.1
    figure, grid = plt.subplots(
        rows, columns, figsize=(5.4 * columns, height), sharex=True, squeeze=False
    )
    for axes, record in zip(grid.flat, records, strict=False):
        panel(axes, record)
    for axes in grid.flat[len(records) :]:
        axes.set_visible(False)
    ratios = [record.ratio(name) or 1 for record in records for name in record.others]
    grid.flat[0].set_xlim(min(0.5, *ratios) * 0.8, max(2.0, *ratios) * 2.6)
    last = grid[-1] if len(records) == rows * columns else grid.flat[: len(records)][-columns:]
    for axes in last:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("time ÷ ours (log scale; shorter is faster)")
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.02, ha="left")
    figure.text(0.02, 0.012, caption, fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 0.985))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def panel(axes: Axes, record: Record) -> None:
    """Horizontal bars, fastest on top."""
    ours = record.info["ours"]
    ratios = {ours: 1.0, **{name: record.ratio(name) or 0.0 for name in record.others}}
    names = sorted(ratios, key=lambda name: ratios[name])
    colours = [colour_of(name, ours) for name in names]
    axes.barh(names, [ratios[name] for name in names], color=colours, height=0.72)
    for position, name in enumerate(names):
        label = times(ratios[name]) if name != ours else duration(record.seconds)
        axes.annotate(
            label,
            (ratios[name], position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            fontweight="bold" if name == ours else "normal",
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}×"))
    axes.axvline(1, color=OURS, linewidth=0.9, linestyle=":", zorder=0)
    listed(axes, record.case)
