"""The project's performance targets, each judged from the records of a run."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.records import Record, Run

TRAINING = "lif, forward and backward"
SURROGATES = "lif, surrogates"
SMALL = "lif, small call"
PENALTY = "trt_penalty, forward and backward"
LOSS = "temporal_loss, forward and backward"


@dataclass(frozen=True)
class Finding:
    """One number held to a bound: at most `limit`, or at least."""

    target: str
    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def bound(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g}"


def findings(run: Run) -> Iterator[Finding]:
    """Every target that the run measured; what it did not measure is not judged."""
    yield from against_relu(run)
    yield from against_others(run)
    yield from surrogates(run)
    yield from penalty(run)
    yield from memory(run)
    yield from overhead(run)


def against_relu(run: Run) -> Iterator[Finding]:
    limits = {(4, 1 << 20): 1.5, (6, 1 << 20): 1.5, (100, 16384): 2.0, (1000, 4096): 2.0}
    for (steps, neurons), limit in limits.items():
        for record in run.of(TRAINING, steps=steps, neurons=neurons):
            slower = record.ratio("relu")
            if slower:
                yield Finding("`lif` time ÷ `torch.relu` time", record.case, 1 / slower, limit)


def against_others(run: Run) -> Iterator[Finding]:
    short = {"compiled loop": 1.4, "SpikingJelly": 4.5, "snnTorch": 7.0, "official loop": 7.0}
    long = {"SpikingJelly": 15.0, "snnTorch": 15.0, "official loop": 15.0}
    for record in run.of(TRAINING):
        steps = record.info["steps"]
        for name, limit in (short if steps <= 10 else long if steps == 100 else {}).items():
            ratio = record.ratio(name)
            if ratio is not None:
                yield Finding(f"{name} time ÷ `lif` time", record.case, ratio, limit, at_least=True)


def surrogates(run: Run) -> Iterator[Finding]:
    for record in run.of(SURROGATES):
        for name in ("sigmoid", "atan"):
            ratio = record.ratio(name)
            if ratio is not None:
                yield Finding(f"{name} time ÷ triangle time", record.case, ratio, 1.3)


def penalty(run: Run) -> Iterator[Finding]:
    for record in run.of(PENALTY, steps=6, network="ResNet-19"):
        for name in ("compiled closed form", "compiled, own derivative"):
            slower = record.ratio(name)
            if slower:
                yield Finding(f"`trt_penalty` time ÷ {name} time", record.case, 1 / slower, 1.0)
        ratio = record.ratio("official loop")
        if ratio is not None:
            yield Finding(
                "official loop time ÷ `trt_penalty` time", record.case, ratio, 40.0, at_least=True
            )


def memory(run: Run) -> Iterator[Finding]:
    for record in run.of("lif, "):
        if record.table.startswith((TRAINING, "lif, half")):
            size = 4.0 if "float32" in record.case else 2.0
            yield from kept("`lif` keeps, B per neuron-step", record, size)
    for record in run.of(PENALTY):
        yield from kept("`trt_penalty` keeps, B per parameter", record, 4.0)
    for record in run.of(LOSS):
        # The logits, a number a row, and the target itself.
        beside = 4 * record.info["rows"] + record.info["targets"]
        elements = record.info["elements"]
        limit = (4 * elements + beside) / elements
        yield from kept("`temporal_loss` keeps, B per logit", record, limit)


def kept(target: str, record: Record, limit: float) -> Iterator[Finding]:
    value = record.kept(record.ours)
    if value is not None:
        yield Finding(target, record.case, value, limit)


def overhead(run: Run) -> Iterator[Finding]:
    for record in run.of(SMALL):
        slower = record.ratio("do-nothing Function")
        if slower:
            yield Finding("`lif` time ÷ do-nothing Function time", record.case, 1 / slower, 1.5)
