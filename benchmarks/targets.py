"""The project's performance targets, each judged from the records of a run."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from benchmarks.records import REGULARIZER, Record, Run

TRAINING = "lif, forward and backward"
SURROGATES = "lif, surrogates"
SMALL = "lif, small call"
PENALTY = "trt_penalty, forward and backward"
LOSS = "temporal_loss, forward and backward"
INFERENCE = "lif, inference"
BACKWARD = "lif, backward"
STEPS = "lif, more and more steps"
BITS = "lif, bits of the CPU"
WALL_PENALTY = "trt_penalty, wall clock"
BLOCK = "batch_norm_lif, forward and backward"
BLOCK_INFERENCE = "batch_norm_lif, inference"
CONSTANT_BLOCK = "batch_norm_lif, constant current"
LEARNED = "lif, learned decay and threshold"
PLIF = "lif, learned time constant (PLIF)"
TWO_BITS = "lif, two bits for the backward pass"
CONSTANT = "lif, constant current"
RATES = "lif, rates of every step"
PACKED = "a network with packed spikes"
ACCELERATED = "accelerate, networks of SpikingJelly"
STEP = "a training step"
ACCELERATED_STEPS = "accelerate, a loop over time of snnTorch"
# Variants that targets ask for.
AS_IT_IS = "as it is"
SEPARATE = "BatchNorm2d + lif"
SEPARATE_NETWORK = "BatchNorm2d + LIF"
OFFICIAL_STEP = "official"
RELU_STEP = "ReLU network"


@dataclass(frozen=True)
class Finding:
    """One number held to a bound: at most `limit`, or at least. None: it was not measured."""

    target: str
    what: str
    value: float | None
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def bound(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g}"


def findings(run: Run) -> Iterator[Finding]:
    """Every target that the run measured, and of those that are listed also what it did not."""
    if run.on_gpu:
        yield from listed(GPU_TARGETS, run)
        return
    yield from against_relu(run)
    yield from against_others(run)
    yield from surrogates(run)
    yield from penalty(run)
    yield from memory(run)
    yield from overhead(run)
    yield from listed(CPU_TARGETS, run)


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


# --- Targets that are listed whether they were measured or not.
Measurements = Iterator[tuple[str, float]]  # case, number
FASTEST_PEER = ("SpikingJelly cuda", "SpikingJelly triton")


@dataclass(frozen=True)
class Target:
    """A bound, and the numbers of a run that are held to it."""

    name: str
    limit: float
    numbers: Callable[[Run], Measurements]
    at_least: bool = False

    def findings(self, run: Run) -> Iterator[Finding]:
        numbers = list(self.numbers(run)) or [("", None)]
        for case, value in numbers:
            yield Finding(self.name, case, value, self.limit, self.at_least)


def listed(targets: Iterable[Target], run: Run) -> Iterator[Finding]:
    """Every target; one without a measurement has no value."""
    for target in targets:
        yield from target.findings(run)


def of_copy(table: str) -> Callable[[Run], Measurements]:
    """Our bandwidth as a fraction of a copy's."""
    return lambda run: ((r.case, r.of_copy) for r in run.of(table))


def slower_than(table: str, name: str) -> Callable[[Run], Measurements]:
    """Our time over that of a variant."""

    def numbers(run: Run) -> Measurements:
        for record in run.of(table):
            ratio = record.ratio(name)
            if ratio:
                yield record.case, 1 / ratio

    return numbers


def times_ours(table: str, *names: str, **about: object) -> Callable[[Run], Measurements]:
    """The time of the fastest of these variants over ours."""

    def numbers(run: Run) -> Measurements:
        for record in run.of(table, **about):
            ratios = [ratio for name in names if (ratio := record.ratio(name)) is not None]
            if ratios:
                yield record.case, min(ratios)

    return numbers


def of_peer(run: Run) -> Measurements:
    """Our time of a small call over that of the fastest SpikingJelly."""
    for case, ratio in times_ours(SMALL, *FASTEST_PEER, clock="wall")(run):
        yield case, 1 / ratio


def of_peers_memory(run: Run) -> Measurements:
    """Bytes that we keep over those that SpikingJelly keeps, the frugalest of its kernels."""
    for record in run.of(TRAINING):
        others = [record.others[name] for name in FASTEST_PEER if name in record.others]
        kept = [number for other in others if (number := record.kept(other))]
        ours = record.kept(record.ours)
        if kept and ours is not None:
            yield record.case, ours / min(kept)


def between_steps(run: Run) -> Measurements:
    """The dearest neuron-step over the cheapest, among as many of them in few and in many steps."""
    for dtype in dict.fromkeys(record.info.get("dtype") for record in run.of(STEPS)):
        records = run.of(STEPS, dtype=dtype)
        each = [record.seconds / record.info["elements"] for record in records]
        if len(each) > 1:
            steps = [record.info["steps"] for record in records]
            suffix = f", {dtype.removeprefix('torch.')}" if dtype else ""
            yield f"T = {min(steps)} to {max(steps)}{suffix}", max(each) / min(each)


def bytes_kept(table: str) -> Callable[[Run], Measurements]:
    """Bytes that we keep per element."""

    def numbers(run: Run) -> Measurements:
        for record in run.of(table):
            kept = record.kept(record.ours)
            if kept is not None:
                yield record.case, kept

    return numbers


def kept_beyond_x(run: Run) -> Measurements:
    """Bytes a neuron-step that we keep of long and short sequences beside x."""
    for record in run.of(STEPS):
        kept = record.kept(record.ours)
        if kept is not None:
            yield record.case, kept - (4 if record.info.get("dtype") == FLOAT32 else 2)


def block_kept(run: Run) -> Measurements:
    """Bytes that the block keeps over those of x."""
    for record in (*run.of(BLOCK), *run.of(CONSTANT_BLOCK)):
        if "kept" in record.ours:
            yield record.case, record.ours["kept"] / record.info["x"]


def network_kept(run: Run) -> Measurements:
    """Bytes that a network of our blocks keeps, packed, over those of two layers each, unpacked."""
    for record in run.of(PACKED):
        usual = record.others.get(SEPARATE_NETWORK, {}).get("kept")
        if usual and "kept" in record.ours:
            yield record.case, record.ours["kept"] / usual


def of_official(fact: str) -> Callable[[Run], Measurements]:
    """What our step keeps, or has alive at its peak, over what the official one does."""

    def numbers(run: Run) -> Measurements:
        for record in run.of(STEP):
            usual = record.others.get(OFFICIAL_STEP, {}).get(fact)
            if usual and fact in record.ours:
                yield record.case, record.ours[fact] / usual

    return numbers


def of_regularizer(run: Run) -> Measurements:
    """The regularizer's share of our step."""
    for record in run.of(STEP):
        parts = record.parts(record.ours)
        if parts:
            yield record.case, parts.get(REGULARIZER, 0.0) / sum(parts.values())


def between_backends(run: Run) -> Measurements:
    """The slower of our backends over the faster."""
    for table in (TRAINING, INFERENCE, BACKWARD, BLOCK):
        for record in run.of(table):
            ratio = record.ratio("ours triton")
            if ratio:
                yield f"{table.removeprefix('lif, ')} {record.case}", max(ratio, 1 / ratio)


def kept_beyond_parameters(run: Run) -> Measurements:
    for record in run.of(PENALTY):
        kept = record.kept(record.ours)
        if kept is not None:
            yield record.case, kept - 4.0


def kernel_launches(run: Run) -> Measurements:
    for record in run.of(WALL_PENALTY):
        for key, count in record.info.items():
            if key.startswith("launches, ") and isinstance(count, int):
                yield f"{record.case}, {key.removeprefix('launches, ')}", count


def wrong_backends(run: Run) -> Measurements:
    """0 for each variant whose spikes and potentials are those of the CPU, 1 for others."""
    for record in run.of(BITS):
        for name in record.info["checked"]:
            yield f"{record.case}, {name}", 0
        for name in record.info.get("failed", {}):
            yield f"{record.case}, {name}", 1


FLOAT32, BFLOAT16 = "torch.float32", "torch.bfloat16"
MEMORY_TARGETS = (
    Target("`batch_norm_lif` keeps ÷ x", 1.05, block_kept),
    Target("`lif` with two bits keeps, B per neuron-step", 0.25, bytes_kept(TWO_BITS)),
    Target("`lif` of any T keeps beside x, B per neuron-step", 0.25, kept_beyond_x),
    # 4.125 of 12 bytes a neuron-step, in half precision 2.0625 of 6; and images and parameters.
    Target("packed network of fused blocks keeps ÷ usual network", 0.36, network_kept),
)
CPU_TARGETS = (
    Target("network ÷ accelerated network", 1.0, times_ours(ACCELERATED, AS_IT_IS), True),
    Target(
        "loop of single steps ÷ accelerated", 2.0, times_ours(ACCELERATED_STEPS, AS_IT_IS), True
    ),
    Target(f"{SEPARATE} ÷ `batch_norm_lif` time", 1.5, times_ours(BLOCK, SEPARATE), True),
    Target("`lif`, dearest ÷ cheapest neuron-step", 1.15, between_steps),
    Target("official training step ÷ ours", 1.6, times_ours(STEP, OFFICIAL_STEP), True),
    Target("our training step keeps ÷ the official one", 1 / 3, of_official("kept")),
    *MEMORY_TARGETS,
)
GPU_TARGETS = (
    Target("`lif` forward, fraction of copy bandwidth", 0.92, of_copy(INFERENCE), True),
    Target("`lif` backward, fraction of copy bandwidth", 0.90, of_copy(BACKWARD), True),
    Target("`lif` time ÷ `torch.relu` time", 1.05, slower_than(TRAINING, "relu")),
    Target(
        "SpikingJelly's fastest ÷ `lif`, float32",
        1.1,
        times_ours(TRAINING, *FASTEST_PEER, dtype=FLOAT32),
        True,
    ),
    Target(
        "SpikingJelly's fastest ÷ `lif`, bfloat16",
        1.5,
        times_ours(TRAINING, *FASTEST_PEER, dtype=BFLOAT16),
        True,
    ),
    Target("SpikingJelly under AMP ÷ `lif`", 5.0, times_ours(TRAINING, "SpikingJelly AMP"), True),
    Target("`lif` keeps ÷ SpikingJelly keeps", 0.5, of_peers_memory),
    Target("`lif` ÷ SpikingJelly's fastest, small layers, time of a call", 0.5, of_peer),
    Target("`lif`, dearest ÷ cheapest neuron-step", 1.15, between_steps),
    Target("`lif`, slower ÷ faster of CUDA and Triton", 1.10, between_backends),
    Target("variants whose bits differ from the CPU's", 0, wrong_backends),
    Target("`trt_penalty`, kernel launches", 2, kernel_launches),
    Target(
        "`trt_penalty` ÷ a copy of its bytes",
        1.5,
        lambda run: ((r.case, 1 / r.of_copy) for r in run.of(PENALTY, steps=6)),
    ),
    Target(
        "official loop ÷ `trt_penalty`, time of a call",
        100.0,
        times_ours(WALL_PENALTY, "official loop"),
        True,
    ),
    Target("`trt_penalty` keeps beside the parameters, B each", 0, kept_beyond_parameters),
    Target("`batch_norm_lif`, fraction of copy bandwidth", 0.85, of_copy(BLOCK), True),
    Target("official training step ÷ ours", 2.5, times_ours(STEP, OFFICIAL_STEP), True),
    Target("our training step's peak memory ÷ the official one's", 1 / 3, of_official("peak")),
    Target("our training step ÷ the same with ReLU", 1.15, slower_than(STEP, RELU_STEP)),
    Target("the regularizer's share of our training step", 0.01, of_regularizer),
    *MEMORY_TARGETS,
)
