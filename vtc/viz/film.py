"""The frames of a video in a strip, each with what happened to its tokens. Needs Pillow and numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vtc.errors import InputError
from vtc.token_map import TokenMap
from vtc.viz.figures import COLOURS, INK, PAPER
from vtc.viz.tokens import CELL, Grid, fit, infer_grid, paint

_ACROSS = 8  # frames in a row
_WIDTH = 320  # pixels of a frame, if its patches are not too small then
_TRACK = "#e1e4ea"


def film(frames: Sequence[Image.Image], token_map: TokenMap, grid: Grid | None = None, *, item: int = 0) -> Image.Image:
    """The frames of a video side by side, at most eight in a row, each drawn as `overlay` does; below each how many of
    its tokens stay. A group that reaches over several frames has the same colour in all of them, and counts as a token
    of the frame where its anchor is.

    Args:
        frames: T pictures of one size, in order. One for each temporal slice: Qwen models join the frames in pairs, so
            `frames[::2]` there.
        token_map: as `handle.token_map` has it: [U, N] with a row for each frame, `item` to `item + T`; or [U, T x N]
            with a row for the whole video, row `item`, frame after frame (what EVS, VidCom2 and FlashVID see).
        grid: (rows, columns) of a frame's patches. None = inferred from the pictures' shape, where the map is not
            padded; if it has T rows from `item` on, these are the frames.
        item: the row where the video begins.

    Raises:
        InputError: no frames, or of several sizes; rows and tokens of the map that are not those of T frames; a map
            that is padded so far that it can be read both ways.
    """
    if not frames:
        raise InputError("a film takes at least one frame")
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        raise InputError(f"the frames have {len(sizes)} sizes, {min(sizes)} and {max(sizes)} among them: give one size")
    (rows, columns), slot, stay = _by_frame(token_map, len(frames), frames[0].size, grid, item)
    members = np.bincount(slot[slot >= 0], minlength=1)
    cell = max(CELL, _WIDTH // columns)
    width, height = columns * cell, rows * cell
    gap, bar, places = width // 16, max(4, width // 40), rows * columns
    labels = [f"{count:,} of {places:,}" for count in stay]
    font = _font(max(labels, key=len), width)
    line = math.ceil(font.size)
    foot = gap // 2 + line + gap // 2 + bar  # a label and its bar
    across = min(len(frames), _ACROSS)
    down = math.ceil(len(frames) / across)
    strip = Image.new("RGB", (across * (width + gap) + gap, down * (height + foot + 2 * gap)), PAPER)
    draw = ImageDraw.Draw(strip)
    for t, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        left, top = gap + t % across * (width + gap), gap + t // across * (height + foot + 2 * gap)
        group = slot[t].reshape(rows, columns)
        strip.paste(paint(fit(frame, (rows, columns), cell), group, cell, members), (left, top))
        draw.text((left, top + height + gap // 2 + line / 2), label, fill=INK, font=font, anchor="lm")
        under = top + height + foot - bar
        draw.rectangle((left, under, left + width - 1, under + bar - 1), fill=_TRACK)
        if stay[t]:
            share = max(1, round(width * stay[t] / places))
            draw.rectangle((left, under, left + share - 1, under + bar - 1), fill=COLOURS[0])
    return strip


def _by_frame(
    token_map: TokenMap, count: int, size: tuple[int, int], grid: Grid | None, item: int
) -> tuple[Grid, np.ndarray, list[int]]:
    """The grid of a frame, the slot of each of its patches [T, P], a number of its own for every group of the video,
    and how many tokens of each frame stay."""
    units, wide = token_map.group.shape
    if not -units <= item < units:
        raise InputError(f"item={item}: the token map has {units} row{'s' * (units != 1)}")
    first = item % units
    group, anchor = token_map.group[first:].cpu().numpy(), token_map.anchor[first:].cpu().numpy()
    if grid is None:
        whole = len(group) < count
        if whole and wide % count:
            raise InputError(_misfit(units, wide, count, "any", item))
        rows, columns = infer_grid(wide // count if whole else wide, size)
    else:
        rows, columns = grid
        whole = _whole(group, count, rows * columns, item)
    places = rows * columns
    length = count * places if whole else places
    own = slice(1 if whole else count)
    if (not whole and len(group) < count) or length > wide or (group[own, length:] >= 0).any():
        raise InputError(_misfit(units, wide, count, f"{rows} x {columns} = {places}", item))
    slot, anchor = group[own, :length], anchor[own]
    if whole:
        frame = anchor[anchor >= 0] // places
        return (rows, columns), slot.reshape(count, places), np.bincount(frame, minlength=count).tolist()
    number = slot + np.arange(count)[:, None] * token_map.slots
    return (rows, columns), np.where(slot < 0, -1, number), (anchor >= 0).sum(1).tolist()


def _whole(group: np.ndarray, count: int, places: int, item: int) -> bool:
    """Whether the first row is that of the whole video, of `count` frames of `places` tokens."""
    if group.shape[1] < count * places or count == 1:
        return False
    if len(group) < count or (group[:count, places:] >= 0).any():
        return True
    raise InputError(
        f"the token map has a row for each of {count} frames from item={item} on, but row {item} is also long enough "
        "for all of them: cut it to the rows of this video, and to the tokens that it has without padding"
    )


def _misfit(units: int, wide: int, count: int, places: str, item: int) -> str:
    return (
        f"{count} frames of {places} patches do not fit a token map of {units} x {wide} tokens from item={item} on: it "
        f"takes a row for each frame, or one for all {count}; give one picture for each temporal slice (Qwen models "
        "join frames in pairs)"
    )


def _font(label: str, width: int) -> ImageFont.FreeTypeFont:
    """As large as is good to read in a strip that was made smaller, if the label fits."""
    size = 0.13 * width
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font.font_variant(size=min(size, size * width / font.getlength(label)))
