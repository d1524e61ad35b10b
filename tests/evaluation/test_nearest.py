"""Nearest neighbours against the obvious search, and what memorisation makes of them."""

import pytest
import torch

from src.evaluation import nearest as module
from src.evaluation.memorisation import Memorisation
from src.evaluation.nearest import nearest


def vectors(n, d, seed, scale=1.0):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_as_the_obvious_search_finds_them_whatever_the_blocks(monkeypatch):
    x, y = vectors(37, 12, 0), vectors(91, 12, 1)
    y[60:] += 1e3  # a far cluster: what all have in common costs the first formula its digits
    x[:9] += 1e3
    exact = (x.double()[:, None] - y.double()).square().sum(2).sqrt()
    distances, indices = exact.sort(dim=1)
    for rows, numbers in ((5, 2**26), (512, 2**26), (512, 12 * 20), (512, 1)):
        monkeypatch.setattr(module, "ROWS", rows)
        monkeypatch.setattr(module, "NUMBERS", numbers)
        found = nearest(x, y, 4)
        torch.testing.assert_close(found.distances, distances[:, :4], rtol=1e-12, atol=0)
        assert torch.equal(found.indices, indices[:, :4])


def test_a_copy_is_at_distance_nought():
    """Catches |a|^2 + |b|^2 - 2 ab in float32, which leaves a distance between a bright image and its copy."""
    images = torch.randint(200, 256, (50, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = nearest(images[[7, 31]], images, 1)
    assert found.distances.flatten().tolist() == [0, 0]
    assert found.indices.flatten().tolist() == [7, 31]


def test_more_neighbours_than_there_are():
    with pytest.raises(ValueError, match="3 images have no 4 nearest"):
        nearest(vectors(2, 2, 0), vectors(3, 2, 1), 4)


def test_samples_of_the_distribution_are_flagged_as_often_as_real_ones_and_copies_always():
    trained, held_out, fresh = (vectors(4000 if seed == 0 else 1000, 6, seed) for seed in range(3))
    measure = Memorisation(share=0.05)
    scores = measure.scores(measure.compare(fresh, held_out, trained), "pixels")
    flagged, ratio = scores["memorised_pixels"], scores["nearest_ratio_pixels"]
    assert flagged.value == pytest.approx(0.05, abs=4 * (2 * 0.05 * 0.95 / 1000) ** 0.5)  # both shares are estimates
    assert ratio.value == pytest.approx(1, abs=0.05)
    half = torch.cat([trained[:500] + 1e-4, fresh[:500]])
    copies = measure.scores(measure.compare(half, held_out, trained), "pixels")
    assert copies["memorised_pixels"].value == pytest.approx(0.5 + 0.5 * flagged.value, abs=0.02)
    assert copies["memorised_pixels"].standard_error == pytest.approx((0.25 / 1000) ** 0.5, rel=0.05)
    assert copies["nearest_ratio_pixels"].value < 0.9


def test_copies_are_flagged_where_real_images_have_copies_themselves():
    """Catches a threshold of nought, below which nothing lies: a model that learned all by heart would pass."""
    train = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    held_out = torch.cat([train[:5], torch.randn(95, 16, generator=torch.Generator().manual_seed(1))])
    score = Memorisation()
    compared = score.compare(train[:50], held_out, train)
    assert compared.threshold == 0
    assert score.scores(compared, "pixels")["memorised_pixels"].value == 1


def test_a_mirrored_training_image_is_one_where_training_mirrors():
    trained = torch.randint(0, 256, (40, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    held_out, samples = trained[:10].roll(1, 2), trained[:5].flip(-1)
    measure = Memorisation()
    assert measure.compare(samples, held_out, trained).samples.distances[:, 0].min() > 50
    found = measure.compare(samples, held_out, trained, mirrored=True).samples
    assert found.distances[:, 0].tolist() == [0] * 5
    assert found.indices[:, 0].tolist() == list(range(5))


@pytest.mark.parametrize("settings", [{"share": 0}, {"share": 1.0}, {"limit": 1}])
def test_settings_that_mean_nothing(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Memorisation(**settings)
