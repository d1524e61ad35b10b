"""Noise that belongs to a sample, and the seeds behind it."""

import itertools

import pytest
import torch

from src.randomness import NoiseStream, RowNoise, generator, mix, scramble

SHAPE = (3, 8, 8)
SCRAMBLED = [0, 1753845952, 1734902346, -1926627400, -867483356]  # of 0, 1, -1 and the ends, by arithmetic modulo 2^32


@pytest.mark.parametrize(
    ("numbers", "seed"),
    [
        ((0,), 2065550767),
        ((1,), 2298633409),
        ((-1,), 459615264),
        ((2**32,), 2743206200),
        ((0, 0), 1293516399),
        ((1, 2), 2524120683),
        ((2, 1), 848024197),
        ((0, 0xDA7A), 777525909),
        ((123456789, 42, 7), 37880125),
    ],
)
def test_seeds_never_change(numbers, seed):
    """Catches a new hash: every published sample and every run's order of images would change in silence."""
    assert mix(*numbers) == seed


def test_noise_never_changes():
    """Catches another order of draws, another block size for the first, or a generator seeded otherwise."""
    noise = NoiseStream(0, [0, 1], (1, 2, 2))
    first = [1.4312541, 1.8526615, 0.7911447, 0.5924251, -1.7900571, -0.4952605, -0.8823055, 0.9029926]
    second = [-0.1072199, -1.2270302, 0.3967083, 0.5023600, 2.4361563, 0.9249945, 0.8472186, -0.1040575]
    torch.testing.assert_close(noise.first.flatten(), torch.tensor(first), rtol=0, atol=1e-6)
    torch.testing.assert_close(noise().flatten(), torch.tensor(second), rtol=0, atol=1e-6)


def test_neighbouring_seeds_differ_in_half_of_their_bits():
    """Catches a mix that hands neighbours on as neighbours: their series would overlap."""
    flips = [bin(mix(i) ^ mix(i + 1)).count("1") for i in range(1000)]
    assert sum(flips) / 1000 == pytest.approx(16, abs=5 * (32 / 4 / 1000) ** 0.5)
    assert min(flips) >= 3
    assert all(0 <= mix(i, j) < 2**32 for i in (-5, 0, 2**70) for j in (-1, 3))


@pytest.mark.parametrize("start", [mix(0), 2**32 - 100])
def test_no_two_of_50000_generators_share_a_seed(start):
    """Catches seeds hashed to 32 bits, of which 50,000 hold a twin in one of four sets, and a wrap that fails."""
    seeds = {generator(start, i).initial_seed() for i in range(50000)}
    assert len(seeds) == 50000
    assert min(seeds) >= 0
    assert max(seeds) < 2**32


def test_a_sample_has_its_own_noise_whatever_the_batch():
    """Catches draws that depend on the batch's size, its order, or on how many samples came before."""
    together = NoiseStream(7, range(6), SHAPE)
    steps = [together() for _ in range(400)]  # more than one block
    assert together.BLOCK // together.first[0].numel() < 400
    for indices in ([4], [5, 0, 4], range(3, 6)):
        alone = NoiseStream(7, indices, SHAPE)
        assert torch.equal(alone.first, together.first[list(indices)])
        for step in steps:
            assert torch.equal(alone(), step[list(indices)])


def test_the_same_stream_twice_and_another_for_another_seed():
    """Catches hidden state, torch's global generator, and a seed that is ignored."""
    torch.manual_seed(1)
    a = NoiseStream(7, range(3), SHAPE)
    torch.manual_seed(2)
    b, other = NoiseStream(7, range(3), SHAPE), NoiseStream(8, range(3), SHAPE)
    assert torch.equal(a.first, b.first)
    assert torch.equal(a(), b())
    assert not torch.isin(other.first, a.first).any()


def test_the_first_draw_and_the_steps_are_all_different():
    """Catches a step that repeats the latents or an earlier step, also where one block follows another."""
    noise = NoiseStream(0, range(2), SHAPE)
    draws = torch.stack([noise.first, *(noise() for _ in range(700))])
    assert len(draws[:, :, 0, 0].flatten().unique()) > 0.99 * draws[:, :, 0, 0].numel()
    assert draws[:, 0].unique(dim=0).shape[0] == 701


def test_neighbouring_samples_and_steps_are_uncorrelated_standard_normals():
    """Catches generators with neighbouring seeds that resemble each other, and steps that do."""
    n = 4096
    noise = NoiseStream(0, range(200), (n,))
    first, second = noise.first.double(), noise().double()
    for a, b in ((first[:-1], first[1:]), (first, second), (first[:-1], second[1:])):
        correlations = (a * b).mean(1)
        assert correlations.abs().max() < 5 / n**0.5
        assert correlations.mean().abs() < 5 / (n * len(a)) ** 0.5
    assert first.mean().abs() < 5 / first.numel() ** 0.5
    assert (first.var() - 1).abs() < 5 * (2 / first.numel()) ** 0.5


@pytest.mark.parametrize("total", [1, 5, 64, 65, 130, 300])
def test_row_noise_does_not_depend_on_who_draws_which_rows(total):
    """Catches noise that two devices, or two accumulated halves of a batch, would draw otherwise than one."""
    noise = RowNoise(5, torch.device("cpu"))
    whole = noise(3, range(total), total, (2, 3))
    assert whole.shape == (total, 2, 3)
    for parts in (1, 2, 3, 7):
        cuts = sorted({round(total * k / parts) for k in range(parts + 1)})
        drawn = [RowNoise(5, torch.device("cpu"))(3, range(a, b), total, (2, 3)) for a, b in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(drawn), whole)


def test_row_noise_differs_by_step_and_seed_and_is_normal():
    """Catches blocks or steps that share a seed: 300 rows are five blocks, and step 1 begins with a sixth."""
    noise = RowNoise(5, torch.device("cpu"))
    steps = torch.cat([noise(step, range(300), 300, (4,)) for step in range(20)])
    assert len(steps.unique(dim=0)) == 6000
    assert not torch.equal(RowNoise(6, torch.device("cpu"))(0, range(300), 300, (4,)), steps[:300])
    assert abs(steps.mean().item()) < 5 / 24000**0.5
    assert abs(steps.var().item() - 1) < 5 * (2 / 24000) ** 0.5


def test_scramble_is_one_to_one_and_mixes():
    """Catches an arithmetic shift that smears the sign bit, and a constant that torch turned into another."""
    assert scramble(torch.tensor([0, 1, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)).tolist() == SCRAMBLED
    x = torch.arange(-(2**16), 2**16, dtype=torch.int32)
    y = scramble(x)
    assert len(y.unique()) == len(x)
    for bit in range(31):
        changed = scramble(x ^ (1 << bit)) ^ y
        counts = sum((changed >> k & 1).double().mean().item() for k in range(32))
        assert 15.9 < counts < 16.1
