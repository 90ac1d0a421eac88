"""Options, collection of bench_*.py, and the fixture that measures a case."""

import gc
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import trt_kernels as tk
from benchmarks import machine
from benchmarks.clocks import HostClock, clock_of
from benchmarks.measure import Case, Measured, copy_of, measure
from benchmarks.report import result_line
from trt_kernels.backends import native

QUICK_SECONDS, FULL_SECONDS = 4.0, 15.0
# A GPU's rounds are shorter, and its time is scarcer.
GPU_SECONDS = 1.0
WARM_UP_SECONDS = 0.5
GPUS = ("cuda",)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trt_kernels")
    group.addoption("--full", action="store_true", help="more shapes, more rounds")
    group.addoption("--device", choices=("cpu", *GPUS), default="cpu", help="default: cpu")
    group.addoption(
        "--time-budget",
        type=float,
        metavar="SECONDS",
        help="cases that would begin later are skipped",
    )
    group.addoption(
        "--threads",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="threads of torch and of the kernels (default: 2, or the cores if fewer)",
    )


def pytest_configure(config: pytest.Config) -> None:
    missing = config.getoption("--device") in GPUS and not torch.cuda.is_available()
    if missing and not config.getoption("--collect-only"):
        raise pytest.UsageError("--device cuda: there is no GPU that this PyTorch can use")
    config.addinivalue_line("markers", "full: runs with --full only")
    config.addinivalue_line("markers", "cpu: runs on a CPU only")
    config.addinivalue_line("markers", "cuda: runs with --device cuda only")
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning")  # the peers'
    torch.set_num_threads(config.getoption("--threads"))
    # A cache of its own, so that the compile times are those of a first use.
    config.stash[COMPILER_CACHE] = cache = tempfile.mkdtemp(prefix="trt_kernels_bench_")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    config.stash[BEGAN] = time.monotonic()


def pytest_unconfigure(config: pytest.Config) -> None:
    cache = config.stash.get(COMPILER_CACHE, None)
    if cache is not None:
        shutil.rmtree(cache, ignore_errors=True)


COMPILER_CACHE = pytest.StashKey[str]()
BEGAN = pytest.StashKey[float]()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = {"cpu", *GPUS} - {config.getoption("--device")}
    if not config.getoption("--full"):
        unwanted.add("full")
    left_out = [item for item in items if any(map(item.get_closest_marker, unwanted))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_setup(item: pytest.Item) -> None:
    budget = item.config.getoption("--time-budget")
    if budget is not None and time.monotonic() - item.config.stash[BEGAN] > budget:
        pytest.skip(f"not measured: the {budget:.0f} s of --time-budget are over")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    machine_info["trt_kernels"] = {
        "version": tk.report().versions.get("trt_kernels", ""),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "level": native._C.cpu_level(),
        "size": "full" if config.getoption("--full") else "quick",
    }
    if config.getoption("--device") in GPUS:
        machine_info["gpu"] = machine.gpu()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device to measure, a GPU at the clocks of one that works."""
    chosen = torch.device(request.config.getoption("--device"))
    if chosen.type == "cpu":
        return chosen
    chosen = torch.device(chosen.type, torch.cuda.current_device())
    step, end = copy_of(256 << 20, chosen), time.monotonic() + WARM_UP_SECONDS
    while time.monotonic() < end:
        step()
        torch.cuda.synchronize(chosen)
    return chosen


@pytest.fixture(autouse=True)
def emptied(request: pytest.FixtureRequest) -> Iterator[None]:
    """Gives a GPU's memory back after each case: the next may need all of it."""
    yield
    if request.config.getoption("--device") in GPUS:
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def measured(benchmark: Any, request: pytest.FixtureRequest, device: torch.device) -> Measured:
    """Measures a case and prints its name before, its result after."""
    config = request.config
    budget = FULL_SECONDS if config.getoption("--full") else QUICK_SECONDS
    if device.type in GPUS:
        budget = GPU_SECONDS
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")

    def run(case: Case, clock: str = "events") -> None:
        def say(text: str) -> None:
            with capture.global_and_fixture_disabled():
                terminal.ensure_newline()
                terminal.write_line(text)

        say(f"{case.table}: {case.name} ...")
        timer: HostClock = clock_of(device, clock)
        record = measure(benchmark, case, budget, timer)
        say("    " + result_line(record))
        failed = record.get("failed")
        if failed:
            pytest.fail("; ".join(f"{name}: {why}" for name, why in failed.items()), pytrace=False)

    return run


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """A case that passed has printed its line: no dot for it."""
    if report.when == "call" and report.passed and "bench_" in report.nodeid:
        return "passed", "", "PASSED"
    return None
