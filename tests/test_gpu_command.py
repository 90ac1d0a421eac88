"""The command that runs everything on a GPU, its stages, and the module built for it beforehand."""

import contextlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

import trt_kernels as tk
from benchmarks import gpu, gpu_stages, peers, prebuild, sanitized
from benchmarks.records import read
from tests.test_benchmarks import gpu_json


def python(name, code, seconds=60.0, judge=gpu_stages.judge_benchmarks):
    return gpu_stages.Stage(name, [sys.executable, "-c", code], seconds, judge)


def test_gpu_command_runs_every_stage_and_writes_what_there_is(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 3.0)
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    gpu_json(scratch / "bench0.json")
    (scratch / "bench1.json").write_text("{ cut off")
    interrupted = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('saved')"
    deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)"
    orphan = "import subprocess; subprocess.Popen(['sleep', '60']); print('left')"
    stages = [
        gpu_stages.Outcome("memcheck", gpu_stages.UNAVAILABLE, 0.0, "no compute-sanitizer here"),
        python(
            "initcheck",
            "print('= Device not supported'); exit(1)",
            judge=gpu_stages.judge_sanitizer,
        ),
        gpu_stages.Stage("missing", ["/nowhere"], 9.0, gpu_stages.judge_sanitizer),
        python("good", "print('3 passed')"),
        python("bad", "print('FAILED x - y'); exit(1)"),
        python("slow", interrupted, 6.0),
        python("deaf", deaf, 1.5),
        python("orphan", orphan),
    ]
    monkeypatch.setattr(gpu, "why_no_gpu", lambda: None)
    environment = {"machine": "NVIDIA Test", "date": "2026-11-25", "report": "cuda available"}
    monkeypatch.setattr(gpu, "describe", lambda: environment)
    by_name = {stage.name: stage for stage in stages}
    monkeypatch.setattr(gpu, "every_stage", lambda python, scratch: by_name)
    monkeypatch.setattr(gpu, "STAGES", tuple(by_name))
    monkeypatch.setattr(gpu.tempfile, "TemporaryDirectory", lambda prefix: Folder(scratch))
    began = time.monotonic()
    assert gpu.main(["--out", str(out)]) == 1
    assert time.monotonic() - began < 40
    assert read([out / "results.json"]).machine == "NVIDIA Test"
    stages = {s["name"]: s for s in json.loads((out / "results.json").read_text())["stages"]}
    assert {name: s["status"] for name, s in stages.items()} == {
        "missing": gpu_stages.FAILED,
        "memcheck": gpu_stages.UNAVAILABLE,
        "initcheck": gpu_stages.UNAVAILABLE,
        "good": gpu_stages.PASSED,
        "bad": gpu_stages.FAILED,
        "slow": gpu_stages.TIMED_OUT,
        "deaf": gpu_stages.TIMED_OUT,
        "orphan": gpu_stages.PASSED,
    }
    assert stages["slow"]["detail"].endswith("saved")
    names = {"summary.md", "results.json", "log.txt", "lif.png"}
    assert {path.name for path in out.iterdir()} == names
    text = (out / "summary.md").read_text()
    assert "bad: FAILED x - y" in text and "NVIDIA Test" in text
    assert "snnTorch failed: RuntimeError: no" in text
    assert "kernel launches of ours triton: the profiler saw no kernel" in text
    assert "| `trt_penalty`, kernel launches | ResNet-19, T = 6, ours cuda | 2 |" in text
    assert "not measured" in text and "copy bandwidth" in capsys.readouterr().out


class Folder:
    """Stands in for a temporary directory."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return str(self.path)

    def __exit__(self, *error):
        pass


def test_gpu_command_without_a_gpu(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().out.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_gpu_command_reads_test_reports(tmp_path):
    path = tmp_path / "tests.xml"
    status, detail, _ = gpu_stages.judge_tests(2, "Interrupted\n", path)
    assert status == gpu_stages.FAILED and detail == "exit status 2, no report; Interrupted"
    path.write_text(
        "<testsuites><testsuite><testcase name='a'/><testcase name='b'><skipped message='no 2'/>"
        "</testcase><testcase name='c'><failure message='assert 1&#10;more'/></testcase>"
        "</testsuite></testsuites>"
    )
    assert gpu_stages.judge_tests(1, "", path) == (
        gpu_stages.FAILED,
        "1 passed, 1 failed, 1 skipped",
        ["failed: c: assert 1", "skipped 1: no 2"],
    )


@pytest.mark.parametrize(
    "code,line,status",
    (
        (0, "ERROR SUMMARY: 0 errors", gpu_stages.PASSED),
        (9, "ERROR SUMMARY: 3 errors", gpu_stages.FAILED),
        (0, "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", gpu_stages.PASSED),
        (0, "RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", gpu_stages.FAILED),
        (0, "", gpu_stages.FAILED),
        (1, "Error: Device not supported.", gpu_stages.UNAVAILABLE),
    ),
)
def test_gpu_command_reads_sanitizers(code, line, status):
    output = f"64 of 64 cases of backend cuda are right\n========= {line}\n"
    assert gpu_stages.judge_sanitizer(code, output)[0] == status


FIRST = "report,tests,lif,block,penalty,step,ncu"


def test_stages_of_the_gpu_command(tmp_path, monkeypatch):
    stages = gpu_stages.benchmark_stages("python", tmp_path)
    assert [s.command[-1].split("=")[0] for s in stages] == ["--time-budget"] * len(stages)
    files = {word for s in stages for word in s.command if word.startswith("benchmarks/bench_")}
    assert files == {str(p.relative_to(gpu.ROOT)) for p in gpu.ROOT.glob("benchmarks/bench_*.py")}
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name, path=None: None)
    assert {o.status for o in gpu_stages.sanitizer_stages("python")} == {gpu_stages.UNAVAILABLE}
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name, path=None: name)
    every = gpu_stages.every_stage("python", tmp_path)
    assert tuple(every) == gpu.STAGES
    seconds = sum(stage.seconds for stage in every.values()) - gpu_stages.SANITIZER_SECONDS * 3
    assert seconds <= gpu.LIMIT_SECONDS - gpu.RESERVED_SECONDS < 9 * 60
    first = sum(every[name].seconds for name in FIRST.split(","))
    assert first + gpu.RESERVED_SECONDS <= 320
    for page in ("README.md", "benchmarks/README.md"):
        assert f"make gpu STAGES={FIRST} SECONDS=320" in (gpu.ROOT / page).read_text()
    # Inductor's kernels are Triton's.
    assert "triton or inductor" in every["triton"].command
    assert gpu_stages.NO_TRITON in every["tests"].command


def test_the_gpu_command_leaves_seven_files(tmp_path, monkeypatch):
    """However many plots there are."""
    plots = pytest.importorskip("benchmarks.plots")
    drawn = []

    def draw(run, folder):
        drawn.extend(folder / name for name in (*gpu.KEPT_PLOTS, "steps.png", "memory.png"))
        for path in drawn:
            path.touch()
        return drawn

    monkeypatch.setattr(plots, "draw", draw)
    gpu_json(tmp_path / "bench0.json")
    out = tmp_path / "out"
    out.mkdir()
    log = gpu.Log(out / "log.txt")
    environment = {"machine": "NVIDIA Test", "date": "2026-11-25", "report": ""}
    assert gpu.draw(gpu.write_results(out, tmp_path, environment, []), out, log)
    assert len(drawn) > 4 and len(list(out.iterdir())) == 7


def test_wheels_of_a_folder_serve_the_stages(tmp_path, monkeypatch):
    """A stage imports what a wheel holds; one that is not pure Python is named and left out."""
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    for name in ("peer-1.0-py3-none-any.whl", "other-2.0-cp312-cp312-linux_x86_64.whl"):
        with zipfile.ZipFile(wheels / name, "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}_of_a_wheel.py", "print('it is here')")
    code = "import peer_of_a_wheel\ntry: import other_of_a_wheel\nexcept ImportError: pass"
    stage = python("report", code)
    monkeypatch.setattr(gpu, "why_no_gpu", lambda: None)
    monkeypatch.setattr(gpu, "every_stage", lambda python, scratch: {"report": stage})
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("TRT_KERNELS_BENCH_TRITON", "")
    arguments = ["--out", str(out), "--stages", "report", "--wheels", str(wheels)]
    assert gpu.main(arguments) == 0
    (ended,) = json.loads((out / "results.json").read_text())["stages"]
    assert ended["status"] == gpu_stages.PASSED and ended["detail"] == "it is here"
    text = (out / "summary.md").read_text()
    assert "Wheels used: peer 1.0." in text
    assert "not pure Python: other-2.0-cp312-cp312-linux_x86_64.whl." in text
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(out), "--wheels", str(tmp_path / "none")])


def test_triton_is_timed_only_where_it_is_asked_for(monkeypatch):
    """SpikingJelly's, too: a run of CUDA compiles nothing by Triton."""
    pytest.importorskip("spikingjelly")
    monkeypatch.setenv("TRT_KERNELS_BENCH_TRITON", "0")
    with pytest.raises(ImportError, match="make gpu TRITON=1"):
        peers.spikingjelly_choice(torch.device("cuda"), "triton")


NCU = """==PROF== Connected to process 1
lif and batch_norm_lif, torch.float32
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","void plain_backward_kernel<float, 4>(Rules<float>, LIFBackward)","{}","ns","104,512"
"0","1","void plain_backward_kernel<float, 4>(Rules<float>, LIFBackward)","{}","%","61.5"
"""


def test_gpu_command_reads_ncu(monkeypatch):
    output = NCU.format(*gpu_stages.METRICS)
    note = "void plain_backward_kernel<float, 4>: time 104,512 ns, issue slots busy 61.5 %"
    assert gpu_stages.judge_ncu(0, output) == (gpu_stages.PASSED, "1 launches", [note])
    assert gpu_stages.judge_ncu(1, output)[0] == gpu_stages.FAILED
    assert gpu_stages.judge_ncu(0, "==PROF== no kernels")[0] == gpu_stages.FAILED
    refused = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"
    assert gpu_stages.judge_ncu(1, refused)[0] == gpu_stages.UNAVAILABLE
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name, path=None: None)
    assert gpu_stages.ncu_stage("python").status == gpu_stages.UNAVAILABLE


@pytest.mark.slow
def test_a_dry_run_of_the_gpu_command_finds_every_test_and_case(tmp_path, monkeypatch):
    """Each stage starts with its own command line and selects something.

    It cannot see whether anything runs on a GPU or fits its limit of time, nor the options of ncu
    and compute-sanitizer, nor pytest-xdist's processes: benchmarks and tests are only collected,
    and the programs that ncu and the sanitizers watch run on the CPU, unwatched."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer/__init__.py", "")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("TRT_KERNELS_BENCH_TRITON", "")
    out = tmp_path / "out"
    assert gpu.main(["--dry-run", "--out", str(out), "--wheels", str(wheels)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["environment"]["wheels"] == ["peer 1.0"]
    found = {s["name"]: (s["status"], s["detail"]) for s in results["stages"]}
    assert tuple(found) == gpu.STAGES
    for name, (status, detail) in found.items():
        expected = "unavailable" if name in ("racecheck", "initcheck") else gpu_stages.PASSED
        assert status == expected, (name, detail)
    for name in ("tests", "triton", *(benchmark[0] for benchmark in gpu_stages.BENCHMARKS)):
        assert int(found[name][1].removesuffix(" collected")) > 0
    assert "available" in results["environment"]["report"]
    assert {path.name for path in out.iterdir()} == {"summary.md", "results.json", "log.txt"}


def test_the_gpu_command_names_its_stages(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--stages", "lif,layers"])
    assert (
        "--stages: got 'layers', needs some of report, tests, lif, block" in capsys.readouterr().err
    )


def test_what_the_sanitizers_watch_is_right(capsys):
    assert sanitized.main("reference", "cpu") == 0
    assert "cases of backend reference are right" in capsys.readouterr().out


def other_python():
    """An interpreter of another version that the package serves, or None."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for version in ("3.12", "3.13", "3.11", "3.10"):
        if version == f"{sys.version_info[0]}.{sys.version_info[1]}":
            continue
        # A shim of pyenv is on PATH and fails, where its version is not chosen.
        for found in (f"python{version}", *root.glob(f"versions/{version}.*/bin/python")):
            code = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
            with contextlib.suppress(OSError):
                done = subprocess.run([found, "-c", code], capture_output=True, text=True)
                if done.returncode == 0:
                    return str(found), done.stdout.strip()
    return None


@pytest.mark.slow
def test_a_module_is_built_for_another_python(tmp_path, monkeypatch, capfd):
    """Of the CPU's part, without optimisation; that Python needs no package for it."""
    other = other_python()
    if other is None:
        pytest.skip("no other Python from 3.10 to 3.13 is here")
    quick = "-DTRT_KERNELS_OPTIMIZE=0 -DCMAKE_CXX_FLAGS_RELEASE=-O0"
    monkeypatch.setenv(
        "CMAKE_ARGS",
        f"{quick} -DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF -DTRT_KERNELS_ONLY_BASELINE=ON",
    )
    name, suffix = other
    out = tmp_path / "out"
    arguments = ["--python", name, "--archs", "", "--out", str(out), "--glibc", "9.99"]
    assert prebuild.main(arguments) == 0
    assert [path.name for path in out.iterdir()] == [f"_C{suffix}"]
    assert "copy it into trt_kernels/ there" in capfd.readouterr().out


def test_a_prebuilt_module_is_checked(tmp_path, monkeypatch, capsys):
    """With the module that is here in the place of one that takes minutes to build."""
    here = Path(tk.ops.native._C.__file__)
    monkeypatch.setattr(prebuild, "build", lambda python, archs, out: here)
    assert prebuild.main(["--glibc", "9.99"]) == 0
    assert prebuild.main(["--glibc", "2.2"]) == 1
    assert "newer than 2.2" in capsys.readouterr().out
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"")
    monkeypatch.setattr(prebuild, "build", lambda python, archs, out: broken)
    monkeypatch.setattr(prebuild, "newest_glibc", lambda module: (2, 17))
    assert prebuild.main([]) == 1
    assert "cannot be imported" in capsys.readouterr().out


def test_a_build_without_a_module_is_an_error(tmp_path, monkeypatch):
    seen = {}

    def run(command, env, **options):
        seen.update(env)

    monkeypatch.setattr(prebuild.subprocess, "run", run)
    with pytest.raises(FileNotFoundError, match="left no compiled module"):
        prebuild.build("python", "90-real", tmp_path)
    assert seen["TRT_KERNELS_CUDA"] == "1" and seen["TRT_KERNELS_CUDA_ARCHS"] == "90-real"
