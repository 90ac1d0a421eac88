"""The example of long sequences: what it prints is true."""

import re

import pytest

from examples import long_sequence


def test_long_sequence(capsys):
    long_sequence.main(["--steps", "240", "--chunk", "50", "--epochs", "3"])
    spikes, first, last, kept, angle = capsys.readouterr().out.splitlines()
    assert spikes == "spikes that differ from the whole sequence's: 0 of 245,760"
    before, after = (float(line.split()[-1]) for line in (first, last))
    assert after < before
    whole, chunk = map(float, re.findall(r"([\d.]+) MB", kept))
    assert whole / chunk == pytest.approx(240 / 50, rel=0.1)
    assert 0.9 < float(angle.split()[-1]) <= 1


def test_long_sequence_whole_is_exact(capsys):
    long_sequence.main(["--steps", "30", "--chunk", "30", "--epochs", "1"])
    assert capsys.readouterr().out.endswith("cosine 1.0000\n")


@pytest.mark.parametrize("name", ["--steps", "--chunk", "--epochs"])
def test_long_sequence_refuses_bad_arguments(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        long_sequence.main([f"{name}=0"])
    assert stopped.value.code == 2
    assert f"argument {name}: got 0" in capsys.readouterr().err
