"""The data sets of the paper from a local folder, and two that every machine has.

    name          samples                        read by                  below --data-root
    cifar10       images [3, 32, 32]             torchvision              cifar-10-batches-py/
    cifar100      images [3, 32, 32]             torchvision              cifar-100-python/
    imagenet100   images [3, 224, 224]           torchvision              train/CLASS/*, val/CLASS/*
    dvs-cifar10   frames [T, 2, 48, 48]          tonic and torchvision    CIFAR10DVS/CLASS/*.aedat4
    n-caltech101  frames [T, 2, 48, 48]          tonic and torchvision    Caltech101/CLASS/*.bin
    digits        images [1, 8, 8]               scikit-learn, which has them
    digit-events  frames [T, 2, 16, 16]          the digits, seen through saccades

Nothing is downloaded. Images are prepared and augmented as in the official code (arXiv 2506.19256).
Of events there, frames of DVS-CIFAR10 pass through 8-bit pictures, N-Caltech101's are not shifted
to the origin, and all samples of a run share one random affine map and cutout; here frames are
resized as they are, and every sample draws its own.

What a sample draws depends on the seed, the epoch and the sample alone. So an epoch is the same
whichever process, worker or resumed run makes it.
"""

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset, default_collate

from examples.checkpoint import write
from examples.parallel import share
from examples.saccades import saccades

Transform = Callable[[Tensor], Tensor]
FRAME = 48  # height and width of an event camera's frames, which come with more


class DataError(Exception):
    """A data set that is not where it should be, or cannot be read."""


@dataclass(frozen=True)
class Data:
    """Samples (x, label): x an image [C, H, W], or a sequence of frames [T, C, H, W].

    Those for training are complete only after `augment`.
    """

    train: "Dataset[Any]"
    test: "Dataset[Any]"
    classes: int
    channels: int
    size: int
    frames: bool
    augment: Transform | None = None


def load(name: str, root: Path | None, steps: int) -> Data:
    """A data set by its name; `steps` is T, the number of frames that events are counted in.

    Raises:
        DataError: it is not there, and what is expected where; or a package is missing.
    """
    return LOADERS[name](root, steps)


def load_digits(root: Path | None, steps: int) -> Data:
    images, labels, rows = digits()
    train, test = (TensorDataset(images[part], labels[part]) for part in rows)
    return Data(train, test, 10, 1, 8, False, lambda image: rolled(F.pad(image, (1,) * 4), 1, 1))


def load_digit_events(root: Path | None, steps: int) -> Data:
    """The digits, larger and with a margin, so that no saccade moves them out of sight."""
    images, labels, rows = digits()
    images = F.interpolate(images, size=(12, 12), mode="bilinear", align_corners=False)
    frames = saccades(F.pad(images, (2,) * 4), steps)
    train, test = (TensorDataset(frames[part], labels[part]) for part in rows)
    return Data(train, test, 10, 2, 16, True, lambda sample: rolled(sample, 2))


def digits() -> tuple[Tensor, Tensor, tuple[list[int], list[int]]]:
    """1,797 images in [0, 1], their labels, and which are for training and for testing: always the
    same 1,347 and 450."""
    datasets = needs("sklearn.datasets", "scikit-learn")
    split = needs("sklearn.model_selection", "scikit-learn").train_test_split
    found = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    rows = split(list(range(len(images))), test_size=0.25, stratify=found.target, random_state=0)
    return images, torch.tensor(found.target, dtype=torch.int64), rows


def load_cifar(root: Path | None, classes: int) -> Data:
    datasets, transforms = needs("torchvision.datasets"), needs("torchvision.transforms")
    kind = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
    files = [name for name, _ in kind.train_list + kind.test_list]
    folder = there(root, f"{kind.base_folder}/{{{','.join(files)}}}", kind.base_folder)
    tensor = transforms.ToTensor()
    normalise = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    crop = transforms.RandomCrop(32, padding=4)
    try:
        train = kind(folder.parent, train=True, transform=tensor)
        both = transforms.Compose([tensor, normalise])
        test = kind(folder.parent, train=False, transform=both)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{folder}: {error}; needs the files {', '.join(files)}") from error
    augment = transforms.Compose([crop, flipped, cutout, normalise])
    return Data(train, test, classes, 3, 32, False, augment)


def load_imagenet100(root: Path | None, steps: int) -> Data:
    transforms = needs("torchvision.transforms")
    last = [
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    cut = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    whole = [transforms.Resize(256), transforms.CenterCrop(224)]
    datasets = needs("torchvision.datasets")
    train, test = (
        folders(datasets.ImageFolder, there(root, f"{part}/CLASS/IMAGE", part), transform=transform)
        for part, transform in (
            # Cut from the image itself, larger than what the network sees.
            ("train", transforms.Compose(cut + last)),
            ("val", transforms.Compose(whole + last)),
        )
    )
    if train.classes != test.classes:
        raise DataError(f"{root}: train/ and val/ have different classes")
    mixed = Subset(train, [i for turn in in_turn(train.targets) for i in turn])
    return Data(mixed, test, len(train.classes), 3, 224, False, None)


def load_dvs_cifar10(root: Path | None, steps: int) -> Data:
    """A pixel of a frame is 1 where it had any event."""
    read = needs("tonic.io").read_aedat4
    frames = needs("tonic.transforms").ToFrame((128, 128, 2), n_event_bins=steps)

    def load(path: str) -> Tensor:
        events = read(path)
        events.dtype.names = ["t", "x", "y", "p"]
        return resized((torch.from_numpy(frames(events)) > 0).float())

    folder = there(root, "CIFAR10DVS/CLASS/*.aedat4", "CIFAR10DVS")
    needs("aedat")  # tonic imports it when it reads
    return recordings(folder, load, ".aedat4", steps, lambda x: rolled(flipped(x), 5))


def load_n_caltech101(root: Path | None, steps: int) -> Data:
    """A pixel of a frame is the number of its events."""
    io = needs("tonic.io")
    transforms, events_of = needs("torchvision.transforms"), needs("tonic.datasets").NCALTECH101
    frames = needs("tonic.transforms").ToFrame((240, 180, 2), n_event_bins=steps)

    def load(path: str) -> Tensor:
        events = io.read_mnist_file(path, dtype=events_of.dtype)
        for axis in ("x", "y"):
            events[axis] -= events[axis].min()
        return resized(torch.from_numpy(frames(events)).float())

    moved = transforms.RandomAffine(30, translate=(5 / FRAME, 5 / FRAME), shear=(-17, 17, -17, 17))

    def augment(x: Tensor) -> Tensor:
        return cutout(moved(flipped(x)), int(torch.randint(1, 31, ())))

    folder = there(root, "Caltech101/CLASS/*.bin", "Caltech101")
    return recordings(folder, load, ".bin", steps, augment)


def recordings(
    folder: Path, load: Callable[[str], Tensor], ending: str, steps: int, augment: Transform
) -> Data:
    """A folder for each class, with a recording of events in each file.

    The first nine tenths of every class, by the numbers in their names, are for training. Frames
    are counted when they are first needed, and kept beside the folder for the next epoch.
    """
    datasets = needs("torchvision.datasets")
    found = folders(datasets.DatasetFolder, folder, loader=load, extensions=(ending,))
    everything = Kept(found, folder.parent / "frames" / f"{folder.name}-{steps}-{FRAME}")
    # a10 comes after a9.
    found.samples.sort(key=lambda s: (s[1], [int(n) for n in re.findall(r"\d+", s[0])], s[0]))
    labels = [label for _, label in found.samples]
    count = {label: labels.count(label) for label in set(labels)}
    train, test = [], []
    for nth, turn in enumerate(in_turn(labels)):
        for index in turn:
            (train if 10 * nth < 9 * count[labels[index]] else test).append(index)
    if not test:
        raise DataError(f"{folder}: needs ten recordings of some class, to test on one of them")
    parts = Subset(everything, train), Subset(everything, test)
    return Data(*parts, len(found.classes), 2, FRAME, True, augment)


class Kept(Dataset[Any]):
    """Recordings whose frames are counted once and then read from a folder.

    There they go by the recording's name, size and time of change.
    """

    def __init__(self, found: Any, folder: Path) -> None:
        self.found, self.folder = found, folder

    def __len__(self) -> int:
        return len(self.found.samples)

    def __getitem__(self, index: int) -> Any:
        path, label = self.found.samples[index]
        of, about = Path(path), os.stat(path)
        kept = self.folder / of.parent.relative_to(self.found.root)
        kept /= f"{of.stem}-{about.st_size}-{about.st_mtime_ns}.pt"
        try:
            if kept.is_file():
                return torch.load(kept, weights_only=True), label
            frames = self.found.loader(path)
        except Exception as error:  # what readers raise of damaged files is their own
            what = kept if kept.is_file() else path
            raise DataError(f"{what}: cannot be read ({error})") from error
        kept.parent.mkdir(parents=True, exist_ok=True)
        write(kept, frames, f".{os.getpid()}")
        return frames, label


def in_turn(labels: list[int]) -> Iterator[list[int]]:
    """The first sample of every class, the second of every class, and so on: so few samples of a
    data set that is sorted are of all classes too."""
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(label, []).append(index)
    for turn in zip_longest(*of_class.values()):
        yield [index for index in turn if index is not None]


LOADERS: dict[str, Callable[[Path | None, int], Data]] = {
    "cifar10": lambda root, steps: load_cifar(root, 10),
    "cifar100": lambda root, steps: load_cifar(root, 100),
    "imagenet100": load_imagenet100,
    "dvs-cifar10": load_dvs_cifar10,
    "n-caltech101": load_n_caltech101,
    "digits": load_digits,
    "digit-events": load_digit_events,
}


def needs(module: str, package: str | None = None) -> Any:
    """An optional package's module, imported."""
    package = package or module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"this data set is read by {package}: pip install {package}") from error
    except RuntimeError as error:  # of a torchvision that was built for another torch
        raise DataError(f"{package} does not fit the installed torch: {error}") from error


def there(root: Path | None, layout: str, folder: str) -> Path:
    """The folder below the data root, which must exist."""
    if root is None:
        raise DataError(f"--data-root: needs the folder that holds {layout}")
    if not (root / folder).is_dir():
        raise DataError(f"--data-root: there is no folder {root / folder}; needs {root}/{layout}")
    return root / folder


def folders(kind: Any, folder: Path, **options: Any) -> Any:
    """A folder of torchvision's, with a folder for each class."""
    try:
        return kind(str(folder), **options)
    except FileNotFoundError as error:
        raise DataError(f"{folder}: {error}") from error


def resized(frames: Tensor) -> Tensor:
    size = (FRAME, FRAME)
    return F.interpolate(frames, size, mode="bilinear", antialias=True, align_corners=False)


def flipped(x: Tensor) -> Tensor:
    return x.flip(-1) if torch.rand(()) < 0.5 else x


def rolled(x: Tensor, most: int, cut: int = 0) -> Tensor:
    """Moved by up to `most` pixels in each direction, then `cut` from every side."""
    down, right = torch.randint(-most, most + 1, (2,)).tolist()
    moved = x.roll((down, right), (-2, -1))
    return moved[..., cut : moved.shape[-2] - cut, cut : moved.shape[-1] - cut]


def cutout(x: Tensor, length: int = 16) -> Tensor:
    """A square of 0 somewhere, the same in every frame and channel (DeVries, arXiv 1708.04552)."""
    height, width = x.shape[-2:]
    row, column = (int(torch.randint(most, ())) for most in (height, width))
    half, x = length // 2, x.clone()
    x[..., max(0, row - half) : row + half, max(0, column - half) : column + half] = 0
    return x


class Augmented(Dataset[Any]):
    """Training samples, each with random numbers of its own for every epoch."""

    def __init__(self, data: "Dataset[Any]", transform: Transform | None, seed: int) -> None:
        self.data, self.transform, self.seed, self.epoch = data, transform, seed, 0

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            # The CPU's generator alone, which is what is restored.
            torch.default_generator.manual_seed(seed_of("sample", self.seed, self.epoch, index))
            x, label = self.data[index]
            return x if self.transform is None else self.transform(x), label


class Batches(Sampler[list[int]]):
    """This process's part of every batch of an epoch, whose order depends on seed and epoch."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, 0

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator)
        for batch in order.split(self.batch_size):
            yield batch[share(len(batch))].tolist()


def seed_of(*parts: Any) -> int:
    """A seed for each combination of parts, unrelated to those of others."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


class Batched:
    """Collates samples; no samples make a batch of none, in the shape of the others."""

    def __init__(self, data: "Dataset[Any]") -> None:
        self.data = data

    def __call__(self, samples: list[Any]) -> Any:
        if samples:
            return default_collate(samples)
        return [part[:0] for part in default_collate([self.data[0]])]


class Training:
    """Batches (x [B, *], labels [B]) of training samples, of one epoch after another."""

    def __init__(self, data: Data, batch_size: int, seed: int, limit: int | None, workers: int):
        total = len(data.train)  # type: ignore[arg-type]
        self.samples = Augmented(data.train, data.augment, seed)
        self.batches = Batches(min(limit or total, total), batch_size, seed)
        self.loader = DataLoader(
            self.samples,
            batch_sampler=self.batches,
            collate_fn=Batched(self.samples),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )

    def epoch(self, epoch: int) -> "DataLoader[Any]":
        self.samples.epoch = self.batches.epoch = epoch
        return self.loader


def testing(data: "Dataset[Any]", batch_size: int, workers: int) -> "DataLoader[Any]":
    """Batches of this process's part of samples, as they are."""
    count: int = len(data)  # type: ignore[arg-type]
    part = Subset(data, range(count)[share(count)])
    return DataLoader(part, batch_size, num_workers=workers, pin_memory=torch.cuda.is_available())
