"""Batches side by side: what comes of them, and how they are cut."""

import threading
import time

import pytest
import torch

from src.diffusion.densities import Uniform
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.objectives import Eps
from src.diffusion.samplers import DDIM, generate
from src.diffusion.schedules import Linear
from src.diffusion.weightings import Constant
from src.models.unet import UNet
from src.processes import Group
from src.threads import cut, in_threads, share_out

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_bits_of_samples_do_not_depend_on_the_number_of_threads():
    """At 28x28 this network's kernels, split over two threads, round otherwise than in one."""
    net = UNet(image_size=28, channels=1, base_channels=32, channel_mults=[1, 2], num_res_blocks=1).eval()
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn(p.shape))
    diffusion = GaussianDiffusion(Linear(), Eps(), Constant(), Uniform())

    def sample(indices, tick):
        with torch.no_grad():
            *_, last = generate(
                diffusion.denoiser(net), DDIM(steps=2, clip=False), diffusion.schedule, (1, 28, 28), 0, indices
            )
        return last.x

    drawn = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        drawn.append(torch.cat(in_threads(sample, share_out(10, 64, (1, 28, 28), CPU), CPU)))
        assert torch.get_num_threads() == threads
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_items_are_done_at_once_and_come_back_in_order():
    torch.set_num_threads(3)
    meeting, amounts = threading.Barrier(3, timeout=20), []

    def work(item, tick):
        meeting.wait()
        tick(item)
        return item, torch.get_num_threads()

    assert in_threads(work, range(3), CPU, amounts.append) == [(0, 1), (1, 1), (2, 1)]
    assert sorted(amounts) == [0, 1, 2]


def test_an_error_ends_the_others():
    torch.set_num_threads(2)
    ticks = []

    def work(item, tick):
        if item == 1:
            raise ValueError("item 1")
        while True:
            time.sleep(0.01)
            tick(1)

    with pytest.raises(ValueError, match="item 1"):
        in_threads(work, range(4), CPU, ticks.append)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("n", [1, 5, 64, 100, 1000])
@pytest.mark.parametrize("most", [1, 7, 64])
@pytest.mark.parametrize("unit", [1, 4, 32])
@pytest.mark.parametrize("workers", [1, 3, 8])
def test_batches_are_whole_units_dealt_out_evenly(n, most, unit, workers):
    batches = cut(n, most, unit, workers)
    assert [i for batch in batches for i in batch] == list(range(n))
    assert max(map(len, batches)) <= most
    unit = min(unit, most)
    assert all(len(batch) % unit == 0 for batch in batches[:-1])
    shares = [sum(-(-len(b) // unit) for b in Group(r, workers).share(batches)) for r in range(workers)]
    assert max(shares) - min(shares) <= 1
