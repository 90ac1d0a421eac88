"""Train a spiking convolutional network on handwritten digits, on a laptop, in under a minute.

    python examples/train_digits.py
    python examples/train_digits.py --method tet --epochs 30 --seed 1 --out out/tet
    python examples/train_digits.py --packed
    python examples/train_digits.py --amp bfloat16
    torchrun --nproc-per-node 2 examples/train_digits.py

The data are the 1,797 real 8x8 images that come with scikit-learn: nothing is downloaded. Every
image is shown as a constant input current for `--steps` timesteps; the network answers with logits
[T, B, 10], and one of three objectives trains it:

    trt   cross entropy and squared distance at every step, plus the weight regularizer  (TRTLoss)
    tet   cross entropy at every step, logits pulled to the firing threshold             (TETLoss)
    sdt   cross entropy of the mean over time, the plain baseline

A random quarter of the images is the test set, so it shares its writers with the training set, and
all three objectives do well: this shows how the parts fit together and compares nothing.

Every block is a convolution and `BatchNormLIF`. With `--packed` the spikes that layers keep for the
backward pass are kept as bits, with the same gradients; what that saved is printed. With `--amp`
it trains in mixed precision: convolutions and spikes in half, membrane potentials, losses and
weights in float32, as for the test.

Under torchrun every process (on GPUs: every GPU) trains its share of each batch, by
DistributedDataParallel and with the batch statistics of all shares. `--batch-size` stays the whole
batch's, and the result is that of one process but for rounding.

Needs scikit-learn, matplotlib and tqdm beside trt_kernels. Writes `curves.png` and `spikes.png`
to `--out`, and with `--json` everything that the curves show.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import trt_kernels

BLUE, ORANGE = "#2458a6", "#d9730d"
Data = tuple[Tensor, Tensor]  # images [N, 1, 8, 8] in [0, 1], labels [N]

# Of the processes that torchrun started; one that it did not start is alone.
RANK, PROCESSES = 0, 1
if distributed.is_available() and distributed.is_torchelastic_launched():
    RANK, PROCESSES = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))


@contextmanager
def process_group(device: str) -> Iterator[Any]:
    """Connects the processes, if there are several; gives their group, or None."""
    if PROCESSES == 1:
        yield None
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield distributed.group.WORLD
    finally:
        distributed.destroy_process_group()


def share(count: int) -> slice:
    """This process's part of `count` images, which are dealt evenly; it may be empty."""
    return slice(count * RANK // PROCESSES, count * (RANK + 1) // PROCESSES)


def summed(device: str, *numbers: float) -> list[float]:
    """Each number summed over all processes."""
    if PROCESSES == 1:
        return list(numbers)
    totals = torch.tensor(numbers, dtype=torch.float64, device=device)
    distributed.all_reduce(totals)
    return totals.tolist()


class SpikingConv(nn.Module):
    """Convolution, then normalisation and LIF neurons in one operator.

    [T, B, C, H, W] -> spikes [T, B, C', H, W]. With the option `steps` the input has no time,
    [B, C, H, W], and is the neurons' current at each of so many steps.
    """

    def __init__(self, channels_in: int, channels_out: int, **lif_options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
        self.neurons = trt_kernels.nn.BatchNormLIF(
            channels_out, decay=0.5, threshold=1.0, **lif_options
        )

    def forward(self, x: Tensor) -> Tensor:
        # The convolution knows no time: it sees T * B images. Normalisation and neurons read its
        # output in place, over all T steps.
        leading = x.shape[:-3]
        current = self.conv(x.flatten(0, -4))
        return self.neurons(current.unflatten(0, leading))


class SpikingNet(nn.Module):
    """Three spiking convolutions and a linear readout: images [B, 1, 8, 8] -> logits [T, B, 10].

    Processes of a `process_group` share their batch statistics.
    """

    def __init__(self, steps: int, process_group: Any = None) -> None:
        super().__init__()
        self.steps = steps
        # Direct encoding: an image is the same current at every step, so it is convolved once.
        self.layer1 = SpikingConv(1, 32, steps=steps, process_group=process_group)
        self.layer2 = SpikingConv(32, 64, process_group=process_group)
        self.layer3 = SpikingConv(64, 64, process_group=process_group)
        self.readout = nn.Linear(64 * 4 * 4, 10)

    def spikes(self, images: Tensor) -> list[Tensor]:
        """The spikes of every layer, each [T, B, C, H, W]."""
        first = self.layer1(images)
        second = self.layer2(first)
        pooled = F.avg_pool2d(second.flatten(0, 1), 2)  # 8x8 -> 4x4
        return [first, second, self.layer3(pooled.unflatten(0, second.shape[:2]))]

    def forward(self, images: Tensor) -> Tensor:
        return self.readout(self.spikes(images)[-1].flatten(2))


def load_data(device: str) -> tuple[Data, Data]:
    """The digits, split into 1,347 for training and 450 for testing: always the same ones."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64, device=device)
    rows = range(len(labels))
    train, test = train_test_split(rows, test_size=0.25, stratify=digits.target, random_state=0)
    return (images[train], labels[train]), (images[test], labels[test])


def shift(images: Tensor) -> Tensor:
    """Moves each image by up to a pixel in each direction, at random."""
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)  # [B, 1, 3, 3, 8, 8]
    down, right = torch.randint(3, (2, len(images)))
    return windows[torch.arange(len(images)), :, down, right]


def make_loss(args: argparse.Namespace, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The objective of `--method`: (logits [T, B, 10], labels [B]) -> scalar."""
    if args.method == "trt":
        return trt_kernels.TRTLoss(
            model, weight=args.weight, delta=args.delta, mse_ratio=args.mse_ratio
        )
    if args.method == "tet":
        return trt_kernels.TETLoss(mean=1.0, weight=args.mse_ratio)
    return lambda logits, labels: F.cross_entropy(logits.mean(0), labels)


def count_correct(logits: Tensor, labels: Tensor) -> int:
    """The network's answer is the class with the largest logit on average over time."""
    return int((logits.mean(0).argmax(1) == labels).sum())


@torch.no_grad()
def evaluate(model: SpikingNet, data: Data) -> float:
    """Accuracy in percent."""
    model.eval()
    images, labels = data
    mine = share(len(labels))
    (correct,) = summed(images.device.type, count_correct(model(images[mine]), labels[mine]))
    return 100 * correct / len(labels)


def train(args: argparse.Namespace, model: SpikingNet, training: Data, test: Data) -> list[dict]:
    """Adam with a cosine schedule; returns loss and accuracies of every epoch."""
    images, labels = training
    loss_of = make_loss(args, model)
    network = DistributedDataParallel(model) if PROCESSES > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    half = getattr(torch, args.amp) if args.amp else None
    # Gradients in float16 reach from 6e-8 to 65,504: scaled up, the small ones are not lost.
    scaler = torch.amp.GradScaler(args.device, enabled=half is torch.float16)
    history = []
    bar = tqdm(range(1, args.epochs + 1), desc=args.method, unit="epoch", disable=RANK > 0)
    for epoch in bar:
        model.train()
        total_loss, correct = 0.0, 0
        for rows in torch.randperm(len(labels)).split(args.batch_size):
            # The random numbers are the whole batch's, the same ones in every process.
            mine = share(len(rows))
            target = labels[rows][mine]
            with torch.autocast(images.device.type, half, enabled=half is not None):
                logits = network(shift(images[rows])[mine])
                loss = loss_of(logits, target) if len(target) else logits.sum()
            # DDP averages over processes: so weighted, means over shares become the batch's.
            loss = loss * (len(target) * PROCESSES / len(rows))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            total_loss += loss.item() * len(rows) / PROCESSES
            correct += count_correct(logits, target)
        schedule.step()
        total_loss, correct = summed(args.device, total_loss, correct)
        record = {
            "epoch": epoch,
            "loss": total_loss / len(labels),
            "train_accuracy": 100 * correct / len(labels),
            "test_accuracy": evaluate(model, test),
        }
        history.append(record)
        bar.set_postfix_str(f"loss {record['loss']:.3f}, test {record['test_accuracy']:.1f} %")
    return history


def plot_curves(history: list[dict], title: str, path: Path) -> None:
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
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e5e7eb")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@torch.no_grad()
def plot_spikes(model: SpikingNet, test: Data, path: Path, rows: int = 4, shown: int = 64) -> None:
    """For the first test images: spikes of some neurons of each layer, and the readout."""
    images, labels = test[0][:rows], test[1][:rows]
    model.eval()
    layers = model.spikes(images)
    logits = model(images).cpu()  # [T, rows, 10]

    figure, axes = plt.subplots(rows, 5, figsize=(12, 2.3 * rows), layout="constrained")
    heat = {"aspect": "auto", "interpolation": "nearest", "vmin": 0, "vmax": 1}
    for row, (first, *middle, last) in enumerate(axes):
        first.imshow(images[row, 0].numpy(force=True), cmap="gray_r")
        first.set(title=f"test image: {labels[row]}", xticks=[], yticks=[])
        for depth, (ax, layer) in enumerate(zip(middle, layers, strict=True), start=1):
            fired = layer[:, row].flatten(1).T.numpy(force=True)  # [neurons, T]
            some = torch.linspace(0, len(fired) - 1, shown).long().numpy()
            ax.imshow(fired[some], cmap=ListedColormap(["#f3f4f6", BLUE]), **heat)
            ax.set(title=f"layer {depth}, rate {fired.mean():.2f}", ylabel=f"{shown} neurons")
            ax.set_yticks([])
        last.imshow(logits[:, row].softmax(-1).T.numpy(), cmap="Blues", **heat)
        answer = logits[:, row].mean(0).argmax()
        last.set(title=f"readout: {answer}", ylabel="class", yticks=range(10))
        last.tick_params(axis="y", labelsize=7)
        for ax in (*middle, last):
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            for step in range(1, model.steps):
                ax.axvline(step - 0.5, color="white", lw=1.5)
    for ax in axes[-1, 1:]:
        ax.set_xlabel("timestep")
    figure.suptitle("Spikes over time (rate: spikes per neuron and step) and class probabilities")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a finite int or float from `low` to `high`."""
    name = {int: "an int", float: "a float"}[kind]
    bound = f">= {low}" if high == math.inf else f"from {low} to {high}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"got {text!r}, needs {name} {bound}")
        return value

    return parse


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, all checked before any training; adds `device`."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    backends = ("auto", "cpu", "cuda", "triton", "reference")
    add("--method", choices=("trt", "tet", "sdt"), default="trt", help="training objective")
    add("--backend", choices=backends, default="auto", help="which kernels run")
    add("--epochs", type=number(int, 1), default=15, help="passes over the training images")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of weights, order and shifts")
    add("--steps", type=number(int, 1), default=6, help="timesteps T")
    add("--batch-size", type=number(int, 1), default=64, help="images per optimizer step")
    add("--lr", type=number(float, 1e-8), default=2e-3, help="first learning rate of Adam")
    add("--weight", type=number(float, 0), default=1e-5, help="lambda of TRT")
    add("--delta", type=number(float, 0), default=0.25, help="time decay delta of TRT")
    add("--mse-ratio", type=number(float, 0, 1), default=0.05, help="eta of TRT, lambda of TET")
    add("--packed", action="store_true", help="keep spikes as bits for the backward pass")
    add("--amp", choices=("bfloat16", "float16"), help="train in mixed precision")
    add("--json", type=Path, help="file for settings, history and result")
    add("--out", type=Path, default=Path("out/digits"), help="folder for the pictures")
    add("--limit", type=number(int, 1), help=argparse.SUPPRESS)  # training images, for tests
    args = parser.parse_args(argv)

    unavailable = trt_kernels.report().unavailable
    name = args.backend
    if name == "auto":
        name = "cpu" if any(unavailable["cuda"].values()) else "cuda"
    if reasons := list(filter(None, unavailable[name].values())):
        parser.error(f"argument --backend: {name} cannot run here: {reasons[0]}")
    if name == "reference" and PROCESSES > 1:
        parser.error("argument --backend: reference shares no statistics between processes")
    args.device = "cuda" if name in ("cuda", "triton") else "cpu"
    if RANK > 0:  # the first process writes
        return args

    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"argument --out: cannot write to {args.out}: {error.strerror}")
    try:
        if args.json:
            args.json.open("a").close()
    except OSError as error:
        parser.error(f"argument --json: cannot write {args.json}: {error.strerror}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, draws, and prints the test accuracy."""
    args = parse_arguments(argv)
    torch.manual_seed(args.seed)

    with process_group(args.device) as group, trt_kernels.use_backend(args.backend):
        (images, labels), test = load_data(args.device)
        training = images[: args.limit], labels[: args.limit]
        model = SpikingNet(args.steps, group).to(args.device)
        start = time.perf_counter()
        with trt_kernels.pack_saved_spikes() if args.packed else nullcontext() as packing:
            history = train(args, model, training, test)
        seconds = time.perf_counter() - start
        if RANK > 0:
            return
        plot_spikes(model, test, args.out / "spikes.png")
    plot_curves(history, f"{args.method}, seed {args.seed}", args.out / "curves.png")

    if packing:
        print(f"over all batches, {packing}")
    accuracy = history[-1]["test_accuracy"]
    if args.json:
        settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
        result = {"test_accuracy": accuracy, "seconds": seconds}
        text = json.dumps({"settings": settings, "history": history, **result}, indent=2)
        args.json.write_text(text + "\n")
    print(
        f"test accuracy {accuracy:.1f} % "
        f"({args.method}, {args.epochs} epochs, seed {args.seed}, {seconds:.0f} s)"
    )


if __name__ == "__main__":
    main()
