"""Tests, sanitizers and benchmarks on a GPU, in one command and within one limit of time.

python -m benchmarks.gpu --out DIR

Writes summary.md, results.json, log.txt and plots into DIR. A stage that fails is told of, and the
others run all the same; the exit status says whether all passed: 0, or 1, or 2 without a GPU.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.records import Run, gpu_line, read

ROOT = Path(__file__).resolve().parents[1]
# The whole command stays under nine minutes.
LIMIT_SECONDS = 535.0
# For the report, at the end; and for a stage to end by itself once interrupted.
RESERVED_SECONDS, GRACE_SECONDS = 20.0, 12.0
TESTS_SECONDS, SANITIZER_SECONDS = 190.0, 190.0
# One process for each: an illegal access, or a capture that fails, spoils the rest of its own
# process only. Name, files, cases, limit of time.
PLAIN = "not compiled and not graph"
BENCHMARKS = (
    ("lif", ("bench_lif.py",), PLAIN, 95.0),
    ("batch_norm_lif", ("bench_batch_norm_lif.py",), PLAIN, 35.0),
    ("options and packing", ("bench_lif_options.py", "bench_packing.py"), PLAIN, 35.0),
    ("accelerate", ("bench_acceleration.py",), PLAIN, 20.0),
    ("trt_penalty", ("bench_penalty.py",), PLAIN, 30.0),
    ("temporal_loss", ("bench_loss.py",), PLAIN, 20.0),
    ("a training step", ("bench_step.py",), PLAIN, 40.0),
    ("graph replay", (".",), "graph", 35.0),
    ("torch.compile", (".",), "compiled", 35.0),
)
# Of a benchmark's time; the rest is for its start, and for the case that is running by then.
BUDGET_FRACTION = 0.75
SANITIZERS = ("memcheck", "racecheck", "initcheck")
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


def tests_stage(python: str, scratch: Path, seconds: float = TESTS_SECONDS) -> Stage:
    """The tests marked gpu; in several processes where pytest-xdist is installed, since Triton
    compiles for long."""
    report = scratch / "tests.xml"
    parallel = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    command = pytest_command(
        python,
        *("-m", "gpu", "tests", "-vv", "--durations=8", "--continue-on-collection-errors"),
        f"--junitxml={report}",
        *parallel,
    )
    return Stage("tests", command, seconds, lambda code, output: judge_tests(code, output, report))


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
        stages.append(Stage(f"benchmarks of {name}", command, seconds, judge_benchmarks, echo=True))
    return stages


def judge_benchmarks(code: int, output: str) -> tuple[str, str, list[str]]:
    notes = failures_in(output)
    return PASSED if code == 0 else FAILED, last_line(output), notes


# --- Everything together.
def run_all(
    together: Sequence[Stage | Outcome],
    alone: Sequence[Stage],
    log: Log,
    deadline: float,
    written: Callable[[list[Outcome]], None],
) -> list[Outcome]:
    """The stages that time nothing together, then the others one by one; `written` after each."""
    outcomes: list[Outcome] = []

    def left(stage: Stage) -> float:
        return min(stage.seconds, deadline - RESERVED_SECONDS - time.monotonic())

    with ThreadPoolExecutor(max(1, len(together))) as pool:
        running = [
            pool.submit(lambda o: o, stage)
            if isinstance(stage, Outcome)
            else pool.submit(attempt, stage, left(stage), log)
            for stage in together
        ]
        outcomes += [future.result() for future in running]
    written(outcomes)
    for stage in alone:
        outcomes.append(attempt(stage, left(stage), log))
        written(outcomes)
    return outcomes


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

        draw_plots(run, out)
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
    options = parser.parse_args(arguments)
    reason = why_no_gpu()
    if reason is not None:
        print(reason)
        return 2
    deadline = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / "log.txt")
    environment = describe()
    print(environment["machine"], flush=True)
    log.write(f"{environment['machine']}\n{environment['report']}\n")
    with tempfile.TemporaryDirectory(prefix="trt_kernels_gpu_") as folder:
        scratch = Path(folder)

        def written(outcomes: list[Outcome]) -> None:
            write_results(options.out, scratch, environment, outcomes)

        outcomes = run_all(
            [tests_stage(sys.executable, scratch), *sanitizer_stages(sys.executable)],
            benchmark_stages(sys.executable, scratch),
            log,
            deadline,
            written,
        )
        run = write_results(options.out, scratch, environment, outcomes)
        drawn = draw(run, options.out, log)
    print_end(options.out, outcomes, run)
    return 1 if any(o.failed for o in outcomes) or run is None or not drawn else 0


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
