"""References: their numbers, and the cache that keeps them."""

import pytest
import torch

from src.evaluation import reference as module
from src.evaluation.features import Extracted, Pixels, Sizes
from src.evaluation.frechet import distance, moments
from src.evaluation.reference import images_digest, reference
from src.files import cache_folder


def images(n=200, size=4, seed=0):
    return torch.randint(0, 256, (n, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Counted(Pixels):
    """Pixels that count how often they are asked, with their first row as spatial features."""

    def __init__(self, name: str = "counted") -> None:
        super().__init__(name)
        self.asked = 0

    def sizes(self, shape):
        return Sizes(shape[1] * shape[2], None, shape[2])

    def _compute(self, images):
        self.asked += 1
        return Extracted(super()._compute(images).features, None, images[:, 0, 0].float())


def same(a, b):
    return (
        torch.equal(a.features, b.features)
        and all(torch.equal(x, y) for x, y in zip(a.moments[1:], b.moments[1:], strict=True))
        and all(torch.equal(x, y) for x, y in zip(a.spatial[1:], b.spatial[1:], strict=True))
        and (a.floor, a.spatial_floor, a.number, a.stamp) == (b.floor, b.spatial_floor, b.number, b.stamp)
    )


def test_it_is_computed_once_and_kept(tmp_path):
    x, features = images(), Counted()
    first = reference(features, x, tmp_path)
    asked = features.asked
    assert asked > 0
    again = reference(features, x, tmp_path)
    assert features.asked == asked
    assert same(first, again)
    assert torch.equal(first.features, x.flatten(1) / 255)
    assert (first.number, first.name) == (200, "counted")
    expected = moments(x.flatten(1) / 255)
    torch.testing.assert_close(first.moments.mean, expected.mean, rtol=1e-10, atol=0)
    torch.testing.assert_close(first.moments.covariance, expected.covariance, rtol=0, atol=1e-12)
    torch.testing.assert_close(first.spatial.covariance, torch.cov(x[:, 0, 0].double().T), rtol=1e-10, atol=1e-8)
    assert first.stamp["images_sha256"] == images_digest(x)


def test_other_images_shapes_or_features_are_other_references(tmp_path):
    """Catches a key that forgets one: the same bytes as 2x8 images, one pixel, the name of the features."""
    x = images()
    other = x.clone()
    other[17, 0, 2, 2] ^= 1
    cases = [(Counted(), x), (Counted(), other), (Counted(), x.reshape(200, 1, 2, 8)), (Counted("others"), x)]
    for number, (features, given) in enumerate(cases, start=1):
        reference(features, given, tmp_path)
        assert len(list(tmp_path.glob("*.pt"))) == number


@pytest.mark.parametrize("damage", ["cut", "bit", "text", "stamp"])
def test_a_damaged_file_is_computed_again(tmp_path, capsys, damage):
    x, features = images(), Counted()
    first = reference(features, x, tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "bit":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "text":
        path.write_text("not a reference")
    else:
        held = torch.load(path, weights_only=True)
        torch.save({**held, "stamp": {**held["stamp"], "images_sha256": "0" * 64}}, path)
    asked = features.asked
    assert same(reference(features, x, tmp_path), first)
    assert features.asked > asked
    assert f"note: {path} is damaged" in capsys.readouterr().out
    asked = features.asked
    assert same(reference(features, x, tmp_path), first)  # the new one is whole
    assert features.asked == asked
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_floor_is_the_distance_of_two_disjoint_halves(tmp_path):
    """It is that of half as many images: less than the distance to another distribution, more than nought."""
    x, features = images(400), Counted()
    found = reference(features, x, tmp_path)
    order = torch.randperm(400, generator=module.generator(module.mix(0x4EF5), 0))
    halves = [moments(x[part].flatten(1) / 255) for part in (order[:200], order[200:])]
    assert found.floor == pytest.approx(distance(*halves).value, rel=1e-8)
    assert 0 < found.floor < distance(halves[0], moments((x // 2).flatten(1) / 255)).value / 5
    assert found.spatial_floor is not None
    assert reference(features, images(30), tmp_path).floor is None  # 15 images, 16 dimensions


def test_of_many_images_some_vectors_are_kept_and_all_are_counted(tmp_path, monkeypatch):
    """Moments are merged piece by piece, and equal those of all at once."""
    monkeypatch.setattr(module, "KEPT", 120)
    monkeypatch.setattr(module, "PIECE", 256)
    x = images(1000)
    found = reference(Counted(), x, tmp_path)
    pixels = x.flatten(1) / 255
    assert (found.number, found.moments.number, len(found.features)) == (1000, 1000, 120)
    torch.testing.assert_close(found.moments.mean, pixels.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.moments.covariance, torch.cov(pixels.double().T), rtol=0, atol=1e-12)
    rows = (found.features[:, None] == pixels[None]).all(2).nonzero()[:, 1]
    assert len(rows.unique()) == 120  # each of them an image, none twice
    assert rows.max() > 900  # from all over the set


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    found = reference(Counted(), images(), tmp_path / "file" / "folder")
    assert found.number == 200
    assert "could not be kept" in capsys.readouterr().out


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("reference") == tmp_path / "diffusion-lab" / "reference"
    reference(Counted(), images())
    assert len(list(cache_folder("reference").iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(cache_folder("reference")) == "/home/somebody/.cache/diffusion-lab/reference"


def test_what_cannot_be_a_reference(tmp_path):
    with pytest.raises(ValueError, match="3 images are too few"):
        reference(Counted(), images(3), tmp_path)
    with pytest.raises(ValueError, match="up to 16x16"):
        reference(Pixels(), images(10, size=17), tmp_path)
    assert not list(tmp_path.iterdir())
