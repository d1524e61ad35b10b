"""Catalogues of .npz files, Parquet files and the hub."""

import json
import pickle
import shutil
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest

from src.data.catalogue import BrokenImageError
from src.data.catalogues.parquet import split_files
from src.data.sources import Hub, Npz, Parquet
from src.errors import UserError
from tests.data.files import encoded, npy, pixels

IMAGES = np.stack([pixels(4, 6, seed=i) for i in range(10)])
LABELS = np.arange(10) % 3
ORDER = (0, 1, 5, 9, 2, 2, 8, 0)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["u1", ">u2"])
def test_npz_is_read_to_the_pixel_in_any_order(tmp_path, save, dtype):
    """And in other processes. Catches an offset into the archive that is off by a header."""
    images = IMAGES.astype(dtype) * np.array(257 if dtype == ">u2" else 1, dtype)
    save(tmp_path / "set.npz", images, LABELS)
    train, val = Npz().catalogues(tmp_path / "set.npz")
    assert val is None
    again = pickle.loads(pickle.dumps(train))
    for i in ORDER:
        for catalogue in (train, again):
            np.testing.assert_array_equal(catalogue.read(i), images[i])
            assert catalogue.read(i).dtype == np.dtype(dtype).newbyteorder("=")
    assert list(train.names) == [str(i) for i in range(10)]
    assert train.labels.tolist() == LABELS.tolist()
    assert list(train.classes) == ["0", "1", "2"]
    assert list(Npz().catalogues(tmp_path, "none")[0].classes) == [""]


def test_npz_may_be_grey_without_classes_or_with_named_arrays(tmp_path):
    np.savez(tmp_path / "set.npz", IMAGES[..., 0], y=LABELS)
    train, _ = Npz().catalogues(tmp_path)
    np.testing.assert_array_equal(train.read(4), IMAGES[4, ..., :1])
    assert list(train.classes) == [""]
    assert Npz().catalogues(tmp_path, "y")[0].labels.tolist() == LABELS.tolist()
    with pytest.raises(UserError, match=r"data\.labels=z is no array of .*set\.npz; it holds arr_0, y"):
        Npz().catalogues(tmp_path, "z")


def test_the_fingerprint_of_an_npz_tells_its_states_apart(tmp_path):
    found = set()
    for images, labels, settings in ((IMAGES, LABELS, {}), (IMAGES[::-1], LABELS, {}), (IMAGES, LABELS[::-1], {})):
        np.savez(tmp_path / "set.npz", images, labels)
        found |= {Npz(**settings).catalogues(tmp_path)[0].fingerprint() for _ in range(2)}
    assert len(found) == 3


def test_broken_floats_in_an_npz_are_named(tmp_path):
    images = np.zeros((3, 4, 6, 3), np.float32)
    images[1, 2, 3, 0] = np.nan
    images[2] = 1.5
    np.savez(tmp_path / "set.npz", images)
    train, _ = Npz(float_range=(0.0, 2.0)).catalogues(tmp_path)
    assert train.read(0).min() == -1
    assert train.read(2).min() == 0.5
    with pytest.raises(BrokenImageError, match="1 holds nan at row 2, column 3, channel 0"):
        train.read(1)


def npz(path: Path, **arrays: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": npy(IMAGES)}, r"holds no arr_0, but x; images are \(N, H, W, C\) in arr_0"),
        ({"arr_0": npy(IMAGES), "arr_1": npy(LABELS[:9])}, "holds 10 images, but 9 labels"),
        ({"arr_0": npy(IMAGES), "arr_1": npy(np.array(10))}, "holds 10 images, but one number in arr_1 and no labels"),
        ({"arr_0": npy(IMAGES), "arr_1": npy(LABELS * 2)}, r"arr_1 of .* holds labels from 0 to 4 but no 1"),
        ({"arr_0": npy(IMAGES), "arr_1": npy(LABELS / 2)}, r"arr_1 of .* holds 10 float64 values, not a whole number"),
        ({"arr_0": npy(IMAGES), "arr_1": npy(np.eye(10))}, r"arr_1 of .* holds 10x10 float64 values"),
        ({"arr_0": npy(IMAGES[0, 0])}, r"arr_0 of .* is \(6, 3\), not \(N, H, W, C\)"),
        ({"arr_0": npy(np.asfortranarray(IMAGES))}, r"arr_0 of .* in Fortran's order, not"),
        ({"arr_0": npy(IMAGES)[:500]}, r"arr_0 of .* is cut short: 372 bytes of 720 are there"),
        ({"arr_0": npy(np.array([print] * 8, object), allow_pickle=True)}, r"arr_0 of .* holds Python objects"),
        ({"arr_0": b"no array"}, r"is damaged or no \.npz \(arr_0 has a damaged \.npy header"),
    ],
)
def test_npz_that_is_not_what_it_should_be_is_refused(tmp_path, arrays, words):
    npz(tmp_path / "set.npz", **arrays)
    with pytest.raises(UserError, match=f"set.npz.* {words}|{words}"):
        Npz().catalogues(tmp_path)


def test_a_damaged_npz_is_refused(tmp_path):
    path = tmp_path / "set.npz"
    np.savez_compressed(path, pixels(10 * 64, 64).reshape(10, 64, 64, 3))
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    with pytest.raises(UserError, match=r"set\.npz is damaged or no \.npz"):
        Npz().catalogues(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    path.write_bytes(damaged)
    train, _ = Npz().catalogues(path)
    with pytest.raises(BrokenImageError, match="9 cannot be read"):
        train.read(9)


def test_the_samples_of_a_run_are_such_a_file(tmp_path):
    """The layout that src.sample writes and guided-diffusion's evaluator reads."""
    np.savez(tmp_path / "samples.npz", arr_0=IMAGES, arr_1=LABELS.astype(np.int64))
    assert Npz().catalogues(tmp_path / "samples.npz")[0].labels.tolist() == LABELS.tolist()


class TestParquet:
    """Tables in the layouts of Hugging Face's datasets."""

    @pytest.fixture(autouse=True)
    def _needs_pyarrow(self):
        pytest.importorskip("pyarrow")

    def write(self, path: Path, columns: dict, names: tuple[str, ...] = (), **settings) -> Path:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table(columns)
        if names:
            features = {"label": {"names": list(names), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, path, **settings)
        return path

    def structs(self, rows: range, paths: bool = True) -> list[dict]:
        return [{"bytes": encoded(IMAGES[i]), "path": f"{i}.png" if paths else None} for i in rows]

    @pytest.fixture
    def dataset(self, tmp_path):
        """Two shards to train on, one to test, in groups of three rows."""
        for name, rows in {
            "train-00000-of-00002": range(5),
            "train-00001-of-00002": range(5, 8),
            "test": (8, 9),
        }.items():
            columns = {"image": self.structs(rows), "label": [int(LABELS[i]) for i in rows]}
            self.write(tmp_path / "data" / f"{name}.parquet", columns, ("cat", "dog", "owl"), row_group_size=3)
        return tmp_path

    def test_rows_are_read_to_the_pixel_in_any_order(self, dataset):
        """Across groups and files, and in other processes; classes have the names that are written in the file."""
        train, val = Parquet().catalogues(dataset)
        assert list(train.names) == [f"{i}.png" for i in range(8)]
        assert list(val.names) == ["8.png", "9.png"]
        again = pickle.loads(pickle.dumps(train))
        for i in (0, 7, 3, 2, 5, 4, 6, 1, 1):
            np.testing.assert_array_equal(train.read(i), IMAGES[i])
            np.testing.assert_array_equal(again.read(i), IMAGES[i])
        np.testing.assert_array_equal(val.read(1), IMAGES[9])
        assert train.labels.tolist() == LABELS[:8].tolist()
        assert val.labels.tolist() == LABELS[8:].tolist()
        assert list(train.classes) == list(val.classes) == ["cat", "dog", "owl"]
        assert list(Parquet().catalogues(dataset, "none")[0].classes) == [""]

    def test_the_fingerprint_tells_states_apart(self, dataset):
        first = Parquet().catalogues(dataset)[0].fingerprint()
        assert Parquet().catalogues(dataset)[0].fingerprint() == first
        assert Parquet().catalogues(dataset, "none")[0].fingerprint() != first
        self.write(
            dataset / "data" / "train-00001-of-00002.parquet", {"image": self.structs((1,)), "label": [0]}, ("a",)
        )
        assert Parquet().catalogues(dataset)[0].fingerprint() != first

    def test_images_may_be_bytes_or_lists_of_numbers(self, tmp_path):
        import pyarrow as pa

        images = {
            "bytes": pa.array([encoded(image) for image in IMAGES]),
            "lists": pa.array(IMAGES.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8())))),
            "fixed": pa.array(IMAGES.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8(), 3), 6), 4)),
            "flat": pa.array(IMAGES.reshape(10, -1).tolist(), pa.list_(pa.uint8(), 72)),
            "large": pa.array([encoded(image) for image in IMAGES], pa.large_binary()),
        }
        for name, column in images.items():
            path = self.write(tmp_path / f"{name}.parquet", {"img": column, "id": list(range(10))})
            train, _ = Parquet(shape=(4, 6, 3)).catalogues(path)
            assert train.names[3] == f"{name}.parquet:3"
            np.testing.assert_array_equal(train.read(9), IMAGES[9], name)
        flat, _ = Parquet().catalogues(tmp_path / "flat.parquet")
        with pytest.raises(
            BrokenImageError, match=r"flat\.parquet:0 is a list of 72 numbers; set data\.source\.shape="
        ):
            flat.read(0)
        wide = self.write(tmp_path / "wide.parquet", {"img": pa.array([[[1, 300]]], pa.list_(pa.list_(pa.int64())))})
        with pytest.raises(BrokenImageError, match="holds int64 values, which have no range"):
            Parquet().catalogues(wide)[0].read(0)

    def test_labels_may_be_names_yes_or_no_or_another_column(self, tmp_path):
        columns = {"image": self.structs(range(3)), "kind": ["owl", "cat", "owl"], "good": [True, False, True]}
        path = self.write(tmp_path / "set.parquet", columns)
        found = {how: Parquet().catalogues(path, how)[0] for how in (None, "kind", "good")}
        assert list(found[None].classes) == [""]
        assert (found["kind"].labels.tolist(), list(found["kind"].classes)) == ([1, 0, 1], ["cat", "owl"])
        assert (found["good"].labels.tolist(), list(found["good"].classes)) == ([1, 0, 1], ["not good", "good"])

    def test_rows_are_told_apart_by_file_and_row_where_paths_do_not(self, tmp_path):
        self.write(tmp_path / "b" / "0.parquet", {"image": self.structs(range(2), paths=False)})
        self.write(tmp_path / "a" / "0.parquet", {"image": self.structs(range(1), paths=False)})
        train, _ = Parquet().catalogues(tmp_path)
        assert list(train.names) == ["a/0.parquet:0", "b/0.parquet:0", "b/0.parquet:1"]

    @pytest.mark.parametrize(
        ("columns", "settings", "labels", "words"),
        [
            ({"a": [1]}, {}, None, r"no column of .*set\.parquet is plainly that of images; set data\.source\.image"),
            ({"a": [b"x"], "b": [b"y"]}, {}, None, "is plainly that of images; set data.source.image to one of a, b"),
            ({"image": [b"x"]}, {"image": "b"}, None, r"data\.source\.image=b is no column of .*; there are image"),
            ({"image": [b"x"]}, {}, "kind", r"data\.labels=kind is no column of .*; there are image"),
            ({"image": [b"x"], "label": [0.5]}, {}, None, "label of .* is double, neither whole numbers nor names"),
            ({"image": [b"x"] * 2, "label": [0, 2]}, {}, None, "label of .* holds labels from 0 to 2 but no 1"),
            ({"image": [b"x"] * 2, "label": [0, None]}, {}, None, r"set\.parquet has no label in row 1"),
            ({"image": [b"x"], "label": [-1]}, {}, None, "label of .* holds the label -1"),
            ({"image": [], "label": []}, {"image": "image"}, "none", "holds Parquet files without rows"),
        ],
    )
    def test_tables_that_do_not_fit_are_refused(self, tmp_path, columns, settings, labels, words):
        path = self.write(tmp_path / "set.parquet", columns)
        with pytest.raises(UserError, match=words):
            Parquet(**settings).catalogues(path, labels)

    def test_broken_rows_are_named(self, tmp_path):
        rows = [{"bytes": b"", "path": "0.png"}, {"bytes": None, "path": "1.png"}, None, *self.structs((3,))]
        train, _ = Parquet().catalogues(self.write(tmp_path / "set.parquet", {"image": rows}))
        for i, words in enumerate(("is empty", "has a path but no bytes in the table", "is missing in the table")):
            with pytest.raises(BrokenImageError, match=rf"set\.parquet:{i} {words}"):
                train.read(i)
        np.testing.assert_array_equal(train.read(3), IMAGES[3])

    def test_damaged_files_are_refused(self, dataset):
        path = dataset / "data" / "train-00001-of-00002.parquet"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet is damaged or no Parquet file"):
            Parquet().catalogues(dataset)
        damaged = bytearray(whole)
        damaged[4:300] = bytes(296)
        path.write_bytes(damaged)
        with pytest.raises((UserError, BrokenImageError)):
            Parquet().catalogues(dataset)[0].read(6)
        self.write(path, {"image": [b"x"], "kind": ["a"]})
        with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet has other columns than .*train-00000"):
            Parquet().catalogues(dataset)

    def test_a_dataset_of_the_hub_is_downloaded_once(self, dataset, tmp_path, monkeypatch, capfd):
        """Its Parquet files alone, of the subset alone; the second time nobody is asked."""
        hub = FakeHub(monkeypatch, dataset, ["README.md", "data/test.parquet", "data/train-00000-of-00002.parquet"])
        source = Hub("owner/pets", subset="data")
        train, val = source.catalogues(tmp_path / "kept")
        np.testing.assert_array_equal(train.read(4), IMAGES[4])
        assert len(val.names) == 2
        assert hub.downloaded == ["data/test.parquet", "data/train-00000-of-00002.parquet"]
        assert Path(train.where) == tmp_path / "kept" / "owner--pets--data"
        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", None)
        assert len(source.catalogues(tmp_path / "kept")[0].names) == 5
        shutil.rmtree(tmp_path / "kept")
        for local in (Hub(str(dataset)), Hub(str(dataset), subset="data")):
            assert len(local.catalogues(tmp_path / "kept")[0].names) == 8

    def test_a_download_that_was_cut_is_not_taken_for_whole(self, dataset, tmp_path, monkeypatch):
        files = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
        hub = FakeHub(monkeypatch, dataset, files, fails_at=1)
        with pytest.raises(
            UserError, match=r"owner/pets is not in .* and could not be downloaded \(the line is dead\)"
        ):
            Hub("owner/pets").catalogues(tmp_path / "kept")
        assert len(hub.downloaded) == 1
        hub.fails_at = None
        assert len(Hub("owner/pets").catalogues(tmp_path / "kept")[0].names) == 8
        kept = tmp_path / "kept" / "owner--pets" / files[1]
        for damage in (kept.unlink, lambda: kept.write_bytes(kept.read_bytes()[:-1])):
            damage()
            assert len(Hub("owner/pets").catalogues(tmp_path / "kept")[0].names) == 8

    def test_tables_that_the_hub_has_made_are_found(self, dataset, tmp_path, monkeypatch):
        hub = FakeHub(monkeypatch, dataset, ["a.zip"], converted=["data/train-00000-of-00002.parquet"])
        assert len(Hub("owner/pets").catalogues(tmp_path / "kept")[0].names) == 5
        hub.converted = []
        with pytest.raises(UserError, match="owner/none holds no Parquet files on the hub"):
            Hub("owner/none").catalogues(tmp_path / "kept")


class FakeHub:
    """The hub's library, which has one dataset."""

    def __init__(self, monkeypatch, root: Path, files: list[str], converted=(), fails_at: int | None = None) -> None:
        self.root, self.files, self.converted, self.fails_at = root, files, list(converted), fails_at
        self.downloaded: list[str] = []
        monkeypatch.setattr(
            "huggingface_hub.HfApi.list_repo_files",
            lambda api, name, repo_type, revision: self.converted if revision else self.files,
        )
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)
        monkeypatch.setattr("src.data.catalogues.hub._resolve", lambda endpoint: None)

    def download(self, name, file, repo_type, revision, local_dir) -> None:
        assert (repo_type, revision) == ("dataset", "refs/convert/parquet" if file in self.converted else None)
        if self.fails_at == len(self.downloaded):
            raise OSError("the line is dead")
        self.downloaded.append(file)
        (local_dir / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.root / file, local_dir / file)


def test_files_are_told_apart_by_what_their_paths_say(tmp_path):
    """In the layouts that the hub has: names of shards, and folders. A test split validates where there is no other."""
    layouts = {
        ("data/train-00000-of-00001-ab12.parquet", "data/test-00000-of-00001.parquet"): (1, 1),
        ("default/train/0000.parquet", "default/train/0001.parquet", "default/validation/0000.parquet"): (2, 1),
        ("train.parquet", "valid.parquet", "test.parquet"): (1, 1),
        ("a.parquet", "b.parquet", ".cache/c.parquet"): (2, 0),
        ("test.parquet",): (1, 0),
        ("latest.parquet", "contest.parquet"): (2, 0),
    }
    for i, (names, counts) in enumerate(layouts.items()):
        for name in names:
            (tmp_path / str(i) / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / str(i) / name).touch()
        train, val = split_files(tmp_path / str(i))
        assert (len(train), len(val)) == counts, names
        assert all("test" not in path.name for path in val) or len(names) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no \.parquet files"):
        split_files(tmp_path / "empty")
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        split_files(tmp_path / "nowhere")


def test_without_a_network_the_hub_says_what_to_do_at_once(tmp_path, monkeypatch):
    def no_network(*_) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(
        UserError,
        match=r"owner/pets is not in .*owner--pets and could not be downloaded \(\[Errno -2\] Name or service not "
        r"known\); put its Parquet files into a folder, and give that as data\.source\.name",
    ):
        Hub("owner/pets").catalogues(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_that_no_dataset_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("src.data.catalogues.hub._resolve", lambda endpoint: None)
    with pytest.raises(UserError, match=r"data\.source\.name=a/b/c is neither a folder nor the name of a dataset"):
        Hub("a/b/c").catalogues(tmp_path)
