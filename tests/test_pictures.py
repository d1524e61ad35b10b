"""From [-1, 1] to pixels, and pixels to grids and files."""

import numpy as np
import pytest
import torch
from PIL import Image

from src.pictures import enlarge, grid, save_gif, save_png, to_uint8


def random_images(n, c, h, w):
    return torch.randint(0, 255, (n, c, h, w), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_pixels_are_rounded_to_the_nearest_level():
    """Catches truncation, which darkens every image by half a level, and 127 or 128 for 127.5."""
    levels = torch.arange(256, dtype=torch.float64)
    for shift in (-0.49, 0.0, 0.49):
        x = (levels + shift) / 127.5 - 1
        assert torch.equal(to_uint8(x), levels.to(torch.uint8))


def test_pixels_outside_are_clamped():
    """Catches values that wrap around: 1.01 as black."""
    x = torch.tensor([-1e9, -1.5, -1.0, 1.0, 1.01, 3.0, 1e9])
    assert to_uint8(x).tolist() == [0, 0, 0, 255, 255, 255, 255]
    assert x.tolist()[1] == -1.5  # not in place


def test_pixels_of_bfloat16_are_computed_in_float32():
    """Catches arithmetic with eight bits: x + 1 near 2 would fall on every other level."""
    x = torch.linspace(-1, 1, 999).bfloat16()
    assert torch.equal(to_uint8(x), to_uint8(x.double()))


@pytest.mark.parametrize(
    ("n", "columns", "gap", "shape"), [(7, None, 2, (3, 3)), (6, 4, 1, (2, 4)), (3, 3, 0, (1, 3)), (1, None, 2, (1, 1))]
)
def test_image_k_of_a_grid_is_where_it_is_expected(n, columns, gap, shape):
    """Catches columns for rows, a gap that shifts, and images that overlap; unused places stay white."""
    rows, cols = shape
    images = random_images(n, 3, 4, 6)
    canvas = grid(images, columns, gap)
    assert canvas.shape == (3, rows * (4 + gap) + gap, cols * (6 + gap) + gap)
    assert canvas.dtype == torch.uint8
    rest = canvas.clone()
    for k in range(n):
        top, left = gap + (k // cols) * (4 + gap), gap + (k % cols) * (6 + gap)
        assert torch.equal(canvas[:, top : top + 4, left : left + 6], images[k])
        rest[:, top : top + 4, left : left + 6] = 255
    assert (rest == 255).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_png_holds_the_pixels_enlarged(tmp_path, channels):
    """Catches interpolation, channels in the wrong order, and height for width."""
    (image,) = random_images(1, channels, 4, 6)
    save_png(image, tmp_path / "image.png", scale=3)
    pixels = np.asarray(Image.open(tmp_path / "image.png")).reshape(12, 18, channels)
    expected = image.repeat_interleave(3, 1).repeat_interleave(3, 2).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(pixels, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["image.png"]


def test_a_gif_plays_all_frames_and_holds_the_last(tmp_path):
    """Catches frames that are lost, out of order, or all of one duration."""
    frames = [torch.full((1, 4, 6), 40 * i, dtype=torch.uint8) for i in range(5)]
    save_gif(frames, tmp_path / "a.gif", seconds=1.0)
    with Image.open(tmp_path / "a.gif") as gif:
        played = []
        for i in range(gif.n_frames):
            gif.seek(i)
            played.append((np.asarray(gif.convert("L")).max().item(), gif.info["duration"]))
    assert played == [(0, 200), (40, 200), (80, 200), (120, 200), (160, 2000)]


@pytest.mark.parametrize(("height", "factor"), [(8, 8), (28, 2), (32, 2), (64, 1), (256, 1)])
def test_small_images_are_enlarged_to_about_64_pixels(height, factor):
    """Catches a factor of 0 for large images."""
    assert enlarge(height) == factor
