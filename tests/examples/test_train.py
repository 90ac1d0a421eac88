"""Training runs as its user starts it, says what it did, resumes, and refuses bad arguments."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import trt_kernels as tk
from examples import checkpoint, data, plots, train
from tests.examples.distributed_training import keep_weights, train_in_double

pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]
TINY = ["--backend", "cpu", "--epochs", "1", "--steps", "2", "--limit", "128", "--batch-size", "32"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the example with the given arguments and returns what it wrote in result.json."""
    runs = iter(range(100))

    def run(*arguments, pictures=False, out=None):
        out = out or tmp_path / f"run{next(runs)}"
        if not pictures:  # they take longer than the training
            for name in ("curves", "spikes"):
                monkeypatch.setattr(plots, name, lambda *_: None)
        train.main([*arguments, "--out", str(out)])
        return json.loads((out / "result.json").read_text())

    return run


def weights(out):
    return checkpoint.load(out / "checkpoint.pt")["model"]


def assert_same_weights(a, b):
    for name, w in weights(a).items():
        assert torch.equal(w, weights(b)[name]), name


@pytest.mark.parametrize("method", ["trt", "tet", "sdt"])
def test_methods(run, method, tmp_path, capsys):
    options = [*TINY, "--epochs", "2", "--method", method, "--seed", "3"]
    result = run(*options, out=tmp_path, pictures=True)

    assert result["settings"]["method"] == method
    assert result["settings"]["seed"] == 3
    assert result["settings"]["steps"] == 2
    history = result["history"]
    assert [record["epoch"] for record in history] == [1, 2]
    assert all(math.isfinite(value) for record in history for value in record.values())
    assert history[1]["loss"] < history[0]["loss"]
    assert result["test_accuracy"] == history[-1]["test_accuracy"]
    assert result["seconds"] > 0

    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert [{key: float(value) for key, value in row.items()} for row in rows] == history
    for name in ("curves.png", "spikes.png"):
        picture = (tmp_path / name).read_bytes()
        assert picture.startswith(b"\x89PNG\r\n")
        assert len(picture) > 10_000

    last = capsys.readouterr().out.splitlines()[-1]
    accuracy = f"{result['test_accuracy']:.1f}"
    assert re.fullmatch(
        rf"test accuracy {re.escape(accuracy)} % "
        rf"\(digits, small, {method}, 2 epochs, seed 3, \d+ s\), in {tmp_path}",
        last,
    )


def test_methods_differ(run):
    losses = {run(*TINY, "--method", m)["history"][0]["loss"] for m in ("trt", "tet", "sdt")}
    assert len(losses) == 3


def test_published_settings():
    published = {
        "cifar10": ("resnet19", 6, 1e-5, 0.25, 0.05, 2.0),
        "cifar100": ("resnet19", 6, 1e-5, 0.25, 0.05, 2.0),
        "imagenet100": ("sew-resnet34", 4, 5e-5, 0.5, 0.001, 1.0),
        "dvs-cifar10": ("vggsnn", 10, 5e-5, 0.5, 0.001, 2.0),
        "n-caltech101": ("vggsnn", 10, 5e-5, 0.5, 0.05, 2.0),
    }
    for name, wanted in published.items():
        s = train.SETTINGS[name]
        assert (s.network, s.steps, s.weight, s.delta, s.mse_ratio, s.tau) == wanted
        assert (s.epochs, s.batch_size, s.lr) == (300, 64, 1e-3)


def test_the_documented_settings_are_these():
    rows = {}
    for line in (ROOT / "docs" / "paper.md").read_text().splitlines():
        cells = [cell.strip(" `") for cell in line.split("|")[1:-1]]
        if cells and cells[0] in train.SETTINGS:
            rows[cells[0]] = cells
    assert rows.keys() == train.SETTINGS.keys()
    for name, s in train.SETTINGS.items():
        _, network, weight, delta, mse_ratio, tau, *_ = rows[name]
        assert int(network.split(", ")[1]) == s.steps
        numbers = (float(weight), float(delta), float(mse_ratio), float(tau))
        assert numbers == (s.weight, s.delta, s.mse_ratio, s.tau), name


def test_settings_of_the_command_line(tmp_path):
    given = ["--data", "imagenet100", "--backend", "cpu", "--out", str(tmp_path), "--delta", "0.1"]
    args = train.parse_arguments(given)
    assert (args.network, args.steps, args.tau, args.epochs) == ("sew-resnet34", 4, 1.0, 300)
    assert (args.weight, args.delta, args.amp) == (5e-5, 0.1, "none")


@pytest.mark.parametrize("network", ["resnet19", "vggsnn", "sew-resnet34"])
def test_the_papers_networks_on_events(run, network):
    options = ["--data", "digit-events", "--network", network, "--limit", "6", "--batch-size", "3"]
    result = run(*TINY, *options, "--packed")
    assert math.isfinite(result["history"][0]["loss"])


def test_an_interrupted_run_resumes_to_the_same_numbers(run, tmp_path, monkeypatch):
    """Also the optimizer, the schedule, the order of samples and their augmentation."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    options = [*TINY, "--epochs", "4", "--amp", "float16"]
    expected = run(*options, out=whole)
    evaluate, calls = train.evaluate, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", interrupted)
    with pytest.raises(
        SystemExit, match="interrupted; after an epoch the same command with --resume"
    ):
        run(*options, out=parted)
    before = checkpoint.load(parted / "checkpoint.pt")
    assert len(before["history"]) == 2
    # Half of a cosine: both the schedule and the scaler are in what is continued.
    assert before["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-3)
    assert before["scaler"]["scale"] == 2.0**16
    with pytest.raises(SystemExit, match=r"unfinished run \(2 of 4 epochs\); --resume it"):
        run(*options, out=parted)
    result = run(*options, "--resume", out=parted)
    assert result["history"] == expected["history"]
    assert_same_weights(whole, parted)
    assert result["seconds"] > before["seconds"] > 0
    assert checkpoint.load(parted / "checkpoint.pt")["optimizer"]["param_groups"][0]["lr"] == 0
    # What is finished has nothing left to do but what was lost, and may be run anew.
    (parted / "history.csv").unlink()
    assert run(*options, "--resume", out=parted)["history"] == expected["history"]
    assert (parted / "history.csv").read_text() == (whole / "history.csv").read_text()
    assert run(*options, out=parted)["history"] == expected["history"]


def test_resume_restores_the_scaler(run, tmp_path):
    options = [*TINY, "--epochs", "2", "--amp", "float16"]
    run(*options, out=tmp_path)
    content = checkpoint.load(tmp_path / "checkpoint.pt")
    content["history"].pop()
    content["scaler"]["scale"] = 2.0**10
    checkpoint.save(tmp_path / "checkpoint.pt", content)
    run(*options, "--resume", out=tmp_path)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["scaler"]["scale"] == 2.0**10


def test_evaluation_uses_the_running_statistics():
    network = train.SpikingNet(steps=2)
    network.add_conv(1, 3)
    network.readout = torch.nn.Linear(3 * 16, 3)
    network(torch.rand(40, 1, 4, 4) * 5)
    batch = (torch.rand(5, 1, 4, 4), torch.randint(3, (5,)))
    loss, accuracy = train.evaluate(network, [batch, batch], "cpu")
    with torch.no_grad():
        logits = network.eval()(batch[0]).mean(0)
        other = network.train()(batch[0]).mean(0)
    wanted, wrong = (float(torch.nn.functional.cross_entropy(o, batch[1])) for o in (logits, other))
    assert loss == pytest.approx(wanted, rel=1e-5) and abs(wrong - wanted) > 1e-3
    assert accuracy == pytest.approx(100 * float((logits.argmax(1) == batch[1]).double().mean()))


def test_the_answer_is_that_of_the_mean_over_time():
    """Of three samples one whose steps agree, and two whose mean is another class than the last."""
    logits = torch.tensor(
        [[[3.0, 0, 0], [9, 0, 0], [0, 5, 0]], [[2.0, 0, 0], [0, 1, 0], [0, 0, 4]]]
    )
    assert train.count_correct(logits, torch.tensor([0, 0, 1])) == 3
    assert train.count_correct(logits, torch.tensor([0, 1, 2])) == 1


def test_every_epoch_trains_in_training_mode(run, monkeypatch):
    """And is followed by a test in evaluation mode."""
    modes, make_loss = [], train.make_loss

    def watched(args, model):
        loss_of = make_loss(args, model)
        model.register_forward_hook(lambda *_: modes.append(model.training))
        return loss_of

    monkeypatch.setattr(train, "make_loss", watched)
    run(*TINY, "--epochs", "2")
    tests = -(-450 // 32)
    assert modes == [*[True] * 4, *[False] * tests] * 2


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_float16_that_overflows_lowers_the_scale(run, tmp_path, monkeypatch):
    """By half in each of four batches, whose steps are left out."""
    make_network, begun = train.make_network, {}

    def watched(*arguments):
        network = make_network(*arguments)
        begun.update({name: p.detach().clone() for name, p in network.named_parameters()})
        return network

    monkeypatch.setattr(train, "make_network", watched)
    huge = lambda logits, _: 1e35 * logits.float().sum()  # noqa: E731
    monkeypatch.setattr(train, "make_loss", lambda *_: huge)
    run(*TINY, "--amp", "float16", out=tmp_path)
    content = checkpoint.load(tmp_path / "checkpoint.pt")
    assert content["scaler"]["scale"] == 2.0**12
    for name, w in begun.items():
        assert torch.equal(content["model"][name], w), name


def test_tau_reaches_the_neurons(tmp_path):
    digits = data.load("digits", None, 6)
    given = ["--backend=cpu", f"--out={tmp_path}", "--network=small"]
    for more, decay in ((["--tau=4"], 0.25), (["--data=imagenet100"], 1.0), ([], 0.5)):
        network = train.make_network(train.parse_arguments([*given, *more]), digits)
        neurons = [layer.neurons for layer in network.layers if hasattr(layer, "neurons")]
        assert [n.lif_options["decay"] for n in neurons] == [decay] * 3


def test_convolutions_are_chosen_as_in_the_official_code(run, monkeypatch):
    """The same one in every run, as far as cudnn has it."""
    cudnn, seen = torch.backends.cudnn, []
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "deterministic", False)

    def no_epochs(*_):
        seen.append((cudnn.benchmark, cudnn.deterministic))
        return [{"test_accuracy": 0.0}], {}, 0.0

    monkeypatch.setattr(train, "train", no_epochs)
    run("--backend", "cpu")
    assert seen == [(False, True)]


def test_objectives(tmp_path):
    """Each with the settings that are its own."""
    logits, labels = torch.randn(3, 4, 5), torch.randint(5, (4,))
    network = train.NETWORKS["small"](5)
    given = [
        "--backend=cpu",
        f"--out={tmp_path}",
        "--weight=1e-3",
        "--mse-ratio=0.2",
        "--delta=0.3",
    ]
    entropy = torch.nn.functional.cross_entropy
    wanted = {
        "trt": tk.TRTLoss(network, weight=1e-3, delta=0.3, mse_ratio=0.2)(logits, labels),
        "tet": 0.8 * torch.stack([entropy(o, labels) for o in logits]).mean()
        + 0.2 * (logits - 1).square().mean(),
        "sdt": entropy(logits.mean(0), labels),
    }
    for method, value in wanted.items():
        args = train.parse_arguments([*given, f"--method={method}"])
        torch.testing.assert_close(train.make_loss(args, network)(logits, labels), value)


def test_a_damaged_sample_is_told_of_in_a_line(monkeypatch, capsys):
    """Also where a process of its own read it."""

    class Damaged(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise data.DataError("a.bin: cannot be read (empty)")

    for workers in (0, 1):
        with (
            pytest.raises(SystemExit, match=r"^error: a.bin: cannot be read \(empty\)$"),
            train.told("..."),
        ):
            next(iter(torch.utils.data.DataLoader(Damaged(), num_workers=workers)))


def test_a_process_without_samples_and_batch_norms_that_gather(monkeypatch, tmp_path):
    network = torch.nn.Sequential(torch.nn.SyncBatchNorm(2))
    args = train.parse_arguments(["--backend=cpu", f"--out={tmp_path}", "--batch-size=4"])
    monkeypatch.setattr(train, "PROCESSES", 2)
    train.check_shares(args, network, 6)
    train.check_shares(args, torch.nn.BatchNorm2d(2), 5)
    with pytest.raises(data.DataError, match="the last batch has 1 samples for 2 processes"):
        train.check_shares(args, network, 5)


@pytest.mark.parametrize(
    ("served", "gpu", "device"),
    [
        (("cuda", "triton"), True, "cuda"),
        (("triton",), True, "cuda"),
        ((), True, "cpu"),
        (("triton",), False, "cpu"),
    ],
)
def test_the_automatic_device(monkeypatch, tmp_path, served, gpu, device):
    """Triton serves a GPU where CUDA's kernels are missing; interpreted it is not chosen."""
    unavailable = {n: {} if n in served else {"lif": "missing"} for n in ("cuda", "triton")}
    unavailable |= {"cpu": {}, "reference": {}}
    monkeypatch.setattr(tk, "report", lambda: train.argparse.Namespace(unavailable=unavailable))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    args = train.parse_arguments([f"--out={tmp_path}"])
    assert (args.device, args.amp) == (device, "float16" if device == "cuda" else "none")
    if not gpu:
        assert train.parse_arguments([f"--out={tmp_path}", "--backend=triton"]).device == "cpu"
    elif served:
        monkeypatch.setattr(train, "PROCESSES", 2)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(SystemExit):
            train.parse_arguments([f"--out={tmp_path}"])


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path):
    options = ["--backend=cpu", "--steps=2", "--limit=400", "--batch-size=20", "--epochs=8"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out, *more):
        command = [sys.executable, "-m", "examples.train", *options, *more, f"--out={out}"]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)

    assert start(whole).wait(timeout=120) == 0
    killed = start(parted)
    deadline = time.monotonic() + 60
    while not (parted / "history.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (parted / "result.json").exists()
    assert start(parted, "--resume").wait(timeout=120) == 0
    one, two = (json.loads((out / "result.json").read_text())["history"] for out in (whole, parted))
    assert one == two
    assert_same_weights(whole, parted)


def test_resume_refuses_what_it_cannot_continue(run, tmp_path):
    with pytest.raises(SystemExit, match=f"error: {tmp_path}/checkpoint.pt: no such file"):
        run(*TINY, "--resume", out=tmp_path)
    run(*TINY, out=tmp_path)
    with pytest.raises(SystemExit, match=r"of a run with --lr 0.002, got 0.5"):
        run(*TINY, "--resume", "--lr", "0.5", out=tmp_path)
    path = tmp_path / "checkpoint.pt"
    damaged = path.read_bytes()[:-100]
    path.write_bytes(damaged)
    with pytest.raises(SystemExit, match="damaged, or no checkpoint"):
        run(*TINY, "--resume", out=tmp_path)
    with pytest.raises(SystemExit, match="damaged, or no checkpoint"):  # nor is it overwritten
        run(*TINY, out=tmp_path)
    assert path.read_bytes() == damaged


def test_a_loss_that_is_not_finite_stops(run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_loss", lambda *_: lambda logits, _: logits.sum() * math.nan)
    with pytest.raises(SystemExit, match="error: epoch 1: the loss is nan; try a smaller --lr"):
        run(*TINY, out=tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_missing_data(run, tmp_path):
    from tests.torchvision_here import torchvision

    torchvision()
    with pytest.raises(SystemExit, match=r"error: --data-root: needs the folder that holds cifar-"):
        run("--data", "cifar10", "--backend", "cpu")
    root = ["--data-root", str(tmp_path)]
    with pytest.raises(SystemExit, match=f"there is no folder {tmp_path}/cifar-10-batches-py"):
        run("--data", "cifar10", "--backend", "cpu", *root)


def test_a_network_that_does_not_fit(run):
    said = r"error: --network vggsnn does not fit this data: size: got 8, needs a multiple of 16"
    with pytest.raises(SystemExit, match=said):
        run(*TINY, "--network", "vggsnn")


def test_a_full_disk(run, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(SystemExit, match=r"error: .*No space left on device"):
        run(*TINY, out=tmp_path)


def test_tensorboard(run, tmp_path, monkeypatch):
    """What it is told, and only of epochs that the run goes on with."""
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, *values):
            written.append(values)

        def close(self):
            written.append("closed")

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    result = run(*TINY, "--tensorboard", out=tmp_path)
    record = dict(result["history"][0])
    epoch = record.pop("epoch")
    values = [(name, value, epoch) for name, value in record.items()]
    assert written == [(str(tmp_path / "tensorboard"), 1), *values, "closed"]


@pytest.mark.slow
def test_two_processes_train_as_one(run, tmp_path, monkeypatch):
    """The last batch is one image, of which the first process has none."""
    options = [
        "--backend=cpu",
        "--epochs=2",
        "--steps=3",
        "--limit=34",
        "--batch-size=11",
        "--seed=1",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    train_in_double(monkeypatch.setattr)
    keep_weights(one, monkeypatch.setattr)
    alone = run(*options, out=one)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(Path(__file__).parent / "distributed_training.py"), str(two)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *script, *options, f"--out={two}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("?batch/s]") == 1  # one bar begins
    said = r"test accuracy [\d.]+ % \(digits, small, trt, 2 epochs, seed 1, \d+ s\), in .*\n"
    assert re.fullmatch(said, done.stdout)
    assert (two / "curves.png").exists() and (two / "spikes.png").exists()

    together = json.loads((two / "result.json").read_text())
    assert together.keys() == alone.keys()
    assert together["settings"].keys() == alone["settings"].keys()
    for a, b in zip(together["history"], alone["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    start, expected = torch.load(one / "start0.pt"), torch.load(one / "end0.pt")
    for rank in (0, 1):
        end = torch.load(two / f"end{rank}.pt")
        for name, before in start.items():
            moved = (expected[name] - before).double().norm()
            assert moved > 0
            assert (end[name] - expected[name]).double().norm() <= 1e-7 * moved, name


def test_a_process_among_several(monkeypatch, tmp_path, capsys):
    """Only the first writes, and all refuse what cannot share statistics."""
    monkeypatch.setattr(train, "PROCESSES", 2)
    monkeypatch.setattr(train, "RANK", 1)
    folder = tmp_path / "out"
    train.parse_arguments(["--out", str(folder), "--backend", "cpu"])
    assert not folder.exists()
    for given, said in (
        (["--backend", "reference"], "argument --backend: reference shares no statistics"),
        (["--backend", "cpu", "--network", "resnet19"], "argument --network: resnet19 has Batch"),
    ):
        with pytest.raises(SystemExit):
            train.parse_arguments(["--out", str(folder), *given])
        assert said in capsys.readouterr().err


def test_packed_spikes_train_the_same(run, capsys):
    usual = run(*TINY)["history"]
    assert "saved tensors" not in capsys.readouterr().out
    assert run(*TINY, "--packed")["history"] == usual
    said, last = capsys.readouterr().out.splitlines()[-2:]
    assert re.search(r"12 saved tensors kept as bits \(12 from lif, 0 packed\)", said)
    assert last.startswith("test accuracy")


@pytest.mark.slow
def test_bfloat16_learns_as_well(run):
    short = [*TINY, "--epochs", "5", "--limit", "400"]
    usual, half = run(*short), run(*short, "--amp", "bfloat16")
    assert min(usual["test_accuracy"], half["test_accuracy"]) >= 90
    assert half["history"][0]["loss"] != usual["history"][0]["loss"]


def test_float16_with_a_scaler(run):
    usual, half = run(*TINY)["history"][0]["loss"], run(*TINY, "--amp", "float16")
    assert half["settings"]["amp"] == "float16"
    assert 0 < abs(half["history"][0]["loss"] - usual) < 0.05


def test_backends_agree(run):
    ours, reference = (run(*TINY, "--backend", backend) for backend in ("cpu", "reference"))
    assert ours["history"][0]["loss"] == pytest.approx(reference["history"][0]["loss"], abs=1e-3)


def test_backend_is_used_and_restored(run, monkeypatch):
    used, before = [], tk.ops.default_backend

    def no_epochs(*_):
        used.append(tk.ops.default_backend)
        return [{"test_accuracy": 0.0}], {}, 0.0

    monkeypatch.setattr(train, "train", no_epochs)
    for backend in ("cpu", "reference", "auto"):
        run("--backend", backend)
    assert used == ["cpu", "reference", "auto"]
    assert tk.ops.default_backend == before


def test_seed(run):
    first, same, other = (run(*TINY, "--seed", seed)["history"] for seed in ("1", "1", "2"))
    assert first == same
    assert first != other


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("--data", "mnist"),
        ("--method", "bptt"),
        ("--network", "resnet18"),
        ("--backend", "gpu"),
        ("--amp", "half"),
        ("--backend", "triton"),
        ("--epochs", "0"),
        ("--epochs", "2.5"),
        ("--epochs", "inf"),
        ("--seed", "-1"),
        ("--seed", str(2**64)),
        ("--steps", "0"),
        ("--batch-size", "0"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--weight", "-1e-5"),
        ("--weight", "inf"),
        ("--delta", "-0.5"),
        ("--mse-ratio", "1.5"),
        ("--tau", "0.5"),
        ("--workers", "-1"),
        ("--out", "{file}"),
        ("--out", "{file}/pictures"),
    ],
)
def test_bad_arguments(tmp_path, capsys, monkeypatch, name, value):
    def no_epochs(*_):
        raise AssertionError("trained in spite of a bad argument")

    monkeypatch.setattr(train, "train", no_epochs)
    if value == "triton":
        unserved = {"triton": {"lif": "no Triton here"}, "cuda": {}}
        report = train.argparse.Namespace(unavailable=unserved)
        monkeypatch.setattr(tk, "report", lambda: report)
    file = tmp_path / "file"
    file.write_text("kept")
    value = value.format(file=file, folder=tmp_path)
    with pytest.raises(SystemExit) as stopped:
        # A good --out first: the last one given counts.
        train.main(["--out", str(tmp_path / "out"), f"{name}={value}"])
    assert stopped.value.code == 2
    assert f"argument {name}: " in capsys.readouterr().err
    assert file.read_text() == "kept"


def test_tensorboard_must_be_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit):
        train.parse_arguments(["--out", str(tmp_path), "--tensorboard"])
    assert "argument --tensorboard: needs the package tensorboard" in capsys.readouterr().err


@pytest.mark.slow
def test_defaults_learn(run):
    torch.use_deterministic_algorithms(False)  # what a user has
    result = run("--epochs", "6", pictures=True)
    assert result["test_accuracy"] >= 96
    assert result["history"][-1]["loss"] < result["history"][0]["loss"] / 2
