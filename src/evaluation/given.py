"""Samples that were drawn elsewhere: an .npz in the layout of guided-diffusion's evaluator."""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.errors import UserError, reason


class Given(NamedTuple):
    """What the file holds: images (N, C, H, W) uint8, and labels (N,) int64 or None."""

    images: Tensor
    labels: Tensor | None


def load_samples(path: Path, shape: tuple[int, int, int]) -> Given:
    """Reads arr_0, uint8 (N, H, W, C) with values from 0 to 255, and arr_1, labels, if there are any.

    Args:
        shape: (C, H, W) that the images must have.

    Raises:
        UserError: when the file is missing, damaged, or holds anything else; nothing is converted by guessing.
    """
    if not path.is_file():
        raise UserError(f"samples={path} does not exist; src.sample writes samples.npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, AttributeError, TypeError) as error:
        raise UserError(
            f"samples={path} is damaged or no .npz file ({reason(error)}); src.sample writes one"
        ) from error
    wanted = f"arr_0 must be uint8 (N, {shape[1]}, {shape[2]}, {shape[0]}) with values from 0 to 255"
    if "arr_0" not in arrays:
        raise UserError(f"samples={path} holds {', '.join(arrays) or 'nothing'} and no arr_0; {wanted}")
    images = arrays["arr_0"]
    if images.dtype != np.uint8:
        broken = ", with NaN or infinity in it" if images.dtype.kind == "f" and not np.isfinite(images).all() else ""
        raise UserError(f"samples={path}: arr_0 is {images.dtype}{broken}; {wanted}")
    if images.ndim != 4 or images.shape[1:] != (shape[1], shape[2], shape[0]) or not len(images):
        raise UserError(f"samples={path}: arr_0 is {images.shape}; {wanted}")
    labels = arrays.get("arr_1")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise UserError(
            f"samples={path}: arr_1 is {labels.dtype} {labels.shape}; labels are whole numbers, one an image"
        )
    return Given(
        torch.from_numpy(images).permute(0, 3, 1, 2),  # a view: 50,000 images are not held twice
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
    )
