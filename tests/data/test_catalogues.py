"""Folders and zips of image files: what is seen, in which order, with which labels, and what is refused."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from src.data.catalogue import BrokenImageError
from src.data.sources import Folder, Zip
from src.errors import UserError
from tests.data.files import encoded, npy, pixels

PLAIN = ("b/2.png", "a/x/1.jpg", "a.webp", "B.TIFF", "c.npy")


def content(name: str, seed: int = 0) -> bytes:
    kind = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".tiff": "TIFF"}.get(Path(name.lower()).suffix)
    array = pixels(seed=seed)
    return npy(array) if kind is None else encoded(array, kind, **({"lossless": True} if kind == "WEBP" else {}))


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def images(*names: str) -> dict[str, bytes]:
    return {name: content(name, seed) for seed, name in enumerate(names)}


@pytest.fixture(params=["folder", "zip"])
def place(request, tmp_path):
    """Makes a source and the place that it reads, of files by name."""

    def make(files: dict[str, bytes], **settings):
        if request.param == "folder":
            return Folder(**settings), write(tmp_path / "set", files)
        return Zip(**settings), pack(tmp_path / "set.zip", files)

    return make


def test_images_are_found_at_any_depth_sorted_by_name_and_read_to_the_pixel(place):
    """In capitals, too. Catches the order of a file system, or of an archive, and images that are mixed up."""
    source, dir = place({**images(*PLAIN), "notes.txt": b"no image", "x/table.csv": b""})
    train, val = source.catalogues(dir)
    assert val is None
    assert list(train.names) == ["B.TIFF", "a.webp", "a/x/1.jpg", "b/2.png", "c.npy"]
    for i, name in enumerate(train.names):
        seed = PLAIN.index(name)
        if not name.endswith("jpg"):
            np.testing.assert_array_equal(train.read(i), pixels(seed=seed), name)
    assert train.labels.tolist() == [0] * 5
    assert list(train.classes) == [""]


def test_hidden_files_are_not_seen(place):
    hidden = images(".x.png", ".cache/x.png", "a/.b/x.png", "__MACOSX/x.png", "a/._1.png")
    source, dir = place({**images("a/1.png"), **hidden})
    assert list(source.catalogues(dir)[0].names) == ["a/1.png"]


def test_a_catalogue_is_read_by_other_processes(place):
    source, dir = place(images(*(f"{i:02}.png" for i in range(40))))
    train, _ = source.catalogues(dir)
    again = pickle.loads(pickle.dumps(train))
    assert list(again.names) == list(train.names)
    np.testing.assert_array_equal(again.read(3), pixels(seed=3))
    assert again.fingerprint() == train.fingerprint()
    with get_context("fork").Pool(3) as pool:
        parts = pool.map(train.read, list(range(40)) * 3, chunksize=1)
    assert all((part == pixels(seed=i % 40)).all() for i, part in enumerate(parts))


def test_a_process_that_was_forked_opens_the_archive_itself(tmp_path, monkeypatch):
    """Catches one position in the file that several processes move."""
    archive = Zip().catalogues(pack(tmp_path / "set.zip", images("1.png")))[0].archive
    first = archive.open()
    assert archive.open() is first
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert archive.open() is not first


def test_the_fingerprint_tells_one_state_from_another(place):
    """An image added, removed, renamed or written anew, another label, and another range of floats."""
    base = images("a/1.png", "b/2.png")
    states = [
        (base, None, {}),
        ({**base, **images("c/3.png")}, None, {}),
        ({"a/1.png": base["a/1.png"]}, None, {}),
        ({"a/1.png": base["a/1.png"], "b/3.png": base["b/2.png"]}, None, {}),
        ({**base, "a/1.png": content("a/1.png", 7)}, None, {}),
        (base, "folder", {}),
        (base, None, {"float_range": (0.0, 1.0)}),
    ]
    found = []
    for files, labels, settings in states:
        source, dir = place(files, **settings)
        found.append([source.catalogues(dir, labels)[0].fingerprint() for _ in range(2)])
        shutil.rmtree(dir) if dir.is_dir() else dir.unlink()
    assert all(a == b for a, b in found)
    assert len({a for a, _ in found}) == len(states)


def test_the_class_is_the_top_level_folder(place):
    source, dir = place(images("dog/2.png", "cat/x/1.png", "cat/0.png", "owl/3.png"))
    train, _ = source.catalogues(dir, "folder")
    assert list(train.names) == ["cat/0.png", "cat/x/1.png", "dog/2.png", "owl/3.png"]
    assert train.labels.tolist() == [0, 0, 1, 2]
    assert train.labels.dtype == np.int64
    assert list(train.classes) == ["cat", "dog", "owl"]


def test_folders_called_by_numbers_are_in_the_order_of_the_numbers(place):
    source, dir = place(images("10/a.png", "2/a.png", "1/a.png"))
    assert list(source.catalogues(dir, "folder")[0].classes) == ["1", "2", "10"]
    source, dir = place(images("10/a.png", "2/a.png", "1/a.png", "x/a.png"))
    assert list(source.catalogues(dir, "folder")[0].classes) == ["1", "10", "2", "x"]


@pytest.mark.parametrize("form", ["pairs", "mapping", "bare pairs"])
def test_edms_dataset_json_labels_images_by_name(place, form):
    """Where it is there, without a setting; and not where there are to be no classes."""
    labels = {"b/2.png": 1, "a/1.png": 0, "c.png": 2}
    pairs = [[name, label] for name, label in labels.items()]
    table = {"pairs": {"labels": pairs}, "mapping": labels, "bare pairs": pairs}[form]
    source, dir = place({**images(*labels), "dataset.json": json.dumps(table).encode()})
    for how in (None, "dataset.json"):
        train, _ = source.catalogues(dir, how)
        assert (train.labels.tolist(), list(train.classes)) == ([0, 1, 2], ["0", "1", "2"])
    assert source.catalogues(dir, "none")[0].labels.tolist() == [0, 0, 0]
    assert list(source.catalogues(dir, "none")[0].classes) == [""]


def test_a_dataset_json_without_labels_has_none(place):
    source, dir = place({**images("1.png"), "dataset.json": b'{"labels": null}'})
    assert source.catalogues(dir)[0].classes == ("",)
    with pytest.raises(UserError, match=r"dataset\.json in .* holds no labels; set data\.labels=none"):
        source.catalogues(dir, "dataset.json")


def test_a_csv_labels_images_by_name_there_or_anywhere(place, tmp_path):
    files = images("1.png", "2.png", "3.png")
    source, dir = place({**files, "t.csv": b"name,label\r\n3.png,dog\r\n1.png, cat\r\n2.png,dog\r\n"})
    train, _ = source.catalogues(dir, "t.csv")
    assert (train.labels.tolist(), list(train.classes)) == ([0, 1, 1], ["cat", "dog"])
    elsewhere = tmp_path / "elsewhere.csv"
    elsewhere.write_text("1.png,1\n2.png,0\n3.png,1\n")
    train, _ = source.catalogues(dir, str(elsewhere))
    assert (train.labels.tolist(), list(train.classes)) == ([1, 0, 1], ["0", "1"])


BAD_LABELS = {
    "numbers that are skipped": ([["1.png", 0], ["2.png", 1], ["3.png", 3]], r"labels from 0 to 3 but no 2; number"),
    "numbers from 1": ([["1.png", 1], ["2.png", 2], ["3.png", 3]], r"labels from 1 to 3 but no 0; number"),
    "huge numbers": ([["1.png", 0], ["2.png", 0], ["3.png", 10**15]], r"labels from 0 to 10{15} but no 1; number"),
    "negative": ([["1.png", 0], ["2.png", -1], ["3.png", 1]], r"holds the label -1; number"),
    "a missing file": ([["1.png", 0], ["9.png", 0], ["8.png", 0]], r"names 9\.png, which is not there"),
    "a missing label": ([["1.png", 0], ["3.png", 0]], r"has no label for 2\.png; add it"),
    "two labels": ([["1.png", 0], ["1.png", 1]], r"gives 1\.png two labels, 0 and 1"),
    "vectors": ([["1.png", [0, 1]]], r"gives 1\.png the label \[0, 1\], which is neither"),
    "fractions": ([["1.png", 0.5]], r"gives 1\.png the label 0\.5, which is neither"),
    "no pairs": ([["1.png"]], r"is not a table of names and labels"),
    "numbers for names": ([[1, 0]], r"is not a table of names and labels \(1 is no name\)"),
    "no table": ("cat", r"is not a table of names and labels"),
}


@pytest.mark.parametrize("wrong", BAD_LABELS)
def test_labels_that_do_not_fit_are_refused_with_the_first(place, wrong):
    pairs, words = BAD_LABELS[wrong]
    source, dir = place({**images("1.png", "2.png", "3.png"), "dataset.json": json.dumps({"labels": pairs}).encode()})
    with pytest.raises(UserError, match=rf"dataset\.json (of|in) .*set.*{words}") as caught:
        source.catalogues(dir)
    assert "\n" not in str(caught.value)


def test_numbers_may_skip_some_where_the_user_says_so(place):
    table = {"labels": [["1.png", 4], ["2.png", 1]]}
    source, dir = place({**images("1.png", "2.png"), "dataset.json": json.dumps(table).encode()}, gaps=True)
    train, _ = source.catalogues(dir)
    assert (train.labels.tolist(), list(train.classes)) == ([4, 1], ["0", "1", "2", "3", "4"])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("folder", r"data\.labels=folder, but 1\.png lies in no folder of .*set"),
        ("top", r"data\.labels=top is not none, folder, or a \.json or \.csv file"),
        (
            "t.csv",
            r"data\.labels=t\.csv is neither in .*set.* nor a file that can be read \(No such file or directory\)",
        ),
        ("three.csv", r"three\.csv in .*set.* is not a table of names and labels \(the row 'a,b,c' is not a name and"),
        ("latin.csv", r"latin\.csv in .*set.* is not a table of names and labels"),
        ("half.json", r"half\.json in .*set.* is not a table of names and labels"),
    ],
)
def test_labels_that_cannot_be_found_are_refused(place, how, words):
    tables = {"three.csv": b"a,b,c\n", "latin.csv": "ä,ö\n".encode("latin1"), "half.json": b'{"labels": [["1.png"'}
    source, dir = place({**images("1.png", "a/2.png"), **tables})
    with pytest.raises(UserError, match=words):
        source.catalogues(dir, how)


def test_a_folder_validates(place):
    """Beside the folder train, which then trains alone; classes are one level below, and shared."""
    files = images("train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/owl/4.png", "test/cat/5.png")
    source, dir = place(files, val_folder="val")
    train, val = source.catalogues(dir, "folder")
    assert list(train.names) == ["train/cat/1.png", "train/dog/2.png"]
    assert list(val.names) == ["val/cat/3.png", "val/owl/4.png"]
    assert list(train.classes) == list(val.classes) == ["cat", "dog", "owl"]
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1], [0, 2])
    np.testing.assert_array_equal(val.read(1), pixels(seed=3))
    table = json.dumps({"labels": [[name, i % 2] for i, name in enumerate(files)]}).encode()
    source, dir = place({**files, "dataset.json": table}, val_folder="test")
    train, val = source.catalogues(dir)
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1], [0])


def test_a_folder_validates_beside_all_others(place):
    source, dir = place(images("cat/1.png", "dog/2.png", "val/cat/3.png"), val_folder="val")
    train, val = source.catalogues(dir, "folder")
    assert list(train.names) == ["cat/1.png", "dog/2.png"]
    assert (list(train.classes), val.labels.tolist()) == (["cat", "dog"], [0])
    with pytest.raises(UserError, match=r"val_folder=v, but .*set.* holds no images in a folder of this name"):
        type(source)(val_folder="v").catalogues(dir)


def test_a_folder_that_validates_must_leave_others(place):
    source, dir = place(images("val/1.png"), val_folder="val")
    with pytest.raises(UserError, match=r"val_folder=val leaves no images of .*set.* to train on"):
        source.catalogues(dir)


def test_a_place_without_images_is_refused(place, tmp_path):
    source, dir = place({"readme.txt": b"nothing", ".hidden.png": content("x.png")})
    with pytest.raises(UserError, match=r"set.* holds no images: no file in it ends in \.png, \.jpg"):
        source.catalogues(dir)
    with pytest.raises(UserError, match=r"data\.dir=.*nowhere does not exist"):
        source.catalogues(tmp_path / "nowhere")


def test_a_broken_image_is_named_as_it_is_read_and_the_others_are_read(place):
    files = {**images("1.png", "3.png"), "2.png": b"", "4.png": b"text", "5.png": content("5.png")[:80]}
    source, dir = place(files)
    train, _ = source.catalogues(dir)
    for i, words in ((1, "2.png is empty"), (3, "4.png is text"), (4, "5.png is cut short")):
        with pytest.raises(BrokenImageError, match=words):
            train.read(i)
    np.testing.assert_array_equal(train.read(2), pixels(seed=1))


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    """A folder linked into itself, two that hold each other, a link to itself, and an image linked from elsewhere."""
    root = write(tmp_path / "set", images("a/1.png", "b/2.png"))
    elsewhere = write(tmp_path / "other", images("x/3.png"))
    (root / "a" / "self").symlink_to(root)
    (root / "a" / "b").symlink_to(root / "b")
    (root / "b" / "a").symlink_to(root / "a")
    (root / "linked").symlink_to(elsewhere)
    (root / "circle.png").symlink_to(root / "circle.png")
    (root / "circle").symlink_to(root / "circle")
    (root / "gone.png").symlink_to(tmp_path / "gone.png")
    train, _ = Folder().catalogues(root)
    assert [n for n in train.names if n.count("/") == 1] == ["a/1.png", "b/2.png"]
    assert {"linked/x/3.png", "a/b/2.png", "b/a/1.png", "circle.png", "gone.png"} <= set(train.names)
    assert len(train.names) == 7
    for name, words in (("circle.png", "Too many levels of symbolic links"), ("gone.png", "No such file")):
        with pytest.raises(BrokenImageError, match=rf"{name} cannot be read \({words}"):
            train.read(list(train.names).index(name))
    assert train.fingerprint()


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that everybody may look into, for a process that gives up being root."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def as_nobody(act) -> None:
    """Does it without root's right to read everything."""
    if os.geteuid():
        return act()
    os.seteuid(65534)
    try:
        return act()
    finally:
        os.seteuid(0)


def test_what_may_not_be_read_is_named(readable):
    root = write(readable / "set", images("a/1.png", "a/2.png", "b/3.png"))
    (root / "a" / "2.png").chmod(0)
    train, _ = Folder().catalogues(root)
    with pytest.raises(BrokenImageError, match=r"a/2\.png cannot be read \(Permission denied\)"):
        as_nobody(lambda: train.read(1))
    (root / "b").chmod(0)
    with pytest.raises(UserError, match=r"the folder .*set/b cannot be read \(Permission denied\)"):
        as_nobody(lambda: Folder().catalogues(root))
    archive = pack(readable / "set.zip", images("1.png"))
    archive.chmod(0)
    with pytest.raises(UserError, match=r"set\.zip is damaged or no zip \(Permission denied\)"):
        as_nobody(lambda: Zip().catalogues(archive))


def test_a_file_where_a_folder_should_be_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"set\.zip is a file, not a folder; data=zip"):
        Folder().catalogues(pack(tmp_path / "set.zip", images("1.png")))


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/x.png", "C:\\x.png", "..\\x.png", "../notes.txt"])
def test_a_path_that_leaves_the_archive_is_refused(tmp_path, name):
    path = pack(tmp_path / "set.zip", {**images("1.png"), name: content("1.png")})
    with pytest.raises(UserError, match=r"set\.zip holds the path '.*', which leaves the archive; do not trust it"):
        Zip().catalogues(path)
    assert [p.name for p in tmp_path.iterdir()] == ["set.zip"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_cannot_be_trusted_are_refused(tmp_path):
    path = pack(tmp_path / "set.zip", images("1.png", "2.png"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"set\.zip is damaged or no zip"):
        Zip().catalogues(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.png", b"")
        archive.writestr("1.png", b"")
    with pytest.raises(UserError, match=r"set\.zip holds 1\.png twice"):
        Zip().catalogues(path)
    damaged = bytearray(whole)
    damaged[70] ^= 255  # in the first image
    path.write_bytes(damaged)
    train, _ = Zip().catalogues(path)
    with pytest.raises(BrokenImageError, match=r"1\.png is damaged in the archive"):
        train.read(0)
    np.testing.assert_array_equal(train.read(1), pixels(seed=1))
    locked = bytearray(whole)
    locked[whole.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(locked)
    with pytest.raises(BrokenImageError, match=r"1\.png is encrypted"):
        Zip().catalogues(path)[0].read(0)


def test_a_zip_may_be_named_by_its_folder(tmp_path):
    pack(tmp_path / "set.zip", images("1.png"))
    assert Zip().catalogues(tmp_path)[0].where.endswith("set.zip")
    pack(tmp_path / "other.zip", images("1.png"))
    with pytest.raises(UserError, match=r"holds 2 \.zip files; set data\.dir to the one to read"):
        Zip().catalogues(tmp_path)


def test_floats_have_the_range_that_the_source_states(place):
    source, dir = place({"1.npy": npy(np.array([[0.0, 1.0]]))}, float_range=(0.0, 1.0))
    assert source.catalogues(dir)[0].read(0).ravel().tolist() == [-1.0, 1.0]
    with pytest.raises(ValueError, match=r"float_range=\[1, 0\] must be \[lowest, highest\]"):
        type(source)(float_range=(1, 0))


def test_reading_needs_no_torch():
    """The processes that decode start in a fraction of a second."""
    modules = ", ".join(f"src.data.catalogues.{name}" for name in ("folder", "zipped", "npz", "parquet"))
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
