"""Reads the records of measured cases back from JSON: pytest-benchmark's, or a saved run's."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Parts of a training step, in the order of tables and plots.
CONVOLUTION, NORM, NEURONS = "convolution", "BatchNorm", "LIF (or ReLU)"
BLOCK = "BatchNorm + LIF"
REGULARIZER, LOSS, OPTIMIZER = "regularizer", "loss", "optimizer"
COMPILED, OTHER, IDLE = "compiled", "other", "idle"
PARTS = (CONVOLUTION, NORM, NEURONS, BLOCK, REGULARIZER, LOSS, OPTIMIZER, COMPILED, OTHER, IDLE)


@dataclass(frozen=True)
class Record:
    """One measured case, as `measure` stored it."""

    info: dict[str, Any]

    @property
    def table(self) -> str:
        return str(self.info["table"])

    @property
    def case(self) -> str:
        return str(self.info["case"])

    @property
    def others(self) -> dict[str, dict[str, Any]]:
        """The results of every variant but ours."""
        variants = self.info["variants"]
        return {name: result for name, result in variants.items() if name != self.info["ours"]}

    @property
    def ours(self) -> dict[str, Any]:
        """The result of ours."""
        result: dict[str, Any] = self.info["variants"][self.info["ours"]]
        return result

    @property
    def seconds(self) -> float:
        """Our median."""
        return float(self.ours["median"])

    @property
    def bandwidth(self) -> float:
        """Bytes a second that ours moves by the byte model."""
        return float(self.info["moved"]) / self.seconds

    @property
    def of_copy(self) -> float:
        """Our bandwidth as a fraction of a copy's in the same run."""
        copy = self.info["copy"]
        return self.bandwidth * float(copy["median"]) / float(copy["moved"])

    def ratio(self, name: str) -> float | None:
        """How many times slower than ours a variant is; None where it was not measured."""
        result = self.others.get(name)
        return None if result is None else float(result["median"]) / self.seconds

    def kept(self, result: dict[str, Any]) -> float | None:
        """Bytes that a variant keeps for its backward pass, per element."""
        return result["kept"] / self.info["elements"] if "kept" in result else None

    def parts(self, result: dict[str, Any]) -> dict[str, float]:
        """Seconds of the parts of a step, together its median.

        On a CPU they are the shares of one profiled step; on a GPU its kernels, and it is idle for
        the rest.
        """
        parts: dict[str, float] = result.get("parts", {})
        median, total = float(result["median"]), sum(parts.values())
        if self.info.get("device") == "cuda" and total < median:
            return {**parts, IDLE: median - total} if parts else {}
        return {name: seconds / total * median for name, seconds in parts.items()}

    def disturbed(self, result: dict[str, Any]) -> float | None:
        """Seconds of the profiled step, where they are far from the median on a CPU."""
        total = sum(result.get("parts", {}).values())
        far = abs(total / float(result["median"]) - 1) > 0.25
        return total if total and far and self.info.get("device") != "cuda" else None


@dataclass(frozen=True)
class Run:
    """Everything that one or several JSON files hold."""

    records: list[Record]
    machine: str
    date: str

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU was measured."""
        return any(record.info.get("device") == "cuda" for record in self.records)

    def copy_bandwidth(self) -> float | None:
        """Bytes a second of the largest copies, read and written together: their median."""
        copies = [record.info["copy"] for record in self.records]
        largest = max((copy["moved"] for copy in copies), default=0)
        rates = [c["moved"] / c["median"] for c in copies if c["moved"] >= largest / 2]
        return statistics.median(rates) if rates else None

    def of(self, table: str, **about: Any) -> list[Record]:
        """The records of the tables whose name begins so, with these facts in their `about`."""
        return [
            r
            for r in self.records
            if r.table.startswith(table) and all(r.info.get(k) == v for k, v in about.items())
        ]

    def save(self, path: Path) -> None:
        """Writes what `read` needs and no single rounds, a case a line: small enough to commit."""
        about = json.dumps({"machine": self.machine, "date": self.date}, ensure_ascii=False)
        cases = ",\n".join(json.dumps(r.info, ensure_ascii=False) for r in self.records)
        path.write_text(f'{about[:-1]}, "records": [\n{cases}\n]}}\n')


def read(paths: Iterable[Path]) -> Run:
    """Reads JSON files of `pytest --benchmark-json`, and those of runs that were saved.

    Of one case measured twice the last counts.
    """
    records: dict[tuple[str, str], Record] = {}
    machines: dict[str, None] = {}
    dates: dict[str, None] = {}
    for path in paths:
        data = json.loads(Path(path).read_text())
        if "records" in data:
            machine, date, cases = data["machine"], data["date"], data["records"]
        else:
            machine, date = machine_line(data["machine_info"]), data.get("datetime", "")[:10]
            cases = [benchmark["extra_info"] for benchmark in data["benchmarks"]]
        machines[machine] = None
        dates[date] = None
        for record in map(Record, cases):
            if "variants" in record.info:
                records[record.table, record.case] = record
    return Run(list(records.values()), "; ".join(machines), ", ".join(dates))


def machine_line(info: dict[str, Any]) -> str:
    """Processor, threads, instruction-set level and torch version of a run, or its GPU."""
    if "gpu" in info:
        return gpu_line(info["gpu"])
    cpu = info.get("cpu", {})
    ours = info.get("trt_kernels", {})
    return ", ".join(
        (
            str(cpu.get("brand_raw") or info.get("machine", "unknown processor")),
            counted(cpu.get("count", "?"), "core"),
            counted(ours.get("threads", "?"), "thread"),
            str(ours.get("level", "?")),
            f"torch {ours.get('torch', '?')}",
        )
    )


def gpu_line(gpu: dict[str, Any]) -> str:
    """Name, driver and versions."""
    return (
        f"{gpu['name']}, driver {gpu['driver']}, torch {gpu['torch']}, CUDA {gpu['cuda']}, "
        f"Triton {gpu['triton']}"
    )


def counted(number: Any, noun: str) -> str:
    """1 thread, 2 threads."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
