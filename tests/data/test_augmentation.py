"""Augmentation: what it does to pixels, to the bit or against closed forms, and what it tells the network."""

from itertools import islice
from math import cos, pi, sin

import pytest
import torch
import torch.nn.functional as F

from src.data.augmentation import Crop, Dihedral, Edm, Flip, Nothing
from src.data.images import ImageSet
from src.data.loader import EvalLoader, TrainLoader, normalize
from src.data.warp import rotation, scaling, translation, warp

CPU = torch.device("cpu")
N = 32
AT = torch.arange(N) + 0.5 - N / 2
INSIDE = (AT[:, None] ** 2 + AT**2 < 13**2).float()  # no mirror image is seen here


def spot(x=3.0, y=2.0, std=2.0, across=None):
    """A Gaussian of height 1, (1, 1, 32, 32), centred at (x, y) pixels from the middle, y down."""
    across = across or std
    return torch.exp(-((AT[None] - x) ** 2) / (2 * std**2) - (AT[:, None] - y) ** 2 / (2 * across**2))[None, None]


def parameters(**a):
    """One image's, of which only those that are given are not 0."""
    return torch.tensor([[float(a.get(f"a{i}", 0)) for i in range(8)]])


def images(n=64, channels=3, height=8, width=8):
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("std", "most", "linear"), [(1.5, 0.017, 0.10), (2.0, 0.0095, 0.055), (3.0, 0.0052, 0.025)])
def test_rotations_of_a_spot_are_what_they_should_be(std, most, linear):
    """Catches a rotation to the other side, half a pixel of shift, and interpolation that blurs (as `linear` does)."""
    angles = torch.linspace(-3.1, 3.1, 16)
    expected = torch.cat([spot(3 * cos(a) - 2 * sin(a), 3 * sin(a) + 2 * cos(a), std) for a in angles.tolist()])
    x = spot(std=std).expand(16, 1, N, N)
    assert ((warp(x, rotation(-angles)) - expected) * INSIDE).abs().max() < most
    grid = F.affine_grid(rotation(-angles)[:, :2], [16, 1, N, N], align_corners=False)
    plain = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    assert ((plain - expected) * INSIDE).abs().max() > linear


def test_shifts_scales_and_matrices_that_are_composed():
    """Catches axes that are swapped, matrices in the wrong order, and the inverse for the matrix."""
    one = torch.ones(1)
    shifted = warp(spot(), translation(-1.25 * one, 2.5 * one))  # from there: the spot moves by (1.25, -2.5)
    assert ((shifted - spot(4.25, -0.5)) * INSIDE).abs().max() < 0.0095
    scaled = warp(spot(), scaling(0.8 * one, 1.25 * one))
    assert ((scaled - spot(3 / 0.8, 2 / 1.25, 2 / 0.8, 2 / 1.25)) * INSIDE).abs().max() < 0.02
    back = translation(-4 * one, 0 * one)
    turned = warp(spot(0, 0), rotation(-pi / 2 * one) @ back)  # first turned, then moved to the right
    assert ((turned - spot(4, 0)) * INSIDE).abs().max() < 0.0095


def test_what_lies_beyond_the_border_is_its_mirror_image():
    """Catches black corners, which would be drawn, and a mirror that counts the last pixel once."""
    x = images(2, height=N, width=N).cumsum(-1)
    x = F.avg_pool2d(F.pad(x / x.abs().max(), [2] * 4, mode="replicate"), 5, 1)
    moved = warp(x, translation(torch.full((2,), 5.0), torch.zeros(2)))
    mirrored = torch.cat([x, x.flip(-1)], -1)
    assert (moved - mirrored[..., 5 : N + 5])[..., 2:-2].abs().max() < 0.1
    assert (moved[..., -5:] - x.flip(-1)[..., :5]).abs().mean() < 0.02


def test_shrinking_does_not_alias():
    """Catches a low-pass filter that is missing: stripes of one pixel are grey when they are half as wide."""
    stripes = torch.ones(1, 1, N, N)
    stripes[..., ::2] = -1
    half = torch.full((1,), 1.9)
    assert warp(stripes, scaling(half, half))[..., 11:-11].abs().max() < 0.1  # between the two mirrors
    grid = F.affine_grid(scaling(half, half)[:, :2], [1, 1, N, N], align_corners=False)
    read = F.grid_sample(stripes, grid, align_corners=False)
    assert read[..., 11:-11].abs().max() > 0.5


@pytest.mark.parametrize(
    ("a", "inverse"),
    [
        ({"a0": 1}, [[-1, 0, 0], [0, 1, 0]]),
        ({"a1": 1}, [[1, 0, 0], [0, -1, 0]]),
        ({"a2": 1.5}, [[2**-0.3, 0, 0], [0, 2**-0.3, 0]]),
        ({"a3": 0.5}, [[cos(0.5), -sin(0.5), 0], [sin(0.5), cos(0.5), 0]]),
        ({"a4": 0.0, "a5": 2.0}, [[2**-0.4, 0, 0], [0, 2**0.4, 0]]),
        ({"a4": pi / 2, "a5": 2.0}, [[2**0.4, 0, 0], [0, 2**-0.4, 0]]),
        ({"a6": 1.0, "a7": -0.5}, [[1, 0, -4], [0, 1, 1]]),  # an eighth of 32 pixels, and of 16
    ],
)
def test_edms_parameters_are_table_6s_matrices(a, inverse):
    """Inverses: a matrix tells where a pixel comes from. Rotation is by -a3 in the table, so its inverse is by a3."""
    found = Edm().inverse(parameters(**a), 16, 32)[0]
    torch.testing.assert_close(found, torch.tensor([*inverse, [0, 0, 1]], dtype=torch.float32), atol=1e-6, rtol=0)


def test_edm_mirrors_first_and_moves_last():
    """Catches matrices in another order: mirrored and then moved to the right is not moved and then mirrored."""
    x = images(1, height=N, width=N)
    done, _ = Edm()(x, parameters(a0=1, a6=1))
    expected = warp(x.flip(-1), translation(torch.tensor([-4.0]), torch.zeros(1)))
    torch.testing.assert_close(done, expected.clamp(-1, 1), atol=1e-5, rtol=0)
    point = Edm().inverse(parameters(a2=1, a3=0.3, a4=0.7, a5=-1, a6=0.5), N, N)[0] @ torch.tensor([3.0, 1.0, 1.0])
    by_hand = torch.tensor([3.0 - 0.5 * 4, 1.0])
    turn = torch.tensor([[cos(0.7), -sin(0.7)], [sin(0.7), cos(0.7)]])
    by_hand = turn @ torch.diag(torch.tensor([2**0.2, 2**-0.2])) @ turn.T @ by_hand
    by_hand = torch.tensor([[cos(0.3), -sin(0.3)], [sin(0.3), cos(0.3)]]) @ by_hand * 2**-0.2
    torch.testing.assert_close(point[:2], by_hand, atol=1e-5, rtol=0)


def test_edm_tells_its_nine_numbers():
    a = torch.tensor([[1, 0, 0.5, 0.3, -2.0, 1.5, -0.25, 2.0], [0] * 8])
    expected = [1, 0, 0.5, cos(0.3) - 1, sin(0.3), 1.5 * cos(-2), 1.5 * sin(-2), -0.25, 2]
    told = Edm()(images(2), a)[1]
    torch.testing.assert_close(told, torch.tensor([expected, [0] * 9], dtype=torch.float32), atol=1e-6, rtol=0)


def test_images_that_edm_only_mirrors_are_exact_and_all_stay_in_range():
    """Catches interpolation of an image that did not move, and what a sharp filter overshoots."""
    x = images(256).sign()  # noise at its extremes overshoots most
    a = Edm(probability=0.3).draw(256, torch.Generator().manual_seed(0))
    done, told = Edm()(x, a)
    assert (done.min(), done.max()) == (-1, 1)
    for i in range(256):
        if not told[i, 2:].any():
            dims = [d for d, mirrored in ((-1, a[i, 0]), (-2, a[i, 1])) if mirrored]
            assert torch.equal(done[i], x[i].flip(dims))
    plain = (told == 0).all(1)
    assert torch.equal(done[plain], x[plain])
    assert 5 < plain.sum() < 60  # 0.7^5 / 2 of 256 are 21.5


@pytest.mark.parametrize("tilted", [0.5, 1.0])
def test_edm_draws_from_table_6s_distributions(tilted):
    """Catches one coin for all, a parameter that is drawn for a disabled augmentation, angles over half a turn, and
    every stretch's axis turned, which the authors' code does not."""
    n, p = 100_000, 0.12
    a = Edm(p, tilted=tilted).draw(n, torch.Generator().manual_seed(0))
    counts = (a != 0).double().mean(0)
    expected = torch.tensor([0.5, p / 2, p, p, p * tilted, p, p, p], dtype=torch.float64)
    assert ((counts - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()
    on = [a[:, i][a[:, i] != 0].double() for i in range(8)]
    for i in (2, 5, 6, 7):
        assert abs(on[i].mean()) < 5 / len(on[i]) ** 0.5
        assert abs(on[i].std() - 1) < 5 / (2 * len(on[i])) ** 0.5
    for i in (3, 4):
        assert on[i].abs().max() <= pi + 1e-6
        assert abs(on[i].std() - pi / 3**0.5) < 5 * pi / 3**0.5 / len(on[i]) ** 0.5
    assert not a[:, 4][a[:, 5] == 0].any()  # one coin for an augmentation's parameters
    assert torch.equal(a[:, 6] != 0, a[:, 7] != 0)
    both = ((a[:, 2] != 0) & (a[:, 3] != 0)).double().mean()
    assert abs(both - p * p) < 5 * p / n**0.5  # two coins for two augmentations


@pytest.mark.parametrize("size", [(8, 8), (8, 6)])
def test_dihedral_is_the_group_of_the_square(size):
    """Each of 8 symmetries (4 of a rectangle), exact, equally often: chi-square below its 99.99th percentile."""
    n = 4000
    x = images(1, height=size[0], width=size[1]).expand(n, 3, *size)
    done, told = Dihedral()(x, Dihedral().draw(n, torch.Generator().manual_seed(0)))
    assert told.shape == (n, 0)
    turns = [x[0].rot90(k, (-2, -1)) for k in range(4)]
    group = [s for s in [*turns, *(t.flip(-1) for t in turns)] if s.shape == x[0].shape]
    counts = torch.tensor([int((done == s).flatten(1).all(1).sum()) for s in group]).double()
    assert counts.sum() == n
    chi_square = ((counts - n / len(group)) ** 2 / (n / len(group))).sum()
    assert chi_square < {8: 29.9, 4: 21.1}[len(group)]


def test_crops_are_windows_of_the_padded_image_equally_often():
    """81 places of a border of 4, exact; chi-square of 80 degrees of freedom below its 99.99th percentile."""
    n = 8100
    x = images(1, height=8, width=6)
    done, _ = Crop(4)(x.expand(n, 3, 8, 6), Crop(4).draw(n, torch.Generator().manual_seed(0)))
    padded = F.pad(x[0], [4] * 4, value=-1)
    windows = [padded[:, i : i + 8, j : j + 6] for i in range(9) for j in range(9)]
    counts = torch.tensor([int((done == w).flatten(1).all(1).sum()) for w in windows]).double()
    assert counts.sum() == n
    assert ((counts - 100) ** 2 / 100).sum() < 133


def test_flips_are_those_of_the_batch_and_exact():
    x, u = images(6), torch.tensor([[0.1], [0.9], [0.4999], [0.5], [0.0], [0.99]])
    done, _ = Flip()(x, u)
    for i, mirrored in enumerate([True, False, True, False, True, False]):
        assert torch.equal(done[i], x[i].flip(-1) if mirrored else x[i])


@pytest.mark.parametrize("augment", [Flip(), Dihedral(), Crop(2), Edm(0.5)], ids=lambda a: type(a).__name__)
def test_the_augmented_stream_is_a_function_of_seed_and_number(augment):
    """Catches augmentation by batch or rank, and one that a resumed run draws anew. 150 images are three epochs."""
    g = torch.Generator().manual_seed(0)
    data = ImageSet(torch.randint(0, 256, (50, 3, 8, 8), generator=g, dtype=torch.uint8), torch.arange(50))

    def stream(batch_size, rank=0, world_size=1, start=0):
        loader = TrainLoader(data, CPU, batch_size, True, 3, rank, world_size, start, augment)
        return islice(loader, (150 - start) // batch_size)

    def joined(batches):
        return [torch.cat(v) for v in zip(*batches, strict=True)]

    whole = joined(stream(50))
    ranks = zip(stream(10, 0, 2), stream(10, 1, 2), strict=True)
    for other in (joined(stream(5)), joined(batch for pair in ranks for batch in pair)):
        torch.testing.assert_close(other[0], whole[0], atol=1e-6, rtol=0)  # to the bit where nothing is interpolated
        assert all(torch.equal(a, b) for a, b in zip(other[1:], whole[1:], strict=True))
    for a, b in zip(joined(stream(10, start=70)), joined(islice(stream(10), 7, 15)), strict=True):
        assert torch.equal(a, b)
    plain = joined(islice(TrainLoader(data, CPU, 50, True, 3), 3))
    assert torch.equal(plain[2], whole[2])  # the same images, in the same order
    assert (plain[0] != whole[0]).flatten(1).any(1).double().mean() > 0.3


def test_evaluation_is_never_augmented():
    data = ImageSet(torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8), torch.arange(20))
    batches = list(EvalLoader(data, CPU, 7))
    assert torch.equal(torch.cat([b.x0 for b in batches]), normalize(data.images))
    assert {b.augment.shape[1] for b in batches} == {0}
    x = images(4)
    assert Nothing()(x, Nothing().draw(4, torch.Generator()))[0] is x


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Crop(0), "padding=0 must be at least 1"),
        (lambda: Edm(1.5), r"probability=1.5 must lie in \[0, 1\]"),
        (lambda: Edm(tilted=-0.1), r"tilted=-0.1 must lie in \[0, 1\]"),
        (lambda: Edm(translation=-1.0), "translation=-1.0 must not be negative"),
    ],
)
def test_impossible_settings_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
