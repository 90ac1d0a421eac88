"""Data sets in the layouts of torchvision and tonic, made small; and who gets which sample when."""

import pickle
import sys

import pytest
import torch

from examples import data, parallel
from examples.data import Augmented, Batches, DataError, Training
from tests.torchvision_here import torchvision

np = pytest.importorskip("numpy")


def test_digits_are_split_alike_every_time():
    pytest.importorskip("sklearn")
    found = data.load("digits", None, 6)
    (images, labels), (test_images, test_labels) = found.train.tensors, found.test.tensors
    assert (len(images), len(test_images)) == (1347, 450)
    assert (found.classes, found.channels, found.size, found.frames) == (10, 1, 8, False)
    assert test_labels.bincount().min() >= 43
    assert images.min() == 0 and images.max() == 1
    assert not {tuple(i.flatten().tolist()) for i in images} & {
        tuple(i.flatten().tolist()) for i in test_images
    }
    again = data.load("digits", None, 6)
    assert torch.equal(again.test.tensors[0], test_images)
    assert torch.equal(again.train.tensors[1], labels)


def test_digit_events():
    pytest.importorskip("sklearn")
    found = data.load("digit-events", None, 4)
    frames, labels = found.train.tensors
    assert frames.shape == (1347, 4, 2, 16, 16) and found.frames
    assert (frames.flatten(2).sum(-1) > 0).all()
    assert torch.equal(labels, data.load("digits", None, 4).train.tensors[1])
    x, _ = Augmented(found.train, found.augment, seed=1)[0]
    assert x.shape == frames[0].shape and x.sum() == frames[0].sum()


def test_digits_move_by_at_most_a_pixel():
    pytest.importorskip("sklearn")
    augment = data.load("digits", None, 6).augment
    image = torch.zeros(1, 8, 8)
    image[0, 3, 4] = 1
    where = {tuple(augment(image).nonzero()[0, 1:].tolist()) for _ in range(300)}
    assert where == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}


class Numbers(torch.utils.data.Dataset):
    """Samples (x [1], label) whose x is their index."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.tensor([float(index)]), index % 3


def noisy(x):
    return torch.cat([x, torch.rand(1)])


def samples(batches):
    return [row for x, _ in batches for row in x.tolist()]


def training(count=23, seed=0, limit=None, workers=0):
    found = data.Data(Numbers(count), Numbers(3), 3, 1, 1, False, noisy)
    return Training(found, 5, seed, limit, workers)


def test_an_epoch_depends_on_seed_and_epoch_alone():
    first = samples(training().epoch(1))
    assert sorted(int(i) for i, _ in first) == list(range(23))
    assert len({noise for _, noise in first}) == 23
    torch.rand(7)
    assert samples(training().epoch(1)) == first
    assert samples(training(workers=2).epoch(1)) == first
    assert samples(training().epoch(2)) != first
    assert samples(training(seed=1).epoch(1)) != first
    order = [[int(i) for i, _ in samples(training().epoch(n))] for n in (1, 2)]
    assert order[0] != order[1]
    # The same sample draws anew in every epoch.
    assert dict(samples(training().epoch(2))) != dict(first)


def test_the_random_numbers_of_others_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Augmented(Numbers(3), noisy, 0)[1]
    assert torch.equal(torch.rand(3), expected)


def test_limit():
    assert sorted(int(i) for i, _ in samples(training(limit=7).epoch(1))) == list(range(7))
    assert len(samples(training(limit=70).epoch(1))) == 23


def test_processes_deal_every_sample_once(monkeypatch):
    """Their batches are those of one process, with its noise; one of them gets none of the last."""
    alone = [x.tolist() for x, _ in training(count=21).epoch(3)]
    monkeypatch.setattr(parallel, "PROCESSES", 3)
    dealt = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "RANK", rank)
        dealt.append([x.tolist() for x, _ in training(count=21).epoch(3)])
        assert len(data.testing(Numbers(7), 5, 0).dataset) in (2, 3)
    together = [[*a, *b, *c] for a, b, c in zip(*dealt, strict=True)]
    assert together == alone
    assert dealt[0][-1] == []
    for count in (0, 1, 2, 7, 9):
        dealt = []
        for rank in range(3):
            monkeypatch.setattr(parallel, "RANK", rank)
            dealt += range(count)[parallel.share(count)]
        assert dealt == list(range(count))


def test_a_batch_of_none_has_the_shape_of_others():
    x, labels = data.Batched(Augmented(Numbers(4), noisy, 0))([])
    assert x.shape == (0, 2) and labels.shape == (0,)


def test_batches_have_their_number():
    assert len(Batches(23, 5, 0)) == len(list(Batches(23, 5, 0))) == 5


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Files as of CIFAR10 and CIFAR100, of a few random images, with other checksums."""
    torchvision()
    from torchvision.datasets import cifar

    monkeypatch.setattr(
        cifar, "check_integrity", lambda path, md5: sys.modules["os"].path.exists(path)
    )
    random = np.random.default_rng(0)

    def write(folder, files, count, key, meta):
        (tmp_path / folder).mkdir()
        for name in files:
            images = random.integers(0, 256, (count, 3072), dtype=np.uint8)
            content = {"data": images, key: list(range(count))}
            (tmp_path / folder / name).write_bytes(pickle.dumps(content))
        (tmp_path / folder / meta[0]).write_bytes(pickle.dumps({meta[1]: ["a", "b"]}))

    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    write("cifar-10-batches-py", batches, 4, "labels", ("batches.meta", "label_names"))
    files = ["train", "test"]
    write("cifar-100-python", files, 6, "fine_labels", ("meta", "fine_label_names"))
    return tmp_path


def test_cifar(cifar):
    for classes, count in ((10, 20), (100, 6)):
        found = data.load(f"cifar{classes}", cifar, 6)
        assert (found.classes, found.channels, found.size, found.frames) == (classes, 3, 32, False)
        assert len(found.train) == count
        x, label = found.test[0]
        assert x.shape == (3, 32, 32) and label == 0
        assert -2.5 < x.min() < 0 < x.max() < 2.8  # normalised
        raw, _ = found.train[1]
        x, label = Augmented(found.train, found.augment, 0)[1]
        assert x.shape == (3, 32, 32) and label == 1
        black = torch.tensor([-0.4914 / 0.2023, -0.4822 / 0.1994, -0.4465 / 0.2010])
        cut = (x == black[:, None, None]).all(0).sum()
        assert 64 <= cut <= 16 * 16 + 2 * 32 * 4
        assert raw.min() >= 0 and raw.max() <= 1


CIFAR_MEAN = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]
CIFAR_DEVIATION = torch.tensor([0.2023, 0.1994, 0.2010])[:, None, None]


def test_cifar_is_normalised(cifar):
    for classes in (10, 100):
        found = data.load(f"cifar{classes}", cifar, 6)
        for index in range(3):
            pixels = torch.from_numpy(found.test.data[index]).permute(2, 0, 1) / 255
            expected = (pixels - CIFAR_MEAN) / CIFAR_DEVIATION
            torch.testing.assert_close(found.test[index][0], expected)


def test_augmentation_of_cifar(cifar):
    """An image whose pixels say where they are, moved, flipped and cut."""
    augment = data.load("cifar10", cifar, 6).augment
    row, column = (torch.arange(32.0) + 1).unsqueeze(1), torch.arange(32.0) + 1
    image = torch.stack([row.expand(32, 32) / 32, column.expand(32, 32) / 32, torch.ones(32, 32)])
    down, right, flips, holes = set(), {False: set(), True: set()}, 0, set()
    for _ in range(400):
        seen = augment(image) * CIFAR_DEVIATION + CIFAR_MEAN
        there = seen[2] > 0.5
        # All else is black: moved in from beyond the border, or cut out.
        torch.testing.assert_close(seen, seen.round(decimals=5) * there, rtol=0, atol=1e-5)
        torch.testing.assert_close(seen[2], there.float(), rtol=0, atol=1e-5)
        rows, columns = (seen[:2] * 32).round().int()
        moved = {int(d) for d in (rows - row.int())[there]}
        assert len(moved) == 1
        down |= moved
        straight = {int(d) for d in (columns - column.int())[there]}
        flipped = len(straight) > 1
        if flipped:
            straight = {int(d) for d in (columns - column.int().flip(0))[there]}
        assert len(straight) == 1
        right[flipped] |= straight
        flips += flipped
        (d,), (r,) = moved, straight
        inside = (32 - abs(d)) * (32 - abs(r))
        holes.add(int(inside - there.sum()))
    assert down == right[False] == right[True] == set(range(-4, 5))
    assert 140 < flips < 260
    # Cutout: less where it reaches beyond the border, or what was moved in.
    assert min(holes) > 0 and max(holes) == 16 * 16


def test_imagenet100(tmp_path):
    torchvision()
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for name in ("n01", "n02"):
            (tmp_path / part / name).mkdir(parents=True)
            image.new("RGB", (300, 260), (200, 10, 10)).save(tmp_path / part / name / "a.png")
    found = data.load("imagenet100", tmp_path, 4)
    assert found.classes == 2 and len(found.train) == len(found.test) == 2
    for x, label in (found.train[1], found.test[1]):
        assert x.shape == (3, 224, 224) and label == 1
    (tmp_path / "val" / "n03").mkdir()
    image.new("RGB", (300, 260)).save(tmp_path / "val" / "n03" / "a.png")
    with pytest.raises(DataError, match="different classes"):
        data.load("imagenet100", tmp_path, 4)


def test_images_of_imagenet100(tmp_path):
    """Red grows from left to right, so that a cut and a flip show; green is even, blue random."""
    torchvision()
    pil = pytest.importorskip("PIL.Image")
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = np.random.default_rng(0).integers(0, 256, (512, 640, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.linspace(0, 255, 640).astype(np.uint8), 90
    image = pil.fromarray(pixels)
    for part in ("train", "val"):
        (tmp_path / part / "n01").mkdir(parents=True)
        image.save(tmp_path / part / "n01" / "a.png")
    found = data.load("imagenet100", tmp_path, 4)

    small = np.asarray(image.resize((320, 256), pil.Resampling.BILINEAR)) / 255
    middle = (small[16 : 16 + 224, 48 : 48 + 224] - mean) / deviation
    expected = torch.from_numpy(middle).permute(2, 0, 1).float()
    torch.testing.assert_close(found.test[0][0], expected, rtol=1e-4, atol=1e-4)

    flips, widths = 0, []
    for _ in range(60):
        x, _ = found.train[0]
        assert x.shape == (3, 224, 224)
        torch.testing.assert_close(
            x[1], torch.full((224, 224), (90 / 255 - mean[1]) / deviation[1])
        )
        red = x[0].mean(0) * deviation[0] + mean[0]
        flips += bool(red[-1] < red[0])
        widths.append(float((red[-1] - red[0]).abs()))
    assert 15 < flips < 45
    assert min(widths) < 0.6 and max(widths) - min(widths) > 0.2


def bin_of(events):
    """Events (x, y, polarity, microseconds) as in the files of N-Caltech101, five bytes each."""
    rows = [(x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255) for x, y, p, t in events]
    return bytes(byte for row in rows for byte in row)


def test_n_caltech101(tmp_path):
    torchvision()
    pytest.importorskip("tonic")
    # An ON event in the upper left in the first half, OFF events in the lower right in the second.
    events = [(0, 0, 1, 10), (0, 0, 1, 20), (239, 179, 0, 30), (239, 179, 0, 40)]
    for name in ("ant", "bass"):
        (tmp_path / "Caltech101" / name).mkdir(parents=True)
        for index in range(10):
            (tmp_path / "Caltech101" / name / f"{index:02}.bin").write_bytes(bin_of(events))
    for _ in range(2):  # counted, then as it was kept
        found = data.load("n-caltech101", tmp_path, 2)
        assert (found.classes, found.frames, found.size) == (2, True, 48)
        assert (len(found.train), len(found.test)) == (18, 2)
        x, label = found.train[17]
        assert x.shape == (2, 2, 48, 48) and label == 1
        assert found.train.indices[:4] == [0, 10, 1, 11] and found.test.indices == [9, 19]
        on, off = x[0].flatten(1).sum(1), x[1].flatten(1).sum(1)
        assert on[1] > 0 and off[0] > 0 and on[0] == off[1] == 0  # [T, polarity]
        assert x[0, 1].nonzero().max() <= 1 and x[1, 0].nonzero().min() >= 46
    kept = tmp_path / "frames" / "Caltech101-2-48" / "bass"
    (file,) = kept.iterdir()
    assert file.name.startswith("08-")
    moved = [Augmented(found.train, found.augment, seed)[17][0] for seed in range(8)]
    assert sum(not torch.equal(m, x) for m in moved) >= 6
    # Another class before the others changes no sample's frames; a damaged file is named.
    (tmp_path / "Caltech101" / "aardvark").mkdir()
    for index in range(10):
        (tmp_path / "Caltech101" / "aardvark" / f"{index:02}.bin").write_bytes(b"")
    again = data.load("n-caltech101", tmp_path, 2)
    assert again.classes == 3
    index = again.train.indices.index(28)
    assert torch.equal(again.train[index][0], x) and again.train[index][1] == 2
    with pytest.raises(DataError, match=r"aardvark/00.bin: cannot be read"):
        again.train[0]
    file.write_bytes(b"PK")
    with pytest.raises(DataError, match=r"08-.*.pt: cannot be read"):
        again.train[index]
    # A recording that changed is counted anew.
    (tmp_path / "Caltech101" / "bass" / "08.bin").write_bytes(bin_of(events[:2] * 2))
    assert not torch.equal(again.train[index][0], x)
    x, _ = Augmented(found.train, found.augment, 0)[0]
    assert x.shape == (2, 2, 48, 48)
    # Rotated and sheared, a frame has empty corners; an upright square is cut from anywhere.
    middles = corners = 0
    for _ in range(100):
        empty = found.augment(torch.ones(1, 1, 48, 48))[0, 0] == 0
        middles += bool(empty[17:31, 17:31].any())
        corners += bool(empty[0, [0, -1]].any() and empty[-1, [0, -1]].any())
    assert 20 < middles < 100 and corners > 50
    ramp = torch.arange(1.0, 49).expand(1, 1, 48, 48)
    flips = sum(
        bool((m := found.augment(ramp))[..., :24].sum() > m[..., 24:].sum()) for _ in "." * 99
    )
    assert 25 < flips < 75


def test_dvs_cifar10(tmp_path, monkeypatch):
    torchvision()
    tonic = pytest.importorskip("tonic")
    monkeypatch.setitem(sys.modules, "aedat", type(sys)("aedat"))
    for name in ("airplane", "truck"):
        (tmp_path / "CIFAR10DVS" / name).mkdir(parents=True)
        for index in range(11):
            (tmp_path / "CIFAR10DVS" / name / f"{name}_{index}.aedat4").touch()
    dtype = [("t", "u8"), ("x", "u2"), ("y", "u2"), ("on", "?")]
    # Of the first sign two in each frame.
    events = np.array([(i, 100, 3, i % 3 == 2) for i in range(12)], dtype=dtype)
    monkeypatch.setattr(tonic.io, "read_aedat4", lambda path: events.copy())
    found = data.load("dvs-cifar10", tmp_path, 4)
    assert (found.classes, len(found.train), len(found.test)) == (2, 20, 2)
    # By their numbers: a name of ten comes after that of nine.
    assert [found.test.dataset.found.samples[i][0][-9:] for i in found.test.indices] == [
        "10.aedat4",
        "10.aedat4",
    ]
    x, label = found.train[5]
    assert x.shape == (4, 2, 48, 48) and label == 1
    # A pixel of 1 among others of 0, made smaller.
    assert (x.flatten(2).sum(-1) > 0).all()
    assert x.sum((2, 3)) == pytest.approx(torch.full((4, 2), (48 / 128) ** 2), rel=0.3)
    moved = [Augmented(found.train, found.augment, seed)[5][0] for seed in range(8)]
    assert sum(not torch.equal(m, x) for m in moved) >= 6
    assert abs(x[0, 1].argmax() % 48 - 100 * 48 / 128) <= 1  # x is the column
    assert abs(x[0, 1].argmax() // 48 - 3 * 48 / 128) <= 1
    # Flipped, and moved by up to five pixels; all frames alike.
    x = torch.zeros(2, 2, 48, 48)
    x[..., 20, 10] = 1
    rows, columns = set(), set()
    for _ in range(1000):
        moved = found.augment(x)
        assert (moved == moved[0, 0]).all() and moved.sum() == 4
        row, column = moved[0, 0].nonzero()[0].tolist()
        rows.add(row)
        columns.add(column)
    assert rows == {*range(15, 26)} and columns == {*range(5, 16), *range(32, 43)}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("cifar10", "cifar-10-batches-py/{data_batch_1,"),
        ("cifar100", "cifar-100-python/{train,test}"),
        ("imagenet100", "train/CLASS/IMAGE"),
        ("dvs-cifar10", r"CIFAR10DVS/CLASS/*.aedat4"),
        ("n-caltech101", r"Caltech101/CLASS/*.bin"),
    ],
)
def test_missing_data(tmp_path, name, layout):
    torchvision()
    if "-" in name:
        pytest.importorskip("tonic")
    with pytest.raises(DataError) as none:
        data.load(name, None, 4)
    assert f"--data-root: needs the folder that holds {layout}" in str(none.value)
    with pytest.raises(DataError) as missing:
        data.load(name, tmp_path, 4)
    assert f"needs {tmp_path}/{layout}" in str(missing.value)


def test_incomplete_data(tmp_path):
    torchvision()
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match=r"not found or corrupted.*needs the files data_batch_1"):
        data.load("cifar10", tmp_path, 6)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="any class folder"):
        data.load("imagenet100", tmp_path, 6)


def test_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(DataError, match="read by torchvision: pip install torchvision"):
        data.load("cifar10", None, 6)


def test_a_torchvision_of_another_torch(monkeypatch):
    def broken(module):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(data.importlib, "import_module", broken)
    with pytest.raises(DataError, match="does not fit the installed torch: operator"):
        data.load("cifar10", None, 6)
