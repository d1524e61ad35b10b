"""python -m src.prepare, and training from what it wrote and from files that were packed on the way."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.mapped import sparse
from src.data import packed
from src.data.datamodule import ImageDataModule
from src.data.geometry import Geometry
from src.data.loader import TrainLoader
from src.data.packed import Packed, Store
from src.data.packing import pack
from src.data.sources import Folder
from tests.data.made import Made, noise


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diffusion-lab" / "data"


def photos(folder, n=24, size=(12, 16), classes=("cat", "dog", "fox")):
    """A folder a class of small PNGs of noise; returns them as an array, in the order of their names."""
    g = np.random.default_rng(0)
    found = {}
    for i in range(n):
        pixels = g.integers(0, 256, (*size, 3), dtype=np.uint8)
        name = f"{classes[i % len(classes)]}/{i:03}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
        found[name] = pixels
    return {name: found[name] for name in sorted(found)}


def test_prepare_writes_a_store_and_training_starts_from_it(command, tmp_path):
    """Rectangles keep their shape; channels, size and classes come from the manifest, or the user's numbers win."""
    images = photos(tmp_path / "photos")
    settings = [f"data.dir={tmp_path / 'photos'}", "data.labels=folder", "size=12x16", f"out={tmp_path / 'out'}"]
    outcome = command("prepare", "data=folder", *settings)
    assert outcome.code == 0, outcome.err
    assert f"24 images, 12x16 with 3 channels of uint8, 0.0 MiB, in {tmp_path / 'out'}" in outcome.out
    assert outcome.out.endswith(f"python -m src.train data=packed data.dir={tmp_path / 'out'}\n")
    store = Store(tmp_path / "out", verify=True)
    np.testing.assert_array_equal(store.images.numpy(), np.stack(list(images.values())).transpose(0, 3, 1, 2))
    assert store.manifest.classes == ["cat", "dog", "fox"]
    assert store.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    train = ["experiment=smoke", "data=packed", f"data.dir={tmp_path / 'out'}", "data.batch_size=8"]
    train += [
        "data.val_images=4",
        "trainer.max_steps=2",
        "callbacks.samples=null",
        "callbacks.checkpoint.every_n_steps=2",
    ]
    outcome = command("train", *train, f"hydra.run.dir={tmp_path / 'run'}", "model.num_classes='${data.num_classes}'")
    assert outcome.code == 0, outcome.err
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "image_size:\n  - 12\n  - 16\n" in config
    assert "num_classes: 3\n" in config
    outcome = command("train", *train, f"hydra.run.dir={tmp_path / 'other'}", "data.channels=1")
    assert "the images are 12x16 with 3 channels, not 12x16 with 1 channel" in outcome.err
    assert outcome.code == 2


def test_the_same_prepare_again_does_nothing_and_another_is_refused(command, tmp_path):
    photos(tmp_path / "photos", 3)
    arguments = ["data=folder", f"data.dir={tmp_path / 'photos'}", f"out={tmp_path / 'out'}"]
    assert command("prepare", *arguments, "size=8").code == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert command("prepare", *arguments, "size=8").code == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    outcome = command("prepare", *arguments, "size=8", "crop=random")
    assert outcome.code == 2
    assert "holds a store of other images or settings (crop differ)" in outcome.err


def test_what_is_of_a_training_is_refused(command, tmp_path):
    photos(tmp_path / "photos", 3)
    outcome = command(
        "prepare", "data=folder", f"data.dir={tmp_path / 'photos'}", "size=8", "data.limit=2", f"out={tmp_path}/out"
    )
    assert outcome.code == 2
    assert "data.limit=2 belongs to a training from it" in outcome.err


def test_images_to_validate_on_are_a_store_of_their_own(command, tmp_path):
    for split in ("train", "val"):
        photos(tmp_path / "photos" / split, 6)
    arguments = [f"data.dir={tmp_path / 'photos'}", "data.labels=folder", "data.source.val_folder=val"]
    outcome = command("prepare", "data=folder", *arguments, "size=8", f"out={tmp_path / 'out'}")
    assert outcome.code == 0, outcome.err
    data = ImageDataModule(Packed(), str(tmp_path / "out"), 3, 8, 3, 4, False, 5)
    data.setup()
    assert (len(data.train), len(data.val)) == (6, 5)


def module(folder, labels="folder", **settings):
    return ImageDataModule(
        Folder(), str(folder), 3, settings.pop("image_size", 12), 3, 4, False, 6, labels=labels, **settings
    )


def test_a_folder_is_packed_once_and_mapped(tmp_path, cache, capsys, monkeypatch):
    images = photos(tmp_path / "photos", size=(12, 12))
    data = module(tmp_path / "photos")
    data.setup()
    (folder,) = cache.iterdir()
    assert f"packing 24 images of {tmp_path / 'photos'}, once, into {folder}" in capsys.readouterr().out
    for part in (data.train, data.val):
        for i in range(len(part)):
            np.testing.assert_array_equal(part.take(torch.tensor([i]))[0].permute(1, 2, 0), images[part.name(i)])
    assert {data.train.name(i) for i in range(18)}.isdisjoint(data.val.name(i) for i in range(6))

    def read(self, i):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patched:
        patched.setattr("src.data.catalogues.folder.FolderCatalogue.read", read)
        again = module(tmp_path / "photos")
        again.setup()
    assert capsys.readouterr().out == ""
    assert torch.equal(again.train.images, data.train.images)
    module(tmp_path / "photos", image_size=6).setup()  # of another size: another store
    assert len(list(cache.iterdir())) == 2
    Image.new("RGB", (12, 12)).save(tmp_path / "photos" / "cat" / "new.png")
    module(tmp_path / "photos").setup()  # a file more: another store
    assert len(list(cache.iterdir())) == 3


def test_classes_limit_and_list_of_a_packed_store(command, tmp_path):
    photos(tmp_path / "photos")
    command(
        "prepare",
        "data=folder",
        f"data.dir={tmp_path / 'photos'}",
        "data.labels=folder",
        "size=8",
        f"out={tmp_path / 'o'}",
    )
    (tmp_path / "val.txt").write_text("fox/002.png\ndog/004.png\n")
    settings = {"classes": ["fox", "dog"], "limit": 7, "val_list": str(tmp_path / "val.txt")}
    data = ImageDataModule(Packed(), str(tmp_path / "o"), 3, 8, 2, 4, False, 2, **settings)
    data.setup()
    assert [data.val.name(i) for i in range(2)] == ["dog/004.png", "fox/002.png"]
    assert data.val.labels.tolist() == [1, 0]
    assert len(data.train) == 7
    assert tuple(data.class_names) == ("fox", "dog")


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path, cache):
    photos(tmp_path / "photos", size=(12, 12))
    cache.parent.mkdir(parents=True)
    cache.write_text("a file")
    with pytest.raises(ValueError, match=r"cannot be written to .*; the cache is \$XDG_CACHE_HOME/diffusion-lab/data"):
        module(tmp_path / "photos").setup()


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_samples_are_compared_with_256_levels(tmp_path, dtype):
    """Catches the upper byte alone of 16 bits, truncation, and values that are taken for levels."""
    values = np.arange(4096).reshape(1, 64, 64, 1)
    deep = (values * 16).astype(np.uint16) if dtype == "uint16" else (values / 2047.5 - 1).astype(np.float32)
    pack(Made(list(deep)), Geometry((64, 64)), tmp_path / "out")
    levels = Store(tmp_path / "out").image_set().levels
    exact = deep.astype(np.float64) / 257 if dtype == "uint16" else (deep.astype(np.float64) + 1) * 127.5
    assert levels.dtype == torch.uint8
    assert np.abs(levels.numpy()[0, 0] - exact[0, ..., 0]).max() <= 0.5001


BROKEN = {
    "cat/000.png": (b"", "cat/000.png is empty"),
    "dog/001.png": (b"hello, I am text", "dog/001.png is text"),
    "fox/002.png": (None, "fox/002.png is cut short"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_broken_files_are_named_and_nothing_is_left(command, tmp_path, name, verb, cache):
    """With real files: one sentence, code 2, no folder; and with data.max_broken they are left out and listed."""
    photos(tmp_path / "photos")
    path = tmp_path / "photos" / name
    content, sentence = BROKEN[name]
    path.write_bytes(path.read_bytes()[:100] if content is None else content)
    out = tmp_path / "out"
    own = (
        [f"out={out}", "size=8"]
        if verb == "prepare"
        else [f"hydra.run.dir={out}", "data.image_size=8", "model=unet_tiny"]
    )
    arguments = ["data=folder", f"data.dir={tmp_path / 'photos'}", *own]
    if verb == "train":
        arguments += ["experiment=smoke", "data.batch_size=4", "data.val_images=4", "trainer.max_steps=1"]
    outcome = command(verb, *arguments)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {sentence}")
    assert outcome.err.count("\n") == 1
    assert "data.max_broken" in outcome.err
    assert not out.exists()
    assert not any(path.name == "manifest.json" for path in tmp_path.rglob("*"))
    if verb == "prepare":
        outcome = command(verb, *arguments, "data.max_broken=1")
        assert outcome.code == 0, outcome.err
        assert (
            f"note: 1 was left out, which manifest.json lists; the first, {sentence.replace(' is', ', is')}"
            in outcome.out
        )
        assert json.loads((out / "manifest.json").read_text())["skipped"][0][0] == name


def test_names_that_no_terminal_shows_are_escaped(command, tmp_path, cache):
    """A line's end and a byte that is no text, in names of broken and of whole images: one sentence each."""
    photos(tmp_path / "photos")
    names = ["dog/a\nb.png", os.fsdecode(b"dog/\xff\x1b[2J.png")]
    for name in names:
        (tmp_path / "photos" / name).write_bytes(b"text")
    arguments = ["data=folder", f"data.dir={tmp_path / 'photos'}"]
    for name, escaped in zip(names, ("a\\nb.png", "\\udcff\\x1b[2J.png"), strict=True):
        outcome = command("prepare", *arguments, f"out={tmp_path / 'out'}", "size=8")
        assert outcome.code == 2
        assert outcome.err.startswith(f"error: dog/{escaped} is text, not an image")
        assert outcome.err.count("\n") == 1
        (tmp_path / "photos" / name).write_bytes((tmp_path / "photos/cat/000.png").read_bytes())
    settings = ["model=unet_tiny", "data.image_size=8", "data.val_images=2", "data.batch_size=4"]
    outcome = command("preview", *arguments, *settings, f"out={tmp_path / 'seen'}")
    assert outcome.code == 0, outcome.err
    assert all(line.isprintable() for line in outcome.out.splitlines())
    assert "the same as another to the bit" in outcome.out


REFUSED = [
    (["data=digits", "size=8"], "these images need no preparing"),
    (["data=webdataset", "size=8"], "shards are read while training goes on, and are not prepared"),
    (["size=[8,8,3]"], "size: size=[8, 8, 3] is not one number, or height and width"),
    (["size=0"], "size: size=0 must be at least 1"),
    (["size=8x"], "size=8x is not a whole number or height by width, such as 48x64"),
    (["size=8", "crop=middle"], "crop=middle is not one of center, none, random"),
    (["size=8", "resize=cubic"], "resize=cubic is not one of lanczos, area"),
    (["size=8", "processes=0"], "processes=0 must be at least 1"),
    (["size=8", "data.max_broken=-1"], "data.max_broken=-1 must not be negative"),
    (["size=8", "data.dir={tmp}/nowhere"], "data.dir={tmp}/nowhere does not exist"),
    (
        ["size=8", "crop=none"],
        "cat/000.png is 12x16, which 8x8 would distort; use crop=center or crop=random; or leave",
    ),
    (["size=8", "out={tmp}/photos/cat/000.png"], "choose another with out=<folder>"),
    (["size=8", "out={tmp}/photos"], "photos holds other files (cat, dog, fox)"),
    ([], "size has no value; set it with size=..."),
    (["size=8", "data=packed", "data.dir={tmp}"], "is no packed store"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_prepare_refuses(command, tmp_path, arguments, sentence):
    photos(tmp_path / "photos", 3)
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    outcome = command(
        "prepare", "data=folder", f"data.dir={tmp_path / 'photos'}", f"out={tmp_path / 'out'}", *arguments
    )
    assert outcome.code == 2
    assert sentence.format(tmp=tmp_path) in outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == ["cat", "dog", "fox"]


def test_prepare_helps(command):
    outcome = command("prepare", "--help")
    assert outcome.code == 0
    assert "data: " in outcome.out
    assert outcome.out.partition("Examples:")[2].count("python -m src.prepare") == 3


def test_packed_data_without_a_store_is_one_sentence(command, tmp_path):
    """Of a resolver that a resolver asks: the network is built from the manifest's numbers."""
    for arguments, sentence in (
        ([], "data.dir names no packed store; set it to the out= of python -m src.prepare"),
        ([f"data.dir={tmp_path}"], f"{tmp_path} is no packed store; data=packed wants data.dir=<the out= of"),
    ):
        outcome = command("train", "data=packed", *arguments, f"hydra.run.dir={tmp_path / 'run'}")
        assert outcome.code == 2
        assert outcome.err.startswith(f"error: {sentence}")
        assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_a_small_store_is_padded_with_black(tmp_path, dtype):
    """Catches a border of 0 around floats, whose black is -1, and one that is part of the size on one side alone."""
    images = noise(12, (6, 4, 2), dtype)
    pack(Made(images), Geometry((6, 4)), tmp_path / "store")
    data = ImageDataModule(Packed(), str(tmp_path / "store"), 2, (10, 8), 1, 4, False, 4, pad=2)
    data.setup()
    assert (len(data.train), len(data.val)) == (8, 4)
    for part in (data.train, data.val):
        for i in range(len(part)):
            original = images[int(part.name(i)[:5])].astype(np.float64)
            black = -1 if dtype == "float32" else 0
            expected = np.pad(original, ((2, 2), (2, 2), (0, 0)), constant_values=black).transpose(2, 0, 1)
            np.testing.assert_array_equal(part.take(torch.tensor([i]))[0].double().numpy(), expected)


def test_a_folder_is_resized_to_what_lies_within_the_border(tmp_path):
    images = photos(tmp_path / "photos", 12, size=(8, 8))
    data = module(tmp_path / "photos", image_size=12, pad=2)
    data.setup()
    assert data.train.store.shape == (6, 3, 12, 12)
    inside = data.train.images[0, :, 2:10, 2:10].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(inside, images[data.train.name(0)])
    with pytest.raises(ValueError, match="must be at least 1"):
        module(tmp_path / "photos", image_size=4, pad=2).setup()


def test_a_pad_that_would_copy_a_store_is_refused(tmp_path):
    sparse(tmp_path / "store", 1e9)
    data = ImageDataModule(Packed(), str(tmp_path / "store"), 3, 66, 1, 4, False, 4, pad=1)
    with pytest.raises(ValueError, match=r"data\.pad=1 would copy 0\.9 GiB of images into memory; pack them"):
        data.setup()


def test_floats_outside_the_range_are_not_trained_on(tmp_path):
    """Of a store that something else packed; `src.preview` may look at it."""
    pack(Made([2 * image for image in noise(8, (6, 6, 1), "float32")]), Geometry((6, 6)), tmp_path / "out")
    data = ImageDataModule(Packed(), str(tmp_path / "out"), 1, 6, 1, 2, False, 2)
    with pytest.raises(ValueError, match=r"holds values from -1.9\d* to 1.9\d*, and networks are trained on \[-1, 1\]"):
        data.setup()
    data.setup("preview")


def memory(name):
    """Of this process, in bytes: RssAnon is its own, RssFile what it holds of files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read where Linux shows it")
def test_a_store_larger_than_memory_is_not_copied(tmp_path, monkeypatch):
    """A sparse file of 4 GB: held out, limited to classes, drawn from. Catches a split that copies, a store that is
    padded or made contiguous, and pages that are kept for ever."""
    monkeypatch.setattr(packed, "KEPT", 2**25)
    sparse(tmp_path / "store", 4e9)
    own = memory("RssAnon")
    data = ImageDataModule(Packed(), str(tmp_path / "store"), 3, 64, 1, 128, True, 64, classes=[0], limit=200_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup()
        files = memory("RssFile")
        grown = []
        for i, batch in enumerate(TrainLoader(data.train, torch.device("cpu"), 128, True, seed=0)):
            assert float(batch.x0.max()) == -1
            data.on_after_batch_transfer(batch, 0)
            grown.append(memory("RssFile") - files)
            if i == 40:
                break
    assert memory("RssAnon") - own < 3e8
    assert max(grown) < 2.5e8
    assert max(grown) > 2e7  # it is looked at what is mapped
