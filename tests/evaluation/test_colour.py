"""Channel statistics against numpy's, and what drift is made of."""

import numpy as np
import pytest
import torch

from src.evaluation.colour import Colour, channels


def images(n, seed):
    return torch.randint(0, 256, (n, 3, 5, 7), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_mean_deviation_and_error_of_each_channel():
    x = images(5000, 0)  # more than one block
    found, plain = channels(x), x.numpy().astype(np.float64)
    np.testing.assert_allclose(found["mean"], plain.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found["std"], plain.std((0, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(found["error"], plain.mean((2, 3)).std(0, ddof=1) / 5000**0.5, rtol=1e-10)


def test_drift_is_that_of_the_worst_channel_of_each_set():
    data = torch.full((10, 3, 4, 4), 100, dtype=torch.uint8)
    ema, raw = data.clone(), data.clone()
    ema[:, 1] += 3
    raw[:, 2] -= 40
    scores = Colour()({"ema": ema, "raw": raw}, data)
    assert {name: score.value for name, score in scores.items()} == {"colour_drift_ema": 3, "colour_drift_raw": 40}
    assert scores["colour_drift_ema"].standard_error == 0
    assert scores["colour_drift_raw"].details["mean"] == [100, 100, 60]


def test_a_single_image_has_no_error():
    assert Colour()({"ema": images(1, 0)}, images(9, 1))["colour_drift_ema"].standard_error is None
    with pytest.raises(ValueError, match="raw_samples=-1"):
        Colour(-1)
