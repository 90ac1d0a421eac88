"""Checkpoints: what is written comes back, what is damaged is refused, what was there stays."""

import os
import pickle

import pytest
import torch

from examples import checkpoint
from examples.checkpoint import CheckpointError


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"model": {"w": torch.arange(1000.0)}, "epoch": 3})
    return path


def test_round_trip(path):
    found = checkpoint.load(path)
    assert found["epoch"] == 3
    assert torch.equal(found["model"]["w"], torch.arange(1000.0))
    checkpoint.save(path, {"epoch": 4})
    assert checkpoint.load(path)["epoch"] == 4
    assert os.listdir(path.parent) == ["checkpoint.pt"]


def test_every_damaged_byte_of_a_tensor_is_seen(path):
    whole = bytearray(path.read_bytes())
    start = whole.index(torch.arange(1000.0).numpy().tobytes())
    for place in (start, start + 2001, start + 3999):
        damaged = whole.copy()
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{path}: damaged"):
            checkpoint.load(path)


def test_damage_anywhere_is_refused_or_harmless(path):
    """Also in names and directories, which readers take apart in their own ways."""
    whole = path.read_bytes()
    for place in [*range(0, 300, 3), *range(len(whole) - 900, len(whole), 3)]:
        damaged = bytearray(whole)
        damaged[place] ^= 64
        path.write_bytes(damaged)
        try:
            found = checkpoint.load(path)
        except CheckpointError:
            continue
        assert torch.equal(found["model"]["w"], torch.arange(1000.0)) and found["epoch"] == 3


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_a_part_of_a_file(path, part):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(CheckpointError, match="damaged, or no checkpoint"):
        checkpoint.load(path)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_what_is_no_checkpoint(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load(tmp_path / "other.pt")
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this training"):
        checkpoint.load(path)
    torch.save({"format": checkpoint.FORMAT, "model": Harmful()}, path)
    with pytest.raises(CheckpointError, match="damaged, or no checkpoint"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(CheckpointError, match="damaged, or no checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("broken", ["save", "fsync", "replace"])
def test_an_interrupted_save_keeps_the_old_one(path, monkeypatch, broken):
    """At any moment, a full disk among the causes."""

    def fail(*_, **__):
        raise OSError("no space left")

    module = checkpoint.torch if broken == "save" else checkpoint.os
    monkeypatch.setattr(module, broken, fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(path, {"epoch": 4})
    monkeypatch.undo()
    assert checkpoint.load(path)["epoch"] == 3
    assert os.listdir(path.parent) == ["checkpoint.pt"]
