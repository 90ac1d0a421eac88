"""Options, collection of bench_*.py, and the fixture that measures a case."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import trt_kernels as tk
from benchmarks.measure import Case, Measured, measure
from benchmarks.report import result_line
from trt_kernels.backends import native

QUICK_SECONDS, FULL_SECONDS = 4.0, 15.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trt_kernels")
    group.addoption("--full", action="store_true", help="more shapes, more rounds")
    group.addoption(
        "--threads",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="threads of torch and of the kernels (default: 2, or the cores if fewer)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: runs with --full only")
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning")  # the peers'
    torch.set_num_threads(config.getoption("--threads"))
    # A cache of its own, so that the compile times are those of a first use.
    config.stash[COMPILER_CACHE] = cache = tempfile.mkdtemp(prefix="trt_kernels_bench_")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache


def pytest_unconfigure(config: pytest.Config) -> None:
    cache = config.stash.get(COMPILER_CACHE, None)
    if cache is not None:
        shutil.rmtree(cache, ignore_errors=True)


COMPILER_CACHE = pytest.StashKey[str]()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    machine_info["trt_kernels"] = {
        "version": tk.report().versions.get("trt_kernels", ""),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "level": native._C.cpu_level(),
        "size": "full" if config.getoption("--full") else "quick",
    }


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def measured(benchmark: Any, request: pytest.FixtureRequest) -> Measured:
    """Measures a case and prints its name before, its result after."""
    config = request.config
    budget = FULL_SECONDS if config.getoption("--full") else QUICK_SECONDS
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")

    def run(case: Case) -> None:
        def say(text: str) -> None:
            with capture.global_and_fixture_disabled():
                terminal.ensure_newline()
                terminal.write_line(text)

        say(f"{case.table}: {case.name} ...")
        say("    " + result_line(measure(benchmark, case, budget)))

    return run


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """A case that passed has printed its line: no dot for it."""
    if report.when == "call" and report.passed and "bench_" in report.nodeid:
        return "passed", "", "PASSED"
    return None
