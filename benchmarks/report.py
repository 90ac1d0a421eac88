"""Turns the JSON of a benchmark run into a Markdown report and plots, and into a smaller JSON.

python -m benchmarks.report IN.json [MORE.json ...] --out DIR
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.records import PARTS, Record, Run, read
from benchmarks.targets import STEP, Finding, findings

LEGEND = (
    "`N×`: times slower than ours, by the medians of runs in turn (below 1: faster). "
    "In brackets: bytes kept for the backward pass, per element. "
    "GB/s: the bytes that must move at least, divided by our time; `of copy`: that bandwidth over "
    "the bandwidth of a copy of the same tensor in the same run."
)

GPU_LEGEND = (
    "Times are those between two events on the GPU, launches hidden behind a kernel that waits; "
    "of small calls and where a table says so by wall clock, Python and launches included; under "
    "graph replay those of the kernels alone. A copy is one from device to device of as many bytes "
    "as the case moves."
)


def duration(seconds: float) -> str:
    """1.23 s, 4.56 ms or 7.89 µs."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def times(ratio: float) -> str:
    """1.23×, 12.3× or 123×."""
    digits = 2 if ratio < 10 else 1 if ratio < 100 else 0
    return f"{ratio:.{digits}f}×"


def size(number: float) -> str:
    """1.23 GB, 4.56 MB or 7.89 kB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def result_line(info: dict[str, Any]) -> str:
    """One case in one line, for the terminal."""
    record = Record(info)
    parts = [
        f"{info['ours']} {duration(record.seconds)}, {record.bandwidth / 1e9:.3g} GB/s "
        f"({record.of_copy:.0%} of a copy)"
    ]
    parts += [f"{name} {times(record.ratio(name) or 0)}" for name in record.others]
    parts += [f"{name} skipped: {reason}" for name, reason in info["skipped"].items()]
    parts += [f"{name} timed with the host's launches" for name in info.get("host_timed", ())]
    parts += [f"{name} FAILED: {reason}" for name, reason in info.get("failed", {}).items()]
    return "; ".join(parts)


def table(records: list[Record]) -> Iterator[str]:
    """A table of cases with the same kind of variants."""
    columns = list(dict.fromkeys(name for record in records for name in record.others))
    has_kept = any("kept" in record.ours for record in records)
    ours = records[0].info["ours"]
    element = records[0].info["element"]
    has_bytes = any("clock" in record.info for record in records)
    head = ["case", ours, *(["bytes"] if has_bytes else []), "GB/s", "of copy"]
    head += [f"kept, B/{element}"] if has_kept else []
    yield row([*head, *columns])
    yield row(["---", *["---:"] * (len(head) + len(columns) - 1)])
    for record in records:
        cells = [
            record.case,
            duration(record.seconds),
            *([size(record.info["moved"])] if has_bytes else []),
            f"{record.bandwidth / 1e9:.3g}",
            f"{record.of_copy:.0%}",
        ]
        if has_kept:
            cells.append(number(record.kept(record.ours)))
        yield row([*cells, *(cell(record, name) for name in columns)])


def step_table(records: list[Record]) -> Iterator[str]:
    """A line for every variant of a training step, with the shares of its parts."""
    every = [r.parts(result) for r in records for result in r.info["variants"].values()]
    parts = [part for part in PARTS if any(part in each for each in every)]
    called = "kernels" if any("launches" in record.ours for record in records) else "operations"
    yield row(["case", "", "time", "÷ ours", "peak", "kept", called, *parts])
    yield row(["---", "---", *["---:"] * (5 + len(parts))])
    for record in records:
        for name, result in record.info["variants"].items():
            own = record.parts(result)
            count = result.get("launches", result.get("operations", ""))
            yield row(
                [
                    record.case,
                    name,
                    duration(result["median"]),
                    times(result["median"] / record.seconds),
                    *(size(result[key]) if key in result else "" for key in ("peak", "kept")),
                    f"{count:,}" if count else "",
                    *(f"{own[p] / result['median']:.1%}" if p in own else "" for p in parts),
                ]
            )


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def cell(record: Record, name: str) -> str:
    """Ratio and kept bytes of a variant, or why it is missing."""
    result = record.others.get(name)
    if result is None:
        if name in record.info.get("failed", {}):
            return "**failed**"
        return "skipped" if name in record.info["skipped"] else ""
    kept = record.kept(result)
    return times(record.ratio(name) or 0) + ("" if kept is None else f" ({kept:.3g} B)")


def notes(records: list[Record]) -> Iterator[str]:
    """Compile times, and what was left out."""
    for record in records:
        for name, result in record.info["variants"].items():
            profiled = record.disturbed(result)
            if profiled is not None:
                yield (
                    f"{record.case}: the parts of {name} are the shares of a step that took "
                    f"{duration(profiled)} under the profiler."
                )
            if "compile" in result:
                seconds = result["compile"]
                yield f"{record.case}: {name} took {seconds:.1f} s to compile, not counted above."
    skipped = {
        f"{name} left out: {reason}"
        for record in records
        for name, reason in record.info["skipped"].items()
    }
    yield from sorted(skipped)
    for record in records:
        for name, reason in record.info.get("failed", {}).items():
            yield f"**{record.case}: {name} failed: {reason}**"
        for name in record.info.get("host_timed", ()):
            yield f"**{record.case}: {name} timed with the host's launches, not the GPU alone**"
        for key, value in record.info.items():
            if key.startswith("launches, "):
                yield f"{record.case}: kernel launches of {key.removeprefix('launches, ')}: {value}"


def targets(run: Run) -> Iterator[str]:
    """How many targets are met, and each with its measured value."""
    verdicts = [verdict(f).strip("*") for f in findings(run)]
    if run.on_gpu:
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
        yield from (f"{counts}.", "")
    yield row(["target", "case", "measured", "bound", ""])
    yield row(["---", "---", "---:", "---", "---"])
    for f in findings(run):
        yield row([f.target, f.what, number(f.value), f.bound, verdict(f)])


def verdict(finding: Finding) -> str:
    if finding.value is None:
        return "not measured"
    return "met" if finding.met else "**missed**"


def markdown(run: Run) -> str:
    """The whole report."""
    lines = ["# Benchmarks of trt_kernels", "", f"{run.machine}; {run.date}.", "", LEGEND]
    lines += tables(run)
    return "\n".join(lines) + "\n"


def tables(run: Run) -> Iterator[str]:
    """A section for every kind of case, and one for the targets."""
    if run.on_gpu:
        bandwidth = run.copy_bandwidth()
        yield from ("", GPU_LEGEND)
        yield from ("", f"Bandwidth of the largest copies: {(bandwidth or 0) / 1e9:.4g} GB/s.")
    for name in dict.fromkeys(record.table for record in run.records):
        records = [record for record in run.records if record.table == name]
        lines = step_table(records) if name == STEP else table(records)
        yield from ("", f"## {name}", "", *lines)
        remarks = list(notes(records))
        if remarks:
            yield from ("", *(f"* {note}" for note in remarks))
    yield from ("", "## Targets", "", *targets(run))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", type=Path, help="JSON of pytest --benchmark-json")
    parser.add_argument("--out", type=Path, default=Path("out"), help="directory of the report")
    options = parser.parse_args(arguments)
    run = read(options.inputs)
    if not run.records:
        parser.error("no measured case in the input: look at the benchmark run for failures")
    options.out.mkdir(parents=True, exist_ok=True)
    text = markdown(run)
    (options.out / "report.md").write_text(text)
    run.save(options.out / "report.json")
    print(text)
    from benchmarks.plots import draw  # not at the top: tables need no matplotlib

    for path in draw(run, options.out):
        print(path)


if __name__ == "__main__":
    main()
