"""Draws on an image what happened to its tokens. Needs Pillow, numpy and matplotlib's colour maps."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vtc.errors import InputError
from vtc.positions import members
from vtc.token_map import TokenMap

Grid = tuple[int, int]
CELL = 16  # minimum pixels per patch side, so that outlines are visible
_DARK = np.array([16.0, 16.0, 22.0])
_INK = "#1d2129"


def overlay(
    image: Image.Image, token_map: TokenMap, grid: Grid | None = None, *, item: int = 0, tint: float = 0.34
) -> Image.Image:
    """The photograph with its token groups: merged patches share a colour and are outlined in it, unmerged tokens are
    unchanged, dropped ones are dark.

    Args:
        image: the encoder's input (after cropping), at any resolution.
        token_map: over the image's tokens only, [B, rows x columns], such as `handle.token_map`.
        grid: (rows, columns) of the patches; None = inferred from the image's shape.
        item: which image of the batch to draw.
        tint: how strongly the colour covers the photograph, 0 to 1.
    """
    pixels, group, cell = _canvas(image, token_map, grid, item)
    return paint(pixels, group, cell, np.bincount(group[group >= 0], minlength=1), tint)


def carried(
    image: Image.Image, token_map: TokenMap, slots: int, grid: Grid | None = None, *, item: int = 0
) -> Image.Image:
    """The groups of `overlay`, each with the places whose positions its token carries (PPE): a dot on the anchor, a
    ring on every other carried member, and a line between them. Members beyond the first `slots` are not marked.

    Other arguments as in `overlay`.
    """
    picture = overlay(image, token_map, grid, item=item, tint=0.28)
    rows, columns = infer_grid(token_map.group.shape[1], image.size) if grid is None else grid
    factor = max(1, math.ceil(960 / max(picture.size)))  # fine marks need enough pixels
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    side = picture.width / columns
    draw, line = ImageDraw.Draw(picture), max(2, round(side / 20))

    def middle(patch: int) -> tuple[float, float]:
        return (patch % columns + 0.5) * side, (patch // columns + 0.5) * side

    def disc(patch: int, radius: float, fill: str, outline: str) -> None:
        x, y = middle(patch)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill, outline=outline, width=line)

    index = members(token_map, slots)[:, item].T.tolist()
    carries = [list(dict.fromkeys(mine)) for mine in index if mine[0] >= 0]  # the slots of small groups repeat
    carries = [mine for mine in carries if len(mine) > 1]
    # All lines before all marks, so that no group's line runs over another's mark. A line is pale, in the colour of its
    # group, with dark edges, so it is visible on bright and dark pictures, and shows which group it belongs to.
    group = token_map.group[item].tolist()
    colour = (0.5 * 255 + 0.5 * _distinct(token_map.slots)).round().astype(int).tolist()
    for width, pale in ((2 * line + 1, False), (line, True)):
        for mine in carries:
            shade = tuple(colour[group[mine[0]]]) if pale else _INK
            for patch in mine[1:]:
                draw.line([middle(mine[0]), middle(patch)], fill=shade, width=width)
    for mine in carries:
        for patch in mine[1:]:
            disc(patch, 0.15 * side, _INK, "white")
        disc(mine[0], 0.22 * side, "white", _INK)
    return picture


def groups(image: Image.Image, token_map: TokenMap, grid: Grid | None = None, *, item: int = 0) -> Image.Image:
    """The photograph as the encoder's last layer sees it: every group in the mean colour of its patches.

    Dropped tokens are dark. Arguments as in `overlay`.
    """
    pixels, group, cell = _canvas(image, token_map, grid, item)
    rows, columns = group.shape
    patches = pixels.reshape(rows, cell, columns, cell, 3).mean((1, 3)).reshape(rows * columns, 3)
    index = np.maximum(group.reshape(-1), 0)
    total, count = np.zeros((index.max() + 1, 3)), np.bincount(index).reshape(-1, 1)
    np.add.at(total, index, patches)
    colour = (total / np.maximum(count, 1))[index].reshape(rows, columns, 3)
    pixels = np.where(_edges(group, cell)[..., None], 0.8 * _spread(colour, cell), _spread(colour, cell))
    return _image(_darken(pixels, group, cell))


def heatmap(image: Image.Image, values: Tensor, *, colours: str = "inferno", strength: float = 0.85) -> Image.Image:
    """A map [h, w] (leading dimensions of 1 are fine) over the photograph in grey; 0 is dark, 1 is bright.

    Args:
        values: used as they are if in 0 to 1; otherwise scaled by their own minimum and maximum.
        colours: a colour map of matplotlib.
        strength: how much the map covers the photograph, 0 to 1.
    """
    from matplotlib import colormaps

    while values.ndim > 2 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != 2 or not values.numel():
        raise InputError(f"values has shape {list(values.shape)}: heatmap takes one map [h, w]")
    field = values.detach().float().cpu()
    if not torch.isfinite(field).all():
        raise InputError("values holds NaN or infinity; there is nothing to draw")
    low, high = field.min(), field.max()
    if low < 0 or high > 1:
        field = (field - low) / (high - low).clamp(min=1e-12)
    smooth = Image.fromarray(field.numpy()).resize(image.size, Image.Resampling.BICUBIC)
    shade = 255 * colormaps[colours](np.clip(np.asarray(smooth), 0, 1))[..., :3]
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None]
    return _image((1 - strength) * grey + strength * shade)


def infer_grid(tokens: int, size: tuple[int, int]) -> Grid:
    """(rows, columns) of `tokens` patches on an image of `size` (width, height): assuming square patches, or a square
    grid."""
    aspect = size[0] / size[1]
    fits = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    if fits:
        rows, columns = min(fits, key=lambda g: abs(math.log(g[1] / g[0] / aspect)))
        if abs(math.log(columns / rows / aspect)) < 0.1:
            return rows, columns
    side = math.isqrt(tokens)
    if tokens and side * side == tokens:
        return side, side
    raise InputError(
        f"{tokens} tokens on an image of {size[0]}x{size[1]}: the grid is not clear, pass grid=(rows, columns)"
    )


def paint(pixels: np.ndarray, group: np.ndarray, cell: int, members: np.ndarray, tint: float = 0.34) -> Image.Image:
    """What `overlay` makes of a photograph [H, W, 3], `cell` pixels a patch. group: each patch's slot [rows, columns];
    members: how many tokens each slot has, those that are not in this photograph counted too."""
    slot = np.maximum(group, 0)
    merged, colour = (group >= 0) & (members[slot] > 1), _distinct(len(members))[slot]
    inside, shade = _spread(merged, cell)[..., None], _spread(colour, cell)
    pixels = np.where(inside, (1 - tint) * pixels + tint * shade, pixels)
    pixels = _darken(pixels, group, cell)
    edge = _edges(group, cell) & inside[..., 0]
    return _image(np.where(edge[..., None], shade, pixels))


def fit(image: Image.Image, grid: Grid, cell: int) -> np.ndarray:
    """[H, W, 3], the photograph with `cell` pixels per patch."""
    size = (grid[1] * cell, grid[0] * cell)
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float64)


def _canvas(
    image: Image.Image, token_map: TokenMap, grid: Grid | None, item: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """The photograph as [H, W, 3] with whole pixels per patch, each patch's slot [rows, columns], pixels per patch."""
    batch, tokens = token_map.group.shape
    if not -batch <= item < batch:
        raise InputError(f"item={item}: the token map has {batch} image{'s' * (batch != 1)}")
    rows, columns = infer_grid(tokens, image.size) if grid is None else grid
    places = token_map.group[item].cpu().numpy()
    if rows * columns > tokens or (places[rows * columns :] >= 0).any():  # padding after a smaller image
        raise InputError(
            f"grid=({rows}, {columns}) has {rows * columns} patches, but the token map has {tokens} tokens: "
            "pass the map of the image's tokens only (handle.token_map, or token_map.drop_prefix(n))"
        )
    cell = max(CELL, round(max(image.width / columns, image.height / rows)))
    return fit(image, (rows, columns), cell), places[: rows * columns].reshape(rows, columns), cell


def _spread(values: np.ndarray, cell: int) -> np.ndarray:
    """One value per patch -> one per pixel."""
    return values.repeat(cell, 0).repeat(cell, 1)


def _darken(pixels: np.ndarray, group: np.ndarray, cell: int) -> np.ndarray:
    return np.where(_spread(group < 0, cell)[..., None], 0.16 * pixels + 0.84 * _DARK, pixels)


def _edges(group: np.ndarray, cell: int) -> np.ndarray:
    """[H, W] bool: the pixels of every patch along its borders with another group, or with the edge of the image."""
    line = max(1, cell // 14)
    edge = np.zeros((group.shape[0] * cell, group.shape[1] * cell), dtype=bool)
    offset = np.arange(cell)
    padded = np.pad(group, 1, constant_values=-2)
    for axis, before in ((0, True), (0, False), (1, True), (1, False)):
        shift = np.roll(padded, 1 if before else -1, axis)[1:-1, 1:-1]
        strip = offset < line if before else offset >= cell - line
        along = np.tile(strip, group.shape[axis])
        edge |= _spread(shift != group, cell) & (along[:, None] if axis == 0 else along[None, :])
    return edge


def _distinct(count: int) -> np.ndarray:
    """[count, 3]: bright colours, with consecutive ones far apart (golden-ratio steps around the colour circle)."""
    steps = [(0.58 + i * 0.618034) % 1 for i in range(count)]
    return 255 * np.array([colorsys.hsv_to_rgb(h, 0.62 + 0.25 * (i % 2), 1.0) for i, h in enumerate(steps)])


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
