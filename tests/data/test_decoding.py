"""From a file's bytes to an array: every kind of file to the pixel, and every kind of damage in a sentence."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from src.data.catalogue import BrokenImageError
from src.data.decoding import MAX_PIXELS, check_float_range, decode
from tests.data.files import chunk, deep_png, encoded, npy, npy_claiming, pixels, png, saved


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_lossless_kinds_are_read_to_the_pixel(kind, channels):
    """Catches channels in another order, rows as columns, grey made colour and alpha that is dropped."""
    array = pixels(channels=channels)
    image = decode(encoded(array, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})), "x")
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    if kind == "WEBP" and channels == 1:  # which has no grey
        assert (image == array).all()
    else:
        np.testing.assert_array_equal(image, array)


def test_jpeg_is_read_as_pillow_reads_it_in_grey_and_in_colour():
    smooth = np.linspace(0, 255, 12 * 16 * 3).reshape(12, 16, 3).astype(np.uint8)
    image = decode(encoded(smooth, "JPEG", quality=95), "x")
    assert (image.dtype, image.shape) == (np.uint8, (12, 16, 3))
    assert np.abs(image.astype(int) - smooth).mean() < 3
    assert decode(encoded(smooth[..., :1], "JPEG"), "x").shape == (12, 16, 1)
    assert decode(saved(Image.fromarray(smooth).convert("CMYK"), "JPEG"), "x").shape == (12, 16, 3)


def test_the_bytes_say_what_a_file_is_not_its_name():
    array = pixels()
    np.testing.assert_array_equal(decode(encoded(array, "PNG"), "x.jpg"), array)
    np.testing.assert_array_equal(decode(npy(array), "x.png"), array)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_exif_orientation_is_applied(kind, orientation):
    """Of a picture whose left is dark, whose top is red. Catches sideways photographs of telephones."""
    array = np.zeros((16, 24, 3), np.uint8)
    array[:, 12:] = 128
    array[:8, :, 0] += 127
    upright = [
        array,
        array[:, ::-1],
        array[::-1, ::-1],
        array[::-1],
        array.transpose(1, 0, 2),
        np.rot90(array, -1),
        array[::-1, ::-1].transpose(1, 0, 2),
        np.rot90(array),
    ]
    exif = Image.Exif()
    exif[0x112] = orientation
    image = decode(
        encoded(array, kind, exif=exif, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {})), "x"
    )
    assert image.shape == upright[orientation - 1].shape
    assert np.abs(image.astype(int) - upright[orientation - 1]).max() <= (0 if kind == "PNG" else 4)


def test_damaged_metadata_does_not_break_an_image():
    array = pixels()
    damaged = encoded(array, "JPEG", exif=b"Exif\0\0MM\0*garbage that is no table")
    np.testing.assert_array_equal(decode(damaged, "x"), decode(encoded(array, "JPEG"), "x"))


def test_palettes_have_the_channels_of_their_colours():
    array = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], np.uint8)
    indexed = Image.fromarray(array).quantize(4, dither=Image.Dither.NONE)
    np.testing.assert_array_equal(decode(saved(indexed), "x"), array)
    red = decode(saved(indexed, transparency=int(np.asarray(indexed)[0, 0])), "x")
    np.testing.assert_array_equal(red[..., :3], array)
    assert red[..., 3].tolist() == [[0, 255], [255, 255]]


def test_one_bit_is_black_and_white_and_grey_with_alpha_has_four_channels():
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    assert decode(saved(bits), "x").tolist() == [[[0], [255]], [[255], [0]]]
    grey = np.array([[[7, 100], [8, 200]]], np.uint8)
    assert decode(encoded(grey), "x").tolist() == [[[7, 7, 7, 100], [8, 8, 8, 200]]]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("filtered", [False, True])
def test_16_bit_pngs_keep_all_their_bits(channels, filtered):
    """Under each of PNG's filters. Catches the lower bytes that Pillow drops in colour, and swapped bytes."""
    array = np.random.default_rng(channels).integers(0, 2**16, (11, 7, channels), dtype=np.uint16)
    image = decode(deep_png(array, filtered), "x")
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, array[..., [0, 0, 0, 1]] if channels == 2 else array)


def test_16_bit_pngs_are_turned_and_keep_their_transparent_colour():
    array = np.random.default_rng(0).integers(0, 2**16, (4, 6, 3), dtype=np.uint16)
    exif = Image.Exif()
    exif[0x112] = 6
    turned = chunk(b"eXIf", exif.tobytes()[6:])
    np.testing.assert_array_equal(decode(deep_png(array, between=turned), "x"), np.rot90(array, -1))
    key = chunk(b"tRNS", array[1, 2].astype(">u2").tobytes())
    image = decode(deep_png(array, between=key), "x")
    np.testing.assert_array_equal(image[..., :3], array)
    assert np.argwhere(image[..., 3] != 65535).tolist() == [[1, 2]]
    assert image[1, 2, 3] == 0


def test_16_bit_tiffs_are_read_in_grey_and_refused_in_colour():
    """Pillow would give the upper bytes of the coloured ones without a word."""
    grey = np.random.default_rng(0).integers(0, 2**16, (4, 6), dtype=np.uint16)
    image = decode(saved(Image.fromarray(grey), "TIFF"), "x")
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image[..., 0], grey)
    tiff = bytearray(encoded(pixels(2, 2), "TIFF"))
    at = tiff.index(bytes([8, 0, 8, 0, 8, 0]))
    tiff[at : at + 6] = bytes([16, 0, 16, 0, 16, 0])
    with pytest.raises(BrokenImageError, match="x is a TIFF of 16 bits in colour"):
        decode(bytes(tiff) + bytes(100), "x")


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2"])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 7)])
def test_npy_has_any_number_of_channels_and_the_range_of_its_type(dtype, shape):
    array = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)
    for stored in (array, np.asfortranarray(array)):
        image = decode(npy(stored), "x")
        assert image.dtype == np.dtype(dtype).newbyteorder("=")
        np.testing.assert_array_equal(image, array.reshape(4, 5, -1))


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "f8"])
def test_floats_are_mapped_from_the_range_that_is_stated(dtype):
    """Also where all values would fit another range. Catches a range that is guessed from the values."""
    array = np.array([[0.0, 0.25], [0.5, 1.0]]).astype(dtype)
    same, mapped, far = (decode(npy(array), "x", r) for r in ((-1.0, 1.0), (0.0, 1.0), (-4.0, 4.0)))
    assert same.dtype == np.float32
    assert same[..., 0].tolist() == array.tolist()
    assert mapped[..., 0].tolist() == [[-1.0, -0.5], [0.0, 1.0]]
    assert far[..., 0].tolist() == [[0.0, 0.0625], [0.125, 0.25]]
    assert same.flags.c_contiguous


def test_floats_outside_their_range_and_ranges_that_are_none_are_refused():
    with pytest.raises(BrokenImageError, match=r"x holds values from 0 to 1\.5, outside -1 to 1; set data.source"):
        decode(npy(np.array([[0.0, 1.5]])), "x")
    with pytest.raises(BrokenImageError, match="outside 0 to 1"):
        decode(npy(np.array([[-0.1, 0.5]])), "x", (0.0, 1.0))
    for wrong in ((1.0, 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="must be"):
            check_float_range(wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_npy_that_is_not_finite_is_refused_with_the_place(value):
    array = np.zeros((4, 5, 6), np.float32)
    array[2, 3, 4] = value
    with pytest.raises(BrokenImageError, match=f"x holds {value} at row 2, column 3, channel 4"):
        decode(npy(array), "x")


PHOTO = encoded(pixels(40, 40), "JPEG")
TIFF = bytearray(encoded(pixels(9, 9), "TIFF"))
TIFF[TIFF.index(bytes([1, 1, 4, 0, 1, 0, 0, 0])) + 8] = 18  # its number of rows, of which 9 are there
HALF = bytes(TIFF)
BROKEN = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "text": (b"Page not found.\nTry again.", "is text, not an image; it begins 'Page not found. Try again.'"),
    "html": (b"<html>" + "\u00e9".encode() * 400, "is text, not an image; it begins '<html>"),
    "jpeg": (PHOTO[: len(PHOTO) // 2], "is cut short"),
    "jpeg less a byte": (PHOTO[:-1], "is cut short"),
    "jpeg's start": (PHOTO[:2], "begins as a JPEG does, but is cut short, damaged or of a rare sort"),
    "png": (encoded(pixels(40, 40))[:2000], "is cut short"),
    "png's start": (encoded(pixels())[:12], "begins as a PNG does, but is cut short, damaged or of a rare sort"),
    "png of 16 bits": (deep_png(np.full((30, 30, 3), 777, np.uint16))[:60], "is (cut short|damaged)"),
    "webp": (encoded(pixels(40, 40), "WEBP")[:300], "is damaged"),
    "tiff": (encoded(pixels(40, 40), "TIFF")[:1000], "is (cut short|damaged)"),
    "bomb": (png(60000, 60000, 8, 2, bytes(100)), r"claims 3,600,000,000 pixels, more than"),
    "bomb of 16 bits": (png(60000, 60000, 16, 2, bytes(100)), r"claims 3,600,000,000 pixels, more than"),
    "smaller bomb": (png(12000, 12000, 8, 0, bytes(100)), r"claims 12,000x12,000 pixels, more than"),
    "npy bomb": (npy_claiming((60000, 60000)), r"claims 60,000x60,000 pixels, more than"),
    "npy of many channels": (npy_claiming((3, 3, 10**12)), r"is cut short: 0 bytes of 9,000,000,000,000 are there"),
    "gif": (encoded(pixels(channels=1), "GIF"), "is a GIF image, not an image of a kind that is read"),
    "pdf": (b"%PDF-1.7\nabc", "is a PDF, not"),
    "bytes": (bytes(range(128, 256)), "is a file of an unknown kind, not"),
    "two pages": (
        saved(Image.new("L", (4, 4)), "TIFF", save_all=True, append_images=[Image.new("L", (4, 4))]),
        "holds 2 pictures",
    ),
    "npy cut": (npy(pixels())[:200], "is cut short: 72 bytes of 162 are there"),
    "npy's head cut": (npy(pixels())[:50], r"has a damaged \.npy header"),
    "npy's head": (npy(pixels())[:10] + b"garbage(".ljust(118), r"has a damaged \.npy header"),
    "npy of objects": (npy(np.array([[print]], object), allow_pickle=True), "holds Python objects, not numbers"),
    "npy of whole numbers": (npy(np.zeros((3, 3), np.int64)), "holds int64 values, which have no range of their own"),
    "npy of text": (npy(np.array([["a"]])), "holds <U1 values"),
    "npy of one axis": (npy(np.zeros(9, np.uint8)), r"holds an array of shape \(9,\), not \(height, width, channels\)"),
    "npy of four": (npy(np.zeros((1, 2, 3, 4), np.uint8)), r"holds an array of shape \(1, 2, 3, 4\)"),
    "npy of nothing": (npy(np.zeros((0, 3, 3), np.uint8)), r"holds an array of shape \(0, 3, 3\)"),
    "tiff of half its rows": (HALF, r"is damaged \(81 of 162 pixels are there\)"),
    "32 bits": (saved(Image.new("I", (4, 4), 70000), "TIFF"), "holds int32 values"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("damage", BROKEN)
def test_broken_files_are_refused_in_plain_words(damage):
    """Without a warning on the screen beside the sentence, and before memory is filled."""
    data, words = BROKEN[damage]
    with pytest.raises(BrokenImageError, match=f"(?s)^cat/x.png {words}") as caught:
        decode(data, "cat/x.png")
    assert "\n" not in str(caught.value)
    assert caught.value.name == "cat/x.png"


def test_the_largest_image_that_is_decoded_is_larger_than_a_photograph():
    assert 100e6 < MAX_PIXELS < 178e6  # Pillow itself refuses the second


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "deep", "npy"])
def test_no_damage_at_all_escapes_as_another_error(kind):
    """Cut anywhere, and with any bytes changed, a file is an image or broken."""
    array = pixels(9, 9)
    whole = {"deep": deep_png(array.astype(np.uint16) * 257), "npy": npy(array)}.get(kind) or encoded(array, kind)
    g = np.random.default_rng(0)
    damaged = [whole[: int(n)] for n in g.integers(0, len(whole), 60)]
    for _ in range(200):
        data = bytearray(whole)
        for at in g.integers(0, min(len(data), 200), g.integers(1, 4)):
            data[at] = g.integers(256)
        damaged.append(bytes(data))
    found = [_attempted(data) for data in damaged]
    refused = [str(result) for result in found if isinstance(result, BrokenImageError)]
    assert all(isinstance(result, BrokenImageError) or result.ndim == 3 for result in found)
    assert len(refused) > 30
    assert not any("\n" in words for words in refused)


def _attempted(data: bytes) -> NDArray | BrokenImageError:
    try:
        return decode(data, "x")
    except BrokenImageError as error:
        return error
