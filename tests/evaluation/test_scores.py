"""Scores against closed forms and sets that can be counted by hand."""

import math

import pytest
import torch

from src.evaluation import neighbours
from src.evaluation.features import Extracted, Module
from src.evaluation.frechet import moments
from src.evaluation.kernel import mmd2
from src.evaluation.neighbours import members
from src.evaluation.reference import Reference
from src.evaluation.scores import Frechet, InceptionScore, Kernel, PrecisionRecall, Spatial


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def reference_of(x, spatial=None, name="toy"):
    of_spatial = None if spatial is None else moments(spatial)
    return Reference(x, moments(x), of_spatial, 0.5, 0.25, len(x), {"features": {"name": name}})


class Flat(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1)


TOY = Module(Flat(), name="toy")  # of 2x2 images: 4 dimensions
SHAPE = (1, 2, 2)


def test_a_shifted_set_is_at_the_square_of_the_shift():
    """Catches a distance that is not squared, and parts that do not add up: |c|^2 = 4 (0.5)^2."""
    x = normal(200, 4)
    found = Frechet()(Extracted(x + 0.5), reference_of(x))
    assert list(found) == ["fd_toy"]
    score = found["fd_toy"]
    assert score.value == pytest.approx(1.0, rel=1e-5)
    assert score.details["of_means"] == pytest.approx(1.0, rel=1e-5)
    assert score.details["of_covariances"] == pytest.approx(0.0, abs=1e-5)
    assert (score.better, score.standard_error) == ("lower", None)
    assert (score.details["floor"], score.details["floor_images"], score.details["too_few"]) == (0.5, 100, False)


def test_a_scaled_set_differs_in_covariance_alone():
    """(2 - 1)^2 times the trace, for 2 x and x of mean nought."""
    x = normal(500, 4)
    x = x - x.mean(0)
    score = Frechet()(Extracted(2 * x), reference_of(x))["fd_toy"]
    assert score.value == pytest.approx(float(torch.cov(x.T).trace()), rel=1e-5)


def test_sfid_is_of_the_spatial_features():
    x, spatial = normal(50, 4), normal(50, 3, seed=1)
    score = Spatial()(Extracted(x, spatial=spatial + 2), reference_of(x, spatial))
    assert list(score) == ["sfid_toy"]
    assert score["sfid_toy"].value == pytest.approx(12.0, rel=1e-5)
    assert score["sfid_toy"].details["floor"] == 0.25
    with pytest.raises(ValueError, match="sfid_toy needs spatial features, which features=toy do not have"):
        Spatial()(Extracted(x), reference_of(x))
    with pytest.raises(ValueError, match="needs spatial features"):
        Spatial().refuse(100, 100, TOY, SHAPE)


@pytest.mark.parametrize(("n", "m", "what"), [(4, 100, "4 samples"), (100, 4, "4 reference images")])
def test_fewer_than_dimensions_mean_nothing(n, m, what):
    """Catches a number where the covariance is singular; force=true has it, and says so."""
    sentence = f"fd_toy has 4 dimensions and there are {what}.*means nothing.*force=true"
    with pytest.raises(ValueError, match=sentence):
        Frechet().refuse(n, m, TOY, SHAPE)
    with pytest.raises(ValueError, match=sentence):
        Frechet()(Extracted(normal(n, 4)), reference_of(normal(m, 4)))
    Frechet(force=True).refuse(n, m, TOY, SHAPE)
    assert Frechet(force=True)(Extracted(normal(n, 4)), reference_of(normal(m, 4)))["fd_toy"].details["too_few"]
    Frechet().refuse(5, 5, TOY, SHAPE)


def test_mmd_is_the_sum_over_all_pairs():
    """Catches pairs of a point with itself, and a kernel of another degree, offset or scale."""
    x, y = normal(6, 3).double(), normal(6, 3, seed=1).double() + 0.3

    def kernel(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    own = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(6) for j in range(6) if i != j) / 30
    across = sum(kernel(a, b) for a in x for b in y) / 36
    assert mmd2(x, y) == pytest.approx(own - 2 * across, rel=1e-10)


def test_mmd_of_a_shift_is_the_closed_form():
    """In one dimension k(x, y) = (x y + 1)^3, so MMD^2 = sum of binom(3, j) (E x^j - E y^j)^2."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, 1, generator=generator, dtype=torch.float64)
    y = torch.randn(100_000, 1, generator=generator, dtype=torch.float64) + 1
    expected = 3 * 1 + 3 * 1 + 1 * 16  # E y = 1, E y^2 = 2, E y^3 = 4; of x 0, 1, 0
    found = Kernel(subsets=100, subset_size=1000)(Extracted(y), reference_of(x))["kd_toy"]
    assert found.value == pytest.approx(expected, abs=4 * found.standard_error)
    assert found.standard_error < 0.04 * expected


def test_the_kernel_distance_of_one_distribution_is_nought_within_its_error():
    found = [Kernel(20, 100)(Extracted(normal(2000, 8, s)), reference_of(normal(2000, 8, s + 50))) for s in range(40)]
    ratios = torch.tensor([f["kd_toy"].value / f["kd_toy"].standard_error for f in found])
    assert abs(float(ratios.mean())) < 4 / math.sqrt(40)
    assert 0.7 < float(ratios.std()) < 1.4  # the error is what the values scatter by


def test_subsets_are_disjoint_while_they_can_be_and_depend_on_the_seed_alone():
    kernel = Kernel(subsets=7, subset_size=30)
    draws = kernel._draws(100, 1)
    assert len(draws) == 7
    assert all(len(set(d.tolist())) == 30 for d in draws)
    assert len({*torch.cat(draws[:3]).tolist()}) == 90
    state = torch.random.get_rng_state()
    again = kernel._draws(100, 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    assert not torch.equal(draws[0], kernel._draws(100, 2)[0])
    assert not torch.equal(draws[0], Kernel(7, 30, seed=1)._draws(100, 1)[0])


def test_one_subset_has_no_error_and_is_the_whole():
    x, y = normal(40, 4), normal(40, 4, seed=1)
    score = Kernel(subsets=3, subset_size=40)(Extracted(x), reference_of(y))["kd_toy"]
    assert score.standard_error is None
    assert score.value == pytest.approx(mmd2(x.double(), y.double()), rel=1e-9)


def test_kernel_refuses():
    with pytest.raises(ValueError, match="subset_size=1000 and there are 999 samples; lower subset_size"):
        Kernel().refuse(999, 5000, TOY, SHAPE)
    with pytest.raises(ValueError, match="there are 999 reference images"):
        Kernel()(Extracted(normal(1000, 4)), reference_of(normal(999, 4)))
    with pytest.raises(ValueError, match="subset_size=1 at least 2"):
        Kernel(subset_size=1)


def test_inception_score_of_certain_and_of_uncertain_answers():
    """K for as many certain answers of each class, 1 where all answers are the same; also where p log p is 0 log 0."""
    certain = 1e4 * torch.eye(5).repeat(4, 1)
    score = InceptionScore(splits=4)(Extracted(certain, certain), reference_of(certain))
    assert list(score) == ["is_toy"]
    assert score["is_toy"].value == pytest.approx(5.0, rel=1e-9)
    assert score["is_toy"].standard_error == pytest.approx(0.0, abs=1e-9)
    assert score["is_toy"].better == "higher"
    same = torch.tensor([[2.0, 0.0, 1.0]]).repeat(20, 1)
    assert InceptionScore(1)(Extracted(same, same), reference_of(same))["is_toy"].value == pytest.approx(1, rel=1e-9)


def test_inception_score_is_the_mean_over_splits_in_order():
    """One split sees one class, score 1, the other both, score 2; error |2 - 1| / sqrt(2) / sqrt(2)."""
    logits = 1e4 * torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    score = InceptionScore(splits=2)(Extracted(logits, logits), reference_of(logits))["is_toy"]
    assert score.value == pytest.approx(1.5, rel=1e-9)
    assert score.standard_error == pytest.approx(0.5, rel=1e-9)
    assert score.details["deviation_of_splits"] == pytest.approx(0.5, rel=1e-9)
    with pytest.raises(ValueError, match="cannot cut 4 samples into splits=5"):
        InceptionScore(5)(Extracted(logits, logits), reference_of(logits))
    with pytest.raises(ValueError, match="is_toy needs logits, which features=toy do not have"):
        InceptionScore().refuse(100, 100, TOY, SHAPE)


REAL = torch.tensor([[0.0], [1], [2], [3], [10]])  # to their nearest neighbour: 1, 1, 1, 1, 7
GENERATED = torch.tensor([[0.5], [3.5], [20]])


def test_precision_recall_density_coverage_counted_by_hand():
    """0.5 lies in the balls of 0 and 1, 3.5 in those of 3 and 10, 20 in none; all but 2's ball hold one."""
    found = members(GENERATED, REAL, 1, 1)
    assert found.precision.tolist() == [1, 1, 0]
    assert found.density.tolist() == [2, 2, 0]
    assert found.coverage.tolist() == [1, 1, 0, 1, 1]
    assert found.recall.tolist() == [1, 1, 1, 1, 1]  # balls of radius 3, 3 and 16.5
    narrow = members(torch.tensor([[0.0], [0.1], [5], [5.2]]), REAL, 1, 2)
    assert narrow.recall.tolist() == [1, 0, 0, 0, 0]
    assert narrow.precision.tolist() == [1, 1, 1, 1]  # [3, 17] holds 5
    assert narrow.density.tolist() == [1, 1, 1, 0.5]  # of [-2, 2], [0, 2], [1, 3], [1, 5] and [2, 18]


def test_scores_are_the_means_and_errors_of_what_was_counted():
    score = PrecisionRecall(neighbours=1, density_neighbours=1)(Extracted(GENERATED), reference_of(REAL))
    assert list(score) == ["precision_toy", "recall_toy", "density_toy", "coverage_toy"]
    assert [s.value for s in score.values()] == pytest.approx([2 / 3, 1, 4 / 3, 4 / 5])
    assert score["precision_toy"].standard_error == pytest.approx(1 / 3)  # sqrt((1/9 + 1/9 + 4/9) / 2) / sqrt(3)
    assert all(s.better == "higher" for s in score.values())


def test_a_ball_has_its_border_and_a_set_is_its_own_neighbour():
    """Catches rounding that decides: in its own set's balls a point lies k + 1 times on average, with the borders."""
    x = normal(300, 64).mul(1e3).add(1e4)
    found = members(x, x.clone(), 3, 5)
    assert found.precision.mean() == found.recall.mean() == found.coverage.mean() == 1
    assert float(found.density.mean()) == pytest.approx(6 / 5, rel=1e-12)


def test_copies_of_one_image_have_a_ball_of_nothing():
    x = torch.ones(10, 3)
    found = members(x, normal(20, 3), 3, 3)
    assert found.recall.sum() == 0


def test_blocks_change_nothing_and_distances_are_exact(monkeypatch):
    """Against every distance in one matrix of float64."""
    x, y = normal(101, 5), normal(83, 5, seed=1) * 1.2
    whole = members(x, y, 3, 5)
    monkeypatch.setattr(neighbours, "ROWS", 7)
    blocks = members(x, y, 3, 5)
    d = torch.cdist(x.double(), y.double())
    rx, ry = (torch.cdist(s.double(), s.double()).kthvalue(4, dim=1).values for s in (x, y))
    ry_density = torch.cdist(y.double(), y.double()).kthvalue(6, dim=1).values
    expected = (
        (d <= ry).any(1).double(),
        (d <= rx[:, None]).any(0).double(),
        (d <= ry_density).sum(1).double() / 5,
        (d <= ry_density).any(0).double(),
    )
    for a, b, c in zip(whole, blocks, expected, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)


def test_a_limit_draws_by_its_seed():
    x, y = normal(500, 3), normal(400, 3, seed=1)
    few = PrecisionRecall(limit=100)(Extracted(x), reference_of(y))
    details = few["density_toy"].details
    assert (details["samples"], details["reference_images"], details["neighbours"]) == (100, 100, 5)
    again = PrecisionRecall(limit=100)(Extracted(x), reference_of(y))
    other = PrecisionRecall(limit=100, seed=1)(Extracted(x), reference_of(y))
    assert few == again
    assert few["density_toy"].value != other["density_toy"].value
    with pytest.raises(ValueError, match="5 neighbours of each of 5 points"):
        PrecisionRecall().refuse(5, 100, TOY, SHAPE)
    with pytest.raises(ValueError, match="limit=5 must be more"):
        PrecisionRecall(limit=5)
    with pytest.raises(ValueError, match="must be at least 1"):
        PrecisionRecall(neighbours=0)


@pytest.mark.parametrize("score", [Frechet(), Kernel(2, 10), PrecisionRecall(), InceptionScore(2), Spatial()])
def test_no_score_of_nan_or_of_other_dimensions(score):
    x = normal(50, 4)
    bad = x.clone()
    bad[3, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        score(Extracted(bad, bad, bad), reference_of(x, x))
    if not isinstance(score, InceptionScore):
        with pytest.raises(ValueError, match="compared with 4 dimensions"):
            score(Extracted(x[:, :3], x, x[:, :3]), reference_of(x, x))


def test_numbers_do_not_depend_on_the_number_of_threads(monkeypatch):
    x, y = normal(300, 40), normal(300, 40, seed=1)
    generated, reference = Extracted(x, x), reference_of(y)
    scores = [Frechet(), Kernel(4, 100), PrecisionRecall(), InceptionScore()]
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append([score(generated, reference) for score in scores])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]
