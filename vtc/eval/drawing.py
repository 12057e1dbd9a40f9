"""Draws the things of a scene, and what is behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (35, 60, 220),
    "yellow": (245, 220, 40),
    "cyan": (60, 215, 225),
    "magenta": (215, 50, 200),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}
DIGITS = tuple("0123456789")
SIDE = 256  # pixels
Size = tuple[int, int]  # width and height in pixels


class Drawn(Protocol):
    """A thing, as `vtc.eval.scenes.Thing` describes it."""

    @property
    def name(self) -> str: ...
    @property
    def colour(self) -> str: ...
    @property
    def x(self) -> float: ...
    @property
    def y(self) -> float: ...
    @property
    def side(self) -> float: ...


def draw(things: Sequence[Drawn], background: Image.Image) -> Image.Image:
    """Draw the things on a background, with smooth edges."""
    width, height = background.size
    large = background.resize((2 * width, 2 * height), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(large)
    for t in things:
        x, y, r = 2 * width * t.x, 2 * height * t.y, 2 * min(width, height) * (t.side / 2)
        _shape(pen, t.name, x, y, r, COLOURS[t.colour])
    return large.resize((width, height), Image.Resampling.BOX)


def _shape(pen: ImageDraw.ImageDraw, name: str, x: float, y: float, r: float, colour: tuple[int, int, int]) -> None:
    def polygon(corners: int, radii: Sequence[float], turn: float = -math.pi / 2) -> None:
        angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
        ends = [radii[i % len(radii)] * r for i in range(corners)]
        pen.polygon([(x + e * math.cos(a), y + e * math.sin(a)) for a, e in zip(angles, ends, strict=True)], colour)

    if name in DIGITS:
        pen.text((x, y), name, colour, _font(round(2.4 * r)), anchor="mm")
    elif name.isdigit():
        pen.text((x, y), name, colour, _font(round(2 * r / (0.556 * len(name)))), anchor="mm")
    elif name == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), colour)
    elif name == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), None, colour, max(2, round(0.45 * r)))
    elif name == "square":
        pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), colour)
    elif name == "triangle":
        polygon(3, (1.15,))
    elif name == "star":
        polygon(10, (1.1, 0.45))
    else:
        for across, along in ((r, r / 3), (r / 3, r)):
            pen.rectangle((x - across, y - along, x + across, y + along), colour)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@cache
def _photo() -> Image.Image:
    with (files("vtc") / "assets" / "photo.jpg").open("rb") as file:
        return Image.open(file).convert("RGB")


def background(kind: str, rng: np.random.Generator, size: Size = (SIDE, SIDE)) -> Image.Image:
    """A background of medium brightness, so that every colour stands out: "paper" of one colour; a "screen" of flat
    panels; or never perfectly uniform."""
    base = rng.uniform(90, 165) + rng.uniform(-12, 12, 3)
    if kind in ("paper", "screen"):
        return _flat(base, rng, size, panels=kind == "screen")
    if kind == "photo":
        photo, longer = _photo(), max(size)
        side = int(rng.integers(SIDE // 2, min(photo.size)))
        part = [max(1, side * n // longer) for n in size]
        left, top = (int(rng.integers(0, whole - n + 1)) for whole, n in zip(photo.size, part, strict=True))
        crop = photo.crop((left, top, left + part[0], top + part[1])).resize(size, Image.Resampling.BILINEAR)
        values = np.asarray(crop, dtype=np.float64)
        values = base + 0.35 * (values - values.mean((0, 1)))
    else:
        across, down = (np.linspace(-1, 1, n) for n in size)
        waves = np.zeros((size[1], size[0]))
        for _ in range(3 if kind == "texture" else 0):
            u, v = rng.uniform(-30, 30, 2)
            waves += np.sin(u * down[:, None] + v * across + rng.uniform(0, 6.3))
        slope = rng.uniform(-12, 12, 2)
        plane = slope[0] * down[:, None] + slope[1] * across + rng.uniform(4, 9) * waves
        values = base + plane[..., None] + rng.normal(0, 2, (size[1], size[0], 1))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def _flat(base: np.ndarray, rng: np.random.Generator, size: Size, panels: bool) -> Image.Image:
    """One colour; or a bar at the top, one at the side, and up to three windows, with lines around them."""

    def shade() -> tuple[int, ...]:
        return tuple(int(value) for value in (base + rng.uniform(-25, 25)).clip(0, 255))

    image = Image.new("RGB", size, tuple(int(value) for value in base))
    if not panels:
        return image
    pen, (width, height) = ImageDraw.Draw(image), size
    pen.rectangle((0, 0, width, int(height * rng.uniform(0.06, 0.12))), shade(), shade())
    pen.rectangle((0, int(height * 0.12), int(width * rng.uniform(0.1, 0.25)), height), shade(), shade())
    for _ in range(int(rng.integers(1, 4))):
        left, top = (int(n * rng.uniform(0.1, 0.6)) for n in size)
        right, bottom = left + int(width * rng.uniform(0.2, 0.4)), top + int(height * rng.uniform(0.2, 0.4))
        pen.rectangle((left, top, right, bottom), shade(), shade())
    return image
