"""The pictures: what is drawn where, and clear errors for what cannot be drawn."""

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from vtc import TokenMap, functional, viz
from vtc.errors import InputError, OptionError
from vtc.positions import members
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
