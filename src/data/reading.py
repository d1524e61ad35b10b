"""A catalogue decoded into memory, for sets that fit there."""

import numpy as np
import torch

from src.data.catalogue import BrokenImageError, Catalogue
from src.data.images import ImageSet
from src.errors import UserError


def read_all(catalogue: Catalogue) -> ImageSet:
    """All images, which must be of one shape and type.

    Raises:
        UserError: for the first that is broken, or unlike the first of all.
    """
    try:
        first = catalogue.read(0)
        images = np.empty((len(catalogue.names), *first.shape), first.dtype)
        for i, name in enumerate(catalogue.names):
            image = catalogue.read(i)
            if image.shape != first.shape or image.dtype != first.dtype:
                raise BrokenImageError(
                    name, f"is {described(image)}, but {catalogue.names[0]} is {described(first)}; make them alike"
                )
            images[i] = image
    except BrokenImageError as error:
        raise UserError(f"{catalogue.where} is not a set of whole images: {error}") from error
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return ImageSet(x, torch.from_numpy(catalogue.labels), catalogue.names, catalogue.classes)


def described(image: "np.ndarray") -> str:
    """The shape and type of an image, (H, W, C), in words."""
    height, width, channels = image.shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''} of {image.dtype}"
