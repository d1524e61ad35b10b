"""Image files as bytes, whole and broken, for tests."""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def pixels(height: int = 6, width: int = 9, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """Noise, (H, W, C)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(array: NDArray, kind: str = "PNG", **settings: object) -> bytes:
    """(H, W, C) as a file of one of Pillow's kinds."""
    return saved(Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array), kind, **settings)


def saved(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def npy(array: NDArray, **settings: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **settings)
    return file.getvalue()


def npy_claiming(shape: tuple[int, ...]) -> bytes:
    """A .npy whose header claims bytes that are not there."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, between: bytes = b"") -> bytes:
    """A PNG of these bytes, each row after the number of its filter; also one that lies about its size."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [chunk(*part) for part in chunks]
    return b"\x89PNG\r\n\x1a\n" + parts[0] + between + parts[1] + parts[2]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def deep_png(array: NDArray[np.uint16], filtered: bool = True, between: bytes = b"") -> bytes:
    """(H, W, C) of 16 bits; with the filters 1 to 4 of PNG in turn where `filtered`, else unfiltered.

    Filters of the specification's section 9.2, on bytes, with the bytes of one pixel as the distance to the left.
    """
    height, width, channels = array.shape
    step = 2 * channels
    raw = array.astype(">u2").view(np.uint8).reshape(height, -1).astype(int)
    rows = b""
    above = np.zeros_like(raw[0])
    for y, row in enumerate(raw):
        left = np.concatenate([np.zeros(step, int), row[:-step]])
        corner = np.concatenate([np.zeros(step, int), above[:-step]])
        p = left + above - corner
        distances = np.stack([abs(p - left), abs(p - above), abs(p - corner)])
        paeth = np.choose(distances.argmin(0), [left, above, corner])
        number = y % 5 if filtered else 0
        predicted = [0 * row, left, above, (left + above) // 2, paeth][number]
        rows += bytes([number]) + ((row - predicted) % 256).astype(np.uint8).tobytes()
        above = row
    return png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], rows, between)
