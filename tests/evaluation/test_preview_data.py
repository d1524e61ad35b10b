"""What src.preview says of a set of images: each fault is planted, and told with its number."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.datamodule import ImageDataModule
from src.data.geometry import Geometry
from src.data.packed import Packed
from src.data.packing import pack
from src.errors import UserError
from src.evaluation.preview_data import BINS, chosen, look_at, words_on
from tests.data.files import encoded
from tests.data.made import Made, noise
from tests.data.test_webdataset import loader, module, numbers, shards, write  # noqa: F401


def look(tmp_path, catalogue, size=(8, 8), channels=3, classes=1, val=4, **settings):
    out = tmp_path / "store"
    pack(catalogue, Geometry(size), out, max_broken=3)
    data = ImageDataModule(Packed(), str(out), channels, size, classes, 2, False, val, **settings)
    data.setup("preview")
    found = look_at(data)
    return found, {said["name"]: said for said in words_on(found, data)}, data


def test_numbers_of_images_that_are_as_they_should_be(tmp_path):
    images = noise(60, (8, 8, 3))
    found, said, data = look(tmp_path, Made(images, np.arange(60) % 3, ("cat", "dog", "fox")), classes=3)
    assert list(said) == ["images_look_right"]
    assert "56 to train and 4 to validate on" in said["images_look_right"]["sentence"]
    assert sum(found.counts.values()) == found.train == found.looked_at == 56
    assert list(found.counts) == ["cat", "dog", "fox"]
    trained = data.train.images.double().numpy() * 2 / 255 - 1
    np.testing.assert_allclose(found.mean, trained.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(found.std, trained.std((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose([found.lowest, found.highest], [trained.min(), trained.max()], atol=1e-6)
    assert found.histogram.shape == (3, BINS)
    np.testing.assert_allclose(found.histogram.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(found.histogram[0], np.histogram(trained[:, 0], found.edges)[0] / (56 * 64), atol=1e-3)


def test_nearly_constant_images_are_named(tmp_path):
    """One of three colours is constant, though its channels differ; one with a single stripe is not."""
    images = noise(40, (8, 8, 3))
    images[5] = np.broadcast_to(np.array([10, 200, 90], np.uint8), (8, 8, 3)).copy()
    images[6] = images[5] + (np.arange(8)[:, None, None] % 2).astype(np.uint8)
    images[7] = images[5].copy()
    images[7][3, :, 2] = 0
    found, said, data = look(tmp_path, Made(images), val=1)
    kept = [i for i in (5, 6) if any(data.train.name(j) == f"{i:05}.png" for j in range(39))]
    assert [data.train.name(i) for i in found.constant] == [f"{i:05}.png" for i in kept]
    assert said["constant_images"]["numbers"]["number"] == len(kept) > 0
    assert data.train.name(found.constant[0]) in said["constant_images"]["sentence"]


def test_a_class_with_three_images_is_named(tmp_path):
    labels = np.array([0] * 40 + [1] * 40 + [2] * 3)
    found, said, _ = look(tmp_path, Made(noise(83), labels, ("cat", "dog", "fox")), (6, 5), classes=3, val=1)
    assert said["small_classes"]["numbers"]["classes"] == {"fox": found.counts["fox"]}
    assert found.counts["fox"] in (2, 3)
    assert f"1 of 3 classes has fewer than 10 images (fox {found.counts['fox']}" in said["small_classes"]["sentence"]


def test_mixed_sizes_and_what_cropping_takes(tmp_path):
    """A third is lost of each wide image; one is smaller than the target."""
    images = [*noise(20, (10, 10, 3)), *noise(9, (10, 15, 3)), *noise(1, (4, 4, 3), seed=2)]
    found, said, _ = look(tmp_path, Made(images), (10, 10))
    assert found.manifest.sizes == {"10x10": 20, "10x15": 9, "4x4": 1}
    sentence = said["cropped"]["sentence"]
    assert "9 images of 30 lose more than 20% to cropping, on average all lose 10%" in sentence
    assert "such as [10,15]" in sentence
    assert said["enlarged"]["numbers"]["number"] == 1


def test_copies_contradictions_and_leaks(tmp_path):
    """Every image twice, the second time with another label: whatever is held out, nothing of it is new."""
    images = noise(20, (8, 8, 3))
    labels = np.array([0] * 20 + [1] * 20)
    found, said, data = look(tmp_path, Made(images * 2, labels, ("cat", "dog")), classes=2, val=1)
    assert len(found.copies) == found.contradictions == 19
    for copy, first in found.copies:
        assert int(data.train.name(copy)[:5]) == int(data.train.name(first)[:5]) + 20
    assert said["copies"]["numbers"]["number"] == 19
    assert "19 of them with another label" in said["copies"]["sentence"]
    assert said["leaks"]["numbers"]["number"] == 1
    assert "1 of 1 validation images is also among the training images" in said["leaks"]["sentence"]


def test_a_range_that_is_left_and_one_that_is_hardly_used(tmp_path):
    """Floats of [-2, 2]; and 12 bits in 16, the darkest sixteenth of their range."""
    _, said, _ = look(tmp_path / "a", Made([2 * i for i in noise(9, (8, 8, 1), "float32")]), channels=1)
    assert said["outside_range"]["sentence"].startswith("Outside the range: the network would see values from -2 to 2,")
    deep = [i // 16 for i in noise(9, (8, 8, 1), "uint16")]
    found, said, _ = look(tmp_path / "b", Made(deep), channels=1)
    assert found.highest == pytest.approx(4095 / 65535 * 2 - 1, abs=1e-3)
    assert "6.2% of [-1, 1]" in said["narrow_range"]["sentence"]


def test_the_picture_shows_each_class_in_turn(tmp_path):
    labels = np.array([0] * 50 + [1] * 20 + [2] * 4)
    _, _, data = look(tmp_path, Made(noise(74), labels, ("a", "b", "c")), (6, 5), classes=3, val=1)
    shown = data.train.labels[chosen(data, 0)].tolist()
    assert len(shown) == 40
    assert shown[:9] == [0, 1, 2] * 3
    assert chosen(data, 0).unique().numel() == 40
    assert chosen(data, 1).tolist() != chosen(data, 0).tolist()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_command_draws_any_number_of_channels(command, tmp_path, channels):
    """Also of rectangles, and of files that could not be read."""
    pack(Made(noise(30, (8, 12, channels)), broken=(3,)), Geometry((8, 12)), tmp_path / "store", max_broken=1)
    outcome = command(
        "preview",
        *("data=packed", f"data.dir={tmp_path / 'store'}", "data.val_images=4", "data.batch_size=2", "model=unet_tiny"),
        f"out={tmp_path / 'out'}",
    )
    assert outcome.code == 0, outcome.err
    assert Image.open(tmp_path / "out" / "data.png").width == 1440
    content = json.loads((tmp_path / "out" / "preview.json").read_text())["data"]
    assert content["packed"]["skipped"] == [["00003.png", "is cut short"]]
    assert "Left out: 1 image could not be used, the first, 00003.png, is cut short." in outcome.out
    assert [said["name"] for said in content["sentences"]] == ["skipped"]
    assert len(content["mean"]) == channels


def test_of_a_stream_the_first_images_are_looked_at(shards):  # noqa: F811
    """They are those that training sees first: a window of each lane; the same each time."""
    data, again = (module(shards, shuffle=12) for _ in range(2))
    for each in (data, again):
        each.setup("preview")
    found = look_at(data)
    first = numbers(islice(loader(module(shards, shuffle=12, batch_size=4)), 3))
    pixels = data.train.images
    assert sorted(pixels[:, 0, 0, 0].tolist()) == sorted(first)
    assert torch.equal(pixels, again.train.images)
    assert list(data.train.names) == list(again.train.names)
    assert [int(name[:6]) for name in data.train.names] == pixels[:, 0, 0, 0].tolist()
    assert all(name.endswith(".tar") and "/" not in name for name in data.train.names)
    assert found.train == found.looked_at == sum(found.counts.values()) == 12
    assert found.counts == {str(c): sum(n % 10 == c for n in first) for c in range(10)}
    assert found.manifest.sizes == {"4x4": 12}
    np.testing.assert_allclose(found.mean, pixels.double().mean((0, 2, 3)) * 2 / 255 - 1, atol=1e-12)
    said = {sentence["name"]: sentence for sentence in words_on(found, data)}
    assert said["first_images"]["numbers"] == {"number": 12, "shards": 6}
    assert "the first 12 images that training would see, from 6 shards" in said["first_images"]["sentence"]
    assert "data.balance" not in said["small_classes"]["sentence"]


def test_of_a_short_stream_each_image_is_looked_at_once(shards):  # noqa: F811
    """A window is longer than an epoch: 44 images, and not the copies of the epoch after."""
    data = module(shards, shuffle=1000)
    data.setup("preview")
    assert sorted(data.train.images[:, 0, 0, 0].tolist()) == list(range(44))
    assert not look_at(data).copies


def test_of_a_stream_sizes_and_what_is_broken_are_told(shards):  # noqa: F811
    """Also grey images, which become colour, and a shard that is cut."""
    wide = np.random.default_rng(0).integers(0, 256, (4, 8, 1), dtype=np.uint8)
    grey = encoded(np.ascontiguousarray(wide))
    write(shards / "train-000.tar", {"a.png": grey, "a.cls": b"1", "b.png": grey[:60], "b.cls": b"1", "c.png": grey})
    path = shards / "train-002.tar"
    path.write_bytes(path.read_bytes()[:5000])
    data = module(shards, shuffle=1000, max_broken=3)
    data.setup("preview")
    assert data.first.sizes == {"4x4": 25, "4x8": 1}
    assert data.first.cropped == {"by_more_than_a_fifth": 1, "mean": pytest.approx(0.5 / 26, abs=1e-12)}
    row = [name[0] for name in data.train.names].index("a")
    assert torch.equal(data.train.images[row], torch.from_numpy(wide[:, 2:6, 0]).expand(3, 4, 4))
    said = {sentence["name"]: sentence for sentence in words_on(look_at(data), data)}
    assert said["skipped"]["numbers"]["number"] == 3
    assert "crop=random" not in said["cropped"]["sentence"]
    with pytest.raises(UserError, match=r"data\.max_broken=3"):
        module(shards, shuffle=1000, max_broken=2).setup("preview")


def test_training_images_of_a_stream_are_for_a_preview_alone(shards):  # noqa: F811
    data = module(shards)
    data.setup()
    with pytest.raises(UserError, match="only a stream of them"):
        data.train  # noqa: B018


def test_the_command_draws_a_stream(command, shards, tmp_path):  # noqa: F811
    settings = ["data.shards=train-*.tar", "data.val_shards=val-*.tar", "data.image_size=4", "data.num_classes=10"]
    arguments = ["data=webdataset", f"data.dir={shards}", *settings, "data.shuffle=20", "data.batch_size=4"]
    outcome = command("preview", *arguments, "model=unet_tiny", f"out={tmp_path / 'out'}")
    assert outcome.code == 0, outcome.err
    assert "Looked at: the first 20 images that training would see, from 6 shards" in outcome.out
    assert Image.open(tmp_path / "out" / "data.png").width == 1440
    content = json.loads((tmp_path / "out" / "preview.json").read_text())["data"]
    assert content["looked_at"] == sum(content["counts"].values()) == 20


def test_of_many_images_some_are_looked_at_and_that_is_said(tmp_path, monkeypatch):
    """No more is read of a mapped file than that."""
    monkeypatch.setattr("src.evaluation.preview_data.LOOKED_AT", 30 * 8 * 8 * 3)
    monkeypatch.setattr("src.data.selection.COPIED", 0)
    found, said, _ = look(tmp_path, Made(noise(60, (8, 8, 3))))
    assert (found.train, found.looked_at) == (56, 30)
    assert said["some_images"]["sentence"].startswith("Looked at: 30 images of 56, spread evenly;")
    assert list(said) == ["some_images", "images_look_right"]
