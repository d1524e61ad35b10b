"""Shards of tar files: read from disk and over HTTP, shared, shuffled, gone on with, and broken in every way."""

import gzip
import io
import json
import tarfile
import threading
import zlib
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from socketserver import TCPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.augmentation import Dihedral, Edm, Nothing
from src.data.catalogue import BrokenImageError
from src.data.lanes import Lane, Place
from src.data.shards import expand, samples
from src.data.streaming import StreamLoader
from src.data.webdataset import WebDataModule
from src.errors import UserError
from tests.data.files import encoded, npy, pixels

CPU = torch.device("cpu")
SHARDS = (9, 5, 12, 7, 1, 10)  # samples of each; 44 in all


def png(number: int) -> bytes:
    """An image that says its number: red is it, green its place in the image."""
    pixels = np.full((4, 4, 3), number, np.uint8)
    pixels[..., 1] = np.arange(16).reshape(4, 4)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write(path: Path, files: dict[str, bytes], **settings) -> None:
    with tarfile.open(path, "w", **settings) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_shards(folder: Path, sizes=SHARDS, first=0, name="train") -> None:
    for i, size in enumerate(sizes):
        files = {}
        for number in range(first, first + size):
            files |= {f"{number:06d}.png": png(number), f"{number:06d}.cls": str(number % 10).encode()}
        write(folder / f"{name}-{i:03d}.tar", files)
        first += size


@pytest.fixture
def shards(tmp_path) -> Path:
    write_shards(tmp_path)
    write_shards(tmp_path, (20,), first=200, name="val")
    return tmp_path


def module(folder: Path, **settings) -> WebDataModule:
    arguments = {
        **{"shards": "train-{000..005}.tar", "val_shards": "val-*.tar", "dir": str(folder)},
        **{"channels": 3, "image_size": 4, "num_classes": 10, "batch_size": 8, "flip": False, "val_images": 10},
        **{"shuffle": 8, "lanes": 2, "workers": 0},
    }
    return WebDataModule(**{**arguments, **settings})


def loader(data: WebDataModule, rank=0, world_size=1, steps=0) -> StreamLoader:
    """As Lightning asks for it."""
    data.setup()
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=CPU),
        **{"global_rank": rank, "world_size": world_size, "global_step": steps, "accumulate_grad_batches": 1},
    )
    return data.train_dataloader()


def numbers(batches) -> list[int]:
    return torch.cat([((b.x0[:, 0, 0, 0] + 1) * 127.5).round().long() for b in batches]).tolist()


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))


def test_samples_are_their_files_whatever_wrote_the_tar(tmp_path):
    """Long names of both kinds, folders, gzip, samples without a label; to the byte, and after some are passed over."""
    long = "a" * 150 + "/" + "b" * 120
    files = {
        "x/1.left.png": b"one" * 300,
        "x/1.cls": b" 7\n",
        "x/1.txt": b"caption",
        f"{long}.jpg": b"two",
        f"{long}.json": json.dumps({"label": 3, "other": [1]}).encode(),
        "y.JPG": b"",
        "z.txt": b"no image",
        "z.json": b"{",
    }
    expected = [(b"two", 3), (b"", None), (None, "damaged JSON")]
    for name, settings in (("gnu", {"format": tarfile.GNU_FORMAT}), ("pax", {"format": tarfile.PAX_FORMAT})):
        write(tmp_path / f"{name}.tar", files, **settings)
        path = tmp_path / f"{name}.tar"
        found = list(samples(str(path)))
        assert [(s.image, s.label) for s in found] == [(None, "7"), *expected]
        assert found[1].name == f"{long} of {path}"
        assert list(samples(str(path), skip=2)) == found[2:]
        (tmp_path / f"{name}.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        packed = list(samples(str(tmp_path / f"{name}.tar.gz"), skip=1))
        assert [(s.image, s.label) for s in packed] == expected


def test_patterns_name_shards(tmp_path):
    for name in ("a-08", "a-09", "a-10", "b", "c"):
        (tmp_path / f"{name}.tar").touch()

    def short(patterns):
        return [Path(path).stem for path in expand(patterns, tmp_path)]

    assert short("a-{08..10}.tar") == ["a-08", "a-09", "a-10"]
    assert short(["{b,c}.tar", "a-*.tar"]) == ["b", "c", "a-08", "a-09", "a-10"]
    assert short(str(tmp_path / "?.tar")) == ["b", "c"]
    assert expand("https://host/{a,b}/{1..2}.tar?x=*", tmp_path) == [
        f"https://host/{folder}/{i}.tar?x=*" for folder in "ab" for i in (1, 2)
    ]
    with pytest.raises(UserError, match=r"there is no shard .*a-11\.tar; set data\.dir and data\.shards"):
        short("a-{10..11}.tar")


def test_every_image_once_an_epoch_with_its_own_label(shards):
    """Exact counts: after so many images, all lanes together have been through their epochs, never one image more."""
    data = module(shards)
    seen = []
    for batch in islice(loader(data), 88):  # 16 epochs
        assert batch.x0.shape == (8, 3, 4, 4)
        found = numbers([batch])
        assert batch.label.tolist() == [n % 10 for n in found]
        np.testing.assert_array_equal(((batch.x0[0, 1] + 1) * 127.5).round(), np.arange(16).reshape(4, 4))
        seen += found
    counts = Counter(seen)
    assert sorted(counts) == list(range(44))
    assert max(counts.values()) - min(counts.values()) <= 3  # lanes have unequal epochs, and are not at their ends
    lanes = [Lane(i, 2, data.shards, 4, data.decode, 0) for i in range(2)]
    for epoch in range(20):
        dealt = [shard for lane in lanes for shard in lane.of_epoch(epoch)]
        assert sorted(dealt) == sorted(data.shards)
    assert len({tuple(lanes[0].of_epoch(epoch)) for epoch in range(20)}) > 10
    windows = list(islice(lanes[0].windows(Place(), 0), 40))
    drawn = [int(w) for window in windows for w in window.images[:, 0, 0, 0]]
    in_order = [s for epoch in range(20) for path in lanes[0].of_epoch(epoch) for s in samples(path)]
    files = [int(s.name.split()[0]) for s in in_order][:160]
    assert [sorted(drawn[i : i + 4]) for i in range(0, 160, 4)] == [sorted(files[i : i + 4]) for i in range(0, 160, 4)]
    assert drawn != files


def test_the_stream_is_a_function_of_the_seed(shards):
    """Neither batch size nor workers change it; another seed does, and so does going back after a divergence."""
    flips = {"flip": True, "augment": Dihedral()}
    whole = list(islice(loader(module(shards, **flips)), 24))
    x = [torch.cat(v) for v in zip(*whole, strict=True)]
    assert torch.equal(x[2], torch.arange(192))
    torch.manual_seed(5)
    small = [torch.cat(v) for v in zip(*islice(loader(module(shards, batch_size=3, **flips)), 64), strict=True)]
    assert_same([x], [small])
    before = torch.get_rng_state()
    working = loader(module(shards, workers=2, **flips))
    assert working.workers == 2
    assert_same(islice(working, 24), whole)
    assert torch.equal(torch.get_rng_state(), before)
    other = module(shards, seed=1)
    again = module(shards)
    again.restores = 1
    assert len({tuple(numbers(islice(loader(data), 24))) for data in (module(shards), other, again)}) == 3


def test_two_ranks_see_disjoint_samples_that_together_are_one_ranks(shards):
    """Catches ranks that read the same shards: within an epoch they share none, and each step's batch is the same."""
    one = islice(loader(module(shards, lanes=4)), 60)
    both = [list(islice(loader(module(shards, lanes=4), rank, 2), 60)) for rank in (0, 1)]
    for whole, left, right in zip(one, *both, strict=True):
        assert len(left.x0) == len(right.x0) == 4
        expected = dict(zip(whole.index.tolist(), numbers([whole]), strict=True))
        found = [dict(zip(b.index.tolist(), numbers([b]), strict=True)) for b in (left, right)]
        assert found[0].keys().isdisjoint(found[1])
        assert {**found[0], **found[1]} == expected
    data = module(shards, lanes=4)
    data.setup()
    for epoch in range(5):
        of = [Lane(i, 4, data.shards, 2, data.decode, 0).of_epoch(epoch) for i in range(4)]
        assert not {*of[0], *of[2]} & {*of[1], *of[3]}
    with pytest.raises(UserError, match="lanes=4 cannot be shared evenly by 3 processes"):
        loader(module(shards, lanes=4, batch_size=9), 0, 3)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 11, 30])
@pytest.mark.parametrize("settings", [{}, {"workers": 1, "shuffle": 44, "batch_size": 5}], ids=["plain", "worker"])
def test_going_on_is_exact(shards, steps, settings):
    """To the bit, with flips and augmentation, from a state that went through JSON; windows and batches do not fit."""
    settings = {"flip": True, "augment": Edm(0.5), **settings}
    data = module(shards, **settings)
    stream = loader(data)
    batches = iter(stream)
    for _ in range(steps):
        next(batches)
    data.trainer.global_step = steps
    state = json.loads(json.dumps(data.state_dict()))
    expected = list(islice(batches, 12))
    resumed = module(shards, **settings)
    resumed.setup()
    resumed.load_state_dict(state)
    assert_same(islice(loader(resumed), 12), expected)


def test_going_on_reads_no_more_than_it_says(shards, monkeypatch):
    """Each lane opens one shard and decodes its window anew: not the epochs before."""
    data = module(shards, shuffle=8)
    batches = iter(loader(data))
    for _ in range(40):
        next(batches)
    data.trainer.global_step = 40
    resumed = module(shards, shuffle=8)
    resumed.setup()
    resumed.load_state_dict(data.state_dict())
    opened, decoded = [], []
    monkeypatch.setattr("src.data.lanes.samples", lambda shard, skip: opened.append(skip) or samples(shard, skip))
    decode = resumed.decode
    resumed.decode = lambda sample: decoded.append(sample.name) or decode(sample)
    next(iter(loader(resumed)))
    assert len(decoded) == 8  # 320 images are 40 rounds of 8: a window of 4 from each of two lanes
    assert len(opened) <= 4
    assert max(opened[:1]) > 0


def test_ranks_hand_their_places_together(shards, monkeypatch):
    """What the first process saves goes on with another number of processes: the lanes are the same."""
    both = [module(shards, lanes=4) for _ in range(2)]
    streams = [iter(loader(data, rank, 2)) for rank, data in enumerate(both)]
    for stream in streams:
        for _ in range(7):
            next(stream)
    parts = []
    for data in both:
        data.trainer.global_step = 7
        parts.append(data._loader.places_at(56))

    def gather(everyone, own):
        everyone[:] = parts

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    states = [data.state_dict() for data in both]
    assert states[0] == states[1]
    one = module(shards, lanes=4)
    whole = list(islice(loader(one), 20))
    resumed = module(shards, lanes=4)
    resumed.setup()
    resumed.load_state_dict(states[0])
    assert_same(islice(loader(resumed), 13), whole[7:])
    other = module(shards, lanes=2)
    other.setup()
    with pytest.raises(UserError, match="the run was trained on 6 shards in 4 lanes, and now there are 6 in 2"):
        other.load_state_dict(states[0])


def damage(folder: Path, kind: str) -> str:
    """Breaks one shard or one of its samples; what must be said of it."""
    path = folder / "train-002.tar"
    content = bytearray(path.read_bytes())
    shard = str(path)
    broken = {f"{n:06d}.{end}": png(n) if end == "png" else b"1" for n in range(14, 26) for end in ("png", "cls")}
    if kind == "cut in half":
        path.write_bytes(content[: len(content) // 2])
        return f"{shard} is cut short"
    if kind == "cut between files":
        path.write_bytes(content[: 4 * 1024])
        return f"{shard} is cut short: it lacks the blocks of zeros that end a tar file"
    if kind == "header":
        content[4 * 1024 + 5] ^= 0xFF
        path.write_bytes(content)
        return f"{shard} is damaged (bad checksum)"
    if kind == "text":
        path.write_text("no tar file" * 100)
        return f"{shard} is damaged"
    if kind == "empty file":
        path.write_bytes(b"")
        return f"{shard} is cut short"
    if kind == "a wrong bit in gzip":
        path.unlink()
        deflate = zlib.compressobj(0, wbits=31)
        half = deflate.compress(content[: 4 * 1024]) + deflate.flush(zlib.Z_FULL_FLUSH)
        (folder / "train-002.tar.gz").write_bytes(half + b"\x07" * 100)  # blocks of a type that there is not
        return "train-002.tar.gz"
    if kind == "gzip":
        path.unlink()
        (folder / "train-002.tar.gz").write_bytes(gzip.compress(content)[:500])
        return "train-002.tar.gz"
    sample = {
        "empty image": ({"000020.png": b""}, "is empty (0 bytes)"),
        "half an image": ({"000020.png": png(20)[:50]}, ""),
        "no image": ({"000020.png": None, "000020.txt": b"text"}, "has no image file that is read here"),
        "no label": ({"000020.cls": None}, 'has no label: neither a .cls nor a .json with "label"'),
        "high label": ({"000020.cls": b"10"}, "has the label '10'; data.num_classes=10 allows 0 to 9"),
        "label in words": ({"000020.cls": b"cat"}, "has the label 'cat'"),
        "transparent": (
            {"000020.png": _transparent()},
            "has 4 channels, and 3 are wanted; parts of it are transparent",
        ),
        "16 bits": ({"000020.png": None, "000020.npy": _npy()}, "is of uint16, and the first image to validate on of"),
    }
    changes, said = sample[kind]
    written = {k: v for k, v in {**broken, **changes}.items() if v is not None}
    write(path, dict(sorted(written.items(), key=lambda item: item[0].partition(".")[0])))
    return f"000020 of {shard} {said}"


def _transparent() -> bytes:
    return encoded(pixels(4, 4, 4))


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((4, 4, 3), np.uint16))
    return file.getvalue()


OF_SHARD = ("cut in half", "cut between files", "header", "text", "empty file", "gzip", "a wrong bit in gzip")
OF_SAMPLE = (
    "empty image",
    "half an image",
    "no image",
    "no label",
    "high label",
    "label in words",
    "transparent",
    "16 bits",
)


@pytest.mark.parametrize("kind", [*OF_SHARD, *OF_SAMPLE])
def test_what_is_broken_is_named_or_skipped(shards, kind, capfd):
    said = damage(shards, kind)
    settings = {"shards": "train-*.tar*"}
    with pytest.raises(UserError) as refused:
        list(islice(loader(module(shards, **settings)), 40))
    assert said in str(refused.value)
    assert str(refused.value).endswith("skip what is broken with data.max_broken=1")
    assert "\n" not in str(refused.value)
    seen = set(numbers(islice(loader(module(shards, max_broken=1, **settings)), 60)))
    assert capfd.readouterr().out.count("skipped: ") == 1
    others = {n for n in range(44) if not 14 <= n < 26}
    assert others <= seen
    if kind in OF_SAMPLE:
        assert set(range(44)) - seen == {20}


def test_grey_images_are_coloured_where_colour_is_wanted(shards):
    """And those that are opaque lose what says so."""
    opaque = np.full((4, 4, 4), 255, np.uint8)
    opaque[..., 0] = 20
    write(shards / "train-002.tar", {"g.png": encoded(np.full((4, 4, 1), 99, np.uint8)), "g.cls": b"3"})
    write(shards / "train-003.tar", {"o.png": encoded(opaque), "o.cls": b"4"})
    batches = list(islice(loader(module(shards, batch_size=2)), 40))
    x0, label = (torch.cat(v) for v in (*zip(*((b.x0, b.label) for b in batches), strict=True),))
    grey = ((x0 - (99 * 2 / 255 - 1)).abs() < 1e-6).flatten(1).all(1)
    assert grey.any()
    assert (label[grey] == 3).all()
    assert (x0[label == 4][:, 2] == 1).any()


def test_a_range_that_floats_leave_names_the_setting(shards):
    write(shards / "train-000.tar", {"a.npy": npy(np.full((4, 4, 3), 2.0, np.float32)), "a.cls": b"1"})
    write(shards / "val-000.tar", {"a.npy": npy(np.full((4, 4, 3), 0.5, np.float32)), "a.cls": b"1"})
    with pytest.raises(UserError, match=r"set data\.float_range to what they span"):
        list(islice(loader(module(shards, shards="train-000.tar", lanes=1)), 1))


def test_more_that_is_broken_than_may_be(shards):
    """Counted once, whatever the epoch; with workers, a sentence and not their traceback."""
    for i in (1, 3):
        (shards / f"train-{i:03d}.tar").write_bytes(b"")
    assert len(list(islice(loader(module(shards, max_broken=2)), 60))) == 60
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"is cut short.* \(1 were skipped before\); mend or remove it") as refused:
            list(islice(loader(module(shards, max_broken=1, workers=workers)), 60))
        assert "\n" not in str(refused.value)


def test_impossible_settings_are_refused(shards):
    refusals = [
        ({"lanes": 7}, "data.lanes=7 is more than the 6 shards"),
        ({"shards": None}, "data.shards names no shards"),
        ({"val_shards": "train-000.tar"}, "is among data.shards and data.val_shards"),
        ({"val_shards": "val-{1..2}.tar"}, "there is no shard"),
    ]
    for settings, sentence in refusals:
        with pytest.raises(UserError, match=sentence):
            module(shards, **settings).setup()
    for settings in ({"shuffle": 0}, {"workers": -1}, {"crop": "random"}, {"float_range": (1.0, 0.0)}):
        with pytest.raises(ValueError, match=r"must be|crop=random"):
            module(shards, **settings)
    for i in range(6):
        write(shards / f"train-{i:03d}.tar", {})
    with pytest.raises(UserError, match="holds no samples"):
        next(iter(loader(module(shards))))
    with pytest.raises(UserError, match="has no set of training images"):
        _ = module(shards).train


def test_validation_images_are_those_of_their_own_shards_resized(shards):
    data = module(shards, image_size=2, num_classes=1)
    data.setup()
    assert data.val.images.shape == (10, 3, 2, 2)
    assert data.val.images[:, 0, 0, 0].tolist() == list(range(200, 210))
    assert set(data.val.labels.tolist()) == {0}


def test_shards_come_over_http(shards):
    """The same stream as from the disk; a server that is gone is one sentence."""
    server = _Server(("127.0.0.1", 0), partial(_Quiet, directory=str(shards)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    settings = {"shards": url + "/train-{000..005}.tar", "val_shards": f"{url}/val-000.tar"}
    try:
        assert_same(islice(loader(module(shards, **settings)), 20), islice(loader(module(shards)), 20))
        with pytest.raises(UserError, match=r"the shard .*train-009\.tar cannot be read"):
            list(samples(f"{url}/train-009.tar"))
        whole = (shards / "train-000.tar").read_bytes()
        (shards / "train-000.tar").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BrokenImageError, match="is cut short"):
            list(samples(f"{url}/train-000.tar"))
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(UserError, match=r"the shard .* cannot be read"):
        next(iter(loader(module(shards, **{**settings, "val_shards": "val-000.tar"}))))


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_shard_goes_on_where_the_connection_broke(shards, monkeypatch, ranges):
    """Catches a broken connection taken for a shard's end, bytes read twice, and a busy server that ends the run."""
    waits = []
    monkeypatch.setattr("src.data.remote.time.sleep", waits.append)
    whole = (shards / "train-000.tar").read_bytes()
    asked: list[int] = []

    class Breaking(_Quiet):
        """Sends a third of the file at most; is busy when asked for the second time."""

        def do_GET(self) -> None:
            start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            asked.append(start)
            if len(asked) == 2:
                self.send_error(503)
                return
            start = start if ranges else 0
            assert not start or self.headers["If-Range"] == '"v1"'
            self.send_response(206 if start else 200)
            self.send_header("ETag", '"v1"')
            self.send_header("Content-Length", str(len(whole) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
            self.end_headers()
            self.wfile.write(whole[start : start + len(whole) // 3])

    server = _Server(("127.0.0.1", 0), Breaking)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/train-000.tar"
    try:
        if ranges:
            found = [(sample.image, sample.label) for sample in samples(url)]
            assert found == [(s.image, s.label) for s in samples(str(shards / "train-000.tar"))]
            third = len(whole) // 3
            assert asked == [0, third, third, 2 * third]
            assert waits == [1, 5, 1]
        else:
            with pytest.raises(UserError, match="does not give the rest of the file"):
                list(samples(url))
            assert waits == [1, 5]
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    def server_bind(self) -> None:
        """Without asking for the machine's name, which takes long where no name server answers."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def test_batches_cannot_be_shared_unevenly(shards):
    data = module(shards)
    data.setup()
    lanes = [Lane(0, 1, data.shards, 4, data.decode, 0)]
    with pytest.raises(ValueError, match="a batch of 5 cannot be shared evenly by 2 processes"):
        StreamLoader(lanes, [Place()], CPU, 5, False, Nothing(), 0, world_size=2)
