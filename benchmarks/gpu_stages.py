"""The stages of `python -m benchmarks.gpu`: their command lines, and how their ends are read."""

import csv
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from xml.etree import ElementTree

REPORT_SECONDS, NCU_SECONDS = 25.0, 15.0
TESTS_SECONDS, TRITON_SECONDS, SANITIZER_SECONDS = 100.0, 100.0, 40.0
TESTS = ("tests/test_gpu.py", "tests/test_gpu_block.py")
NO_TRITON = "not triton and not inductor"
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
    *("report", "tests", "lif", "block", "penalty", "step", "options", "loss", "accelerate"),
    *("ncu", "triton", "graph", "compile", *SANITIZERS),
)
# What ncu reads of a kernel, and how a note names it.
METRICS = {
    "gpu__time_duration.sum": "time",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue slots busy",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM",
}
# What compute-sanitizer says where the machine does not let it work.
REFUSALS = ("Device not supported", "not supported on this device", "Unable to attach")
PASSED, FAILED, TIMED_OUT, UNAVAILABLE = "passed", "FAILED", "TIMED OUT", "unavailable"


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


def pytest_command(python: str, *arguments: str) -> list[str]:
    # A test that hangs shows where.
    options = ("-p", "no:cacheprovider", "-o", "faulthandler_timeout=100", "--tb=short")
    return [python, "-m", "pytest", *options, *arguments]


def report_stage(python: str, scratch: Path) -> Stage:
    """`python -m trt_kernels`; the summary quotes what it prints, from scratch/report.txt."""

    def judge(code: int, output: str) -> tuple[str, str, list[str]]:
        (scratch / "report.txt").write_text(output)
        served = [
            line.strip()
            for line in output.splitlines()
            if re.match(r"cuda +\w+ +(available|no:)", line)
        ]
        detail = re.sub(r" +", " ", "; ".join(served)) or last_line(output)
        return PASSED if code == 0 else FAILED, detail, []

    return Stage("report", [python, "-m", "trt_kernels"], REPORT_SECONDS, judge)


def tests_stage(python: str, scratch: Path, triton: bool = False) -> Stage:
    """The tests marked gpu, of Triton's kernels and of Inductor, which compiles by Triton, or of
    everything else; in several processes where pytest-xdist is installed."""
    name = "triton" if triton else "tests"
    report = scratch / f"{name}.xml"
    processes = "16" if triton else "8"  # Triton compiles for long
    parallel = ("-n", processes) if importlib.util.find_spec("xdist") else ()
    command = pytest_command(
        python,
        *("-m", "gpu", *TESTS, "-k", "triton or inductor" if triton else NO_TRITON),
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


def toolkit_program(name: str) -> str | None:
    """A program of the CUDA toolkit, on PATH or where the toolkit is."""
    folders = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    places = [f"{folder}/bin" for folder in (*folders, "/usr/local/cuda") if folder]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def ncu_stage(python: str) -> Stage | Outcome:
    """Issue utilisation of the backward kernels of `lif` and `batch_norm_lif`."""
    program = toolkit_program("ncu")
    if program is None:
        return Outcome("ncu", UNAVAILABLE, 0.0, "no ncu here")
    options = ("--clock-control", "none", "--kernel-name", "regex:backward_kernel")
    metrics = ("--metrics", ",".join(METRICS), "--csv")
    command = [program, *options, *metrics, python, "-m", "benchmarks.profiled", "cuda"]
    return Stage("ncu", command, NCU_SECONDS, judge_ncu)


def judge_ncu(code: int, output: str) -> tuple[str, str, list[str]]:
    """A note for every launch in ncu's table, which follows its messages."""
    if "ERR_NVGPUCTRPERM" in output:
        return UNAVAILABLE, "ncu may not read the performance counters here", []
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    launches: dict[str, list[str]] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        label = METRICS.get(row["Metric Name"] or "")
        if label is not None:
            # Without the arguments, of which there are hundreds of characters.
            kernel = (row["Kernel Name"] or "").partition("(")[0]
            value = f"{label} {row['Metric Value']} {row['Metric Unit']}"
            launches.setdefault(row["ID"], [kernel]).append(value)
    notes = [f"{kernel}: {', '.join(values)}"[:300] for kernel, *values in launches.values()]
    if not notes:
        return FAILED, f"exit status {code}, no kernel; {last_line(output)}", []
    return PASSED if code == 0 else FAILED, f"{len(notes)} launches", notes[:20]


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
    program = toolkit_program("compute-sanitizer")
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


def every_stage(python: str, scratch: Path) -> dict[str, Stage | Outcome]:
    """All stages by name, in their order."""
    stages = [
        report_stage(python, scratch),
        tests_stage(python, scratch),
        tests_stage(python, scratch, triton=True),
        *benchmark_stages(python, scratch),
        ncu_stage(python),
        *sanitizer_stages(python),
    ]
    return {stage.name: stage for stage in sorted(stages, key=lambda s: STAGES.index(s.name))}


def chosen_stages(text: str) -> list[str]:
    """The names in "lif,block".

    Raises:
        ValueError: there is no stage of that name.
    """
    names = text.split(",")
    for name in names:
        if name not in STAGES:
            raise ValueError(f"got {name!r}, needs some of {', '.join(STAGES)}")
    return names


# --- Without a GPU.
def rehearsed(stage: Stage | Outcome, python: str) -> Stage | Outcome:
    """The stage as far as it goes without a GPU.

    Pytest collects what the stage's own command selects, for the GPU. The report runs as it is. The
    programs that ncu and the sanitizers would watch run on the CPU, without a watcher.
    """
    name = stage.name
    if name == "ncu":
        return Stage(name, [python, "-m", "benchmarks.profiled", "cpu"], NCU_SECONDS, judge_run)
    if name in SANITIZERS[1:]:
        return Outcome(name, UNAVAILABLE, 0.0, f"its program is that of {SANITIZERS[0]}")
    if name in SANITIZERS:
        command = [python, "-m", "benchmarks.sanitized", "reference", "cpu"]
        return Stage(name, command, SANITIZER_SECONDS, judge_run)
    if isinstance(stage, Outcome) or "pytest" not in stage.command:
        return stage
    command = [*stage.command, "--collect-only", "-p", "no:xdist"]
    if "-n" in command:
        del command[(at := command.index("-n")) : at + 2]
    return replace(stage, command=command, judge=judge_collection, echo=False)


def judge_run(code: int, output: str) -> tuple[str, str, list[str]]:
    return PASSED if code == 0 else FAILED, last_line(output), []


def judge_collection(code: int, output: str) -> tuple[str, str, list[str]]:
    """Pytest ends with another status where it selects nothing."""
    found = re.search(r"(\d+)(?:/\d+)? tests? collected", output)
    collected = int(found[1]) if found else 0
    detail = f"{collected} collected" if found else last_line(output)
    return PASSED if code == 0 and collected else FAILED, detail, failures_in(output)
