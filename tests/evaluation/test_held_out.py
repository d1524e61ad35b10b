"""The loss by noise level, against p_losses and against the oracle's exact loss."""

import pytest
import torch

from src.data.loader import normalize
from src.data.sources import ImageSet
from src.diffusion.densities import Uniform
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.objectives import Edm, Eps, Flow, V
from src.diffusion.schedules import Cosine, Linear
from src.diffusion.weightings import Constant, MinSNR
from src.evaluation.held_out import LOSS, HeldOut
from src.evaluation.likelihood import Subject
from src.models.simple_unet import SimpleUNet
from src.randomness import NoiseStream, mix


def data(n, seed):
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return ImageSet(images, torch.zeros(n, dtype=torch.int64))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return SimpleUNet(channels=1, image_size=8, hidden_dims=8, time_emb_dim=16).eval()


CASES = [
    (Linear(100, 1e-4, 0.2), Eps(), Constant()),
    (Cosine(100), V(), MinSNR()),
    (Cosine(100), Edm(), Constant()),
    (Linear(100, 1e-4, 0.2), Flow(), Constant()),
]


@pytest.mark.parametrize(("schedule", "objective", "weighting"), CASES, ids=lambda part: type(part).__name__)
def test_the_loss_is_p_losses_at_the_middle_of_each_part(net, schedule, objective, weighting):
    """Catches a factor between the errors of x0 and of F: w (d / sigma)^2."""
    diffusion = GaussianDiffusion(schedule, objective, weighting, Uniform())
    val, train = data(6, 0), data(6, 1)
    scores = HeldOut(4)(Subject(diffusion, net, val, 4, 7, trained=train))
    expected = {}
    for name, images in (("held_out", val.images), ("trained", train.images)):
        x0 = normalize(images)
        noise = NoiseStream(mix(7, LOSS), range(6), (1, 8, 8))
        with torch.no_grad():
            rows = [diffusion.p_losses(net, x0, torch.full((6,), t), noise()) for t in (12, 37, 62, 87)]
        expected[name] = torch.stack(rows, 1).double()  # (N, K)
    levels = scores["loss"].details["levels"]
    assert [level["t"] for level in levels] == [12, 37, 62, 87]
    for name, losses in expected.items():
        torch.testing.assert_close([level[name] for level in levels], losses.mean(0).tolist(), rtol=2e-4, atol=1e-6)
    each = expected["held_out"].mean(1)
    assert scores["loss"].value == pytest.approx(each.mean().item(), rel=1e-4)
    assert scores["loss"].standard_error == pytest.approx(each.std().item() / 6**0.5, rel=1e-3)
    gap = each - expected["trained"].mean(1)
    assert scores["gap"].value == pytest.approx(gap.mean().item(), abs=1e-4)
    assert scores["gap"].better is None, "it is least where nothing was learned"


def test_the_error_of_eps_is_the_loss_of_the_eps_objective(net):
    diffusion = GaussianDiffusion(Linear(100, 1e-4, 0.2), Eps(), Constant(), Uniform())
    loss = HeldOut(5)(Subject(diffusion, net, data(3, 0), 2, 0, trained=data(3, 1)))["loss"]
    assert loss.details["eps"] == pytest.approx(loss.value, rel=1e-5)


def test_another_batch_size_is_the_same_to_the_bit(net):
    diffusion = GaussianDiffusion(Linear(100, 1e-4, 0.2), Eps(), Constant(), Uniform())
    one, other = (HeldOut(3)(Subject(diffusion, net, data(5, 0), size, 0, trained=data(5, 1))) for size in (5, 2))
    assert one == other


def test_no_levels():
    with pytest.raises(ValueError, match="num_levels=0 must be at least 1"):
        HeldOut(0)
