"""Pictures of samples: grids, strips and animations. Always rounded to uint8, never truncated."""

import math
from pathlib import Path

import torch
from torch import Tensor

from src.files import replacing


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to {0, ..., 255}: the nearest level, values outside clamped; any shape, uint8 on the same device."""
    return x.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def grid(images: Tensor, columns: int | None = None, gap: int | None = None) -> Tensor:
    """Tiles uint8 images, (N, C, H, W), into one (C, rows (H + gap) + gap, columns (W + gap) + gap), row by row.

    The gap is white; without a number it is a fourteenth of the images' height, at least one pixel.
    """
    n, c, h, w = images.shape
    gap = max(1, h // 14) if gap is None else gap
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = images.new_full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), 255)
    for i, image in enumerate(images):
        top, left = (i // columns) * (h + gap) + gap, (i % columns) * (w + gap) + gap
        canvas[:, top : top + h, left : left + w] = image
    return canvas


def save_png(image: Tensor, path: Path, scale: int = 1) -> None:
    """Writes a uint8 image, (C, H, W), enlarged by a whole factor."""
    with replacing(path) as temporary:
        _pil(image, scale).save(temporary, format="PNG")


def save_gif(frames: list[Tensor], path: Path, seconds: float, scale: int = 1) -> None:
    """Writes uint8 frames, each (C, H, W), as an animation of about `seconds` that holds its last frame."""
    pictures = [_pil(frame, scale) for frame in frames]
    each = max(20, int(1000 * seconds / len(pictures)))
    durations = [each] * (len(pictures) - 1) + [2000]
    with replacing(path) as temporary:
        pictures[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=durations,
            loop=0,
            optimize=False,
        )


def enlarge(height: int) -> int:
    """The whole factor that makes an image of `height` pixels comfortable to look at."""
    return max(1, round(64 / height))


def _pil(image: Tensor, scale: int):  # type: ignore[no-untyped-def]
    from PIL import Image

    if image.shape[0] not in (1, 3, 4):
        image = image[:1]  # more channels than a picture has: the first
    array = image.permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
