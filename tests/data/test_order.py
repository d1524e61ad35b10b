"""Class balance, other types of pixels, and images that are fetched ahead."""

from itertools import islice

import pytest
import torch

from src.data.images import ImageSet
from src.data.loader import TrainLoader, normalize
from src.data.order import Balanced
from src.data.prefetch import ahead

CPU = torch.device("cpu")
SIZES = {0: 50, 3: 7, 4: 1, 9: 12}  # images of each class; four classes, 70 images


def unequal():
    labels = torch.cat([torch.full((n,), c) for c, n in SIZES.items()])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return ImageSet(images, labels)


def stream(batch_size, images, start=0, seed=0, **ranks):
    loader = TrainLoader(unequal(), CPU, batch_size, False, seed, start=start, balance=True, **ranks)
    return list(islice(loader, images // batch_size))


def test_balanced_classes_come_equally_often_and_their_images_in_turn():
    """Exact counts: each four images hold each class once, and each lap of a class each of its images once."""
    batches = stream(4, 1200)
    for batch in batches:
        assert sorted(batch.label.tolist()) == sorted(SIZES)
    label, index = (torch.cat(v) for v in list(zip(*batches, strict=True))[1:3])
    assert torch.equal(unequal().labels[index], label)
    for c, n in SIZES.items():
        laps = index[label == c][: 300 // n * n].view(-1, n)
        assert (laps.sort(1).values == laps[0].sort().values).all()
        assert n == 1 or len({tuple(lap.tolist()) for lap in laps}) > 1
    places = torch.stack([b.label for b in batches]).eq(9).double().mean(0)
    assert (places - 0.25).abs().max() < 5 * (0.25 * 0.75 / 300) ** 0.5  # in an order of their own each time


@pytest.mark.parametrize("batch_size", [1, 7, 70])
def test_the_balanced_stream_does_not_depend_on_how_it_is_cut(batch_size):
    """Also across epochs of 72 images, which no batch size here divides."""
    whole = torch.cat([b.index for b in stream(10, 420)])
    assert torch.equal(torch.cat([b.index for b in stream(batch_size, 420)]), whole)
    assert Balanced(unequal().labels, 0).length == 72


def test_a_balanced_stream_goes_on_and_is_shared_by_ranks():
    whole = torch.cat([b.index for b in stream(10, 400)])
    assert torch.equal(torch.cat([b.index for b in stream(10, 200, start=200)]), whole[200:])
    ranks = [stream(10, 400, rank=rank, world_size=2) for rank in (0, 1)]
    shared = [b.index for pair in zip(*ranks, strict=True) for b in pair]
    assert torch.equal(torch.cat(shared), whole)
    assert not torch.equal(torch.cat([b.index for b in stream(10, 400, seed=1)]), whole)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("mapped", [False, True])
def test_pixels_of_every_type_reach_their_range(layout, dtype, mapped, tmp_path):
    """0 to the type's largest value are -1 to 1, float32 stays as it is; in memory, and mapped with a thread ahead."""
    g = torch.Generator().manual_seed(0)
    shape = (40, 3, 4, 5) if layout == "NCHW" else (40, 4, 5, 3)
    most = {torch.uint8: 255, torch.uint16: 65535}.get(dtype)
    values = torch.randint(0, most + 1, shape, generator=g) if most else torch.rand(shape, generator=g) * 2 - 1
    values.view(-1)[:2] = torch.tensor([0, most]) if most else torch.tensor([-1.0, 1.0])
    expected = (values.double() * 2 / most - 1 if most else values.double()).float()
    stored = values.to(dtype)
    if mapped:
        stored.numpy().tofile(tmp_path / "images.bin")
        stored = torch.from_file(str(tmp_path / "images.bin"), size=values.numel(), dtype=dtype).view(shape)
    if layout == "NHWC":
        stored, expected = stored.permute(0, 3, 1, 2), expected.permute(0, 3, 1, 2)
    torch.testing.assert_close(normalize(stored), expected, atol=2e-7, rtol=0)
    loader = TrainLoader(ImageSet(stored, torch.arange(40), mapped=mapped), CPU, 8, True, 0)
    loader.ahead = mapped
    for batch in islice(loader, 12):
        assert batch.x0.dtype == torch.float32
        assert batch.x0.is_contiguous()
        plain = expected[batch.index]
        either = (batch.x0 - plain).flatten(1).abs().amax(1), (batch.x0 - plain.flip(-1)).flatten(1).abs().amax(1)
        assert torch.minimum(*either).max() < 2e-7
        assert (either[0] > 1e-3).any()


def test_the_stream_that_is_fetched_ahead_is_that_of_memory(monkeypatch):
    """Catches a thread that draws otherwise, batches out of order, and a thread for what stays in memory anyway."""
    data = unequal()
    plain = islice(TrainLoader(data, CPU, 8, True, 0), 30)
    mapped = ImageSet(data.images, data.labels, mapped=True)
    assert not TrainLoader(mapped, CPU, 8, True, 0).ahead
    monkeypatch.setattr("src.data.loader._memory", lambda: 2 * mapped.nbytes - 1)
    large = TrainLoader(mapped, CPU, 8, True, 0)
    assert large.ahead
    for a, b in zip(plain, islice(large, 30), strict=True):
        assert all(torch.equal(v, w) for v, w in zip(a, b, strict=True))


def test_what_is_fetched_ahead_is_bounded_ends_and_fails_in_its_turn():
    """Catches a thread that reads everything, hides an error, or outlives its iterator."""
    import threading
    import time

    taken = []

    def items(count, error=None):
        for i in range(count):
            taken.append(i)
            yield i
        if error:
            raise error

    assert list(ahead(items(20), 3)) == list(range(20))
    with pytest.raises(ZeroDivisionError):
        list(ahead(items(2, ZeroDivisionError()), 3))
    taken.clear()
    endless = ahead(items(10**9), 3)
    assert [next(endless), next(endless)] == [0, 1]
    time.sleep(0.2)
    assert len(taken) <= 2 + 3 + 1
    endless.close()
    assert not [t for t in threading.enumerate() if t.name == "fetches ahead"]
