"""Image sources, on small files in the real formats."""

import io
import json
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.datamodule import ImageDataModule
from src.data.sources import CIFAR10, MNIST, Digits, read_zip
from src.errors import UserError


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()


def write_zip(path, images: np.ndarray, labels: list[int]) -> None:
    """The layout of EDM's dataset tool."""
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in zip(names, images, strict=True):
            archive.writestr(name, png(image))
        archive.writestr("dataset.json", json.dumps({"labels": [[n, y] for n, y in zip(names, labels, strict=True)]}))


def write_idx(folder, name: str, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    (folder / name).write_bytes(header + array.tobytes())


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)


def test_digits_are_scikit_learns_in_its_17_levels():
    from sklearn.datasets import load_digits

    data, test = Digits().load(None)
    assert test is None
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.max() == 255
    levels = (data.images.float() * 16 / 255).round()
    np.testing.assert_array_equal(levels[:, 0].numpy(), load_digits().images)
    assert torch.bincount(data.labels).tolist() == np.bincount(load_digits().target).tolist()


def test_digits_that_scikit_learn_keeps_elsewhere_are_the_same(monkeypatch):
    expected, _ = Digits().load(None)
    monkeypatch.setattr("src.data.sources.digits.find_spec", lambda name: None)
    data, _ = Digits().load(None)
    assert torch.equal(data.images, expected.images)
    assert torch.equal(data.labels, expected.labels)


def test_a_zip_of_edms_tool_is_read_pixel_by_pixel(tmp_path, images):
    write_zip(tmp_path / "cifar10-32x32.zip", images, [i % 10 for i in range(30)])
    write_zip(tmp_path / "cifar10-32x32-test.zip", images[:5], [0] * 5)
    train, test = CIFAR10().load(tmp_path)
    np.testing.assert_array_equal(train.images.permute(0, 2, 3, 1).numpy(), images)
    assert train.labels.tolist() == [i % 10 for i in range(30)]
    assert len(test) == 5


def test_torchvisions_mnist_files_are_read(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    digits = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for split, n in (("train", 20), ("t10k", 7)):
        write_idx(raw, f"{split}-images-idx3-ubyte", digits[:n])
        write_idx(raw, f"{split}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10)
    train, test = MNIST().load(tmp_path)
    np.testing.assert_array_equal(train.images[:, 0].numpy(), digits)
    assert (len(test), test.labels.tolist()) == (7, list(range(7)))

    (raw / "train-images-idx3-ubyte").write_bytes((raw / "train-images-idx3-ubyte").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"MNIST in .* is damaged"):
        MNIST().load(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "no images", "two shapes", "a label missing"])
def test_a_damaged_zip_is_refused(tmp_path, images, damage):
    path = tmp_path / "set.zip"
    write_zip(path, images, [0] * 30)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:20000])
    elif damage == "flipped":
        content[5000] ^= 0xFF
        path.write_bytes(content)
    elif damage == "text":
        path.write_text("no zip")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            if damage == "two shapes":
                archive.writestr("a.png", png(images[0]))
                archive.writestr("b.png", png(images[0, :16]))
            if damage == "a label missing":
                archive.writestr("a.png", png(images[0]))
                archive.writestr("dataset.json", json.dumps({"labels": [["b.png", 0]]}))
    with pytest.raises(UserError, match=r"set\.zip"):
        read_zip(path)


def module(tmp_path, **settings) -> ImageDataModule:
    arguments = {
        "channels": 3,
        "image_size": 32,
        "num_classes": 30,
        "batch_size": 4,
        "flip": True,
        "val_images": 10,
        **settings,
    }
    return ImageDataModule(CIFAR10(), str(tmp_path), **arguments)


def test_a_test_split_validates_and_all_training_images_train(tmp_path, images):
    write_zip(tmp_path / "cifar10-32x32.zip", images, [0] * 30)
    write_zip(tmp_path / "cifar10-32x32-test.zip", images[:20], [0] * 20)
    data = module(tmp_path)
    data.setup()
    assert (len(data.train), len(data.val)) == (30, 10)


def test_without_a_test_split_images_are_held_out_the_same_each_time(tmp_path, images):
    write_zip(tmp_path / "cifar10-32x32.zip", images, list(range(30)))
    first, second = module(tmp_path), module(tmp_path, seed=5)
    first.setup()
    second.setup()
    assert sorted([*first.train.labels.tolist(), *first.val.labels.tolist()]) == list(range(30))
    assert first.val.labels.tolist() == second.val.labels.tolist()
    assert first.val.labels.tolist() != list(range(10))


def test_padding_adds_black_borders(tmp_path, images):
    write_zip(tmp_path / "cifar10-32x32.zip", images, [0] * 30)
    data = module(tmp_path, pad=4, image_size=40)
    data.setup()
    assert data.train.images.shape[1:] == (3, 40, 40)
    assert data.train.images[:, :, :4].max() == 0
    assert data.train.images[:, :, 4:-4, 4:-4].float().mean() > 100
