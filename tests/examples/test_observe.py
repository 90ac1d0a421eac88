"""Fisher information and loss landscape: against their definitions, and as a command."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")

from examples import checkpoint, observe, train
from examples.networks import SmallNet

TINY = ["--backend=cpu", "--epochs=1", "--steps=3", "--limit=64", "--batch-size=32"]


@pytest.fixture
def network():
    network = SmallNet(classes=4, steps=3)
    for _ in range(3):  # running statistics of the images below
        network(torch.rand(16, 1, 8, 8))
    return network


@pytest.fixture
def batches():
    return [(torch.rand(6, 1, 8, 8), torch.randint(4, (6,))) for _ in range(2)]


def test_fisher_information_is_that_of_a_run_for_each_timestep(network, batches):
    information = observe.fisher_information(network, batches)
    assert network.training
    network.eval()
    expected = torch.zeros(3, dtype=torch.float64)
    for x, labels in batches:
        for t in range(3):
            network.zero_grad()
            F.nll_loss(F.log_softmax(network(x)[: t + 1].mean(0), 1), labels).backward()
            expected[t] += sum(p.grad.double().square().sum() for p in network.parameters())
    assert (expected > 0).all()
    torch.testing.assert_close(information, expected, rtol=1e-5, atol=0)


def test_fisher_information_runs_forward_once_and_backward_t_times(network, batches, monkeypatch):
    forward, backward, grad = [], [], torch.autograd.grad
    network.register_forward_hook(lambda *_: forward.append(1))

    def counting(*arguments, **options):
        backward.append(1)
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    observe.fisher_information(network, batches)
    assert (len(forward), len(backward)) == (2, 6)


def test_centroid():
    assert observe.centroid(torch.tensor([0.0, 0.0, 2.0])) == 3
    assert observe.centroid(torch.tensor([1.0, 1.0, 1.0, 1.0])) == 2.5
    assert observe.centroid(torch.tensor([3.0, 1.0])) == 1.25


def test_a_direction_has_the_length_of_every_filter(network):
    way = observe.direction(network, torch.Generator().manual_seed(0))
    weights = dict(network.named_parameters())
    assert {name for name in weights if name not in way} == {
        name for name, w in weights.items() if w.ndim == 1
    }
    for name, d in way.items():
        torch.testing.assert_close(d.flatten(1).norm(dim=1), weights[name].flatten(1).norm(dim=1))
        assert not torch.equal(d, weights[name])


def test_landscape(network, batches):
    before = {name: w.clone() for name, w in network.state_dict().items()}
    distances, losses = observe.landscape(network, batches, directions=2, points=5, radius=1.0)
    assert distances.tolist() == [-1, -0.5, 0, 0.5, 1]
    assert losses.shape == (2, 5)
    network.eval()
    with torch.no_grad():
        each = [F.cross_entropy(network(x).mean(0), labels) for x, labels in batches]
    # All lines meet at the network itself; both batches are of one size.
    torch.testing.assert_close(losses[:, 2], torch.stack(each).mean().expand(2))
    way = observe.direction(
        network, torch.Generator().manual_seed(observe.seed_of("direction", 0, 1))
    )
    with torch.no_grad():
        for name, w in network.named_parameters():
            w.add_(way.get(name, torch.zeros_like(w)), alpha=0.5)
        each = [F.cross_entropy(network(x).mean(0), labels) for x, labels in batches]
    torch.testing.assert_close(losses[1, 3], torch.stack(each).mean())
    again = SmallNet(classes=4, steps=3)
    again.load_state_dict(before)
    assert torch.equal(
        observe.landscape(again, batches, directions=2, points=5, radius=1.0)[1], losses
    )
    assert all(torch.equal(w, before[name]) for name, w in again.state_dict().items())


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.plots, "spikes", lambda *_: None)
    train.main([*TINY, "--data", "digit-events", "--out", str(tmp_path)])
    capsys.readouterr()
    options = ["--backend=cpu", "--batches=1", "--directions=2", "--points=3"]
    observe.main([str(tmp_path), *options])
    said = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "observations.json").read_text())
    assert len(found["fisher_information"]) == 3
    assert 1 <= found["fisher_centroid"] <= 3
    assert said[1].startswith(f"its centroid: {found['fisher_centroid']:.2f} of 3 timesteps")
    assert all(math.isfinite(loss) for line in found["landscape"]["losses"] for loss in line)
    with pytest.raises(SystemExit):
        observe.main([str(tmp_path), "--backend=gpu"])
    assert "argument --backend" in capsys.readouterr().err
    content = checkpoint.load(tmp_path / "checkpoint.pt")
    del content["model"]["readout.weight"]
    checkpoint.save(tmp_path / "checkpoint.pt", content)
    with pytest.raises(SystemExit, match=r"error: the checkpoint is of another network: .*readout"):
        observe.main([str(tmp_path), *options])
    for name in ("fisher.png", "landscape.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_the_command_refuses_a_folder_without_a_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit):
        observe.main([str(tmp_path)])
    assert f"argument folder: {tmp_path}/checkpoint.pt: no such file" in capsys.readouterr().err
