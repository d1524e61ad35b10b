"""Shards of samples: what is there counts, what is damaged or of other samples does not."""

import numpy as np
import pytest

from src.errors import UserError
from src.evaluation.shards import Shards


def save(shards, *stretches):
    for first, stop in stretches:
        shards.save(range(first, stop), {"images": np.arange(first, stop, dtype=np.uint8)[:, None]})


def test_gaps_are_what_no_shard_covers(tmp_path):
    shards = Shards(tmp_path / "shards", {"seed": 0})
    assert shards.missing(10) == [range(0, 10)]
    assert not shards.folder.exists()
    save(shards, (2, 4), (7, 9), (3, 6))  # two attempts with other batches overlap
    assert shards.missing(10) == [range(0, 2), range(6, 7), range(9, 10)]
    assert shards.missing(5) == [range(0, 2)]
    assert shards.missing(7) == [range(0, 2), range(6, 7)]
    save(shards, (0, 2), (6, 7), (9, 12))
    assert shards.missing(10) == []
    for n in (5, 10, 12):
        assert np.concatenate(list(shards.read("images", n)))[:, 0].tolist() == list(range(n))


@pytest.mark.parametrize("position", [0.3, 0.9])
def test_a_damaged_shard_is_drawn_again(tmp_path, position):
    shards = Shards(tmp_path, {"seed": 0})
    shards.save(range(0, 64), {"images": np.zeros((64, 8), np.uint8)})
    shards.save(range(64, 128), {"images": np.zeros((64, 8), np.uint8)})
    path = tmp_path / "0000064-0000127.npz"
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 1
    path.write_bytes(data)
    assert shards.missing(128) == [range(64, 128)]
    path.write_bytes(data[:40])
    assert shards.missing(128) == [range(64, 128)]


def test_what_other_samples_have_left_is_refused_by_what_differs(tmp_path):
    save(Shards(tmp_path, {"seed": 0, "weights": "ema"}), (0, 2))
    assert Shards(tmp_path, {"weights": "ema", "seed": 0}).missing(2) == []
    with pytest.raises(UserError, match=r"other samples \(seed differ\); choose another out=, or delete that folder"):
        Shards(tmp_path, {"seed": 1, "weights": "ema"})
    (tmp_path / "key.json").write_text("{")
    with pytest.raises(UserError, match="other samples"):
        Shards(tmp_path, {"seed": 0, "weights": "ema"})
