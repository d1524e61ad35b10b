"""What is cut away, and what resizing makes of the rest: against closed forms and Pillow."""

import numpy as np
import pytest
from PIL import Image

from src.data.geometry import Box, DistortedError, Geometry, Size, lost, parse_size


@pytest.mark.parametrize(
    ("given", "wanted", "box"),
    [
        ((100, 100), (64, 64), Box(0, 0, 100, 100)),
        ((100, 160), (64, 64), Box(0, 30, 100, 100)),
        ((161, 100), (64, 64), Box(30, 0, 100, 100)),  # of an odd remainder the bottom loses the pixel more
        ((480, 640), (48, 64), Box(0, 0, 480, 640)),
        ((640, 640), (48, 64), Box(80, 0, 480, 640)),
        ((480, 480), (48, 64), Box(60, 0, 360, 480)),
        ((10, 33), (3, 7), Box(0, 5, 10, 23)),  # 23.33 wide
        ((10, 33), (4, 7), Box(0, 7, 10, 18)),  # 17.5 wide
        ((1, 1), (64, 64), Box(0, 0, 1, 1)),
        ((1, 1000), (64, 1), Box(0, 499, 1, 1)),  # never nothing
    ],
)
def test_the_largest_box_of_the_targets_proportions_in_the_middle(given, wanted, box):
    """Catches a crop to the target's size rather than its proportions, height and width mixed up, and rounding down."""
    assert Geometry(wanted).box(*given, 0) == box


def test_a_random_box_lies_anywhere_and_depends_on_number_and_seed_alone():
    """Catches a place drawn from a global generator, one that is the same for all images, and a range one too short."""
    place = Geometry((8, 8), crop="random", seed=3)
    lefts = [place.box(10, 14, i).left for i in range(400)]
    assert lefts == [place.box(10, 14, i).left for i in range(400)]
    assert lefts != [Geometry((8, 8), crop="random", seed=4).box(10, 14, i).left for i in range(400)]
    assert np.bincount(lefts, minlength=5).min() > 80 - 5 * 8  # each of 0 to 4 is one in five
    assert max(lefts) == 4
    assert {place.box(10, 14, i)._replace(left=0) for i in range(400)} == {Box(0, 0, 10, 10)}
    assert place.box(10, 10, 7) == Box(0, 0, 10, 10)


def test_without_a_crop_nothing_is_distorted():
    """Catches an image that is squeezed, and one that is refused because a pixel's fraction is missing."""
    geometry = Geometry((48, 64), crop="none")
    assert geometry.box(375, 500, 0) == Box(0, 0, 375, 500)
    assert geometry.box(33, 44, 0) == Box(0, 0, 33, 44)
    with pytest.raises(DistortedError, match="is 64x64, which 48x64 would distort; use crop=center"):
        geometry.box(64, 64, 0)


@pytest.mark.parametrize("resize", ["lanczos", "area"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_a_constant_stays_constant(resize, dtype, channels):
    """Catches weights that do not sum to 1, rounding down, channels mixed, and alpha that darkens colours."""
    values = np.array([0, 200, 255, 7, 128][:channels])
    values = (values / 300).astype(dtype) if dtype == "float32" else values.astype(dtype)
    image = np.broadcast_to(values, (37, 53, channels))
    for size in ((16, 16), (64, 80), (7, 11)):
        made = Geometry(size, resize=resize)(image, 0)
        assert made.shape == (*size, channels)
        assert made.dtype == dtype
        tolerance = 1e-6 if dtype == "float32" else 0
        np.testing.assert_allclose(made, np.broadcast_to(values, made.shape), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("old", "new"), [(12, 4), (12, 5), (13, 4), (100, 33)])
def test_the_area_of_a_ramp_is_a_ramp(old, new):
    """The mean of x + 1/2 over a pixel from a to b, of pixels that are constant: in closed form. Catches an average of
    whole pixels only, and one shifted by half a pixel."""
    ramp = np.arange(old, dtype=np.float32)[None, :, None].repeat(old, 0) / old
    made = Geometry((new, new), resize="area")(ramp, 0)[0, :, 0]

    def integral(x):  # of floor, from 0
        n = np.floor(x)
        return n * (n - 1) / 2 + (x - n) * n

    edges = np.arange(new + 1) * old / new
    np.testing.assert_allclose(made, np.diff(integral(edges)) * new / old / old, rtol=0, atol=2e-6)
    down = Geometry((new, new), resize="area")(ramp.transpose(1, 0, 2), 0)[:, 0, 0]
    np.testing.assert_allclose(down, made, rtol=0, atol=3e-7)


def test_area_rounds_and_mixes_only_across_edges():
    """Catches truncation, and an enlargement that blurs."""
    image = np.array([[0, 1], [1, 1]], np.uint8)[..., None]
    assert Geometry((1, 1), resize="area")(image, 0).item() == 1  # 0.75
    twice = Geometry((4, 4), resize="area")(image * 200, 0)[..., 0]
    np.testing.assert_array_equal(twice, (image[..., 0] * 200).repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_lanczos_is_pillows(mode, channels):
    """To the bit, of the crop. Catches another filter, a crop after resizing, and rows and columns swapped."""
    image = np.random.default_rng(0).integers(0, 256, (50, 41, channels), dtype=np.uint8)
    made = Geometry((24, 18))(image, 0)
    middle = Image.fromarray(image.squeeze()).crop((1, 0, 39, 50))  # 37.5 is 38 wide
    theirs = np.asarray(middle.resize((18, 24), Image.Resampling.LANCZOS)).reshape(24, 18, channels)
    np.testing.assert_array_equal(made, theirs)
    assert middle.mode == mode


def test_lanczos_of_other_types_is_the_same_filter():
    """Four and five channels by themselves, to the bit; uint16 and float32 within the rounding of Pillow's two passes
    over uint8, where nothing is clamped between them."""
    image = np.random.default_rng(0).integers(96, 160, (50, 40, 5), dtype=np.uint8)
    geometry = Geometry((20, 16))
    alone = np.concatenate([geometry(image[..., c : c + 1], 0) for c in range(5)], 2)
    np.testing.assert_array_equal(geometry(image[..., :4], 0), alone[..., :4])
    np.testing.assert_array_equal(geometry(image, 0), alone)
    deep = geometry(image.astype(np.uint16) * 257, 0)
    np.testing.assert_allclose(deep / 257, alone, atol=1.01)
    real = geometry(image.astype(np.float32) / 127.5 - 1, 0)
    np.testing.assert_allclose((real + 1) * 127.5, alone, atol=1.01)


def test_what_lanczos_overshoots_is_clamped():
    """A step rings; floats must not leave [-1, 1], nor 16 bits wrap around."""
    step = np.zeros((40, 40, 1), np.float32) - 1
    step[:, 20:] = 1
    made = Geometry((28, 28))(step, 0)
    assert (made.min(), made.max()) == (-1, 1)
    deep = Geometry((28, 28))(((step + 1) * 32767.5).astype(np.uint16), 0)
    assert np.diff(deep.astype(int), axis=1).min() > -10000


def test_an_image_that_has_the_size_keeps_every_pixel():
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    for resize in ("lanczos", "area"):
        np.testing.assert_array_equal(Geometry((8, 9), resize=resize)(image, 0), image)


def test_sizes():
    assert [parse_size(s) for s in (64, "64x48", [48, 64])] == [(64, 64), (64, 48), (48, 64)]
    for wrong in ("64", "axb", "64x", "-1x2", "64x48x3", "1.5x2"):
        with pytest.raises(ValueError, match="height by width, such as 48x64"):
            Size(wrong)
    with pytest.raises(ValueError, match="must be at least 1"):
        parse_size("0x4")
    with pytest.raises(ValueError, match="crop=middle is not one of center, none, random"):
        Geometry((1, 1), crop="middle")
    assert lost(100, 200, Box(0, 0, 100, 100)) == 0.5
