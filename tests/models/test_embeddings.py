"""How networks are told the time, and which image sizes they refuse."""

import numpy as np
import pytest
import torch

from src.models.embeddings import SinusoidalEmbedding, check_divisible
from src.shapes import as_pair


@pytest.mark.parametrize("dim", [4, 10, 128])
def test_sines_come_first_and_the_last_frequency_is_one_over_the_period(dim):
    """Catches ADM's convention: cosines first, dim / 2 for dim / 2 - 1."""
    half = dim // 2
    t = np.array([0.0, 0.5, 1.0, 17.0, 500.0, 999.0])
    angles = t[:, None] * 10000.0 ** (-np.arange(half) / (half - 1))
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    embedding = SinusoidalEmbedding(dim)(torch.from_numpy(t))
    assert embedding.dtype == torch.float32
    np.testing.assert_allclose(embedding.numpy(), expected, rtol=0, atol=1e-4)  # 999 f in float32 is good to 6e-5


def test_adm_has_cosines_first_and_divides_by_half():
    """And iDDPM is told 1000 t / T: a time of 4000 steps, a quarter of it."""
    t = np.array([0.0, 3.0, 500.0, 3999.0])
    angles = 0.25 * t[:, None] * 10000.0 ** (-np.arange(8) / 8)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    embedding = SinusoidalEmbedding(16, cosine_first=True, endpoint=False, scale=0.25)(torch.from_numpy(t))
    np.testing.assert_allclose(embedding.numpy(), expected, rtol=0, atol=1e-4)


def test_a_network_that_is_built_without_memory_has_its_frequencies():
    """Catches constants that are lost with the memory: sampling would go on with whatever lay there."""
    with torch.device("meta"):
        embed = SinusoidalEmbedding(16)
    t = torch.arange(5)
    assert torch.equal(embed.to_empty(device="cpu")(t), SinusoidalEmbedding(16)(t))


def test_integer_and_float_times_are_told_the_same():
    """Catches training (int64) and sampling (float) that see different times."""
    embed = SinusoidalEmbedding(32)
    t = torch.arange(1000)
    assert torch.equal(embed(t), embed(t.float()))


def test_the_embedding_does_not_suffer_from_bfloat16():
    """Catches frequencies rounded to bfloat16 with the module: at t = 999 their angles are off by radians."""
    t = torch.arange(1000)
    exact = SinusoidalEmbedding(128)(t)
    cast = SinusoidalEmbedding(128).to(torch.bfloat16)(t)
    torch.testing.assert_close(cast.float(), exact, rtol=0, atol=0.005)  # bfloat16's own rounding is 0.002


def test_the_embedding_is_not_in_checkpoints():
    """Catches a buffer of constants in the weights, which other code would not know what to do with."""
    assert not SinusoidalEmbedding(32).state_dict()


@pytest.mark.parametrize("dim", [0, 2, 7])
def test_impossible_sizes_are_refused(dim):
    """Catches a division by zero, or an odd size that is rounded in silence."""
    with pytest.raises(ValueError, match=f"of {dim} numbers"):
        SinusoidalEmbedding(dim)


@pytest.mark.parametrize(
    ("size", "factor", "nearest"),
    [
        ((30, 32), 8, "30: 24 or 32;"),
        ((32, 33), 8, "33: 32 or 40;"),
        ((4, 4), 8, "4: 8;"),
        ((28, 28), 16, "28: 16 or 32;"),
    ],
)
def test_sizes_that_do_not_divide_are_told_their_neighbours(size, factor, nearest):
    """Catches an error that leaves the user to work out which size would do, or suggests an image of 0 pixels."""
    with pytest.raises(ValueError, match=f"a net cannot halve images of {size[0]}x{size[1]}.*{factor}.*{nearest}"):
        check_divisible(size, factor, "a net")
    check_divisible((factor, 3 * factor), factor, "a net")


def test_one_number_is_a_square():
    """Catches height and width the wrong way round."""
    assert as_pair(8) == (8, 8)
    assert as_pair((8, 16)) == as_pair([8, 16]) == (8, 16)
