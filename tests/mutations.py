"""Applies the deliberate faults of `faults.py` one by one, and reports which the tests catch.

    python -m tests.mutations                            # all of them: make mutate
    python -m tests.mutations --list
    python -m tests.mutations --only hard-reset-term eval-mode --out report.md

The working tree is never touched: its files are copied to a temporary folder, the C++ is built
there once, and every fault is put into the copy and taken out again. Of a fault in C++ only what
depends on its file is compiled. First the tests that are to catch the faults must pass without one.

A fault is "caught" where one of its tests fails; it "survived" where all of them pass; it is
"broken" where that says nothing: it does not compile, or the tests do not even start.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from tqdm import tqdm

from tests.faults import FAULTS, Mutation

ROOT = Path(__file__).parents[1]
NATIVE = ("csrc/", "CMakeLists.txt")  # what the compiled modules are made of
PACKAGE, ON_HOST = "_C", "_cuda_on_host"  # targets of CMake
SECONDS = 300  # for the tests of a fault
BUILD_SECONDS = 900
PASSED, FAILED = 0, 1  # what pytest returns; anything else is no verdict


@dataclass(frozen=True)
class Result:
    """What became of a fault: its verdict, and the test that caught it or what went wrong."""

    name: str
    verdict: str  # "caught", "survived" or "broken"
    detail: str
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """Of a run of pytest: the names of tests that failed, and why it is no verdict, if it is none.

    `missed` are the tests that were skipped.
    """

    failed: tuple[str, ...]
    missed: tuple[str, ...]
    trouble: str


class Broken(Exception):
    """A fault, or a tree, with which nothing can be found out."""


def files_of(root: Path) -> list[str]:
    """What git knows of a tree, and what is new in it and not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [name for name in dict.fromkeys(listed.split("\0")) if (root / name).is_file()]


def run(command: Sequence[str | Path], folder: Path, seconds: float) -> tuple[int | None, str]:
    """Runs a command; its code (None: it took too long) and what it said.

    Its temporary files are made beside `folder`, and nothing that it started outlives it.
    """
    temporary = folder.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",  # no code of a fault is found after it
        "TMPDIR": str(temporary),
    }
    with tempfile.TemporaryFile(dir=temporary) as said:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=folder,
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=seconds)
        finally:
            end(process)
        said.seek(0)
        text = said.read().decode(errors="replace")
    shutil.rmtree(temporary, ignore_errors=True)
    return code, text


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a command that leads a session, and everything in it."""
    if process.poll() is None:
        # Asked first: ninja and torchrun then end what they put into groups of their own.
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # pid (name) state parent group session ...
            _, _, _, session, *_ = stat.read_text().rpartition(")")[2].split()
            if int(session) == process.pid:
                os.kill(int(stat.parent.name), signal.SIGKILL)
    process.wait()


def matching(patterns: Iterable[str], ids: Iterable[str]) -> list[str]:
    """The tests that patterns name: an id with or without its parameters, * for anything."""
    found: dict[str, None] = {}
    ids = list(ids)
    for pattern in patterns:
        rule = re.compile(".*".join(map(re.escape, pattern.split("*"))) + r"(\[.*\])?")
        here = [i for i in ids if rule.fullmatch(i)]
        if not here:
            raise Broken(f"no test {pattern} runs here")
        found.update(dict.fromkeys(here))
    return list(found)


class Workshop:
    """A copy of a tree, in which faults are tried."""

    def __init__(self, root: Path, folder: Path, files: Iterable[str]) -> None:
        self.tree = folder / "tree"
        self.build = self.tree / "build" / "on_host"  # where conftest.py looks
        self.whole = folder / "whole"  # the build without a fault
        self.results = folder / "results.xml"
        self.ids: list[str] = []
        for name in files:
            to = self.tree / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to)

    # --- Without a fault.
    def prepare(self, mutations: Sequence[Mutation]) -> None:
        """Builds what the faults need, and demands that their tests pass.

        Raises:
            Broken: they do not, or something is not there.
        """
        if (self.tree / "CMakeLists.txt").exists():
            self.configure()
            self.make((PACKAGE, ON_HOST))
            shutil.copytree(self.build, self.whole)
        files = sorted({test.partition("::")[0] for m in mutations for test in m.tests})
        options = ("-o", "addopts=", "--collect-only", "-q", "-p", "no:cacheprovider")
        code, text = run([sys.executable, "-m", "pytest", *options, *files], self.tree, SECONDS)
        if code != PASSED:
            raise Broken(f"the tests cannot be collected:\n{text[-2000:]}")
        self.ids = [line for line in text.splitlines() if "::" in line]
        patterns = dict.fromkeys(test for m in mutations for test in m.tests)
        tests = matching(patterns, self.ids)
        outcome = self.test(tests, seconds=SECONDS + 5 * len(tests), stop=False)
        if outcome.trouble or outcome.failed:
            what = outcome.trouble or ", ".join(outcome.failed)
            raise Broken(f"without any fault the tests do not pass: {what}")
        # A test that is skipped here catches nothing.
        self.ids = [i for i in self.ids if not i.endswith(tuple(f"::{m}" for m in outcome.missed))]

    def configure(self) -> None:
        """With one instruction-set level and little optimisation: what matters is correctness."""
        tools = Path(sys.executable).parent
        code, where = run([tools / "pybind11-config", "--cmakedir"], self.tree, SECONDS)
        command = [
            *(tools / "cmake", "-GNinja", "-S", self.tree, "-B", self.build),
            f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={where.strip()}",
            "-DTRT_KERNELS_WITH_TESTS=ON",
            "-DTRT_KERNELS_ONLY_BASELINE=ON",
            "-DTRT_KERNELS_OPTIMIZE=1",
            "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
            "-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF",  # linking would take as long as compiling
        ]
        code, text = run(command, self.tree, BUILD_SECONDS)
        if code:
            raise Broken(f"cmake: {text[-2000:]}")

    def make(self, targets: Iterable[str]) -> None:
        """Builds targets, and puts the package's module into the package."""
        cmake = Path(sys.executable).parent / "cmake"
        code, text = run(
            [cmake, "--build", self.build, "--target", *targets], self.tree, BUILD_SECONDS
        )
        if code != 0:
            errors = [line for line in text.splitlines() if "error" in line.lower()]
            raise Broken(f"does not compile: {(errors or text.splitlines() or ['?'])[0]}")
        self.install()

    def install(self) -> None:
        for module in self.build.glob(f"{PACKAGE}.*"):
            # Not over the old one, which a process that is ending may still have mapped.
            (self.tree / "trt_kernels" / module.name).unlink(missing_ok=True)
            shutil.copy2(module, self.tree / "trt_kernels" / module.name)

    def test(self, tests: Sequence[str], seconds: float, stop: bool = True) -> Outcome:
        """Runs tests by their ids."""
        self.results.unlink(missing_ok=True)
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={self.results}", "--tb=short"]
        if stop:
            options.append("-x")
        command = [sys.executable, "-m", "pytest", *options, *tests]
        code, text = run(command, self.tree, seconds)
        if code is None:
            return Outcome((), (), f"the tests took more than {seconds:.0f} seconds")
        if code not in (PASSED, FAILED) or not self.results.is_file():
            last = [line for line in text.splitlines() if line.strip()] or ["nothing was said"]
            return Outcome((), (), f"pytest returned {code}: {last[-1]}")
        by_kind: dict[str, list[str]] = {"failure": [], "error": [], "skipped": []}
        count = 0
        for case in ElementTree.parse(self.results).iter("testcase"):
            count += 1
            for kind, names in by_kind.items():
                if case.find(kind) is not None:
                    names.append(str(case.get("name")))
        failed, errors, skipped = map(tuple, by_kind.values())
        trouble = ""
        if errors:
            trouble = f"no test failed, but what comes before or after it: {errors[0]}"
        elif count == len(skipped):
            trouble = "no test ran"
        return Outcome(failed, skipped, trouble)

    # --- With one.
    def check(self, mutation: Mutation) -> Result:
        """Puts a fault in, runs its tests, and takes it out."""
        began = time.perf_counter()
        try:
            verdict, detail = self.verdict_of(mutation)
        except Broken as error:
            verdict, detail = "broken", str(error)
        return Result(mutation.name, verdict, detail, time.perf_counter() - began)

    def verdict_of(self, mutation: Mutation) -> tuple[str, str]:
        path = self.tree / mutation.file
        tests = matching(mutation.tests, self.ids)
        before, about = path.read_text(), path.stat()
        targets = targets_of(mutation, tests)
        path.write_text(mutation.apply(before))
        try:
            if targets:
                self.make(targets)
            outcome = self.test(tests, SECONDS)
        finally:
            path.write_text(before)
            os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
            if targets:  # back from the copy: compiling it again would take as long
                shutil.rmtree(self.build)
                shutil.copytree(self.whole, self.build)
                self.install()
        if outcome.trouble:
            raise Broken(outcome.trouble)
        if outcome.failed:
            return "caught", outcome.failed[0]
        return "survived", f"{len(tests)} tests passed"


def targets_of(mutation: Mutation, tests: Sequence[str]) -> tuple[str, ...]:
    """What has to be built anew for a fault's tests."""
    if mutation.targets is not None:
        return mutation.targets
    if not mutation.file.startswith(NATIVE):
        return ()
    if mutation.file.startswith("csrc/cpu/"):
        return (PACKAGE,)
    if mutation.file.startswith("csrc/cuda/"):
        return (ON_HOST,)
    on_host = any("cuda" in test for test in tests)
    return (PACKAGE, ON_HOST) if on_host else (PACKAGE,)


def table(results: Sequence[Result], mutations: Sequence[Mutation]) -> str:
    """The results in Markdown."""
    about = {m.name: m for m in mutations}
    lines = ["| fault | file | what it is | verdict | by |", "|---|---|---|---|---|"]
    for r in results:
        m = about[r.name]
        cells = (f"`{r.name}`", f"`{m.file}`", m.what, r.verdict, f"`{r.detail}`")
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def summary(results: Sequence[Result]) -> str:
    count = Counter(r.verdict for r in results)
    kinds = ", ".join(f"{count[kind]} {kind}" for kind in ("caught", "survived", "broken"))
    return f"{len(results)} faults: {kinds}"


def report(results: Sequence[Result], mutations: Sequence[Mutation], commit: str) -> str:
    return (
        "# Deliberate faults, and the tests that catch them\n\n"
        f"By `python -m tests.mutations` (`make mutate`), {date.today()}, at {commit}.\n"
        f"{summary(results)}.\n\n{table(results, mutations)}"
    )


def try_all(
    root: Path, files: Iterable[str], mutations: Sequence[Mutation], quiet: bool = False
) -> list[Result]:
    """The verdict of every fault.

    Raises:
        Broken: the tests do not pass without a fault.
    """
    with tempfile.TemporaryDirectory(prefix="mutations-", ignore_cleanup_errors=True) as folder:
        workshop = Workshop(root, Path(folder), files)
        print("without a fault: building, and running all of the tests", file=sys.stderr)
        workshop.prepare(mutations)
        results = []
        bar = tqdm(mutations, unit="fault", disable=True if quiet else None)  # None: off a terminal
        for mutation in bar:
            bar.set_postfix_str(mutation.name)
            result = workshop.check(mutation)
            results.append(result)
            text = f"{result.verdict:9} {result.name} ({result.seconds:.0f} s): {result.detail}"
            bar.write(text, file=sys.stderr)
        return results


def main(argv: Sequence[str] | None = None) -> int:
    """Tries the faults; 1 where one is not caught."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone")
    parser.add_argument("--list", action="store_true", help="print the faults and do nothing")
    parser.add_argument("--out", type=Path, help="a file for the report, in Markdown")
    args = parser.parse_args(argv)
    known = {m.name: m for m in FAULTS}
    if unknown := [name for name in args.only or () if name not in known]:
        parser.error(f"argument --only: there is no fault {unknown[0]}")
    chosen = [known[name] for name in args.only] if args.only else list(FAULTS)
    if args.list:
        for m in chosen:
            print(f"{m.name:32} {m.file}: {m.what}")
        return 0
    # A termination ends as Ctrl-C does: what was started is ended, and the copy removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results = try_all(ROOT, files_of(ROOT), chosen)
    except Broken as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the working tree is as it was")
    print(table(results, chosen))
    print(summary(results))
    if args.out:
        show = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(show, cwd=ROOT, capture_output=True, text=True)
        args.out.write_text(report(results, chosen, done.stdout.strip() or "no commit"))
    return int(any(r.verdict != "caught" for r in results))


if __name__ == "__main__":
    sys.exit(main())
