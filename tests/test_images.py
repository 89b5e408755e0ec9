"""Pictures as people have them: every mode, upright, over white; broken ones are refused in one way."""

import base64
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw
from PIL import Image

from cm3leon_hf.images import MAX_PIXELS, read_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, format: str = "PNG", **arguments) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **arguments)
    return file.getvalue()


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says how large it is."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")


def half_transparent_palette() -> Image.Image:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (4, 0, 8, 8))
    image.info["transparency"] = 1
    return image


def colours(image: Image.Image) -> tuple:
    """Colours of the left and of the right half."""
    return image.getpixel((1, 4)), image.getpixel((6, 4))


def test_a_picture_stays_as_it_is():
    image = draw("red", "circle")
    assert read_image(image).tobytes() == image.tobytes()
    assert read_image(encoded(image)).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.new("RGB", (8, 8), "red"), RED),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), RED),
        (Image.new("L", (8, 8), 77), (77, 77, 77)),
        (Image.new("1", (8, 8), 1), WHITE),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 255)), RED),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 51)), (255, 204, 204)),
        (Image.new("LA", (8, 8), (0, 0)), WHITE),
        (Image.new("LA", (8, 8), (0, 255)), (0, 0, 0)),
        (Image.new("P", (8, 8)), (0, 0, 0)),
        (Image.new("I", (8, 8), 200), (200, 200, 200)),
        (Image.new("I", (8, 8), 65535), WHITE),
        (Image.new("F", (8, 8), 128.0), (128, 128, 128)),
        (Image.fromarray(np.full((8, 8), 65535, np.uint16)), WHITE),
        (Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)), (128, 128, 128)),
        (Image.fromarray(np.full((8, 8), 200, np.uint16)), (1, 1, 1)),  # nearly black in 16 bits
    ],
)
def test_modes_become_rgb(image, expected):
    read = read_image(image)
    assert read.mode == "RGB" and read.size == (8, 8)
    assert colours(read) == (expected, expected)


def test_transparent_palettes_lie_over_white():
    assert colours(read_image(half_transparent_palette())) == (RED, WHITE)
    assert colours(read_image(encoded(half_transparent_palette(), "GIF", transparency=1))) == (RED, WHITE)
    assert colours(read_image(encoded(Image.new("RGB", (8, 8), "red"), transparency=RED))) == (WHITE, WHITE)


def test_16_bit_files_keep_their_brightness():
    data = encoded(Image.fromarray(np.full((8, 8), 257 * 99, np.uint16)))
    assert colours(read_image(data)) == ((99, 99, 99),) * 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_photographs_stand_upright(orientation):
    upright = Image.new("RGB", (16, 32), "white")
    upright.paste("red", (0, 0, 8, 8))  # a red corner, upper left
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation to the transposition that a camera would store
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x112] = orientation
    read = read_image(encoded(stored, exif=exif))
    assert read.tobytes() == upright.tobytes()


def test_every_way_to_name_a_picture(tmp_path):
    image = draw("blue", "square")
    data, path = encoded(image), tmp_path / "picture.png"
    path.write_bytes(data)
    address = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    array = np.asarray(image)
    floats = torch.from_numpy(array / 255).float()
    sources = [image, data, path, str(path), address, array, array.transpose(2, 0, 1), array / 255, floats]
    sources += [floats.permute(2, 0, 1), floats.permute(2, 0, 1).requires_grad_(), torch.from_numpy(array.copy())]
    for source in sources:
        assert read_image(source).tobytes() == image.tobytes()
    half = np.asarray(read_image(floats.bfloat16())).astype(int)
    assert np.abs(half - array).max() <= 1


def test_addresses_lie_over_white_too():
    data = base64.b64encode(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))).decode()
    assert colours(read_image(f"data:image/png;base64,{data}")) == (WHITE, WHITE)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (1, 8, 8)])
def test_grey_arrays(shape):
    assert colours(read_image(np.full(shape, 0.2))) == ((51, 51, 51),) * 2


def test_arrays_with_alpha_lie_over_white():
    assert colours(read_image(np.zeros((8, 8, 4), np.uint8))) == (WHITE, WHITE)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.full((8, 8, 3), np.nan), "NaN"),
        (np.full((8, 8, 3), np.inf), "values outside"),
        (np.full((8, 8, 3), 255.0), "values outside"),
        (np.full((8, 8, 3), -0.5), "values outside"),
        (torch.full((3, 8, 8), float("nan")), "NaN"),
        (np.zeros((8, 8, 3), np.int64), "uint8"),
        (np.zeros((8, 8, 3), np.uint16), "uint8"),
        (np.zeros((8, 8), bool), "uint8"),
        (np.zeros((8, 8), complex), "uint8"),
        (np.zeros((2, 8, 8, 3), np.uint8), "one picture at a time"),
        (np.zeros((8, 8, 5), np.uint8), "shape"),
        (np.zeros(3, np.uint8), "shape"),
        (np.zeros((0, 0, 3), np.uint8), "with pixels"),
        (Image.fromarray(np.full((8, 8), np.nan, np.float32)), "NaN"),
    ],
)
def test_arrays_that_are_no_picture_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        read_image(array)


@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"no picture",
        "no/such/file.png",
        Path("no/such/file.png"),
        "",
        "x" * 5000,
        "a\0b",
        "data:image/png",
        "data:image/png;base64,AAAA",
        Path(__file__),
        str(Path(__file__)),
        Path(__file__).parent,
        None,
        7,
        {},
    ],
)
def test_what_is_no_picture_is_refused(source):
    with pytest.raises(ValueError, match="expected"):
        read_image(source)


@pytest.mark.parametrize("size", [(40_000, 40_000), (9_000, 9_000), (2**31 - 1, 2**31 - 1), (MAX_PIXELS + 1, 1)])
def test_enormous_pictures_are_refused_before_they_are_read(size):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"at most .* pixels"):
        warnings.simplefilter("error")
        read_image(png_that_claims(*size))


@pytest.mark.parametrize("size", [(300, 10), (10, 101), (5, 1)])
def test_extreme_aspect_ratios(size):
    if max(size) / min(size) <= 10:
        assert read_image(Image.new("RGB", size)).size == size
    else:
        with pytest.raises(ValueError, match="10:1"):
            read_image(Image.new("RGB", size))


def test_empty_pictures_are_refused():
    with pytest.raises(ValueError, match="with pixels"):
        read_image(Image.new("RGB", (0, 0)))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO"])
def test_truncated_and_scrambled_files_are_read_or_refused(format):
    """Pillow raises half a dozen kinds of errors for broken files; a person should see one."""
    noise = np.random.default_rng(0)
    image = Image.fromarray(noise.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    data = encoded(image, format)
    with pytest.raises(ValueError, match="expected"):
        read_image(data[: len(data) // 2])
    refused = 0
    for _ in range(60):
        broken = bytearray(data)
        for place in noise.integers(0, noise.choice([64, len(data)]), size=4):
            broken[min(place, len(data) - 1)] = noise.integers(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert read_image(bytes(broken)).mode == "RGB"
            except ValueError:
                refused += 1
    assert refused
