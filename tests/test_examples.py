"""The examples run, say what they did, and refuse bad arguments before any work."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed_digits import keep_weights

for needed in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(needed)

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--backend", "cpu", "--epochs", "1", "--steps", "2", "--limit", "128", "--batch-size", "32"]


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits():
    return loaded("train_digits")


@pytest.fixture(scope="module")
def sequence():
    return loaded("long_sequence")


@pytest.fixture
def run(digits, tmp_path, monkeypatch):
    """Runs the example with the given arguments and returns what it wrote with --json."""

    def run(*arguments, pictures=False):
        path = tmp_path / "result.json"
        if not pictures:  # they take longer than the training
            for name in ("plot_curves", "plot_spikes"):
                monkeypatch.setattr(digits, name, lambda *_: None)
        digits.main([*arguments, "--out", str(tmp_path / "pictures"), "--json", str(path)])
        return json.loads(path.read_text())

    return run


@pytest.mark.parametrize("method", ["trt", "tet", "sdt"])
def test_methods(run, method, tmp_path, capsys):
    result = run(*TINY, "--epochs", "2", "--method", method, "--seed", "3", pictures=True)

    assert result["settings"]["method"] == method
    assert result["settings"]["seed"] == 3
    assert result["settings"]["steps"] == 2
    history = result["history"]
    assert [record["epoch"] for record in history] == [1, 2]
    assert all(math.isfinite(value) for record in history for value in record.values())
    assert history[1]["loss"] < history[0]["loss"]
    assert result["test_accuracy"] == history[-1]["test_accuracy"]
    assert result["seconds"] > 0

    for name in ("curves.png", "spikes.png"):
        data = (tmp_path / "pictures" / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n")
        assert len(data) > 10_000

    last = capsys.readouterr().out.splitlines()[-1]
    accuracy = f"{result['test_accuracy']:.1f}"
    assert re.fullmatch(
        rf"test accuracy {re.escape(accuracy)} % \({method}, 2 epochs, seed 3, \d+ s\)", last
    )


def test_methods_differ(run):
    losses = {run(*TINY, "--method", m)["history"][0]["loss"] for m in ("trt", "tet", "sdt")}
    assert len(losses) == 3


def test_the_first_convolution_runs_once_an_image(digits):
    model = digits.SpikingNet(steps=3)
    shapes = []
    for layer in (model.layer1, model.layer2):
        layer.conv.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape[0]))
    layers = model.spikes(digits.torch.rand(5, 1, 8, 8))
    assert shapes == [5, 15]
    assert [tuple(s.shape[:3]) for s in layers] == [(3, 5, 32), (3, 5, 64), (3, 5, 64)]


@pytest.mark.slow
def test_two_processes_train_as_one(run, digits, tmp_path, monkeypatch):
    """The last batch is one image, of which the first process has none."""
    options = ["--backend=cpu", "--epochs=2", "--steps=3", "--limit=34", "--batch-size=11"]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    keep_weights(digits, one, monkeypatch.setattr)
    alone = run(*options)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(Path(__file__).parent / "distributed_digits.py"), str(two)]
    written = ["--out", str(two), "--json", str(two / "result.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    two.mkdir()
    done = subprocess.run(
        [*command, *script, *options, *written],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("?epoch/s]") == 1  # one bar begins
    said = r"test accuracy [\d.]+ % \(trt, 2 epochs, seed 0, \d+ s\)\n"
    assert re.fullmatch(said, done.stdout)
    assert (two / "curves.png").exists() and (two / "spikes.png").exists()

    together = json.loads((two / "result.json").read_text())
    assert together.keys() == alone.keys()
    assert together["settings"].keys() == alone["settings"].keys()
    for a, b in zip(together["history"], alone["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    load = digits.torch.load
    start, expected = load(one / "start0.pt"), load(one / "end0.pt")
    for rank in (0, 1):
        end = load(two / f"end{rank}.pt")
        for name, before in start.items():
            moved = (expected[name] - before).double().norm()
            assert moved > 0
            assert (end[name] - expected[name]).double().norm() <= 1e-4 * moved, name


def test_processes_deal_every_image_once(digits, monkeypatch):
    monkeypatch.setattr(digits, "PROCESSES", 3)
    for count in (0, 1, 2, 7, 9):
        dealt = []
        for rank in range(3):
            monkeypatch.setattr(digits, "RANK", rank)
            dealt += range(count)[digits.share(count)]
        assert dealt == list(range(count))


def test_a_process_among_several(digits, monkeypatch, tmp_path, capsys):
    """Only the first writes, and all refuse what cannot share statistics."""
    monkeypatch.setattr(digits, "PROCESSES", 2)
    monkeypatch.setattr(digits, "RANK", 1)
    folder, file = tmp_path / "pictures", tmp_path / "result.json"
    options = ["--out", str(folder), "--json", str(file)]
    digits.parse_arguments([*options, "--backend", "cpu"])
    assert not folder.exists() and not file.exists()
    with pytest.raises(SystemExit):
        digits.parse_arguments([*options, "--backend", "reference"])
    assert "argument --backend: reference shares no statistics" in capsys.readouterr().err


def test_packed_spikes_train_the_same(run, capsys):
    usual = run(*TINY)["history"]
    assert "saved tensors" not in capsys.readouterr().out
    assert run(*TINY, "--packed")["history"] == usual
    said, last = capsys.readouterr().out.splitlines()[-2:]
    assert re.search(r"12 saved tensors kept as bits \(12 from lif, 0 packed\)", said)
    assert last.startswith("test accuracy")


@pytest.mark.slow
def test_bfloat16_learns_as_well(run):
    short = [*TINY, "--epochs", "3", "--limit", "400"]
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


def test_backend_is_used_and_restored(run, digits, monkeypatch):
    used, before = [], digits.trt_kernels.ops.default_backend

    def train(*_):
        used.append(digits.trt_kernels.ops.default_backend)
        return [{"test_accuracy": 0.0}]

    monkeypatch.setattr(digits, "train", train)
    for backend in ("cpu", "reference", "auto"):
        run("--backend", backend)
    assert used == ["cpu", "reference", "auto"]
    assert digits.trt_kernels.ops.default_backend == before


def test_seed(run):
    first, same, other = (run(*TINY, "--seed", seed)["history"] for seed in ("1", "1", "2"))
    assert first == same
    assert first != other


def test_split_is_stratified_and_fixed(digits):
    (images, labels), (test_images, test_labels) = digits.load_data("cpu")
    assert (len(images), len(test_images)) == (1347, 450)
    assert test_labels.bincount().min() >= 43
    assert not {tuple(i.flatten().tolist()) for i in images} & {
        tuple(i.flatten().tolist()) for i in test_images
    }
    again = digits.load_data("cpu")
    assert (again[1][0] == test_images).all()
    assert (again[0][1] == labels).all()


def test_shift_moves_by_at_most_a_pixel(digits):
    images = digits.torch.zeros(500, 1, 8, 8)
    images[:, 0, 3, 4] = 1
    where = {tuple(index[2:].tolist()) for index in digits.shift(images).nonzero()}
    assert where == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("--method", "bptt"),
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
        ("--json", "{file}/result.json"),
        ("--json", "{folder}"),
        ("--json", "{folder}/missing/result.json"),
        ("--out", "{file}"),
        ("--out", "{file}/pictures"),
    ],
)
def test_bad_arguments(digits, tmp_path, capsys, monkeypatch, name, value):
    def train(*_):
        raise AssertionError("trained in spite of a bad argument")

    monkeypatch.setattr(digits, "train", train)
    if value == "triton":
        unserved = {"triton": {"lif": "no Triton here"}, "cuda": {}}
        report = digits.argparse.Namespace(unavailable=unserved)
        monkeypatch.setattr(digits.trt_kernels, "report", lambda: report)
    file = tmp_path / "file"
    file.write_text("kept")
    value = value.format(file=file, folder=tmp_path)
    with pytest.raises(SystemExit) as stopped:
        # A good --out first: the last one given counts.
        digits.main(["--out", str(tmp_path / "pictures"), f"{name}={value}"])
    assert stopped.value.code == 2
    assert f"argument {name}: " in capsys.readouterr().err
    assert file.read_text() == "kept"


@pytest.mark.slow
def test_defaults_learn(run, digits):
    digits.torch.use_deterministic_algorithms(False)  # what a user has
    result = run(pictures=True)
    assert result["test_accuracy"] >= 96
    assert result["history"][-1]["loss"] < result["history"][0]["loss"] / 2


def test_long_sequence(sequence, capsys):
    sequence.main(["--steps", "240", "--chunk", "50", "--epochs", "3"])
    spikes, first, last, kept, angle = capsys.readouterr().out.splitlines()
    assert spikes == "spikes that differ from the whole sequence's: 0 of 245,760"
    before, after = (float(line.split()[-1]) for line in (first, last))
    assert after < before
    whole, chunk = map(float, re.findall(r"([\d.]+) MB", kept))
    assert whole / chunk == pytest.approx(240 / 50, rel=0.1)
    assert 0.9 < float(angle.split()[-1]) <= 1


def test_long_sequence_whole_is_exact(sequence, capsys):
    sequence.main(["--steps", "30", "--chunk", "30", "--epochs", "1"])
    assert capsys.readouterr().out.endswith("cosine 1.0000\n")


@pytest.mark.parametrize("name", ["--steps", "--chunk", "--epochs"])
def test_long_sequence_refuses_bad_arguments(sequence, capsys, name):
    with pytest.raises(SystemExit) as stopped:
        sequence.main([f"{name}=0"])
    assert stopped.value.code == 2
    assert f"argument {name}: got 0" in capsys.readouterr().err
