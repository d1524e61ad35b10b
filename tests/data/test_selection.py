"""Which images train and which validate, for every source: classes, limits and held-out images."""

import numpy as np
import pytest
import torch

from src.data.datamodule import ImageDataModule
from src.data.images import ImageSet
from src.data.selection import choose, class_names, held_out, limited, listed, of_classes
from src.data.sources import Digits, Folder
from src.errors import UserError
from tests.data.files import encoded, pixels


def image_set(n: int = 20, classes: tuple[str, ...] = ("cat", "dog", "owl", "5"), named: bool = True) -> ImageSet:
    """Image i is all i, of class i % 4."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, 2, 2).contiguous()
    return ImageSet(images, torch.arange(n) % 4, [f"{i:02}.png" for i in range(n)] if named else None, classes)


def values(data: ImageSet) -> list[int]:
    """What the images are, after a check that each is in its place."""
    assert len(data) == len(data.images) == len(data.labels)
    found = data.images[:, 0, 0, 0].tolist()
    assert data.take(torch.arange(len(data)))[:, 0, 0, 0].tolist() == found
    if data.names is not None:
        assert list(data.names) == [f"{value:02}.png" for value in found]
    return found


@pytest.fixture(params=["copied", "mapped"])
def amount(request, monkeypatch):
    """Sets that are small are copied, others are a choice of rows; both must be the same to whoever reads them."""
    if request.param == "mapped":
        monkeypatch.setattr("src.data.selection.COPIED", -1)
    return request.param


def test_classes_are_chosen_and_numbered_in_the_order_that_is_given(amount):
    """By names and by numbers; what is both is a name."""
    for wanted in (["owl", "cat"], [2, 0], ["2", "cat"]):
        chosen = of_classes(image_set(), wanted)
        assert values(chosen) == [i for i in range(20) if i % 4 in (0, 2)]
        assert chosen.labels.tolist() == [1 if i % 4 == 0 else 0 for i in values(chosen)]
        assert chosen.classes == ("owl", "cat")
    assert values(of_classes(image_set(), [5])) == [3, 7, 11, 15, 19]
    assert of_classes(image_set(classes=()), [3, 1]).classes == ("3", "1")
    assert (chosen.rows is None) == (amount == "copied")


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["cat", "dogg"], r"data\.classes names dogg, which is no class of these images; did you mean dog\?"),
        (["zebra"], r"names zebra, .*there are cat, dog, owl, 5"),
        ([4], r"names 4, which is no class"),
        ([-1], r"names -1, which is no class"),
        (["cat", 0], r"data\.classes=\['cat', 0\] names cat twice"),
        ([], r"data\.classes=\[\] names no class"),
    ],
)
def test_classes_that_are_not_there_are_refused(wanted, words):
    with pytest.raises(UserError, match=words):
        of_classes(image_set(), wanted)


def test_held_out_images_are_drawn_by_the_seed_and_shared_by_no_two_sets(amount):
    train, val = held_out(image_set(), 6)
    assert sorted(values(train) + values(val)) == list(range(20))
    assert (len(val), values(val)) == (6, sorted(values(val)))
    assert values(held_out(image_set(), 6)[1]) == values(val)
    assert len({tuple(values(held_out(image_set(), 6, seed)[1])) for seed in range(5)}) == 5
    with pytest.raises(UserError, match=r"data\.val_images=20 leaves nothing of 20 images to train on"):
        held_out(image_set(), 20)


def test_held_out_images_are_named_by_a_file(amount, tmp_path):
    """With a byte order mark, comments and empty lines; images without names are called by their number."""
    path = tmp_path / "val.txt"
    path.write_text("\ufeff# these validate\n07.png\n\n 03.png \n", encoding="utf-8")
    train, val = listed(image_set(), path)
    assert values(val) == [3, 7]
    assert values(train) == [i for i in range(20) if i not in (3, 7)]
    path.write_text("7\n3\n")
    assert values(listed(image_set(named=False), path)[1]) == [3, 7]
    some = choose(image_set(named=False), torch.tensor([2, 3, 7]))
    if amount == "mapped":
        assert values(listed(some, path)[0]) == [2]


def test_lists_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "val.txt"
    for text, words in (
        ("03.png\n99.png\n98.png", r"names 99\.png, which is not among the 20 images; they are called 00\.png"),
        ("# nothing\n", "names no image; it must name some"),
        ("\n".join(f"{i:02}.png" for i in range(20)), "names every image; it must name some"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"data\.val_list=.*val\.txt {words}"):
            listed(image_set(), path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"val\.txt cannot be read \(it is no text\)"):
        listed(image_set(), path)
    with pytest.raises(UserError, match=r"none\.txt cannot be read \(No such file or directory\)"):
        listed(image_set(), tmp_path / "none.txt")


def test_a_limit_draws_from_all_classes_and_a_smaller_one_is_part_of_a_larger(amount):
    """Catches the first images of a sorted folder, which are all cats."""
    sets = [set(values(limited(image_set(), n))) for n in (5, 10, 20, 30)]
    assert [len(s) for s in sets] == [5, 10, 20, 20]
    assert sets[0] < sets[1] < sets[2] == sets[3]
    assert sets[0] != set(range(5))
    assert values(limited(image_set(), 10)) == sorted(sets[1])


def test_choices_of_choices_are_choices(amount):
    data = choose(choose(image_set(), torch.arange(4, 20)), torch.tensor([0, 3, 5, 15]))
    assert values(data) == [4, 7, 9, 19]
    assert values(data[torch.tensor([3, 0])]) == [19, 4]
    assert values(data[1:3]) == [7, 9]
    assert data[1:3].labels.tolist() == [3, 1]
    assert data.name(3) == "19.png"


def test_a_choice_of_a_large_set_copies_nothing():
    data = ImageSet(torch.empty(1, 3, 600, 600, dtype=torch.uint8).expand(1000, 3, 600, 600), torch.zeros(1000).long())
    train, val = held_out(data, 200)
    assert train.store is val.store is data.store
    assert train.take(torch.tensor([0])).shape == (1, 3, 600, 600)


def test_class_names_are_numbers_where_there_are_none():
    assert class_names(image_set()) == ("cat", "dog", "owl", "5")
    assert class_names(image_set(classes=())) == ("0", "1", "2", "3")


def module(source=None, dir=".", **settings) -> ImageDataModule:
    arguments = {"channels": 1, "image_size": 8, "num_classes": 10, "batch_size": 4, "flip": False, "val_images": 128}
    data = ImageDataModule(source or Digits(), str(dir), **{**arguments, **settings})
    data.setup()
    return data


def test_the_digits_are_held_out_as_they_always_were():
    """The first of them by number: another choice would make runs of before and after incomparable."""
    data = module()
    assert (len(data.train), len(data.val)) == (1669, 128)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    whole = Digits().load(None)[0]
    assert torch.equal(data.val.images, whole.images[order[:128].sort().values])
    assert torch.equal(data.train.labels, whole.labels[order[128:].sort().values])
    assert data.class_names == tuple("0123456789")


HELD_OUT_SEED = 3689550331


def test_classes_limit_and_seed_are_settings_of_every_source():
    """The limit takes none of what validates, so that runs with different limits are compared on the same images."""
    data = module(classes=(3, 8), num_classes=2, limit=50, val_images=20)
    assert (len(data.train), len(data.val)) == (50, 20)
    assert data.train.labels.unique().tolist() == data.val.labels.unique().tolist() == [0, 1]
    assert data.class_names == ("3", "8")
    whole = Digits().load(None)[0]
    eights = {tuple(image.flatten().tolist()) for image in whole.images[whole.labels == 8]}
    assert {tuple(image.flatten().tolist()) for image in data.train.images[data.train.labels == 1]} <= eights
    other = module(classes=(3, 8), num_classes=2, limit=9, val_images=20)
    assert torch.equal(other.val.images, data.val.images)
    another = module(classes=(3, 8), num_classes=2, val_images=20, val_seed=1)
    assert not torch.equal(another.val.images, data.val.images)


def test_labels_are_left_out_where_none_are_wanted():
    data = module(labels="none", num_classes=1)
    assert data.train.labels.unique().tolist() == [0]
    assert data.class_names == ("",)
    with pytest.raises(UserError, match=r"data\.labels=folder is for images in files"):
        module(labels="folder")


def test_a_list_takes_the_place_of_a_number(tmp_path):
    (tmp_path / "val.txt").write_text("0\n17\n")
    data = module(val_list=str(tmp_path / "val.txt"), val_images=1)
    whole = Digits().load(None)[0]
    assert torch.equal(data.val.images, whole.images[[0, 17]])
    assert len(data.train) == 1795


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"val_seed": -1}, r"data\.val_seed=-1 must lie between"),
        ({"limit": 3}, r"data\.batch_size=4 is more than the 3 training images"),
        ({"num_classes": 4}, r"data\.num_classes=4 does not allow; set data\.num_classes=10"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        module(**settings)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def pets(tmp_path):
    for i, name in enumerate(["cat/1.png", "cat/2.png", "dog/3.png", "owl/4.png", "owl/5.png", "dog/6.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(pixels(8, 8, 1, seed=i)))
    return tmp_path


def test_a_folder_trains_by_name(pets, tmp_path):
    """From files to what the loader gets: pixels, labels and names belong together."""
    (tmp_path / "val.txt").write_text("owl/4.png\ncat/2.png\n")
    settings = {"labels": "folder", "classes": ("owl", "cat"), "val_list": str(tmp_path / "val.txt"), "num_classes": 2}
    data = module(Folder(), pets, batch_size=2, **settings)
    assert list(data.train.names) == ["cat/1.png", "owl/5.png"]
    assert data.train.labels.tolist() == [1, 0]
    assert data.class_names == ("owl", "cat")
    np.testing.assert_array_equal(data.train.images[1, 0].numpy(), pixels(8, 8, 1, seed=4)[..., 0])
    assert list(data.val.names) == ["cat/2.png", "owl/4.png"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_classes": 2}, r"data\.num_classes=2 does not allow; set data\.num_classes=3"),
        ({"classes": ("owl", "cat"), "num_classes": 1}, r"data\.num_classes=1 does not allow; set data\.num_classes=2"),
        ({"classes": ("cow",)}, r"data\.classes names cow, which is no class"),
    ],
)
def test_classes_that_do_not_fit_are_refused_before_images_are_decoded(pets, monkeypatch, settings, words):
    monkeypatch.setattr("src.data.datamodule.packed_once", None)
    with pytest.raises(UserError, match=words):
        module(Folder(), pets, labels="folder", **settings)


def test_a_test_split_without_the_chosen_classes_is_refused(tmp_path):
    for i, name in enumerate(["train/cat/1.png", "train/dog/2.png", "val/cat/3.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(encoded(pixels(8, 8, 1, seed=i)))
    with pytest.raises(UserError, match=r"data\.classes=\['dog'\]: the test split holds no image of these classes"):
        module(Folder(val_folder="val"), tmp_path, labels="folder", classes=("dog",), batch_size=1)
    data = module(Folder(val_folder="val"), tmp_path, labels="folder", batch_size=1)
    assert (list(data.train.names), list(data.val.names)) == (["train/cat/1.png", "train/dog/2.png"], ["val/cat/3.png"])
