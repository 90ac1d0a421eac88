"""Tests, benchmarks and sanitizers on a GPU, in one command and within one limit of time.

python -m benchmarks.gpu --out DIR [--stages report,tests,lif,...] [--seconds 320] [--triton]

Each stage is a process with a limit of its own, one after the other, the most valuable first; what
is measured is written after each: summary.md, results.json, log.txt and at most four plots in DIR.
A stage that fails is told of, and the others run all the same; the exit status says whether all
passed: 0, or 1, or 2 without a GPU.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_stages import (
    BENCHMARKS,
    FAILED,
    STAGES,
    TIMED_OUT,
    Outcome,
    Stage,
    chosen_stages,
    every_stage,
    rehearsed,
)
from benchmarks.records import Run, gpu_line, read

ROOT = Path(__file__).resolve().parents[1]
# The whole command stays under nine minutes.
LIMIT_SECONDS = 535.0
# For the report, at the end; and for a stage to end by itself once interrupted.
RESERVED_SECONDS, GRACE_SECONDS = 20.0, 12.0
REHEARSAL_SECONDS = 60.0
# Of the plots these, as far as they were drawn.
KEPT_PLOTS = ("lif.png", "batch_norm_lif.png", "penalty.png", "step.png")
# Of the folder --wheels, in the summary.
WHEELS = {"Wheels used": "wheels", "Wheels left out, not pure Python": "wheels left out"}
LARGEST_LOG = 8 << 20


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


def rehearse(stages: Sequence[Stage | Outcome], log: Log) -> list[Outcome]:
    """What `rehearsed` leaves of the stages, two at a time: nothing is timed."""
    ready = [rehearsed(stage, sys.executable) for stage in stages]

    def outcome(stage: Stage | Outcome) -> Outcome:
        return stage if isinstance(stage, Outcome) else attempt(stage, REHEARSAL_SECONDS, log)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(outcome, ready))


def unpacked_wheels(wheels: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Unpacks a folder's wheels of pure Python, which is how they are installed.

    Returns names and versions of these, and file names of those that must be installed."""
    found, refused = [], []
    for wheel in sorted(wheels.glob("*.whl")):
        if not wheel.name.endswith("-none-any.whl"):
            refused.append(wheel.name)
            continue
        with zipfile.ZipFile(wheel) as content:
            content.extractall(folder)
        found.append(" ".join(wheel.name.split("-")[:2]))
    return found, refused


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
    for title, key in WHEELS.items():
        if key in environment:
            yield from ("", f"{title}: {', '.join(environment[key]) or 'none'}.")
    if run is None:
        yield from ("", "No benchmark was measured.")
    else:
        yield from ("", "## Benchmarks", "", LEGEND, *tables(run))
    yield from ("", "## Installation", "", "```", environment["report"], "```")


def describe() -> dict[str, Any]:
    """The machine, whatever can be found out; the stage "report" describes the installation."""
    environment: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": "unknown GPU"}
    environment["report"] = "not asked for: --stages report"
    try:
        from benchmarks import machine

        environment["gpu"] = machine.gpu()
        environment["nvidia-smi"] = machine.nvidia_smi()
        environment["machine"] = gpu_line(environment["gpu"])
    except Exception:
        environment["error"] = traceback.format_exc()
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


def names_of_stages(text: str) -> list[str]:
    """`chosen_stages`, with its error as argparse prints one."""
    try:
        return chosen_stages(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=LIMIT_SECONDS, help="limit of all stages")
    parser.add_argument(
        "--stages",
        type=names_of_stages,
        default=list(STAGES),
        help=f"of {', '.join(STAGES)}; default: all",
    )
    parser.add_argument("--triton", action="store_true", help="time Triton's kernels beside CUDA's")
    parser.add_argument("--wheels", type=Path, help="a folder with the peers' wheels, to be used")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: collect what each stage would run"
    )
    options = parser.parse_args(arguments)
    chosen = options.stages
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
    log.write(f"{environment['machine']}\n{environment.get('error', '')}\n")
    os.environ["TRT_KERNELS_BENCH_TRITON"] = "1" if options.triton else "0"
    with tempfile.TemporaryDirectory(prefix="trt_kernels_gpu_") as folder:
        scratch = Path(folder)
        if options.wheels is not None:
            found, refused = unpacked_wheels(options.wheels, scratch / "wheels")
            environment["wheels"], environment["wheels left out"] = found, refused
            paths = (str(scratch / "wheels"), os.environ.get("PYTHONPATH", ""))
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

        def written(outcomes: list[Outcome]) -> None:
            report = scratch / "report.txt"
            if report.exists():
                environment["report"] = report.read_text(errors="replace")
            write_results(options.out, scratch, environment, outcomes)

        every = every_stage(sys.executable, scratch)
        stages = [every[name] for name in every if name in chosen]
        if options.dry_run:
            written(outcomes := rehearse(stages, log))
        else:
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
