"""Methods side by side over seeds: what is computed, what is drawn, and that it can go on."""

import json

import pytest

pytest.importorskip("sklearn")

from examples import checkpoint, compare, train

OPTIONS = ["--backend=cpu", "--data=digits", "--epochs=2", "--steps=2", "--limit=64", "--seeds=2"]


@pytest.mark.slow
def test_comparison(tmp_path, capsys, monkeypatch):
    options = [*OPTIONS, "--batches=1", "--out", str(tmp_path)]
    evaluate, calls = train.evaluate, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == 11:  # two epochs and a look at the training set a run: the fourth's second
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", interrupted)
    with pytest.raises(SystemExit, match="interrupted; the same command goes on"):
        compare.main(options)
    monkeypatch.setattr(train, "evaluate", evaluate)
    assert len(checkpoint.load(tmp_path / "sdt-1" / "checkpoint.pt")["history"]) == 1
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-0/checkpoint.pt")}
    assert len(finished) == 3
    compare.main(options)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # not trained again

    found = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert {method: len(runs) for method, runs in found.items()} == {"sdt": 2, "tet": 2, "trt": 2}
    for method, runs in found.items():
        for seed, run in enumerate(runs):
            kept = checkpoint.load(tmp_path / f"{method}-{seed}" / "checkpoint.pt")["observed"]
            assert run["observed_epochs"] == [1, 2] == sorted(kept)
            assert run["fisher"] == list(kept.values())
            assert [len(row) for row in run["fisher"]] == [2, 2]
            assert run["centroid"] == run["centroids"][-1]
            assert len(run["losses"]) == 3 and len(run["losses"][0]) == len(run["distances"])
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG\r\n")
    said = capsys.readouterr().out
    assert said.count("±") >= 15
    assert (tmp_path / "comparison.md").read_text().splitlines()[2] == "| | SDT | TET | TRT |"


@pytest.mark.parametrize("other", ["--batches=2", "--lr=0.01"])
def test_runs_of_other_settings_are_not_taken_for_these(tmp_path, other):
    options = [*OPTIONS, "--epochs=1", "--seeds=1", "--batches=1", "--out", str(tmp_path)]
    compare.main(options)
    with pytest.raises(SystemExit, match=rf"of a run with {other.partition('=')[0]} "):
        compare.main([*options, other])


def test_table():
    """Mean and standard deviation, the latter of a sample."""
    runs = {"sdt": [dict.fromkeys(compare.ROWS, value) for value in (1.0, 2.0, 3.0)]}
    assert "| test accuracy (%) | 2 ± 1 |" in compare.table(runs)
    runs = {"sdt": [dict.fromkeys(compare.ROWS, 4.0)]}
    assert "| test accuracy (%) | 4 ± 0 |" in compare.table(runs)


def test_observed_epochs():
    assert compare.observed_epochs(40) == [1, 10, 20, 30, 40]
    assert compare.observed_epochs(1) == [1]


@pytest.mark.parametrize("option", ["--method=trt", "--resume"])
def test_options_of_a_single_run(tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        compare.main([option, "--out", str(tmp_path)])
    assert f"argument {option.partition('=')[0]}: " in capsys.readouterr().err


def test_under_torchrun(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "PROCESSES", 2)
    with pytest.raises(SystemExit):
        compare.main(["--out", str(tmp_path)])
    assert "runs in one process" in capsys.readouterr().err


def test_bad_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.main(["--seeds=0", "--out", str(tmp_path)])
    assert "argument --seeds: got '0', needs an int >= 1" in capsys.readouterr().err
