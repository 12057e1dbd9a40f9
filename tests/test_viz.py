"""The pictures: what is drawn where, and clear errors for what cannot be drawn."""

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from vtc import TokenMap, functional, viz
from vtc.errors import InputError, OptionError
from vtc.positions import members
from vtc.viz.figures import COLOURS
from vtc.viz.tokens import infer_grid

CELL = 16


@pytest.fixture
def photo():
    pixels = np.random.default_rng(0).integers(60, 200, (4 * CELL, 4 * CELL, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def token_map(group):
    """16 tokens; `group` lists their slots."""
    group = torch.tensor([group])
    slots = int(group.max()) + 1
    anchor = torch.stack([(group[0] == s).nonzero()[0, 0] for s in range(slots)])[None]
    size = torch.stack([(group[0] == s).sum() for s in range(slots)])[None].float()
    return TokenMap(group, anchor, size)


def patch(image, row, column, inset=3):
    pixels = np.asarray(image)
    return pixels[row * CELL + inset : (row + 1) * CELL - inset, column * CELL + inset : (column + 1) * CELL - inset]


def test_overlay_shows_merged_alone_and_dropped(photo):
    drawn = viz.overlay(photo, token_map([0, 0, 1, 2, *range(3, 14), -1]))
    assert drawn.size == photo.size and drawn.mode == "RGB"
    assert not np.array_equal(patch(drawn, 0, 0), patch(photo, 0, 0))  # merged: tinted
    assert np.array_equal(patch(drawn, 1, 1, 0), patch(photo, 1, 1, 0))  # alone: the photograph
    assert patch(drawn, 3, 3).mean() < 0.5 * patch(photo, 3, 3).mean()  # dropped: dark
    pixels = np.asarray(drawn)
    # an outline around the two merged patches, none between them
    assert (pixels[5, 0] == pixels[0, 5]).all() and (pixels[5, 2 * CELL - 1] == pixels[5, 0]).all()
    assert not (pixels[5, CELL] == pixels[5, 0]).all()


def test_identity_map_is_the_photograph(photo):
    drawn = viz.overlay(photo, TokenMap.identity(1, 16))
    assert np.array_equal(np.asarray(drawn), np.asarray(photo))


def test_groups_are_painted_in_their_mean(photo):
    drawn = viz.groups(photo, token_map([0, 0, *range(1, 15)]))
    mean = np.asarray(photo, dtype=float)[:CELL, : 2 * CELL].mean((0, 1))
    assert abs(patch(drawn, 0, 0) - mean).max() <= 1
    assert abs(patch(drawn, 0, 1) - mean).max() <= 1


def test_a_batch_is_told_apart(photo):
    features = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    merged = functional.tome(features, r=6)
    first, second = (viz.overlay(photo, merged, item=i) for i in (0, 1))
    assert not np.array_equal(np.asarray(first), np.asarray(second))
    with pytest.raises(InputError, match="item=2"):
        viz.overlay(photo, merged, item=2)


def test_grid():
    assert infer_grid(256, (640, 640)) == (16, 16)
    assert infer_grid(24, (600, 400)) == (4, 6)
    assert infer_grid(256, (640, 427)) == (16, 16)  # squeezed into a square
    with pytest.raises(InputError, match="grid="):
        infer_grid(257, (640, 640))
    image = Image.new("RGB", (40, 20))
    assert viz.overlay(image, TokenMap.identity(1, 8), (2, 4)).size == (64, 32)
    with pytest.raises(InputError, match="drop_prefix"):
        viz.overlay(image, TokenMap.identity(1, 9), (2, 4))


def test_heatmap(photo):
    values = torch.zeros(1, 1, 8, 8)
    values[..., 4:] = 1
    pixels = np.asarray(viz.heatmap(photo, values))
    assert pixels[:, :20].mean() < pixels[:, -20:].mean()
    assert viz.heatmap(photo, 100 * torch.randn(5, 5)).size == photo.size
    with pytest.raises(InputError, match="NaN"):
        viz.heatmap(photo, torch.full((4, 4), torch.nan))
    with pytest.raises(InputError, match="one map"):
        viz.heatmap(photo, torch.zeros(3, 4, 4))


def test_curve():
    rows = [{"macs": m, "cosine": c, "method": n} for n in ("a", "b") for m, c in ((0.8, 0.9), (0.4, 0.5))]
    figure = viz.curve(rows, "macs", "cosine", "method", labels={"macs": "MACs left"})
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    assert list(axes.lines[0].get_xdata()) == [0.4, 0.8]
    assert axes.get_xlabel() == "MACs left"
    with pytest.raises(InputError, match="'time'"):
        viz.curve(rows, "time", "cosine", "method")


def test_save_overwrites_only_its_own(photo, tmp_path):
    sheet = viz.sheet([(photo, "one", ""), (photo, "two", "note")], "title", height=1)
    path = tmp_path / "out.png"
    assert viz.save(sheet, path) == path
    assert Image.open(path).info["Software"] == "vtc"
    viz.save(sheet, path)
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]

    theirs = tmp_path / "theirs.png"
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "somebody")
    photo.save(theirs, pnginfo=info)
    before = theirs.read_bytes()
    with pytest.raises(OptionError, match="not written by vtc"):
        viz.save(sheet, theirs)
    assert theirs.read_bytes() == before
    link = tmp_path / "link.png"
    link.symlink_to(path)
    for bad in (link, tmp_path / "out.jpg", tmp_path / "none" / "out.png"):
        with pytest.raises(OptionError):
            viz.save(sheet, bad)


def test_carried_members_are_marked():
    """A dot on the anchor, a ring on every other member that is carried, nothing on those beyond the slots."""
    features = torch.zeros(2, 24, 4)
    features[:, :12, 0], features[:, 12:, 1] = 1, 1
    features += 1e-3 * torch.randn(2, 24, 4, generator=torch.Generator().manual_seed(0))
    groups = functional.dpc_knn(features, keep=2)
    image = Image.new("RGB", (240, 160), (90, 90, 90))
    plain = np.asarray(viz.overlay(image, groups, (4, 6), tint=0.28).resize((960, 640), Image.Resampling.NEAREST))
    marked = viz.carried(image, groups, 3, (4, 6))
    assert marked.size == (960, 640)
    pixels = np.asarray(marked)
    index = members(groups, 3)[:, 0]
    for slot in range(2):
        mine = index[:, slot].tolist()
        for turn, patch in enumerate(mine):
            y, x = 160 * (patch // 6) + 80, 160 * (patch % 6) + 80
            assert pixels[y, x].tolist() == ([255, 255, 255] if turn == 0 else [0x1D, 0x21, 0x29])
    assert (pixels != plain).any(-1).mean() < 0.4
    alone = viz.carried(image, TokenMap.identity(1, 24), 3, (4, 6))  # nothing merged, nothing marked
    assert np.array_equal(np.asarray(alone), np.asarray(image.resize(alone.size)))


def test_a_smaller_image_of_a_batch_is_drawn_without_its_padding():
    mask = torch.arange(24) < torch.tensor([24, 12])[:, None]
    groups = functional.dpc_knn(torch.randn(2, 24, 4), keep=0.5, mask=mask)
    image = Image.new("RGB", (240, 120), (90, 90, 90))
    assert viz.overlay(image, groups, (2, 6), item=1).size == (360, 120)
    with pytest.raises(InputError, match="12 patches"):
        viz.overlay(image, groups, (2, 6), item=0)


# -- films ----------------------------------------------------------------------------------------------------------

SIDE, STEP = 320, 340  # pixels of a frame, and from one to the next
BAR = 8


def clip(count):
    """Frames of 320 x 320, so that four patches a side are drawn as they are."""
    pixels = np.random.default_rng(1).integers(60, 200, (count, SIDE, SIDE, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def cut(strip, t):
    """Frame t of a strip, and how many pixels of its bar are filled."""
    across = min(8, (strip.width - 20) // STEP)
    height = strip.height // max(1, round(strip.height / 420))
    left, top = 20 + t % across * STEP, 20 + t // across * height
    pixels = np.asarray(strip)[top : top + height - 20, left : left + SIDE]
    fill = tuple(int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5))
    assert ((pixels[SIDE + 10 : -BAR - 10] < 80).all(-1)).any(), "no label"
    return Image.fromarray(pixels[:SIDE]), int((pixels[-BAR // 2 - 20] == fill).all(-1).sum())


def test_a_film_is_its_frames():
    """A row for each frame: the pictures of `overlay`, but no two frames share a group; padding, an image before."""
    frames = clip(3)
    features = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0))
    features = torch.cat([features, torch.zeros(4, 5, 8)], 1)
    mask = torch.arange(21).expand(4, 21) < 16
    for made in (functional.dpc_knn(features, keep=5, mask=mask), functional.max_min(features, keep=5, mask=mask)):
        strip = viz.film(frames, made, (4, 4), item=1)
        assert strip.size == (20 + 3 * STEP, strip.height)
        for t in range(3):
            picture, filled = cut(strip, t)
            assert filled == round(SIDE * 5 / 16)
            alone = viz.overlay(frames[t], made, (4, 4), item=1 + t)
            if t == 0 or made.order is not None:
                assert np.array_equal(np.asarray(picture), np.asarray(alone))
    merged = functional.dpc_knn(features[:1, :16].repeat(2, 1, 1), keep=5)
    one, two = (np.asarray(cut(viz.film([frames[0]] * 2, merged), t)[0]) for t in range(2))
    assert not np.array_equal(one, two)  # the same groups of two frames


def test_a_film_of_one_row():
    """Two frames in one row: a group over both has one colour, and counts where its anchor is."""
    frames = [Image.new("RGB", (SIDE, SIDE), (120, 120, 120))] * 2
    group = torch.tensor([[0, 0, 1, *[-1] * 13, 0, 1, 2, 3, *[-1] * 12, -1, -1]])  # two columns of padding
    made = TokenMap(group, torch.tensor([[0, 2, 18, 19]]), torch.tensor([[3.0, 2, 1, 1]]))
    strip = viz.film(frames, made, (4, 4))
    (one, left), (two, right) = cut(strip, 0), cut(strip, 1)
    assert left == right == SIDE // 8
    middle = [[np.asarray(frame)[40, 40 + 80 * i].tolist() for i in range(4)] for frame in (one, two)]
    assert middle[0][0] == middle[0][1] == middle[1][0] != middle[0][2] == middle[1][1]  # the two groups
    assert middle[1][2] == middle[1][3] == [120] * 3  # alone
    assert max(middle[0][3]) < 40  # dropped
    exact = TokenMap(group[:, :32], made.anchor, made.size)
    assert np.array_equal(np.asarray(viz.film(frames, exact)), np.asarray(strip))  # the grid follows from the pictures
    dropped = TokenMap(torch.tensor([[0] + [-1] * 31]), torch.zeros(1, 1).long(), torch.ones(1, 1))
    assert [cut(viz.film(frames, dropped), t)[1] for t in range(2)] == [SIDE // 16, 0]


def test_a_long_film_has_rows_of_eight():
    frames = clip(11)
    strip = viz.film(frames, TokenMap.identity(1, 11 * 16))
    assert strip.width == 20 + 8 * STEP
    for t in (0, 7, 8, 10):
        picture, filled = cut(strip, t)
        assert filled == SIDE and np.array_equal(np.asarray(picture), np.asarray(frames[t]))


def test_what_is_no_film():
    frames = clip(4)
    for some, made, grid, item, words in (
        ([], TokenMap.identity(4, 16), None, 0, "at least one frame"),
        ([*frames, Image.new("RGB", (8, 8))], TokenMap.identity(5, 16), None, 0, "2 sizes"),
        (frames, TokenMap.identity(4, 16), None, 4, "item=4: the token map has 4 rows"),
        (frames, TokenMap.identity(4, 16), (4, 4), 1, "4 frames of 4 x 4 = 16 patches do not fit .* 4 x 16 tokens"),
        (clip(8), TokenMap.identity(1, 64), (4, 4), 0, "one picture for each temporal slice"),
        (clip(3), TokenMap.identity(1, 64), None, 0, "3 frames of any patches"),
        (frames, TokenMap.identity(4, 20), (4, 4), 0, "do not fit"),  # more tokens than patches
        (frames[:3], TokenMap.identity(1, 64), (4, 4), 0, "do not fit"),
        (frames, TokenMap.identity(4, 9), (4, 4), 0, "do not fit"),
        (frames, TokenMap.identity(4, 17), None, 0, "pass grid="),
    ):
        with pytest.raises(InputError, match=words):
            viz.film(some, made, grid, item=item)
    # four rows as long as a video of four frames: those of four videos, unless only first frames are left
    group = torch.full((4, 64), -1)
    group[:, :3] = torch.arange(3)
    first = TokenMap(group, torch.arange(3).repeat(4, 1), torch.ones(4, 3))
    with pytest.raises(InputError, match="cut it to the rows of this video"):
        viz.film(frames, first, (4, 4))
    alone = TokenMap(group[:1], first.anchor[:1], first.size[:1])
    assert [cut(viz.film(frames, alone, (4, 4)), t)[1] for t in range(4)] == [60, 0, 0, 0]
    assert [cut(viz.film(frames, TokenMap.identity(5, 64), (4, 4), item=-1), t)[1] for t in range(4)] == [SIDE] * 4
