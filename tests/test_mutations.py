"""That the list of deliberate faults still fits the tree, and that what tries them tells right."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import mutations
from tests.faults import FAULTS, Mutation
from tests.mutations import Broken, Result, Workshop, files_of, targets_of, try_all

ROOT = Path(__file__).parents[1]


def names_in(file):
    """The tests of a file, without their parameters."""
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda m: m.name)
def test_every_fault_fits(fault):
    text = (ROOT / fault.file).read_text()
    assert fault.apply(text) != text
    assert fault.tests and isinstance(fault.tests, tuple)
    for test in fault.tests:
        file, _, name = test.partition("::")
        pattern = re.escape(name.partition("[")[0]).replace(r"\*", ".*")
        assert any(re.fullmatch(pattern, known) for known in names_in(file)), test


def test_names_are_unique():
    assert len({m.name for m in FAULTS}) == len(FAULTS) >= 45


CODE = """\
def double(x):
    return x + x


def half(x):
    return x // 2
"""
TESTS = """\
import pytest
from code_here import double, half


@pytest.mark.parametrize("x", (1, 2))
def test_double(x):
    assert double(x) == 2 * x


def test_half():
    half(2)


@pytest.fixture
def even():
    assert half(4) == 2
    return 4


def test_even(even):
    assert even == 4


@pytest.mark.skip
def test_skipped():
    assert False


def test_slow():
    while half(2) == 7:
        pass
"""


def fault(name, old, new, *tests):
    return Mutation(name, "code_here.py", old, new, tuple(f"test_it.py::{t}" for t in tests), "...")


@pytest.fixture
def project(tmp_path):
    (tmp_path / "code_here.py").write_text(CODE)
    (tmp_path / "test_it.py").write_text(TESTS)
    return tmp_path


def test_verdicts(project, monkeypatch, capsys):
    """What is no failure of a test is no proof that it would have been noticed."""
    monkeypatch.setattr(mutations, "SECONDS", 20)
    faults = (
        fault("caught", "x + x", "x * x", "test_double"),
        fault("by-a-pattern", "x + x", "x * x", "test_d*[1]"),
        fault("survives", "x // 2", "x // 3", "test_half"),
        fault("no-import", "def double", "def triple", "test_double"),
        fault("in-a-fixture", "x // 2", "x // 3", "test_even"),
        fault("ends-the-process", "x // 2", "__import__('os')._exit(1)", "test_half"),
        fault("all-skipped", "x // 2", "x // 3", "test_skipped"),
    )
    results = {r.name: r for r in try_all(project, ("code_here.py", "test_it.py"), faults, True)}
    verdicts = {name: r.verdict for name, r in results.items()}
    assert verdicts == {
        "caught": "caught",
        "by-a-pattern": "caught",
        "survives": "survived",
        "no-import": "broken",
        "in-a-fixture": "broken",
        "ends-the-process": "broken",
        "all-skipped": "broken",
    }
    assert results["caught"].detail == "test_double[1]"
    assert results["survives"].detail == "1 tests passed"
    assert (project / "code_here.py").read_text() == CODE
    assert sorted(p.name for p in project.iterdir()) == ["code_here.py", "test_it.py"]
    assert "survived  survives" in capsys.readouterr().err


def test_a_test_that_hangs_is_no_verdict(project, tmp_path, monkeypatch):
    hangs = fault("hangs", "x // 2", "7", "test_slow")
    workshop = Workshop(project, tmp_path / "work", ("code_here.py", "test_it.py"))
    workshop.prepare([hangs])
    monkeypatch.setattr(mutations, "SECONDS", 3)
    result = workshop.check(hangs)
    assert result.verdict == "broken" and result.detail == "the tests took more than 3 seconds"


def test_tests_must_pass_without_a_fault(project):
    (project / "code_here.py").write_text(CODE.replace("x + x", "x"))
    with pytest.raises(Broken, match=r"without any fault the tests do not pass: test_double\[1\]"):
        try_all(project, ("code_here.py", "test_it.py"), [fault("a", "x //", "x *", "test_double")])
    with pytest.raises(Broken, match=r"no test test_it.py::test_nothing runs here"):
        try_all(
            project, ("code_here.py", "test_it.py"), [fault("a", "x //", "x *", "test_nothing")]
        )


def test_a_fault_must_fit():
    for old, message in (("nothing", "occurs 0 times"), ("x", "occurs 5 times")):
        with pytest.raises(ValueError, match=f"a: its text {message} in code_here.py"):
            fault("a", old, "y", "test_double").apply(CODE)
    with pytest.raises(ValueError, match="a: changes nothing"):
        fault("a", "x + x", "x + x", "test_double").apply(CODE)


def test_what_is_built():
    def targets(file, test, **more):
        return targets_of(Mutation("a", file, "", "", (), "", **more), [test])

    assert targets("trt_kernels/nn.py", "test_a[cuda]") == ()
    assert targets("csrc/cpu/loss.cpp", "test_a") == ("_C",)
    assert targets("csrc/cuda/loss.cu", "test_a[cuda-1]") == ("_cuda_on_host",)
    assert targets("csrc/math/loss.h", "test_a[cpu]") == ("_C",)
    assert targets("csrc/math/loss.h", "test_a[cuda]") == ("_C", "_cuda_on_host")
    assert targets("CMakeLists.txt", "test_a", targets=()) == ()


def test_files_are_those_of_the_tree(tmp_path):
    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    for name in ("kept.py", "new.py", "gone.py", "ignored.so"):
        (tmp_path / name).touch()
    (tmp_path / ".gitignore").write_text("*.so\n")
    git("add", "kept.py", "gone.py")
    (tmp_path / "gone.py").unlink()
    assert sorted(files_of(tmp_path)) == [".gitignore", "kept.py", "new.py"]


def test_the_command(tmp_path, monkeypatch, capsys):
    tried = []

    def no_trial(root, files, chosen):
        tried.extend(chosen)
        return [Result(m.name, "caught", "test_a[1|2]", 1.0) for m in chosen]

    monkeypatch.setattr(mutations, "try_all", no_trial)
    out = tmp_path / "report.md"
    assert mutations.main(["--only", "fork", "eval-mode", "--out", str(out)]) == 0
    assert [m.name for m in tried] == ["fork", "eval-mode"]
    assert capsys.readouterr().out.splitlines()[-1] == "2 faults: 2 caught, 0 survived, 0 broken"
    text = out.read_text()
    assert "| `fork` | `csrc/cpu/parallel.h` |" in text and r"`test_a[1\|2]` |" in text
    for verdict in ("survived", "broken"):
        monkeypatch.setattr(
            mutations, "try_all", lambda *_, v=verdict: [Result("fork", v, "...", 1.0)]
        )
        assert mutations.main(["--only", "fork"]) == 1
    tried.clear()
    assert mutations.main(["--list"]) == 0 and not tried
    assert len(capsys.readouterr().out.splitlines()) >= len(FAULTS)
    with pytest.raises(SystemExit):
        mutations.main(["--only", "nothing"])
    assert "there is no fault nothing" in capsys.readouterr().err


def gone(pid):
    """Whether a process has ended; it is waited for."""
    stat = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 30
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "XZ":
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_it_ends_what_it_started(tmp_path):
    """Also what a test left running, and what has a process group of its own."""
    (tmp_path / "tree").mkdir()
    for then in ("", "sys.stdout.flush(); time.sleep(60)"):
        code = f"""
import os, subprocess, sys, time
for group in (None, os.setpgrp):
    print(subprocess.Popen(["sleep", "60"], preexec_fn=group).pid)
{then}
"""
        status, text = mutations.run([sys.executable, "-c", code], tmp_path / "tree", 5)
        assert status == (None if then else 0)
        assert all(map(gone, text.split())) and len(text.split()) == 2
