"""Odd picture files: read right, or refused in one line."""

from __future__ import annotations

import io
import struct
import warnings

import pytest

pytest.importorskip("PIL")

from PIL import Image  # noqa: E402

from vtc.models.images import ImageError, load_image, preprocess

SIDE = 16
COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "grey": (128, 128, 128), "white": (255, 255, 255)}


def quarters(mode="RGB"):
    """Red and green above grey and white."""
    image = Image.new("RGB", (SIDE, SIDE))
    for number, colour in enumerate(COLOURS.values()):
        image.paste(colour, (number % 2 * 8, number // 2 * 8, number % 2 * 8 + 8, number // 2 * 8 + 8))
    return image if mode == "RGB" else image.quantize(8) if mode == "P" else image.convert(mode)


def check(image, near=2, grey=False, want=None):
    assert image.mode == "RGB" and image.size == (SIDE, SIDE)
    for number, colour in enumerate(want or COLOURS.values()):
        if grey:
            level = round(0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2])
            colour = (level,) * 3
        found = image.getpixel((number % 2 * 8 + 4, number // 2 * 8 + 4))
        assert all(abs(a - b) <= near for a, b in zip(found, colour, strict=True)), (number, found, colour)


def read(path):
    """Without a word on stderr: a warning is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_image(path)


GREY = {"grey": True}
LOSSY = {"near": 12}
ODD = {  # name: (mode, how to save it, how to check it)
    "rgb.png": ("RGB", {}, {}),
    "rgba.png": ("RGBA", {}, {}),
    "grey.png": ("L", {}, GREY),
    "grey_alpha.png": ("LA", {}, GREY),
    "palette.png": ("P", {}, {}),
    "palette_4_bits.png": ("P", {"bits": 4}, {}),
    "palette_one_clear.png": ("P", {"transparency": 1}, {}),
    "palette_alpha.png": ("P", {"transparency": bytes([255, 128, 0, 7])}, {}),
    "interlaced.png": ("RGB", {"interlace": True}, {}),
    "clear_colour.png": ("RGB", {"transparency": (255, 0, 0)}, {}),
    "clear_grey.png": ("L", {"transparency": 76}, GREY),
    "icc.png": ("RGB", {"icc_profile": b"nonsense"}, {}),
    "animated.png": ("RGB", {"save_all": True, "append_images": [Image.new("RGB", (SIDE, SIDE))]}, {}),
    "rgb.jpg": ("RGB", {"quality": 95, "subsampling": 0}, LOSSY),
    "grey.jpg": ("L", {"quality": 95}, {**GREY, "near": 12}),
    "cmyk.jpg": ("CMYK", {"quality": 95}, LOSSY),
    "ycc.jpg": ("YCbCr", {"quality": 95, "subsampling": 0}, LOSSY),
    "progressive.jpg": ("RGB", {"quality": 95, "progressive": True, "subsampling": 0}, LOSSY),
    "subsampled.jpg": ("RGB", {"quality": 95, "subsampling": 2}, {"near": 30}),
    "comment.jpg": ("RGB", {"quality": 95, "subsampling": 0, "comment": b"\xff\xfe"}, LOSSY),
    "jpeg_named.png": ("RGB", {"format": "JPEG", "quality": 95, "subsampling": 0}, LOSSY),
    "no_ending": ("RGB", {"format": "PNG"}, {}),
    "rgb.webp": ("RGB", {"lossless": True}, {}),
    "alpha.webp": ("RGBA", {"lossless": True}, {}),
    "lossy.webp": ("RGB", {"quality": 95}, {"near": 40}),
    "animated.webp": ("RGB", {"lossless": True, "save_all": True, "append_images": [Image.new("RGB", (16, 16))]}, {}),
    "rgb.gif": ("RGB", {}, {}),
    "grey.gif": ("L", {}, GREY),
    "clear.gif": ("P", {"transparency": 0}, {}),
    "animated.gif": ("P", {"save_all": True, "append_images": [Image.new("P", (SIDE, SIDE))]}, {}),
    "rgb.bmp": ("RGB", {}, {}),
    "rgba.bmp": ("RGBA", {}, {}),
    "grey.bmp": ("L", {}, GREY),
    "palette.bmp": ("P", {}, {}),
    "rgb.ppm": ("RGB", {}, {}),
    "grey.pgm": ("L", {}, GREY),
    "rgb.tif": ("RGB", {}, {}),
    "grey.tif": ("L", {}, GREY),
    "rgba.tif": ("RGBA", {}, {}),
    "grey_alpha.tif": ("LA", {}, GREY),
    "palette.tif": ("P", {}, {}),
    "palette_alpha.tif": ("PA", {}, {"near": 60}),  # of the colours that browsers have
    "cmyk.tif": ("CMYK", {}, {}),
    "lzw.tif": ("RGB", {"compression": "tiff_lzw"}, {}),
    "deflate.tif": ("RGB", {"compression": "tiff_adobe_deflate"}, {}),
    "pages.tif": ("RGB", {"save_all": True, "append_images": [Image.new("RGB", (SIDE, SIDE))]}, {}),
    "rgb.jp2": ("RGB", {}, {}),
    "alpha.jp2": ("RGBA", {}, {}),
    "grey.jp2": ("L", {}, GREY),
    "rgb.avif": ("RGB", {"quality": 100, "subsampling": "4:4:4"}, {"near": 8}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files(name, tmp_path):
    mode, options, how = ODD[name]
    image = quarters("RGBA").convert("P").convert("PA") if mode == "PA" else quarters(mode)
    try:
        image.save(tmp_path / name, **options)
    except (KeyError, ValueError, OSError) as error:
        pytest.skip(f"this Pillow writes no such file: {error}")
    check(read(tmp_path / name), **how)


@pytest.mark.parametrize("name", ["bits.png", "bits.pbm", "bits.tif", "bits.bmp"])
def test_black_and_white(name, tmp_path):
    image = Image.new("1", (SIDE, SIDE))
    image.paste(1, (8, 0, 16, 16))
    image.save(tmp_path / name)
    black, white = (0, 0, 0), (255, 255, 255)
    check(read(tmp_path / name), want=[black, white, black, white])


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_turned_files(turn, ending, tmp_path):
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that the orientation undoes
    image = quarters() if turn == 1 else quarters().transpose(Image.Transpose(back[turn]))
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"quality": 95, "subsampling": 0} if ending == "jpg" else {"lossless": True} if ending == "webp" else {}
    image.save(tmp_path / f"turned.{ending}", exif=exif, **options)
    check(read(tmp_path / f"turned.{ending}"), near=12)


LEVELS = [0.0, 0.25, 0.5, 1.0]


def sixteen(top, path, mode="I;16"):
    values = [round(LEVELS[(x // 8) + 2 * (y // 8)] * top) for y in range(SIDE) for x in range(SIDE)]
    if path.suffix == ".pgm":  # names its range, here a larger one than is used
        path.write_bytes(b"P5 16 16 65535\n" + struct.pack(">256H", *values))
        return
    order = ">" if mode.endswith("B") else "<"
    kind = "i" if mode == "I" else "H"
    Image.frombytes(mode, (SIDE, SIDE), struct.pack(f"{order}256{kind}", *values)).save(path)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize(("name", "mode"), [("g.png", "I;16"), ("g.tif", "I;16"), ("b.tif", "I;16B"), ("i.tif", "I")])
def test_grey_of_many_bits(name, mode, bits, tmp_path):
    """What has 12 bits and is stored in 16 is no black picture."""
    sixteen((1 << bits) - 1, tmp_path / name, mode)
    check(read(tmp_path / name), want=[(round(255 * level),) * 3 for level in LEVELS])


def test_a_range_that_the_file_names(tmp_path):
    sixteen(4095, tmp_path / "dark.pgm")
    check(read(tmp_path / "dark.pgm"), want=[(round(16 * level),) * 3 for level in LEVELS])
    (tmp_path / "12.pgm").write_bytes(b"P5 16 16 4095\n" + struct.pack(">256H", *[4095] * 256))
    check(read(tmp_path / "12.pgm"), want=[(255, 255, 255)] * 4)


def test_pixels_of_no_known_range(tmp_path):
    for name, mode, value in (("float.tif", "F", 0.5), ("wide.tif", "I", 1 << 20), ("below.tif", "I", -5)):
        Image.new(mode, (4, 4), value).save(tmp_path / name)
        with pytest.raises(ImageError, match="32 bits have no known range; save the picture with 8 bits"):
            read(tmp_path / name)


def test_colours_that_are_none_of_ours():
    with pytest.raises(ImageError, match=r"its colours \(La\) are none that vtc reads; save the picture as RGB"):
        preprocess(Image.new("La", (4, 4)))


def test_preprocess_warns_of_nothing():
    buffer = io.BytesIO()
    quarters("P").save(buffer, "PNG", transparency=bytes([255, 128, 0, 7]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert preprocess(Image.open(buffer), 16).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/cat.jpg",
        "HTTP://example.org/cat.jpg",
        "s3://bucket/cat.jpg",
        "file:///tmp/cat.jpg",
        "data:image/png;base64," + "iVBORw0KGgo" * 200,
    ],
)
def test_addresses_are_not_fetched(address):
    with pytest.raises(
        ImageError, match="an address, and vtc fetches nothing; save the picture and give its path"
    ) as e:
        load_image(address)
    assert len(str(e.value)) < 600 and "no such file" not in str(e.value)
