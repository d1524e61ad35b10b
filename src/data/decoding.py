"""One image file's bytes to an array; every way in which they can be broken, in plain words.

PNG, JPEG, WebP, TIFF and BMP, of 8 or 16 bits, grey, coloured, with alpha or a palette; and .npy with any number of
channels. What a file holds is told from its bytes, not from its name. Values keep their file's type, whose range is
the images': 0 to 255, 0 to 65535, and for floats the range that the user states.
"""

import contextlib
import io
import logging
import re
import warnings
import zlib
from math import prod

import numpy as np
from numpy.typing import NDArray

from src.data.catalogue import BrokenImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".npy")
MAX_PIXELS = 2**27  # 11,585 x 11,585; a file of a few kilobytes can claim any number, and would fill the memory

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it reports is in the sentence of the error

FloatRange = tuple[float, float]
Array = NDArray[np.generic]

_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")  # of Pillow
_DEEP = (2, 4, 6)  # PNG's types of colour with more than one channel
_PNG = b"\x89PNG\r\n\x1a\n"
_NPY = b"\x93NUMPY"


def decode(data: bytes, name: str, float_range: FloatRange = (-1.0, 1.0)) -> Array:
    """The image that a file's bytes hold.

    Args:
        data: the whole file.
        name: of the image, for messages.
        float_range: what the values of a file of floats span; they are mapped linearly from it to [-1, 1].

    Returns:
        (H, W, C): uint8 or uint16 as stored, or float32 in [-1, 1]. Grey images have one channel, those with alpha or
        a transparent colour four, palettes the channels of their colours; an EXIF orientation is applied.

    Raises:
        BrokenImageError: when it is none, is damaged, is too large, or holds values without a range.
    """
    if not data:
        raise BrokenImageError(name, "is empty (0 bytes)")
    if data.startswith(_NPY):
        return _npy(data, name, float_range)
    return _picture(data, name, float_range)


def check_float_range(float_range: FloatRange) -> None:
    """Raises a ValueError where the values of floats cannot span this."""
    low, high = float_range
    if not low < high:
        raise ValueError(f"float_range=[{low}, {high}] must be [lowest, highest], such as [0, 1]")


def finished(array: Array, name: str, float_range: FloatRange = (-1.0, 1.0)) -> Array:
    """An array of pixels as an image: (H, W) or (H, W, C), bool, uint8, uint16 or floats.

    Raises:
        BrokenImageError: for another shape or type, and for floats that are not finite or leave their range.
    """
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not array.size:
        raise BrokenImageError(name, f"holds an array of shape {array.shape}, not (height, width, channels)")
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "f":
        return _scaled(array, name, float_range)
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise BrokenImageError(
            name, f"holds {array.dtype} values, which have no range of their own; uint8, uint16 or floats do"
        )
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _scaled(array: Array, name: str, float_range: FloatRange) -> Array:
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        y, x, c = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise BrokenImageError(name, f"holds {values[y, x, c]} at row {y}, column {x}, channel {c}")
    low, high = float_range
    least, most = float(values.min()), float(values.max())
    if least < low or most > high:
        raise BrokenImageError(
            name,
            f"holds values from {least:.6g} to {most:.6g}, outside {low:g} to {high:g}; "
            f"set data.source.float_range to what they span",
        )
    return ((values - low) * (2 / (high - low)) - 1).astype(np.float32, order="C")


def _npy(data: bytes, name: str, float_range: FloatRange) -> Array:
    shape, fortran, dtype, start = npy_header(io.BytesIO(data), name)
    if dtype.hasobject:
        raise BrokenImageError(name, "holds Python objects, not numbers; they could run code, and are not opened")
    size = prod(shape) * dtype.itemsize
    if prod(shape[:2]) > MAX_PIXELS:
        raise BrokenImageError(name, _too_large(shape[:2]))
    if len(data) - start < size:
        raise BrokenImageError(name, f"is cut short: {len(data) - start:,} bytes of {size:,} are there")
    array = np.frombuffer(data, dtype, count=prod(shape), offset=start)
    return finished(array.reshape(shape, order="F" if fortran else "C"), name, float_range)


def npy_header(file: io.BufferedIOBase, name: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether in Fortran's order, type, and where the numbers begin; reads no more than the header.

    Raises:
        BrokenImageError: when it is damaged.
    """
    start = file.tell()
    try:
        version = np.lib.format.read_magic(file)
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}.get(version[0])
        if read is None:
            raise ValueError(f"version {version}")
        shape, fortran, dtype = read(file)
    except Exception as error:  # NumPy reads it as Python text, and meets damage with whatever that raises
        raise BrokenImageError(name, f"has a damaged .npy header ({_one_line(error)})") from error
    return shape, fortran, dtype, file.tell() - start


def _picture(data: bytes, name: str, float_range: FloatRange) -> Array:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are refused below, and of metadata that nobody reads
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BrokenImageError(name, _too_large((height, width)))
                frames = getattr(image, "n_frames", 1)
                if frames > 1 and image.format != "MPO":  # JPEG of telephones, whose further frames are previews
                    raise BrokenImageError(name, f"holds {frames} pictures; save each as a file of its own")
                deep = image.format == "PNG" and data[24] == 16 and data[25] in _DEEP
                return finished(_deep(data) if deep else _pixels(image, name), name, float_range)
    except BrokenImageError:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImageError(name, _what_else(data)) from error
    except Image.DecompressionBombError as error:
        size = int(re.findall(r"\d+", str(error))[0])
        raise BrokenImageError(name, _too_large((size,))) from error
    except Exception as error:  # damage reaches the user as whatever Pillow's parsers happen to raise
        kind = _one_line(error)
        if "truncated" in kind.lower():
            raise BrokenImageError(name, "is cut short: its end is missing") from error
        raise BrokenImageError(name, f"is damaged ({kind})") from error


def _deep(data: bytes) -> Array:
    """A 16-bit PNG in colour or with alpha, of which Pillow keeps one byte a value: here once either."""
    from PIL import Image

    grey = data[25] == 4
    if grey:  # to PNG's filters, two values of 16 bits are four of 8
        header = data[12:24] + bytes([8, 6]) + data[26:29]
        data = data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]
    parts = []
    for order in (None,) if grey else ("B", "L"):  # read as little-endian, the upper byte is the lower one
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            key = image.info.get("transparency")
            if order is not None:
                image.tile = [tile._replace(args=f"{image.mode};16{order}") for tile in image.tile]
            image.load()
            parts.append(np.asarray(_upright(image)).astype(np.uint16))
    values = parts[0][..., ::2] << 8 | parts[0][..., 1::2] if grey else parts[0] << 8 | parts[1]
    if grey:  # as Pillow's conversions of 8 bits do
        return values[..., [0, 0, 0, 1]]
    if key is None:
        return values
    opaque = (values != np.array(key, np.uint16)).any(-1, keepdims=True)
    return np.concatenate([values, opaque * np.uint16(65535)], -1)


def _pixels(image: "Image.Image", name: str) -> Array:  # type: ignore[name-defined]  # noqa: F821
    if image.format == "TIFF":
        bits = set(image.tag_v2.get(258, (1,)))
        if max(bits) > 8 and len(image.getbands()) > 1:  # Pillow would keep the upper bytes
            raise BrokenImageError(
                name, f"is a TIFF of {max(bits)} bits in colour, which is not read; save it as 16-bit PNG or .npy"
            )
        covered = sum((right - left) * (low - top) for _, (left, top, right, low), *_ in image.tile)
        if covered < image.size[0] * image.size[1]:  # Pillow would leave the rest black
            raise BrokenImageError(
                name, f"is damaged ({covered:,} of {image.size[0] * image.size[1]:,} pixels are there)"
            )
    image.load()
    kind = image.format
    image = _upright(image)
    transparent = image.mode in ("P", "L", "RGB") and "transparency" in image.info
    if transparent or image.mode in ("PA", "LA", "RGBa"):
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
        image = image.convert("RGB")
    array = np.asarray(image)
    if image.mode == "I" and kind == "PNG":  # of 16 bits, in older versions of Pillow
        return array.astype(np.uint16)
    return array


def _upright(image: "Image.Image") -> "Image.Image":  # type: ignore[name-defined]  # noqa: F821
    from PIL import ImageOps

    with contextlib.suppress(Exception):  # unreadable metadata says nothing of the orientation
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _what_else(data: bytes) -> str:
    """Why no image was found."""
    known = {_PNG: "PNG", b"\xff\xd8": "JPEG", b"RIFF": "WebP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
    if kind := next((kind for start, kind in known.items() if data.startswith(start)), None):
        return f"begins as a {kind} does, but is cut short, damaged or of a rare sort"
    other = {b"GIF8": "GIF image", b"%PDF": "PDF", b"PK\3\4": "zip archive"}.get(data[:4], "file of an unknown kind")
    try:
        text = " ".join(data[:256].decode(errors="ignore" if len(data) > 256 else "strict").split())
    except UnicodeDecodeError:
        text = ""
    if text.isprintable() and text and not data.startswith(b"%PDF"):
        return f"is text, not an image; it begins {text[:30]!r}"
    return f"is a {other}, not an image of a kind that is read: PNG, JPEG, WebP, TIFF, BMP or .npy"


def _too_large(shape: tuple[int, ...]) -> str:
    return (
        f"claims {'x'.join(f'{n:,}' for n in shape)} pixels, more than the {MAX_PIXELS:,} that are decoded; "
        f"make it smaller first"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
