"""Tests, benchmarks and sanitizers on a GPU, in one command and within one limit of time.

python -m benchmarks.gpu --out DIR [--stages tests,lif,...] [--seconds 320] [--triton]

Each stage is a process with a limit of its own, one after the other, the most valuable first; what
is measured is written after each: summary.md, results.json, log.txt and at most four plots in DIR.
A stage that fails is told of, and the others run all the same; the exit status says whether all
passed: 0, or 1, or 2 without a GPU.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.records import Run, gpu_line, read

ROOT = Path(__file__).resolve().parents[1]
# The whole command stays under nine minutes.
LIMIT_SECONDS = 535.0
# For the report, at the end; and for a stage to end by itself once interrupted.
RESERVED_SECONDS, GRACE_SECONDS = 20.0, 12.0
TESTS_SECONDS, TRITON_SECONDS, SANITIZER_SECONDS = 100.0, 100.0, 40.0
TESTS = ("tests/test_gpu.py", "tests/test_gpu_block.py")
# An illegal access, or a capture that fails, spoils the rest of its own process only. Stage, files,
# cases, limit of time.
PLAIN = "not compiled and not graph"
BENCHMARKS = (
    ("lif", ("bench_lif.py",), PLAIN, 70.0),
    ("block", ("bench_batch_norm_lif.py",), PLAIN, 25.0),
    ("penalty", ("bench_penalty.py",), PLAIN, 15.0),
    ("step", ("bench_step.py",), PLAIN, 40.0),
    ("options", ("bench_lif_options.py", "bench_packing.py"), PLAIN, 30.0),
    ("loss", ("bench_loss.py",), PLAIN, 15.0),
    ("accelerate", ("bench_acceleration.py",), PLAIN, 20.0),
    ("graph", (".",), "graph", 30.0),
    ("compile", (".",), "compiled", 30.0),
)
# Of a benchmark's time; the rest is for its start, and for the case that is running by then.
BUDGET_FRACTION = 0.75
SANITIZERS = ("memcheck", "racecheck", "initcheck")
# Every stage, the most valuable first: CUDA before Triton, and sanitizers last.
STAGES = (
    *("tests", "lif", "block", "penalty", "step", "options", "loss", "accelerate"),
    *("triton", "graph", "compile", *SANITIZERS),
)
# Of the plots these, as far as they were drawn.
KEPT_PLOTS = ("lif.png", "batch_norm_lif.png", "penalty.png", "step.png")
# What compute-sanitizer says where the machine does not let it work.
REFUSALS = ("Device not supported", "not supported on this device", "Unable to attach")
PASSED, FAILED, TIMED_OUT, UNAVAILABLE = "passed", "FAILED", "TIMED OUT", "unavailable"
LARGEST_LOG = 8 << 20


@dataclass
class Outcome:
    """How a stage ended."""

    name: str
    status: str
    seconds: float
    detail: str
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.status not in (PASSED, UNAVAILABLE)


@dataclass
class Stage:
    """A command with a limit of time, and how to read its end: (exit status, output) to a status,
    a detail and notes."""

    name: str
    command: Sequence[str]
    seconds: float
    judge: Callable[[int, str], tuple[str, str, list[str]]]
    environment: dict[str, str] = field(default_factory=dict)
    echo: bool = False


class Log:
    """log.txt, written as it happens: what is there survives whoever is killed."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        path.write_text("")

    def write(self, text: str) -> None:
        with self.lock, self.path.open("a") as file:
            if file.tell() < LARGEST_LOG:
                file.write(text)


def kill_group(process: subprocess.Popen[str]) -> None:
    """Ends whatever a process has started and left behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def ended(process: subprocess.Popen[str], seconds: float) -> tuple[int, bool]:
    """The exit status, and whether the time was over: then it is interrupted, so that it writes
    what it has, and killed if it stays."""
    late = False
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        late = True
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    kill_group(process)
    # One that hangs in the driver cannot be killed: it is left behind.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    return -signal.SIGKILL if process.returncode is None else process.returncode, late


def execute(stage: Stage, seconds: float, log: Log) -> Outcome:
    """Runs a stage for so long at most."""
    began = time.monotonic()
    if seconds <= 1:
        return Outcome(stage.name, FAILED, 0.0, "no time was left for it")
    process = subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of its own, so that its children end with it
        # A shell's background jobs ignore this signal, and so would the stage.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    lines: list[str] = []

    def collect() -> None:
        for line in process.stdout or ():
            lines.append(line)
            if stage.echo:
                print(f"    {line.rstrip()}", flush=True)

    reader = threading.Thread(target=collect, daemon=True)
    reader.start()
    returned, late = ended(process, seconds)
    reader.join(GRACE_SECONDS)
    output = "".join(lines)
    took = time.monotonic() - began
    log.write(f"\n===== {stage.name}: {' '.join(stage.command)}\n{output}")
    status, detail, notes = stage.judge(returned, output)
    if late:
        status, detail = TIMED_OUT, f"stopped after {seconds:.0f} s; {detail}"
    log.write(f"===== {stage.name}: {status} after {took:.0f} s; {detail}\n")
    return Outcome(stage.name, status, took, detail, notes)


def attempt(stage: Stage, seconds: float, log: Log) -> Outcome:
    """`execute`, with whatever goes wrong with it as an outcome."""
    try:
        outcome = execute(stage, seconds, log)
    except Exception as error:
        log.write(traceback.format_exc())
        outcome = Outcome(stage.name, FAILED, 0.0, f"{type(error).__name__}: {error}")
    print(
        f"{outcome.name}: {outcome.status} ({outcome.seconds:.0f} s) {outcome.detail}", flush=True
    )
    for note in outcome.notes[:20]:
        print(f"    {note}", flush=True)
    return outcome


# --- Stages.
def pytest_command(python: str, *arguments: str) -> list[str]:
    # A test that hangs shows where.
    options = ("-p", "no:cacheprovider", "-o", "faulthandler_timeout=100", "--tb=short")
    return [python, "-m", "pytest", *options, *arguments]


def tests_stage(python: str, scratch: Path, triton: bool = False) -> Stage:
    """The tests marked gpu, of Triton's kernels or of everything else; in several processes where
    pytest-xdist is installed."""
    name = "triton" if triton else "tests"
    report = scratch / f"{name}.xml"
    processes = "16" if triton else "8"  # Triton compiles for long
    parallel = ("-n", processes) if importlib.util.find_spec("xdist") else ()
    command = pytest_command(
        python,
        *("-m", "gpu", *TESTS, "-k", "triton" if triton else "not triton"),
        *("-vv", "--durations=8", "--continue-on-collection-errors", f"--junitxml={report}"),
        *parallel,
    )
    seconds = TRITON_SECONDS if triton else TESTS_SECONDS
    return Stage(name, command, seconds, lambda code, output: judge_tests(code, output, report))


def judge_tests(code: int, output: str, report: Path) -> tuple[str, str, list[str]]:
    try:
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return FAILED, f"exit status {code}, no report; {last_line(output)}", failures_in(output)
    failed = [case for case in cases if any(case.find(kind) is not None for kind in BAD)]
    skipped = [case for case in cases if case.find("skipped") is not None]
    passed = len(cases) - len(failed) - len(skipped)
    notes = [f"failed: {case.get('name')}: {message(case, *BAD)}" for case in failed]
    reasons = [message(case, "skipped") for case in skipped]
    notes += [f"skipped {reasons.count(r)}: {r}" for r in dict.fromkeys(reasons)]
    detail = f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped"
    return PASSED if code == 0 and passed else FAILED, detail, notes


BAD = ("failure", "error")


def message(case: ElementTree.Element, *kinds: str) -> str:
    """The first line of what a test case says."""
    for kind in kinds:
        found = case.find(kind)
        if found is not None:
            return (found.get("message") or found.text or "").strip().splitlines()[0][:300]
    return ""


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def failures_in(output: str) -> list[str]:
    """Pytest's own lines on failures, each once."""
    lines = (line[:300] for line in output.splitlines() if line.startswith(("FAILED", "ERROR")))
    return list(dict.fromkeys(lines))


def sanitizer_program() -> str | None:
    folders = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [f"{folder}/bin" for folder in (*folders, "/usr/local/cuda") if folder]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(places)
    )


def sanitizer_stage(program: str, tool: str, python: str) -> Stage:
    # Errors that a CUDA call returns are its caller's to handle: torch probes what is there.
    options = ("--tool", tool, "--error-exitcode", "9", "--print-limit", "20")
    if tool == "memcheck":
        options = (*options, "--report-api-errors", "no")
    command = [program, *options, python, "-m", "benchmarks.sanitized", "cuda"]
    # Every tensor an allocation of its own, or an access past its end would fall into another.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage(tool, command, SANITIZER_SECONDS, judge_sanitizer, environment)


def judge_sanitizer(code: int, output: str) -> tuple[str, str, list[str]]:
    for refusal in REFUSALS:
        if refusal in output:
            return UNAVAILABLE, f"compute-sanitizer says: {refusal}", []
    summaries = re.findall(r"=+ (\w+ SUMMARY: .*)", output)
    rights = re.findall(r"^\d+ of \d+ cases of backend .*", output, re.MULTILINE)
    detail = "; ".join([*summaries, *rights]) or f"exit status {code}; {last_line(output)}"
    clean = bool(summaries) and all(re.search(r"SUMMARY: 0 ", s) for s in summaries)
    notes = [line[:300] for line in output.splitlines() if line.startswith("WRONG")]
    notes += list(
        dict.fromkeys(re.findall(r"=+ ((?:Invalid|Error:|Uninit|Race|Program).*)", output))
    )
    return PASSED if code == 0 and clean and rights else FAILED, detail, notes[:20]


def sanitizer_stages(python: str) -> list[Stage | Outcome]:
    program = sanitizer_program()
    if program is None:
        return [Outcome(t, UNAVAILABLE, 0.0, "no compute-sanitizer here") for t in SANITIZERS]
    return [sanitizer_stage(program, tool, python) for tool in SANITIZERS]


def benchmark_stages(python: str, scratch: Path, device: str = "cuda") -> list[Stage]:
    stages = []
    for index, (name, paths, selection, seconds) in enumerate(BENCHMARKS):
        command = pytest_command(
            python,
            *(str(Path("benchmarks") / path) for path in paths),
            *("--device", device, "-k", selection, "--benchmark-quiet"),
            f"--benchmark-json={scratch / f'bench{index}.json'}",
            f"--time-budget={BUDGET_FRACTION * seconds:.0f}",
        )
        stages.append(Stage(name, command, seconds, judge_benchmarks, echo=True))
    return stages


def judge_benchmarks(code: int, output: str) -> tuple[str, str, list[str]]:
    notes = failures_in(output)
    return PASSED if code == 0 else FAILED, last_line(output), notes


# --- Everything together.
def every_stage(python: str, scratch: Path) -> dict[str, Stage | Outcome]:
    """All stages by name, in their order."""
    stages = [
        tests_stage(python, scratch),
        tests_stage(python, scratch, triton=True),
        *benchmark_stages(python, scratch),
        *sanitizer_stages(python),
    ]
    return {stage.name: stage for stage in sorted(stages, key=lambda s: STAGES.index(s.name))}


def rehearsed(stage: Stage | Outcome) -> Stage | Outcome:
    """The stage as far as it goes without a GPU: what it selects is collected."""
    if isinstance(stage, Outcome) or "pytest" not in stage.command:
        return stage
    command = [*stage.command, "--collect-only", "-p", "no:xdist"]
    if "-n" in command:
        del command[(at := command.index("-n")) : at + 2]
    return replace(stage, command=command, judge=judge_collection)


def judge_collection(code: int, output: str) -> tuple[str, str, list[str]]:
    """Pytest ends with another status where it selects nothing."""
    return PASSED if code == 0 else FAILED, last_line(output), failures_in(output)


def run_all(
    stages: Sequence[Stage | Outcome],
    log: Log,
    deadline: float,
    written: Callable[[list[Outcome]], None],
) -> list[Outcome]:
    """The stages one after the other, `written` after each."""
    outcomes: list[Outcome] = []
    for stage in stages:
        if isinstance(stage, Stage):
            left = min(stage.seconds, deadline - RESERVED_SECONDS - time.monotonic())
            stage = attempt(stage, left, log)
        outcomes.append(stage)
        written(outcomes)
    return outcomes


def unpacked_wheels(wheels: Path, folder: Path) -> list[str]:
    """Unpacks the wheels of a folder, which is how pure Python is installed, and names them."""
    found = sorted(wheels.glob("*.whl"))
    for wheel in found:
        zipfile.ZipFile(wheel).extractall(folder)
    return ["-".join(wheel.name.split("-")[:2]) for wheel in found]


def read_records(scratch: Path) -> Run | None:
    """What the benchmarks have measured so far; a file that is not whole is left out."""
    paths = []
    for path in sorted(scratch.glob("bench*.json")):
        try:
            json.loads(path.read_text())
        except ValueError:
            continue
        paths.append(path)
    run = read(paths) if paths else None
    return run if run is not None and run.records else None


def write_results(
    out: Path, scratch: Path, environment: dict[str, Any], outcomes: list[Outcome]
) -> Run | None:
    """summary.md and results.json."""
    from benchmarks.targets import findings

    run = read_records(scratch)
    (out / "summary.md").write_text("\n".join(summary(environment, outcomes, run)) + "\n")
    results = {
        "machine": environment["machine"],
        "date": environment["date"],
        "environment": environment,
        "stages": [asdict(outcome) for outcome in outcomes],
        "targets": [] if run is None else [{**asdict(f), "met": f.met} for f in findings(run)],
        "records": [] if run is None else [record.info for record in run.records],
    }
    (out / "results.json").write_text(json.dumps(results, indent=1))
    return run


def summary(environment: dict[str, Any], outcomes: list[Outcome], run: Run | None) -> Iterator[str]:
    """The Markdown of everything."""
    from benchmarks.report import LEGEND, row, tables

    yield from ("# trt_kernels on a GPU", "", f"{environment['machine']}; {environment['date']}.")
    yield from ("", "## Stages", "", row(["stage", "", "seconds", ""]))
    yield row(["---", "---", "---:", "---"])
    for o in outcomes:
        yield row([o.name, o.status, f"{o.seconds:.0f}", o.detail.replace("|", "/")])
    notes = [f"* {o.name}: {note}" for o in outcomes for note in o.notes]
    if notes:
        yield from ("", *notes)
    if run is None:
        yield from ("", "No benchmark was measured.")
    else:
        yield from ("", "## Benchmarks", "", LEGEND, *tables(run))
    yield from ("", "## Installation", "", "```", environment["report"], "```")


def describe() -> dict[str, Any]:
    """The machine and the installation, whatever can be found out."""
    environment: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": "unknown GPU"}
    try:
        from benchmarks import machine

        environment["gpu"] = machine.gpu()
        environment["nvidia-smi"] = machine.nvidia_smi()
        environment["machine"] = gpu_line(environment["gpu"])
        import trt_kernels as tk

        environment["report"] = str(tk.report())
    except Exception:
        environment["report"] = traceback.format_exc()
    return environment


def draw(run: Run | None, out: Path, log: Log) -> bool:
    """Plots, where there is something to plot; says whether they could be drawn."""
    if run is None:
        return True
    try:
        from benchmarks.plots import draw as draw_plots

        for path in draw_plots(run, out):
            if path.name not in KEPT_PLOTS:
                path.unlink()
    except Exception:
        log.write(traceback.format_exc())
        return False
    return True


def why_no_gpu() -> str | None:
    """One line, or None where there is a GPU."""
    try:
        import torch
    except ImportError as error:
        return f"no GPU run: this Python has no torch ({error})"
    if torch.cuda.is_available():
        return None
    return f"no GPU run: torch {torch.__version__} finds no CUDA device here"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=LIMIT_SECONDS, help="limit of all stages")
    parser.add_argument(
        "--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}; default: all"
    )
    parser.add_argument("--triton", action="store_true", help="time Triton's kernels beside CUDA's")
    parser.add_argument("--wheels", type=Path, help="a folder with the peers' wheels, to be used")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: collect what each stage would run"
    )
    options = parser.parse_args(arguments)
    chosen = options.stages.split(",")
    unknown = [name for name in chosen if name not in STAGES]
    if unknown:
        parser.error(f"--stages: got {unknown[0]!r}, needs some of {', '.join(STAGES)}")
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels: got {options.wheels}, needs a folder")
    reason = None if options.dry_run else why_no_gpu()
    if reason is not None:
        print(reason)
        return 2
    deadline = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / "log.txt")
    environment = describe()
    print(environment["machine"], flush=True)
    log.write(f"{environment['machine']}\n{environment['report']}\n")
    os.environ["TRT_KERNELS_BENCH_TRITON"] = "1" if options.triton else "0"
    with tempfile.TemporaryDirectory(prefix="trt_kernels_gpu_") as folder:
        scratch = Path(folder)
        if options.wheels is not None:
            environment["wheels"] = unpacked_wheels(options.wheels, scratch / "wheels")
            paths = (str(scratch / "wheels"), os.environ.get("PYTHONPATH", ""))
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

        def written(outcomes: list[Outcome]) -> None:
            write_results(options.out, scratch, environment, outcomes)

        every = every_stage(sys.executable, scratch)
        stages = [every[name] for name in every if name in chosen]
        if options.dry_run:
            stages = [rehearsed(stage) for stage in stages]
        outcomes = run_all(stages, log, deadline, written)
        run = write_results(options.out, scratch, environment, outcomes)
        drawn = draw(run, options.out, log)
    print_end(options.out, outcomes, run)
    measured = run is not None or options.dry_run or not set(chosen) & {b[0] for b in BENCHMARKS}
    return 1 if any(o.failed for o in outcomes) or not measured or not drawn else 0


def print_end(out: Path, outcomes: list[Outcome], run: Run | None) -> None:
    """What a caller who sees only the last lines should see."""
    from benchmarks.report import targets

    if run is not None:
        bandwidth = (run.copy_bandwidth() or 0) / 1e9
        print(f"\ncopy bandwidth {bandwidth:.4g} GB/s", *targets(run), sep="\n")
    for outcome in outcomes:
        print(f"{outcome.name}: {outcome.status}; {outcome.detail}")
    print(f"results in {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


if __name__ == "__main__":
    sys.exit(main())
