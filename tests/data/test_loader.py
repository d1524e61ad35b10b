"""The order of images, flips, and the way to [-1, 1] and back."""

from itertools import islice

import pytest
import torch

from src.data.images import ImageSet
from src.data.loader import EvalLoader, TrainLoader, normalize
from src.pictures import to_uint8

CPU = torch.device("cpu")


def image_set(n=50):
    """Random images; each differs from its mirror image."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 4, 6), generator=g, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n) * 10)


def train(batch_size=8, flip=True, seed=0, n=50, **settings):
    return TrainLoader(image_set(n), CPU, batch_size, flip, seed, **settings)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))


def test_normalising_and_back_is_the_identity():
    """Catches 0..255 that does not reach -1 and 1 exactly, and a way back that truncates."""
    levels = torch.arange(256, dtype=torch.uint8)
    x = normalize(levels)
    assert x.dtype == torch.float32
    assert abs(x[0].item() + 1) <= 1e-7
    assert abs(x[255].item() - 1) <= 1e-7
    torch.testing.assert_close(x.double(), torch.arange(256).double() / 127.5 - 1, rtol=0, atol=2e-7)
    assert torch.equal(to_uint8(x), levels)
    assert torch.equal(levels, torch.arange(256, dtype=torch.uint8))  # not in place


def test_every_image_exactly_once_an_epoch_and_new_order_in_the_next():
    """Catches sampling with replacement, an epoch that repeats the last one's order, and images that are left out."""
    stream = torch.cat([batch.index for batch in islice(train(), 50 * 100 // 8)])
    epochs = stream.view(100, 50)
    assert all(torch.equal(epoch.sort().values, torch.arange(50)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 100


@pytest.mark.parametrize("batch_size", [1, 7, 16, 49, 50])
def test_the_stream_does_not_depend_on_how_it_is_cut(batch_size):
    """Catches an order that batch size, devices or accumulation change; 350 images are seven epochs."""
    whole = islice(train(batch_size=50), 7)
    parts = islice(train(batch_size=batch_size), -(-350 // batch_size))
    for a, b in zip(zip(*whole, strict=True), zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(a), torch.cat(b)[:350])


def test_a_batch_holds_the_images_and_labels_of_its_index():
    """Catches labels that are shuffled otherwise than images."""
    data = image_set()
    for batch in islice(train(flip=False), 20):
        assert batch.x0.dtype == torch.float32
        assert batch.label.dtype == batch.index.dtype == torch.int64
        assert torch.equal(batch.label, data.labels[batch.index])
        assert torch.equal(batch.x0, normalize(data.images[batch.index]))


def test_the_stream_is_a_function_of_the_seed_alone():
    """Catches torch's global generator, and a seed that is ignored."""
    torch.manual_seed(1)
    a = list(islice(train(seed=3), 15))
    torch.manual_seed(2)
    loader = train(seed=3)
    assert_same(islice(loader, 15), a)
    assert_same(islice(loader, 15), a)  # iterating anew starts anew
    assert not torch.equal(next(iter(train(seed=4))).index, a[0].index)
    unflipped = islice(train(seed=3, flip=False), 15)
    assert all(torch.equal(x.index, y.index) for x, y in zip(unflipped, a, strict=True))


def test_ranks_share_the_batch():
    """Catches ranks that see the same images, or runs on two GPUs that differ from runs on one."""
    one = islice(train(batch_size=8), 20)
    two = [islice(train(batch_size=8, rank=rank, world_size=2), 20) for rank in range(2)]
    for whole, left, right in zip(one, *two, strict=True):
        assert_same([whole], [tuple(torch.cat(pair) for pair in zip(left, right, strict=True))])


@pytest.mark.parametrize("start", [1, 5, 6, 7, 12, 17])
@pytest.mark.parametrize("rank", [0, 1])
def test_start_continues_as_if_batches_had_been_drawn(start, rank):
    """Catches a resumed run that begins its epoch anew, skips a batch at its end, or counts another rank's batches."""
    settings = {"batch_size": 8, "rank": rank, "world_size": 2}
    assert_same(islice(train(**settings, start=8 * start), 10), islice(train(**settings), start, start + 10))


@pytest.mark.parametrize("balance", [False, True])
def test_epochs_may_end_with_their_last_whole_batch(balance):
    """48 of 50 images an epoch, none twice, other ones left out in each; shared by ranks and gone on with as always."""
    settings = {"drop_last": True, "balance": balance}
    stream = torch.cat([batch.index for batch in islice(train(**settings), 6 * 200)])
    epochs = stream.view(200, 48)
    assert all(len(epoch.unique()) == 48 for epoch in epochs)
    assert len({tuple(sorted(epoch.tolist())) for epoch in epochs}) > 150
    assert torch.equal(stream.unique(), torch.arange(50))
    if not balance:
        whole = torch.cat([batch.index for batch in islice(train(), 50)]).view(8, 50)
        assert torch.equal(epochs[:8], whole[:, :48])  # the epochs' orders are those of all images
    for rank in range(2):
        shared = {**settings, "rank": rank, "world_size": 2}
        assert_same(islice(train(**shared, start=8 * 17), 10), islice(train(**shared), 17, 27))
    two = [islice(train(**settings, rank=rank, world_size=2), 20) for rank in range(2)]
    for one, left, right in zip(islice(train(**settings), 20), *two, strict=True):
        assert_same([one], [tuple(torch.cat(pair) for pair in zip(left, right, strict=True))])


def test_an_epoch_without_a_remainder_drops_nothing():
    assert_same(islice(train(48, n=48, drop_last=True), 3), islice(train(48, n=48), 3))


def test_flips_are_per_image_exact_and_about_half():
    """Catches one flip for the whole batch, flips top to bottom, and a flip that an image keeps in every epoch."""
    data = image_set()
    plain, mirror = normalize(data.images), normalize(data.images.flip(-1))
    counts, each = [], torch.zeros(50, dtype=torch.int64)
    for batch in islice(train(), 600):
        is_plain = (batch.x0 == plain[batch.index]).flatten(1).all(1)
        is_mirror = (batch.x0 == mirror[batch.index]).flatten(1).all(1)
        assert torch.equal(is_plain, ~is_mirror)
        counts.append(int(is_mirror.sum()))
        each[batch.index] += is_mirror
    assert sum(counts) / 4800 == pytest.approx(0.5, abs=5 * 0.5 / 4800**0.5)
    assert sum(0 < c < 8 for c in counts) > 0.95 * len(counts)  # all alike: once in 128 batches
    assert each.min() > 20
    assert each.max() < 76


def test_batches_that_cannot_be_are_refused():
    """Catches a batch that holds an image twice, and ranks with fewer images than the others."""
    with pytest.raises(ValueError, match="50 images do not fill one batch of 52"):
        train(batch_size=52, world_size=2)
    with pytest.raises(ValueError, match="a batch of 50 cannot be shared evenly by 3 processes"):
        train(batch_size=50, world_size=3)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (2, 8), (3, 5), (1, 50), (4, 100)])
def test_evaluation_sees_each_image_once_in_order_and_never_flipped(world_size, batch_size):
    """Catches images that are dropped with the last batch, counted twice to fill it, or mirrored."""
    data = image_set()
    seen = []
    for rank in range(world_size):
        loader = EvalLoader(data, CPU, batch_size, rank, world_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        index = torch.cat([b.index for b in batches])
        assert torch.equal(index, torch.arange(rank, 50, world_size))
        assert len(batches) == -(-50 // (world_size * batch_size))  # on all ranks alike
        for batch in batches:
            assert len(batch.index) <= batch_size
            assert torch.equal(batch.x0, normalize(data.images[batch.index]))
            assert torch.equal(batch.label, data.labels[batch.index])
        seen += index.tolist()
    assert sorted(seen) == list(range(50))
