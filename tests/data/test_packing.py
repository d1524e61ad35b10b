"""The packed store: what is written, and that no death of its writer makes a half one look whole."""

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from src.data import packing
from src.data.geometry import Geometry
from src.data.packed import Store, read_manifest
from src.data.packing import pack
from src.errors import UserError
from src.lock import Lock
from tests.data.made import Made, noise

ROOT = Path(__file__).resolve().parents[2]
SAME = Geometry((6, 5))
WHOLE = ["images.bin", "labels.npy", "manifest.json", "names.json"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_what_is_packed_is_what_was_read(tmp_path, dtype, channels):
    """Catches channels last, a type that changes, labels of others, and statistics of something else."""
    images = noise(40, (6, 5, channels), dtype)
    labels = np.arange(40) % 3
    manifest = pack(Made(images, labels, ("a", "b", "c")), SAME, tmp_path / "out")
    assert names(tmp_path / "out") == WHOLE
    store = Store(tmp_path / "out", verify=True)
    stack = np.stack(images).transpose(0, 3, 1, 2)
    assert store.images.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(store.images.numpy(), stack)
    np.testing.assert_array_equal(store.labels.numpy(), labels)
    assert manifest == store.manifest
    assert (manifest.count, manifest.shape, manifest.dtype) == (40, [channels, 6, 5], dtype)
    np.testing.assert_allclose(manifest.mean, stack.mean((0, 2, 3), dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, stack.std((0, 2, 3), dtype=np.float64), rtol=1e-10)
    assert (manifest.lowest, manifest.highest) == (stack.min(), stack.max())
    assert manifest.classes == ["a", "b", "c"]
    assert manifest.sha256 == hashlib.sha256(stack.tobytes()).hexdigest()
    assert manifest.settings == {"size": [6, 5], "crop": "center", "resize": "lanczos", "seed": 0, "channels": None}


def test_many_processes_write_what_one_does(tmp_path, monkeypatch):
    """Catches chunks that are appended as they come, and a random crop that depends on who draws it."""
    monkeypatch.setattr(packing, "CHUNK", 7)
    (tmp_path / "pids").mkdir()
    geometry = Geometry((4, 4), crop="random")
    catalogue = Made(noise(100, (9, 6, 3)), np.arange(100) % 7, noted=tmp_path / "pids", broken=(3, 50))
    pack(catalogue, geometry, tmp_path / "two", max_broken=2, processes=2)
    assert len(names(tmp_path / "pids")) >= 2  # this one reads the first image, the others all
    pack(catalogue, geometry, tmp_path / "one", max_broken=2, processes=1)
    for name in WHOLE:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


KILLED = """
import sys
from pathlib import Path
import numpy as np
from src.data import packing
from src.data.geometry import Geometry
from tests.data.made import Made, noise
if __name__ == "__main__":
    packing.SYNC_SECONDS, packing.CHUNK = 0.02, 4
    catalogue = Made(noise(400), np.arange(400) % 9, delay=0.01, noted=Path(sys.argv[2]))
    packing.pack(catalogue, Geometry((6, 5)), Path(sys.argv[1]), processes=2)
"""


def test_killed_it_goes_on_where_it_was(tmp_path, capfd):
    """kill -9, twice, in the middle: no manifest, no process left, and in the end what an undisturbed one writes."""
    out, pids, script = tmp_path / "out", tmp_path / "pids", tmp_path / "killed.py"
    pids.mkdir()
    script.write_text(KILLED)
    done = [0]
    for _ in range(2):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, str(script), str(out), str(pids)], env=environment)
        deadline = time.monotonic() + 60
        while _done(out) < done[-1] + 60:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        done.append(_done(out))
        assert "manifest.json" not in names(out)
        with pytest.raises(UserError, match=r"is packed only in part; run the same src\.prepare again"):
            read_manifest(out)
    assert 60 <= done[1] < done[2] < 400
    while any(_lives(int(name)) for name in names(pids) if int(name) != os.getpid()):  # they end when they notice
        assert time.monotonic() < deadline
        time.sleep(0.02)
    catalogue = Made(noise(400), np.arange(400) % 9)
    pack(catalogue, SAME, out)
    assert f"which holds {done[2]} of 400 images" in capfd.readouterr().out
    pack(catalogue, SAME, tmp_path / "undisturbed")
    for name in WHOLE:
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert names(out) == names(tmp_path / "undisturbed")


def _done(out):
    try:
        return json.loads((out / "progress.json").read_text())["done"]
    except FileNotFoundError:
        return 0


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def stopped(out, monkeypatch, at=50, n=100, **settings):
    """A packing that ended after `at` images."""
    monkeypatch.setattr(packing, "CHUNK", 10)
    monkeypatch.setattr(packing, "SMALL", 10)

    def die(self, chunk):
        if self.done == at:
            raise KeyboardInterrupt
        return add(self, chunk)

    add = packing.Progress.add
    with monkeypatch.context() as patched:
        patched.setattr(packing.Progress, "add", die)
        with pytest.raises(KeyboardInterrupt):
            pack(Made(noise(n), **settings), SAME, out, processes=1)
    assert _done(out) == at


def test_a_part_of_other_images_is_not_gone_on_from(tmp_path, monkeypatch, capsys):
    """Catches a store whose first half is of files that have changed since."""
    out = tmp_path / "out"
    stopped(out, monkeypatch)
    pack(Made(noise(100, seed=1), version=1), SAME, out)
    assert "is begun anew" in capsys.readouterr().out
    np.testing.assert_array_equal(Store(out).images.numpy(), np.stack(noise(100, seed=1)).transpose(0, 3, 1, 2))
    assert names(out) == WHOLE


def test_bytes_beyond_what_was_noted_are_written_anew(tmp_path, monkeypatch):
    """Catches a writer that appends to what the one before it had not yet said to be good."""
    out = tmp_path / "out"
    stopped(out, monkeypatch)
    with (out / "images.bin").open("ab") as file:
        file.write(b"\7" * 1000)
    manifest = pack(Made(noise(100)), SAME, out)
    np.testing.assert_array_equal(Store(out, verify=True).images.numpy(), np.stack(noise(100)).transpose(0, 3, 1, 2))
    stack = np.stack(noise(100)).astype(np.float64)
    np.testing.assert_allclose(manifest.mean, stack.mean((0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize("content", ["", "{", '{"key": 3}', "[]"])
def test_damaged_notes_of_progress_begin_anew(tmp_path, monkeypatch, content):
    out = tmp_path / "out"
    stopped(out, monkeypatch)
    (out / "progress.json").write_text(content)
    pack(Made(noise(100)), SAME, out)
    Store(out, verify=True)


def test_what_is_there_is_not_packed_again_and_nothing_else_is_overwritten(tmp_path):
    out = tmp_path / "out"
    manifest = pack(Made(noise(5)), SAME, out)
    assert pack(Made(noise(5), broken=(0, 1, 2, 3, 4)), SAME, out) == manifest  # which reads none
    with pytest.raises(UserError, match=r"holds a store of other images or settings \(size differ\)"):
        pack(Made(noise(5)), Geometry((3, 3)), out)
    with pytest.raises(UserError, match=r"\(the files differ\); choose another out="):
        pack(Made(noise(5), version=1), SAME, out)
    with pytest.raises(UserError, match=r"\(names and labels differ\)"):
        pack(Made(noise(5), np.arange(5)), SAME, out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
        pack(Made(noise(5)), SAME, other)
    assert names(other) == ["thesis.tex"]


def test_one_writer_at_a_time(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    lock = Lock(out, "being packed into")
    with pytest.raises(UserError, match=f"is being packed into by process {os.getpid()} on .*; wait for it"):
        pack(Made(noise(5)), SAME, out)
    lock.release()
    assert names(out) == []


WAITS = """
import sys
from pathlib import Path
from src.data.geometry import Geometry
from src.data.packing import pack
from tests.data.made import Made, noise
pack(Made(noise(5), noted=Path(sys.argv[2])), Geometry((6, 5)), Path(sys.argv[1]), wait=True)
print("mapped")
"""


def test_a_second_one_waits_and_finds_all_there(tmp_path):
    """Catches two processes of a job that pack the same images over each other, or both decode."""
    out, pids = tmp_path / "out", tmp_path / "pids"
    out.mkdir()
    pids.mkdir()
    lock = Lock(out)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", WAITS, str(out), str(pids)]
    two = [subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    time.sleep(0.5)
    assert all(process.poll() is None for process in two)
    lock.release()
    assert [process.communicate(timeout=60)[0].splitlines()[-1] for process in two] == ["mapped", "mapped"]
    assert len(names(pids)) == 1
    assert names(out) == WHOLE


@pytest.mark.parametrize("limit", ["tmpfs", "file size"])
def test_a_full_disk_is_one_sentence_and_what_was_packed_stays(tmp_path, monkeypatch, limit):
    """On a disk of 400 KiB where one can be mounted; and with a limit on a file's size, which fails as a quota does."""
    out = tmp_path / "disk" / "out"
    out.parent.mkdir()
    images = noise(200, (32, 32, 3))  # 600 KiB
    monkeypatch.setattr(packing, "CHUNK", 10)
    monkeypatch.setattr(packing, "SMALL", 10)
    monkeypatch.setattr(packing, "SYNC_SECONDS", 0.0)
    geometry = Geometry((32, 32))
    if limit == "tmpfs":
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", out.parent], capture_output=True)
        if mount.returncode:
            pytest.skip("no right to mount a disk")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        if limit == "file size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
        with pytest.raises(UserError, match="is full; what was packed stays: make room, and the same command goes on"):
            pack(Made(images), geometry, out)
        assert 50 <= _done(out) <= 130
        assert not (out / "manifest.json").exists()
        if limit == "tmpfs":
            subprocess.run(["mount", "-o", "remount,size=1m", out.parent], check=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        already = range(_done(out))
        pack(Made(images, broken=tuple(already)), geometry, out)  # which are not read again
        np.testing.assert_array_equal(Store(out).images.numpy(), np.stack(images).transpose(0, 3, 1, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        if limit == "tmpfs":
            subprocess.run(["umount", out.parent], check=True)


def test_a_disk_that_fails_otherwise_is_named(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(packing, "_write_json", fail)
    with pytest.raises(UserError, match=r"cannot be written to \(.*Input/output error\)"):
        pack(Made(noise(5)), SAME, tmp_path / "out")
    assert "manifest.json" not in names(tmp_path / "out")


def test_broken_images_stop_it_or_are_listed(tmp_path):
    catalogue = Made(noise(20), np.arange(20), tuple(map(str, range(20))), broken=(4, 7, 19))
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"^00004.png is cut short; repair it or take it away, or leave such images out"
    ):
        pack(catalogue, SAME, out)
    assert names(out) == []
    with pytest.raises(
        UserError, match=r"00019.png is cut short; with it 3 images .* data.max_broken=2; the first is 00004.png"
    ):
        pack(catalogue, SAME, out, max_broken=2)
    assert names(out) == []
    manifest = pack(catalogue, SAME, out, max_broken=3)
    assert manifest.skipped == [[f"{i:05}.png", "is cut short"] for i in (4, 7, 19)]
    assert manifest.count == 17
    kept = [i for i in range(20) if i not in (4, 7, 19)]
    store = Store(out, verify=True)
    assert store.labels.tolist() == kept
    assert list(store.image_set().names) == [f"{i:05}.png" for i in kept]
    np.testing.assert_array_equal(store.images.numpy(), np.stack(catalogue.images)[kept].transpose(0, 3, 1, 2))


def test_more_may_be_left_out_later_without_beginning_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 10)
    monkeypatch.setattr(packing, "SMALL", 10)
    out, broken = tmp_path / "out", (77,)
    with pytest.raises(UserError, match="00077"):
        pack(Made(noise(100), broken=broken), SAME, out)
    assert _done(out) == 80
    manifest = pack(Made(noise(100), broken=(*range(77), 77)), SAME, out, max_broken=1)  # the others are not read
    assert (manifest.count, manifest.skipped) == (99, [["00077.png", "is cut short"]])
    Store(out, verify=True)


def test_all_broken(tmp_path):
    with pytest.raises(UserError, match=r"made: no image can be read; the first, 00000\.png is cut short"):
        pack(Made(noise(3), broken=(0, 1, 2)), SAME, tmp_path / "out", max_broken=9)
    with pytest.raises(UserError, match="made holds no images"):
        pack(Made([]), SAME, tmp_path / "out")
    with pytest.raises(UserError, match=r"data.max_broken=-1 must not be negative"):
        pack(Made(noise(3)), SAME, tmp_path / "out", max_broken=-1)


ODD = {
    "has 4 channels, and 3 are wanted; parts of it are transparent: save it without": noise(1, (6, 5, 4)),
    "has 2 channels, and 3 are wanted; make all images alike": noise(1, (6, 5, 2)),
    "has 5 channels, and 3 are wanted; it may be channels x height x width": noise(1, (3, 6, 5)),
    "holds uint16 values, and the first image uint8": noise(1, dtype="uint16"),
    "holds float64 of shape": [np.zeros((6, 5, 3))],
    "is 6x6, which 6x5 would distort; use crop=center": noise(1, (6, 6, 3)),
    "holds uint8 of shape \\(6, 5\\)": noise(1, (6, 5)),
}


@pytest.mark.parametrize("sentence", ODD)
def test_an_image_unlike_the_others_is_named(tmp_path, sentence):
    images = [*noise(3), *ODD[sentence]]
    with pytest.raises(UserError, match=f"00003.png {sentence}"):
        pack(Made(images), Geometry((6, 5), crop="none"), tmp_path / "out")
    manifest = pack(Made(images), Geometry((6, 5), crop="none"), tmp_path / "out", max_broken=1)
    assert manifest.count == 3


def test_not_a_number_is_refused_by_name(tmp_path):
    images = noise(3, dtype="float32")
    images[2][4, 1, 0] = np.nan
    with pytest.raises(UserError, match=r"00002.png holds values that are not finite"):
        pack(Made(images), SAME, tmp_path / "out")


def test_grey_images_become_colour_where_colour_is_wanted(tmp_path):
    grey = noise(1, (6, 5, 1))
    with pytest.raises(
        UserError, match=r"00001.png has 3 channels, and 1 is wanted; it is in colour: set data.channels=3"
    ):
        pack(Made([*grey, *noise(1)]), SAME, tmp_path / "grey")
    pack(Made([*grey, *noise(1)]), SAME, tmp_path / "out", channels=3)
    first = Store(tmp_path / "out").images[0].numpy()
    np.testing.assert_array_equal(first, grey[0].transpose(2, 0, 1).repeat(3, 0))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_channels_that_tell_nothing_are_dropped(tmp_path, dtype):
    """Screenshots have an alpha that is opaque everywhere; scanners save grey as colour."""
    image = noise(1, (6, 5, 4), dtype)[0]
    image[..., 3] = 1 if dtype == "float32" else np.iinfo(dtype).max
    pack(Made([image]), SAME, tmp_path / "colour", channels=3)
    np.testing.assert_array_equal(Store(tmp_path / "colour").images[0].numpy(), image[..., :3].transpose(2, 0, 1))
    grey = image[..., :1].repeat(3, 2)
    for name, saved in (("grey", grey), ("grey with alpha", np.concatenate([grey, image[..., 3:]], axis=2))):
        pack(Made([saved]), SAME, tmp_path / name, channels=1)
        np.testing.assert_array_equal(Store(tmp_path / name).images[0, 0].numpy(), image[..., 0])


def test_what_cropping_took_is_counted(tmp_path):
    images = [*noise(2, (10, 10, 3)), *noise(3, (10, 20, 3)), *noise(1, (11, 10, 3)), *noise(1, (4, 4, 3))]
    manifest = pack(Made(images), Geometry((5, 5)), tmp_path / "out")
    assert manifest.sizes == {"10x20": 3, "10x10": 2, "11x10": 1, "4x4": 1}
    assert manifest.cropped == {"by_more_than_a_fifth": 3, "mean": pytest.approx((3 * 0.5 + 1 / 11) / 7)}
    assert manifest.enlarged == 1


BAD = {
    "no manifest": (lambda out: (out / "manifest.json").unlink(), "is packed only in part"),
    "manifest cut": (lambda out: (out / "manifest.json").write_text("{"), "manifest.json is damaged"),
    "key gone": (lambda out: _edit(out, lambda m: m.pop("count")), "manifest.json is damaged"),
    "other type": (lambda out: _edit(out, lambda m: m.update(dtype="int7")), "manifest.json is damaged"),
    "newer": (lambda out: _edit(out, lambda m: m["key"].update(format=99)), "was written by a newer version"),
    "pixels cut": (lambda out: os.truncate(out / "images.bin", 100), "has 100 bytes and not the 450"),
    "pixels gone": (lambda out: (out / "images.bin").unlink(), "has 0 bytes and not the 450"),
    "labels gone": (lambda out: (out / "labels.npy").unlink(), r"labels.npy cannot be read"),
    "labels cut": (lambda out: os.truncate(out / "labels.npy", 100), r"labels.npy cannot be read"),
    "labels of others": (lambda out: np.save(out / "labels.npy", np.arange(4)), "not a label for each of 5 images"),
    "a pixel changed": (
        lambda out: (out / "images.bin").write_bytes(bytes(450)),
        "is not what was packed, by its SHA-256",
    ),
}


def _edit(out, change):
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", BAD)
def test_a_store_that_cannot_be_trusted_is_refused(tmp_path, damage):
    pack(Made(noise(5)), SAME, tmp_path)
    harm, sentence = BAD[damage]
    harm(tmp_path)
    with pytest.raises(UserError, match=sentence):
        Store(tmp_path, verify=True)
