"""Training on broken data: one sentence, exit code 2, nothing left behind."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.data.files import encoded, npy, pixels, png
from tests.data.test_catalogues import pack, write


def image(seed: int = 0, size: int = 8, channels: int = 1) -> bytes:
    return encoded(pixels(size, size, channels, seed=seed))


def table(*labels: tuple[str, object]) -> bytes:
    return json.dumps({"labels": labels}).encode()


GOOD = {f"{i:02}.png": image(i) for i in range(12)}
PHOTO = encoded(pixels(40, 40), "JPEG")
NAN = npy(np.full((8, 8), np.nan))
FILES = {  # in folders; what is said of them
    "empty folder": ({}, "set holds no images: no file in it ends in .png"),
    "truncated JPEG": ({**GOOD, "x.jpg": PHOTO[:500]}, "x.jpg is cut short: its end is missing"),
    "zero bytes": ({**GOOD, "x.png": b""}, "x.png is empty (0 bytes)"),
    "text": ({**GOOD, "x.png": b"Not found"}, "x.png is text, not an image; it begins 'Not found'"),
    "bomb": ({**GOOD, "x.png": png(60000, 60000, 8, 2, b"")}, "x.png claims 3,600,000,000 pixels"),
    "NaN": ({**GOOD, "x.npy": NAN}, "x.npy holds nan at row 0, column 0, channel 0"),
    "mixed channels": ({**GOOD, "x.png": image(channels=3)}, "x.png has 3 channels, and 1 is wanted"),
    "labels that skip": ({"1.png": image(), "dataset.json": table(("1.png", 4))}, "labels from 4 to 4 but no 0"),
    "missing files": ({**GOOD, "dataset.json": table(("y.png", 0))}, "names y.png, which is not there"),
}
ZIPS = {
    "zip slip": ({**GOOD, "../x.png": image()}, "holds the path '../x.png', which leaves the archive; do not trust it"),
    "text": ({**GOOD, "x.png": b"Not found"}, "x.png is text, not an image; it begins 'Not found'"),
    "missing files": ({**GOOD, "dataset.json": table(("y.png", 0))}, "names y.png, which is not there"),
}


@pytest.fixture
def refused(command, tmp_path, monkeypatch):
    """Trains on a place with such files, and checks how it ends."""
    own = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    monkeypatch.setenv("MPLCONFIGDIR", str(own / "matplotlib"))  # which would make its list of fonts anew, for seconds
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = set()

    def run(option: str, dir, words: str) -> None:
        before.update(tmp_path.iterdir())
        settings = ["data.channels=1", "data.image_size=8", "data.batch_size=4", "data.val_images=2", "data.flip=false"]
        outcome = command(
            "train", "experiment=smoke", f"data={option}", f"data.dir={dir}", *settings, f"hydra.run.dir={tmp_path}/run"
        )
        assert outcome.code == 2
        sentences = outcome.err.strip().splitlines()
        assert [line for line in sentences if line.startswith("error: ")] == sentences[-1:]
        assert words in sentences[-1]
        assert "Traceback" not in outcome.err
        left = [
            p for p in (tmp_path / "cache" / "diffusion-lab" / "data").rglob("*") if p.is_file() and p.suffix != ".lock"
        ]
        assert left == []
        assert not (tmp_path / "run").exists()
        assert set(tmp_path.iterdir()) - before <= {tmp_path / "cache"}

    return run


@pytest.mark.parametrize("damage", FILES)
def test_a_folder_that_cannot_be_trusted_is_refused(refused, tmp_path, damage):
    files, words = FILES[damage]
    (tmp_path / "set").mkdir()
    refused("folder", write(tmp_path / "set", files), words)


@pytest.mark.parametrize("damage", ZIPS)
def test_a_zip_that_cannot_be_trusted_is_refused(refused, tmp_path, damage):
    files, words = ZIPS[damage]
    refused("zip", pack(tmp_path / "set.zip", files), words)


@pytest.mark.parametrize("option", ["folder", "zip", "npz", "parquet"])
def test_a_place_that_is_not_there_is_refused(refused, tmp_path, option):
    refused(option, tmp_path / "nowhere", "nowhere does not exist")


def test_an_npz_that_is_cut_is_refused(refused, tmp_path):
    np.savez(tmp_path / "set.npz", np.zeros((20, 8, 8, 1), np.uint8))
    (tmp_path / "set.npz").write_bytes((tmp_path / "set.npz").read_bytes()[:700])
    refused("npz", tmp_path / "set.npz", "set.npz is damaged or no .npz")
