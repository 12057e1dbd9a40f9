"""From an image file to a vision encoder's input. Needs Pillow, but neither numpy nor torchvision."""

from __future__ import annotations

import importlib.resources
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from vtc.errors import OptionError, VTCError

__all__ = ["ImageError", "example_photo", "load_image", "preprocess"]

MAX_PIXELS = 64_000_000
MEAN = (0.485, 0.456, 0.406)  # of ImageNet
STD = (0.229, 0.224, 0.225)

# plain picture formats only: some of Pillow's other readers start programs (EPS) or parse far more than a picture
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.ASCII)


class ImageError(VTCError, ValueError):
    """A file that cannot be used as a picture. The message is one line: the file, what is wrong, what to do."""


def example_photo() -> Path:
    """The photograph that comes with vtc, 640×427: a rocket before its launch (public domain, see assets/NOTICE.md)."""
    return Path(str(importlib.resources.files("vtc") / "assets" / "photo.jpg"))


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture as RGB, turned upright as its EXIF orientation says; the first frame of an animated one.

    Transparency is dropped. 16-bit grey is scaled to 8 bits, also if a camera stored 10 or 12 bits in 16: the range is
    assumed to be the smallest of 8, 10, 12 and 16 bits that holds the brightest pixel. Nothing is decoded before the
    header's size is checked, and nothing is fetched.

    Raises:
        ImageError: no such file, an address, not a regular file, not a picture, damaged, or above 64 megapixels.
    """
    try:
        if _ADDRESS.match(os.fsdecode(path)) and not os.path.exists(path):
            raise ImageError("this is an address, and vtc fetches nothing; save the picture and give its path")
        return _load(Path(path))
    except ImageError as error:
        name = os.fsdecode(path)  # of a data: address, enough to recognise it
        raise ImageError(f"{name if len(name) <= 400 else name[:60] + '...'!r}: {error}") from error.__cause__


def preprocess(image: Image.Image, size: int | tuple[int, int] = 224) -> Tensor:
    """Scale the picture until it covers `size`, cut out the centre, normalise as ImageNet.

    Args:
        image: any mode; converted to RGB as by `load_image`.
        size: side of a square, or (height, width), in pixels.

    Returns:
        [1, 3, height, width], float32. The resize is bicubic with anti-aliasing.

    Raises:
        OptionError: `size` is not a positive integer or a pair of them.
        ImageError: `image` is not a Pillow image, is empty, or has 32-bit pixels.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(sides) != 2 or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in sides):
        raise OptionError(f"size={size!r} must be a positive integer or a pair (height, width) of them")
    if not isinstance(image, Image.Image):
        raise ImageError(f"a {type(image).__name__} is not a Pillow image; use vtc.models.images.load_image(path)")
    if 0 in image.size:
        raise ImageError(f"a picture of {image.width}×{image.height} pixels is empty; use another one")
    height, width = sides
    picture = ImageOps.fit(_rgb(image, image.format), (width, height), method=Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, height, width, 3)
    normal = (pixels.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return normal.permute(0, 3, 1, 2).contiguous()


def _load(path: Path) -> Image.Image:
    """As `load_image`, but error messages lack the file's name."""
    try:
        if not path.exists():
            raise ImageError("no such file; check the path")
        if not path.is_file():
            what = "a folder" if path.is_dir() else "not a regular file"
            raise ImageError(f"this is {what}; give the path of a picture")
    except OSError as error:
        raise ImageError(f"out of reach ({error.strerror}); check the path") from error
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    too_large = f"more than {MAX_PIXELS // 1_000_000} megapixels; make the picture smaller first"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(too_large) from error
    except PermissionError as error:
        raise ImageError("no permission to read it; change that first") from error
    except Exception as error:  # for broken headers, readers may raise anything
        raise ImageError(f"not a picture, or of an unknown format; use one of {', '.join(formats)}") from error
    with image, warnings.catch_warnings():
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(too_large)
        warnings.simplefilter("ignore")  # about odd metadata, which does not affect the pixels
        try:
            image.load()
            return _rgb(ImageOps.exif_transpose(image), image.format)
        except ImageError:
            raise
        except Exception as error:  # the same for broken pixels
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"damaged or incomplete ({reason}); get or save it again") from error


def _rgb(image: Image.Image, form: str | None) -> Image.Image:
    if image.mode.startswith("I"):
        image = _eight_bits(image, named=form == "PPM")
    if image.mode == "F":
        raise ImageError("pixels of 32 bits have no known range; save the picture with 8 bits per channel")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # a direct conversion to RGB makes Pillow warn
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"its colours ({image.mode}) are none that vtc reads; save the picture as RGB") from error


def _eight_bits(image: Image.Image, named: bool) -> Image.Image:
    """Convert 16-bit grey, or 32-bit whose values fit into 16 bits, to 8 bits. `named`: the file states its range."""
    whole: Any = image.convert("I")
    least, most = whole.getextrema()
    if least < 0 or most >= 1 << 16:
        raise ImageError("pixels of 32 bits have no known range; save the picture with 8 bits per channel")
    bits = 16 if named else next(bits for bits in (8, 10, 12, 16) if most < 1 << bits)
    return whole.point(lambda value: value * 2.0 ** (8 - bits)).convert("L")
