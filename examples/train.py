"""Train the paper's networks with TRT, TET or the plain objective (SDT).

    python -m examples.train                                   # real digits, half a minute
    python -m examples.train --data digit-events --method tet --seed 1 --out out/tet
    python -m examples.train --data cifar10 --data-root DATA   # at the published settings
    python -m examples.train --data cifar10 --data-root DATA --resume
    torchrun --nproc-per-node 4 -m examples.train --data imagenet100 --data-root DATA

Data sets are listed in data.py, with the folders that they are expected in; the settings of each,
the paper's, in settings.py. The network answers with logits [T, B, classes], and one of three
objectives trains it:

    trt   cross entropy and squared distance at every step, plus the weight regularizer  (TRTLoss)
    tet   cross entropy at every step, logits pulled to the firing threshold             (TETLoss)
    sdt   cross entropy of the mean over time, the plain baseline

Every epoch ends with a checkpoint in `--out`. After an interruption the same command with
`--resume` goes on from the last one, to the numbers of a run that was never interrupted: bit for
bit on a CPU with as many threads and processes, on a GPU as far as its convolutions are
deterministic.

With `--packed` the spikes that layers keep for the backward pass are kept as bits, with the same
gradients; what that saved is printed. `--amp` trains in mixed precision: convolutions and spikes in
half, membrane potentials, losses and weights in float32, as for the test.

Under torchrun every process (on GPUs: every GPU) trains its share of each batch, by
DistributedDataParallel and with the batch statistics of all shares. `--batch-size` stays the whole
batch's, and the result is that of one process but for rounding.

Writes to `--out`: checkpoint.pt, history.csv, result.json, curves.png and spikes.png.
"""

import argparse
import csv
import dataclasses
import importlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import trt_kernels as tk
from examples import checkpoint, data, plots
from examples.checkpoint import CheckpointError
from examples.data import DataError
from examples.networks import NETWORKS, SpikingNet
from examples.parallel import PROCESSES, RANK, process_group, summed
from examples.settings import SETTINGS

Loss = Callable[[Tensor, Tensor], Tensor]
Observe = Callable[[SpikingNet, int], Any]
BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
# What may differ between a run and its continuation.
FREE = ("backend", "data_root", "device", "out", "resume", "tensorboard", "workers")


@dataclasses.dataclass
class Run:
    """What training leaves: the network, a record of every epoch, what was observed after it."""

    model: SpikingNet
    history: list[dict[str, float]]
    observed: dict[int, Any]
    packing: Any
    seconds: float


def make_network(args: argparse.Namespace, found: data.Data, group: Any = None) -> SpikingNet:
    """The network of `--network`, for the shape of the data.

    Raises:
        DataError: the network does not take that shape.
    """
    options: dict[str, Any] = {"channels": found.channels, "tau": args.tau, "process_group": group}
    if args.network in ("vggsnn", "small"):
        options["size"] = found.size
    steps = None if found.frames else args.steps
    try:
        return NETWORKS[args.network](found.classes, steps, **options)
    except ValueError as error:
        raise DataError(f"--network {args.network} does not fit this data: {error}") from error


def make_loss(args: argparse.Namespace, model: nn.Module) -> Loss:
    """The objective of `--method`: (logits [T, B, classes], labels [B]) -> scalar."""
    if args.method == "trt":
        return tk.TRTLoss(model, weight=args.weight, delta=args.delta, mse_ratio=args.mse_ratio)
    if args.method == "tet":
        return tk.TETLoss(mean=1.0, weight=args.mse_ratio)
    return lambda logits, labels: F.cross_entropy(logits.mean(0), labels)


def as_input(x: Tensor, device: str) -> Tensor:
    """A batch as networks take it: images [B, C, H, W], or sequences, time first."""
    x = x.to(device, non_blocking=True)
    return x.transpose(0, 1) if x.ndim == 5 else x


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """The network's answer is the class with the largest logit on average over time."""
    return (logits.mean(0).argmax(1) == labels).sum()


@torch.no_grad()
def evaluate(model: SpikingNet, batches: Any, device: str) -> tuple[float, float]:
    """The cross entropy of the mean over time, and accuracy in percent."""
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for x, labels in batches:
        labels = labels.to(device)
        logits = model(as_input(x, device)).float()
        loss = F.cross_entropy(logits.mean(0), labels, reduction="sum")
        totals += torch.stack(
            [loss.double(), count_correct(logits, labels), labels.new_tensor(len(labels))]
        )
    loss, correct, count = summed(totals)
    return loss / count, 100 * correct / count


def train(
    args: argparse.Namespace,
    model: SpikingNet,
    found: data.Data,
    start: dict[str, Any] | None,
    observe: Observe | None,
) -> tuple[list[dict[str, float]], dict[int, Any], float]:
    """Adam with a cosine schedule, from a checkpoint if one is given.

    Returns:
        A record of every epoch, what was observed after epochs, and seconds since the first start.
    """
    began = time.perf_counter()
    training = training_data(args, found)
    check_shares(args, model, training.batches.count)
    test = data.testing(found.test, args.batch_size, args.workers)
    loss_of = make_loss(args, model)
    network = DistributedDataParallel(model) if PROCESSES > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    half = None if args.amp == "none" else getattr(torch, args.amp)
    # Gradients in float16 reach from 6e-8 to 65,504: scaled up, the small ones are not lost.
    scaler = torch.amp.GradScaler(args.device, enabled=half is torch.float16)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    history: list[dict[str, float]] = []
    observed: dict[int, Any] = {}
    if start is not None:
        for name, part in parts.items():
            restore(part, start[name])
        history, observed = start["history"], start["observed"]
        began -= start["seconds"]

    board = tensorboard(args, len(history))
    count, batches = training.batches.count, len(training.batches)
    bar = tqdm(
        desc=f"{args.data}, {args.method}, {args.device}",
        total=args.epochs * batches,
        initial=len(history) * batches,
        unit="batch",
        disable=RANK > 0,
    )
    for epoch in range(len(history) + 1, args.epochs + 1):
        model.train()
        # Read once an epoch: reading a number waits for the GPU.
        totals = torch.zeros(2, dtype=torch.float64, device=args.device)
        for index, (x, labels) in enumerate(training.epoch(epoch)):
            labels = labels.to(args.device, non_blocking=True)
            with torch.autocast(args.device, half, enabled=half is not None):
                logits = network(as_input(x, args.device))
                loss = loss_of(logits, labels) if len(labels) else logits.sum()
            # DDP averages over processes: so weighted, means over shares become the batch's.
            whole = min(args.batch_size, count - index * args.batch_size)
            loss = loss * (len(labels) * PROCESSES / whole)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            seen = [loss.detach().double() * whole / PROCESSES, count_correct(logits, labels)]
            totals += torch.stack(seen)
            bar.update()
        schedule.step()
        total_loss, correct = summed(totals)
        if not math.isfinite(total_loss):
            raise FloatingPointError(
                f"epoch {epoch}: the loss is {total_loss}; try a smaller --lr, or --amp none"
            )
        test_loss, test_accuracy = evaluate(model, test, args.device)
        record = {
            "epoch": epoch,
            "loss": total_loss / count,
            "train_accuracy": 100 * correct / count,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
        }
        history.append(record)
        if observe is not None:
            seen_after = observe(model, epoch)
            if seen_after is not None:
                observed[epoch] = seen_after
        bar.set_postfix_str(f"loss {record['loss']:.3f}, test {test_accuracy:.1f} %")
        if RANK == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            beside = {
                "settings": settings_of(args),
                "history": history,
                "observed": observed,
                "seconds": time.perf_counter() - began,
            }
            checkpoint.save(args.out / "checkpoint.pt", {**beside, **states})
            write_history(args.out / "history.csv", history)
        for name, value in record.items():
            if board is not None and name != "epoch":
                board.add_scalar(name, value, epoch)
    bar.close()
    if board is not None:
        board.close()
    if RANK == 0:  # again: an interruption may have come before the last one
        write_history(args.out / "history.csv", history)
    return history, observed, time.perf_counter() - began


def training_data(args: argparse.Namespace, found: data.Data) -> data.Training:
    """The batches of every epoch."""
    return data.Training(found, args.batch_size, args.seed, args.limit, args.workers)


def restore(part: Any, state: dict[str, Any]) -> None:
    """Gives a network, an optimizer or the like the state that a checkpoint holds.

    Raises:
        CheckpointError: it does not fit.
    """
    try:
        part.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the checkpoint is of another network: {reason}") from error


def check_shares(args: argparse.Namespace, model: nn.Module, count: int) -> None:
    """SyncBatchNorm gathers numbers of another dtype from a process without samples.

    Raises:
        DataError: the last batch has fewer samples than there are processes.
    """
    last = count % args.batch_size or min(args.batch_size, count)
    if last < PROCESSES and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise DataError(
            f"--batch-size: the last batch has {last} samples for {PROCESSES} processes, and "
            f"{args.network} needs one for each; choose another --batch-size or --limit"
        )


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that a continued run must share."""
    return {key: value for key, value in vars(args).items() if key not in FREE}


def resumed(args: argparse.Namespace) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None.

    Raises:
        CheckpointError: it is damaged or of other settings; or, without `--resume`, one that is
            damaged or of an unfinished run would be overwritten.
    """
    path = args.out / "checkpoint.pt"
    if not args.resume:
        if path.is_file():
            before = checkpoint.load(path)
            done, epochs = len(before["history"]), before["settings"]["epochs"]
            if done < epochs:
                raise CheckpointError(
                    f"{path}: of an unfinished run ({done} of {epochs} epochs); --resume it, "
                    "choose another --out, or remove the file"
                )
        return None
    found = checkpoint.load(path)
    now = settings_of(args)
    for key, before in found["settings"].items():
        if now.get(key) != before:
            option = "--" + key.replace("_", "-")
            raise CheckpointError(f"{path}: of a run with {option} {before}, got {now.get(key)}")
    return found


def load(args: argparse.Namespace) -> data.Data:
    """The data set of the command line."""
    return data.load(args.data, args.data_root, args.steps)


def run(args: argparse.Namespace, found: data.Data, observe: Observe | None = None) -> Run:
    """Trains. `observe` is called with the network and the number of every epoch; what it returns
    is kept in the checkpoint.

    Raises:
        CheckpointError: `--resume`, or its absence, does not fit what is in `--out`.
        FloatingPointError: the loss became infinite or NaN.
    """
    # As in the official code: the same convolution for the same shapes, in every run.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    start = resumed(args)
    torch.manual_seed(args.seed)
    with process_group(args.device) as group, tk.use_backend(args.backend):
        model = make_network(args, found, group).to(args.device)
        if group is not None and args.device == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
        with tk.pack_saved_spikes() if args.packed else nullcontext() as packing:
            history, observed, seconds = train(args, model, found, start, observe)
        return Run(model, history, observed, packing, seconds)


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """A row for every epoch."""
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, history[0].keys())
        rows.writeheader()
        rows.writerows(history)


def tensorboard(args: argparse.Namespace, epochs: int) -> Any:
    """A writer, or None; of what a run wrote after its last checkpoint nothing is shown."""
    if not args.tensorboard or RANK > 0:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(args.out / "tensorboard"), purge_step=epochs + 1)


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


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a training run; those without a default here are the data set's."""
    add = parser.add_argument
    add("--data", choices=SETTINGS, default="digits", help="data set")
    add("--data-root", type=Path, help="folder that holds it")
    add("--method", choices=("trt", "tet", "sdt"), default="trt", help="training objective")
    add("--network", choices=NETWORKS, help="default: the data set's, as the settings below")
    add("--backend", choices=BACKENDS, default="auto", help="which kernels run")
    add("--epochs", type=number(int, 1), help="passes over the training samples")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of weights, order, augmentation")
    add("--steps", type=number(int, 1), help="timesteps T")
    add("--batch-size", type=number(int, 1), help="samples per optimizer step, of all processes")
    add("--lr", type=number(float, 1e-8), help="first learning rate of Adam")
    add("--weight", type=number(float, 0), help="lambda of TRT")
    add("--delta", type=number(float, 0), help="time decay delta of TRT")
    add("--mse-ratio", type=number(float, 0, 1), help="eta of TRT, lambda of TET")
    add("--tau", type=number(float, 1), help="time constant of the neurons")
    add("--amp", choices=("none", "bfloat16", "float16"), help="default: float16 on a GPU")
    add("--packed", action="store_true", help="keep spikes as bits for the backward pass")
    add("--limit", type=number(int, 1), help="train on so many samples only")
    add("--workers", type=number(int, 0), help="processes that read data; default: 0 for digits")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--tensorboard", action="store_true", help="also log for TensorBoard, in --out")
    add("--out", type=Path, help="folder for everything that is written; default: out/DATA-METHOD")


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Fills in the data set's settings, checks what can be checked now, and adds `device`."""
    for key, value in dataclasses.asdict(SETTINGS[args.data]).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.out is None:
        args.out = Path("out") / f"{args.data}-{args.method}"
    if args.workers is None:
        args.workers = 0 if args.data.startswith("digit") else min(8, os.cpu_count() or 1)

    unavailable = tk.report().unavailable
    on_gpu = torch.cuda.is_available()
    name = args.backend
    if name == "auto":  # what the package itself would take
        kernels = [gpu for gpu in ("cuda", "triton") if not any(unavailable[gpu].values())]
        name = kernels[0] if on_gpu and kernels else "cpu"
    if reasons := list(filter(None, unavailable[name].values())):
        parser.error(f"argument --backend: {name} cannot run here: {reasons[0]}")
    # Where there is no GPU, Triton's interpreter serves the CPU.
    args.device = "cuda" if on_gpu and name in ("cuda", "triton") else "cpu"
    if args.amp is None:
        args.amp = "float16" if args.device == "cuda" else "none"
    if PROCESSES > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", PROCESSES))
        if args.device == "cuda" and local > torch.cuda.device_count():
            parser.error(f"{local} processes for {torch.cuda.device_count()} GPUs of this machine")
        if name == "reference":
            parser.error("argument --backend: reference shares no statistics between processes")
        if args.device == "cpu" and "resnet" in args.network:
            parser.error(
                f"argument --network: {args.network} has BatchNorms that share their statistics "
                "between processes on GPUs only"
            )
    if args.tensorboard:
        try:
            importlib.import_module("torch.utils.tensorboard")
        except ImportError:
            parser.error("argument --tensorboard: needs the package tensorboard")
    if RANK == 0:  # the process that writes
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.out).close()
        except OSError as error:
            parser.error(f"argument --out: cannot write to {args.out}: {error.strerror}")
    return args


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, all checked before any training."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.train", description=__doc__.partition("\n")[0]
    )
    add_options(parser)
    return complete(parser, parser.parse_args(argv))


@contextmanager
def told(interrupted: str) -> Iterator[None]:
    """Ends the program with a line that says what cannot be used, or how to go on."""
    try:
        yield
    except (DataError, CheckpointError, FloatingPointError, OSError) as error:
        text = str(error)
        if "Original Traceback" in text:  # of a process that reads data: its last line is the error
            text = text.rstrip().splitlines()[-1].partition("Error: ")[2]
        sys.exit(f"error: {text}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted; {interrupted}")


def alone(parser: argparse.ArgumentParser) -> None:
    """For programs that processes cannot share."""
    if PROCESSES > 1:
        parser.error("runs in one process, not under torchrun")


def report(args: argparse.Namespace, found: data.Data, done: Run) -> None:
    """Draws, and writes and prints the result."""
    plots.curves(
        done.history, f"{args.data}, {args.method}, seed {args.seed}", args.out / "curves.png"
    )
    shown = [found.test[index] for index in range(min(4, len(found.test)))]
    x = as_input(torch.stack([x for x, _ in shown]), args.device)
    with tk.use_backend(args.backend):
        plots.spikes(done.model, x, [int(label) for _, label in shown], args.out / "spikes.png")
    if done.packing:
        print(f"over all batches, {done.packing}")
    last = done.history[-1]
    result = {"seconds": done.seconds, "test_accuracy": last["test_accuracy"]}
    settings = {**settings_of(args), "backend": args.backend, "device": args.device}
    text = json.dumps({"settings": settings, **result, "history": done.history}, indent=2)
    (args.out / "result.json").write_text(text + "\n")
    print(
        f"test accuracy {last['test_accuracy']:.1f} % ({args.data}, {args.network}, {args.method}, "
        f"{args.epochs} epochs, seed {args.seed}, {done.seconds:.0f} s), in {args.out}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, draws, and prints the test accuracy."""
    args = parse_arguments(argv)
    with told("after an epoch the same command with --resume goes on from its checkpoint"):
        found = load(args)
        done = run(args, found)
        if RANK == 0:
            report(args, found, done)


if __name__ == "__main__":
    main()
