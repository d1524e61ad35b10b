"""Sets of torchvision's, on small files in the real formats."""

import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from src.data.catalogues.fetching import fetched
from src.data.sources import CIFAR100, STL10, SVHN, CelebA, Flowers102
from src.errors import UserError
from src.lock import Lock, is_locked
from tests.data.files import encoded, pixels


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision takes files for whole whose checksum is not that of the real set."""
    for module in ("cifar", "svhn", "stl10", "utils"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).is_file()
        )


def noise(n: int, size: int) -> np.ndarray:
    """(N, C, H, W)"""
    return np.stack([pixels(size, size, seed=i).transpose(2, 0, 1) for i in range(n)])


def test_cifar100_is_read_in_its_fine_classes(tmp_path, unchecked):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    images = noise(6, 32)
    for name, rows in (("train", slice(0, 4)), ("test", slice(4, 6))):
        part = {"data": images[rows].reshape(-1, 3072), "fine_labels": [3, 0, 99, 5][: len(images[rows])]}
        (folder / name).write_bytes(pickle.dumps({**part, "coarse_labels": [0] * 4}))
    names = [f"kind {i}" for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    train, test = CIFAR100().load(tmp_path)
    np.testing.assert_array_equal(train.images.numpy(), images[:4])
    assert (train.labels.tolist(), test.labels.tolist()) == ([3, 0, 99, 5], [3, 0])
    assert list(train.classes) == names


def test_svhn_has_the_digit_0_as_class_0(tmp_path, unchecked):
    from scipy.io import savemat

    images = noise(5, 32)
    for name, rows in (("train", slice(0, 3)), ("test", slice(3, 5))):
        labels = np.array([[10], [1], [9]][: len(images[rows])], np.uint8)
        savemat(tmp_path / f"{name}_32x32.mat", {"X": images[rows].transpose(2, 3, 1, 0), "y": labels})
    train, test = SVHN().load(tmp_path)
    np.testing.assert_array_equal(train.images.numpy(), images[:3])
    np.testing.assert_array_equal(test.images.numpy(), images[3:])
    assert train.labels.tolist() == [0, 1, 9]
    assert train.labels.dtype == torch.int64


def test_stl10_is_upright(tmp_path, unchecked):
    """Its files hold columns. Catches images that lie on their side, and classes from 1."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = noise(3, 96)
    for name, rows in (("train", slice(0, 2)), ("test", slice(2, 3)), ("unlabeled", slice(0, 0))):
        (folder / f"{name}_X.bin").write_bytes(images[rows].transpose(0, 1, 3, 2).tobytes())
        (folder / f"{name}_y.bin").write_bytes(bytes([1, 10][: len(images[rows])]))
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    train, test = STL10().load(tmp_path)
    np.testing.assert_array_equal(train.images.numpy(), images[:2])
    np.testing.assert_array_equal(test.images.numpy(), images[2:])
    assert train.labels.tolist() == [0, 9]
    assert list(train.classes)[:2] == ["airplane", "bird"]


@pytest.fixture
def faces(tmp_path):
    root = tmp_path / "celeba"
    (root / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06}.jpg" for i in range(1, 7)]
    for i, name in enumerate(names):
        (root / "img_align_celeba" / name).write_bytes(encoded(pixels(8, 6, seed=i), "JPEG"))
    (root / "list_eval_partition.txt").write_text("".join(f"{n} {i // 2}\n" for i, n in enumerate(names)))
    rows = [f"{name} {1 if i % 2 else -1:2d} -1\n" for i, name in enumerate(names)]
    (root / "list_attr_celeba.txt").write_text("6\nSmiling Young \n" + "".join(rows))
    return tmp_path


def test_celeba_is_split_as_it_says_with_an_attribute_for_a_class(faces):
    train, val = CelebA().catalogues(faces)
    assert list(train.names) == ["000001.jpg", "000002.jpg"]
    assert list(val.names) == ["000003.jpg", "000004.jpg"]
    assert train.read(1).shape == (8, 6, 3)
    assert list(train.classes) == [""]
    train, val = CelebA().catalogues(faces, "Smiling")
    assert (train.labels.tolist(), list(train.classes)) == ([0, 1], ["not Smiling", "Smiling"])
    assert CelebA().catalogues(faces, "Young")[0].labels.tolist() == [0, 0]
    with pytest.raises(UserError, match=r"data\.labels=Old is no attribute of CelebA; there are Smiling, Young"):
        CelebA().catalogues(faces, "Old")


def test_damaged_tables_of_celeba_are_refused(faces):
    table = faces / "celeba" / "list_attr_celeba.txt"
    table.write_text(table.read_text()[:60])
    with pytest.raises(UserError, match=r"list_attr_celeba\.txt is damaged .*; provide list_eval_partition\.txt and"):
        CelebA().catalogues(faces, "Smiling")
    (faces / "celeba" / "list_eval_partition.txt").write_text("")
    with pytest.raises(UserError, match=r"list_eval_partition\.txt is damaged \(it names no images"):
        CelebA().catalogues(faces)


@pytest.fixture
def flowers(tmp_path):
    from scipy.io import savemat

    root = tmp_path / "flowers-102"
    (root / "jpg").mkdir(parents=True)
    for i in range(1, 7):
        (root / "jpg" / f"image_{i:05}.jpg").write_bytes(encoded(pixels(5 + i, 9, seed=i), "JPEG"))
    savemat(root / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 1, 5, 6]], np.uint8)})
    splits = {"trnid": [[3, 1]], "valid": [[2]], "tstid": [[6, 4]]}
    savemat(root / "setid.mat", {key: np.array(ids, np.uint16) for key, ids in splits.items()})
    return tmp_path


def test_flowers_are_split_as_they_say(flowers):
    train, val = Flowers102().catalogues(flowers)
    assert list(train.names) == [f"image_0000{i}.jpg" for i in (1, 3, 4, 6)]
    assert train.labels.tolist() == [76, 101, 0, 5]
    assert [train.read(i).shape[0] for i in range(4)] == [6, 8, 9, 11]
    assert (list(val.names), val.labels.tolist()) == (["image_00002.jpg"], [0])
    assert len(train.classes) == 102
    assert train.classes[0] == "pink primrose"
    assert list(Flowers102(train=("train",)).catalogues(flowers)[0].names) == ["image_00001.jpg", "image_00003.jpg"]
    assert list(Flowers102().catalogues(flowers, "none")[0].classes) == [""]


def test_settings_of_flowers_that_cannot_be_are_refused(flowers):
    for wrong in ((), ("val",), ("train", "train")):
        with pytest.raises(ValueError, match=r"must be \[train\], \[test\] or \[train, test\]"):
            Flowers102(train=wrong)
    with pytest.raises(UserError, match=r"data\.labels=folder is not null"):
        Flowers102().catalogues(flowers, "folder")
    (flowers / "flowers-102" / "setid.mat").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"setid\.mat is damaged"):
        Flowers102().catalogues(flowers)


@pytest.mark.parametrize(
    "source", [CIFAR100(), SVHN(), STL10(), CelebA(), Flowers102()], ids=lambda s: type(s).__name__
)
def test_without_a_network_the_way_by_hand_is_told(tmp_path, monkeypatch, source):
    """In a sentence, with nothing left behind."""
    import urllib.error

    def no_network(*_, **__) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    dir = tmp_path / "data"
    words = (
        rf"{type(source).__name__} is not in {dir} \(.* missing\) and could not be downloaded \(.*\); provide .*{dir}"
    )
    with pytest.raises(UserError, match=words) as caught:
        (source.load if hasattr(source, "load") else source.catalogues)(dir)
    assert "\n" not in str(caught.value)
    assert not dir.exists()


def test_one_process_at_a_time_downloads(tmp_path):
    """Another that finds files missing, or somebody at work, waits and asks again."""

    def make(_):
        assert is_locked(tmp_path)
        (tmp_path / "file").write_bytes(b"")
        return "made"

    def fetch():
        return fetched("FakeData", tmp_path, tmp_path, ["file"], "it", make)

    held = Lock(tmp_path)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(fetch)
        time.sleep(0.3)
        assert not waiting.done()
        held.release()
        assert waiting.result(timeout=30) == "made"
    assert not is_locked(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
