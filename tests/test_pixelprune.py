"""PixelPrune's rule: which cells of an image its neighbours predict."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import video_vectors as vectors

import vtc
from vtc.functional import pixelprune
from vtc.methods import make

METRICS = {
    "max": lambda a, b: np.abs(a - b).max(),
    "mean": lambda a, b: np.abs(a - b).mean(),
    "rms": lambda a, b: np.sqrt(((a - b) ** 2).mean()),
}
CASES = 200


def predicted(x, rows, columns, i, same):
    """The cell whose pixels the rule expects at cell i; x: the cells as far as they are known."""
    row, column = divmod(i, columns)
    left, above, corner = i - 1, i - columns, i - columns - 1
    if row == 0:
        return left
    if column == 0:
        return above
    return above if same(x[corner], x[left]) and not same(x[corner], x[above]) else left


def reference(x, rows, columns, tolerance, metric, anchored):
    """The kept cells, and the picture that they and the rule give back, cell by cell in float64."""

    def same(a, b):
        return bool((a == b).all()) if tolerance == 0 else METRICS[metric](a, b) <= tolerance

    kept, rebuilt = [0], x.copy()
    for i in range(1, rows * columns):
        guess = predicted(rebuilt if anchored and tolerance else x, rows, columns, i, same)
        if same(x[i], (rebuilt if anchored and tolerance else x)[guess]):
            rebuilt[i] = rebuilt[guess]
        else:
            kept.append(i)
    return kept, rebuilt


def decoded(kept, cells, rows, columns, tolerance, metric):
    """The picture, from the kept cells and the rule alone."""

    def same(a, b):
        return bool((a == b).all()) if tolerance == 0 else METRICS[metric](a, b) <= tolerance

    out = np.zeros((rows * columns, cells.shape[1]), cells.dtype)
    for i in range(rows * columns):
        out[i] = cells[kept.index(i)] if i in kept else out[predicted(out, rows, columns, i, same)]
    return out


def picture(seed, noise=True):
    """Blocks of few colours, as float32 numbers in float64, with noise in some of the cells."""
    rng = np.random.default_rng(seed)
    rows, columns, width = rng.integers(1, 8), rng.integers(1, 8), rng.integers(1, 6)
    palette = rng.random((3, width))
    blocks = rng.integers(0, 3, (-(-rows // 2), -(-columns // 2)))
    x = palette[np.kron(blocks, np.ones((2, 2), int))[:rows, :columns]].reshape(rows * columns, width)
    if noise:
        x = np.clip(x + 0.02 * rng.standard_normal(x.shape) * (rng.random((len(x), 1)) < 0.5), 0, 1)
    return x.astype(np.float32).astype(np.float64), int(rows), int(columns)


def kept_by(x, rows, columns, **options):
    token_map = pixelprune(torch.tensor(x)[None], (rows, columns), **options)
    kept = token_map.anchor[0].tolist()
    assert kept == sorted(set(kept)) and token_map.order[0].tolist() == kept
    assert (token_map.group[0] >= 0).nonzero().flatten().tolist() == kept
    return kept


NAMED = {"mae": "mean", "rmse": "rms"}  # the metrics, as the reference calls them


@pytest.mark.parametrize("dtype", vectors.DTYPES, ids=str)
@pytest.mark.parametrize("case", vectors.cases("pixelprune", "pixelprune_scan"), ids=lambda case: case["name"])
def test_the_published_vectors(case, dtype):
    (x,), given, expect = vectors.inputs(case, dtype), case["params"], case["expect"]
    x, height, width = x.numpy(), given["h"], given["w"]
    options = {"tolerance": given.get("thr", 0.0)}
    if case["method"] == "pixelprune_scan":
        options["scan"] = "serpentine" if given.get("serpentine") else "raster"
    else:
        options |= {"metric": NAMED.get(given.get("metric"), "max"), "anchored": given.get("anchored", True)}
    kept = kept_by(x, height, width, **options)
    assert kept == expect["indices"]
    if options.get("anchored"):
        back = decoded(kept, x[kept], height, width, options["tolerance"], options["metric"])
        assert abs(np.abs(back - x).max() - expect["max_recon_error"]) < 1e-6


@pytest.mark.parametrize("anchored", [True, False])
def test_as_written_down_cell_by_cell(anchored):
    for seed in range(CASES):
        x, rows, columns = picture(seed)
        metric, tolerance = list(METRICS)[seed % 3], (0.013, 0.031, 0.0)[seed // 3 % 3]
        kept, rebuilt = reference(x, rows, columns, tolerance, metric, anchored)
        options = {"tolerance": tolerance, "metric": metric, "anchored": anchored}
        assert kept_by(x, rows, columns, **options) == kept, seed
        if anchored:
            assert max(METRICS[metric](a, b) for a, b in zip(x, rebuilt, strict=True)) <= tolerance


def test_nothing_is_lost_at_zero():
    """The cells that stay and the rule give the image back, with ties of colour everywhere."""
    left = 0
    for seed in range(CASES):
        x, rows, columns = picture(seed, noise=False)
        kept = kept_by(x, rows, columns)
        assert kept == kept_by(x, rows, columns, anchored=False) == kept_by(x, rows, columns, metric="rms")
        assert np.array_equal(decoded(kept, x[kept], rows, columns, 0, "max"), x)
        left += rows * columns - len(kept)
    assert left > 500


def test_what_is_rebuilt_is_within_the_tolerance():
    """And it is the decoder's own picture: it knows the kept cells alone. Errors of the other way add up."""
    for seed in range(CASES):
        x, rows, columns = picture(seed)
        kept = kept_by(x, rows, columns, tolerance=0.031)
        assert np.abs(decoded(kept, x[kept], rows, columns, 0.031, "max") - x).max() <= 0.031
    slope = np.linspace(0, 1, 50)[:, None]
    assert kept_by(slope, 1, 50, tolerance=0.031, anchored=False) == [0]
    assert len(kept_by(slope, 1, 50, tolerance=0.031)) > 15


@pytest.mark.parametrize("scan", ["raster", "serpentine"])
def test_runs(scan):
    for seed in range(CASES):
        x, rows, columns = picture(seed)
        tolerance, order = (0.0, 0.02)[seed % 2], np.arange(rows * columns).reshape(rows, columns)
        if scan == "serpentine":
            order[1::2] = order[1::2, ::-1].copy()
        kept = [0]
        for i in order.flatten()[1:]:
            if np.abs(x[i] - x[kept[-1]]).max() > tolerance:
                kept.append(int(i))
        assert kept_by(x, rows, columns, tolerance=tolerance, scan=scan) == sorted(kept)


@pytest.mark.parametrize("options", [{}, {"tolerance": 0.02}, {"tolerance": 0.02, "anchored": False}])
def test_a_batch_is_its_images_alone(options):
    x = torch.rand(3, 5, 4, 7).round(decimals=1)[:, :, :, :1].expand(-1, -1, -1, 7).flatten(1, 2)
    whole = pixelprune(x, (5, 4), **options)
    for image, anchor in zip(x, whole.anchor, strict=True):
        alone = pixelprune(image[None], (5, 4), **options).anchor[0]
        assert torch.equal(alone, anchor[anchor >= 0]) and (anchor[len(alone) :] == -1).all()
    order = torch.randperm(7)
    assert torch.equal(pixelprune(x[..., order], (5, 4), **options).group, whole.group)


def test_flat_and_unlike_pictures():
    assert kept_by(np.full((12, 3), 0.5), 3, 4) == [0]
    assert kept_by(np.arange(12)[:, None] / 12, 3, 4) == list(range(12))
    assert kept_by(np.full((1, 3), 0.5), 1, 1) == [0]
    low, high = np.float32(0.5), np.nextafter(np.float32(0.5), np.float32(1))
    assert kept_by(np.array([[low], [high]]), 1, 2) == [0, 1]  # equal means equal


def test_bad_input():
    x = torch.rand(1, 6, 3)
    for options, why in (
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"tolerance": 4}, "pixel values lie in"),
        ({"metric": "cosine"}, "max, mean, rms"),
        ({"anchored": 1}, "anchored=1"),
        ({"scan": "zigzag"}, "serpentine"),
        ({"keep": 0.5}, "keep=0.5: pixelprune has no budget"),
    ):
        with pytest.raises(vtc.OptionError, match=why):
            pixelprune(x, (2, 3), **options)
    with pytest.raises(vtc.InputError, match="2x2 is 4 cells"):
        pixelprune(x, (2, 2))
    with pytest.raises(vtc.InputError, match="undo the processor's normalisation"):
        pixelprune(4 * x, (2, 3), tolerance=0.1)
    with pytest.raises(vtc.InputError, match="NaN"):
        pixelprune(torch.full_like(x, float("nan")), (2, 3))
    assert kept_by((255 * x[0]).numpy(), 2, 3) == list(range(6))  # whether values are equal asks for no range


@pytest.mark.parametrize("given", [{"keep": 0.25}, {"keep": 64}, {"r": 8}, {"flops": 0.5}, {"keep": 1}])
def test_there_is_no_budget(given):
    with pytest.raises(vtc.OptionError, match=f"{next(iter(given))}=.*divprune.pixelprune"):
        vtc.PixelPrune(**given)


def test_options():
    for given, why in (
        ({"tolerance": 2}, "tolerance=2"),
        ({"metric": "l2"}, "metric='l2'"),
        ({"std": 0.5}, "std=0.5"),
        ({"std": (1, 0, 1)}, "image_std"),
        ({"where": "tower"}, "before the tower"),
        ({"pooled": True}, "before the tower"),
        ({"before": vtc.PixelPrune()}, "before the tower"),
    ):
        with pytest.raises(vtc.OptionError, match=why):
            vtc.PixelPrune(**given)
    assert vtc.PixelPrune(std=[1, 2, 3]).std == (1.0, 2.0, 3.0)


def test_before_another_method():
    assert make("divprune+pixelprune", keep=0.25) == vtc.DivPrune(keep=0.25, before=vtc.PixelPrune())
    assert make("divprune+pixelprune", keep=0.25).label == "divprune+pixelprune"
    some = make("dpc_knn+ppe+pixelprune=0.02", keep=0.25)
    assert some.before == vtc.PixelPrune(tolerance=0.02) and some.label == "dpc_knn+ppe+pixelprune=0.02"
    assert vtc.PixelPrune().label == "pixelprune"
    for name, options, why in (
        ("tome", {"where": "tower"}, "inside the tower"),
        ("fastv", {}, "between the decoder's layers"),
        ("dpc_knn", {"cascade": {1: 0.5}}, "between the decoder's layers"),
        ("downsample", {}, "rows and columns"),
        ("dpc_knn", {"events": 2}, "frames of videos"),
    ):
        with pytest.raises(vtc.OptionError, match=why):
            make(f"{name}+pixelprune", keep=0.5, **options)
    for wrong in ("pixelprune", vtc.DivPrune(keep=0.5), {"size": 1}):
        with pytest.raises(vtc.OptionError, match=r"it takes vtc.PixelPrune"):
            vtc.DivPrune(keep=0.5, before=wrong)
    with pytest.raises(vtc.OptionError, match="tolerance='lots'"):
        make("divprune+pixelprune=lots", keep=0.5)


def test_on_disk(tmp_path):
    for number, method in enumerate(
        (
            vtc.PixelPrune(tolerance=0.02, metric="rms", std=(0.1, 0.2, 0.3)),
            vtc.DivPrune(keep=0.25, before=vtc.PixelPrune(tolerance=0.02, std=(0.1, 0.2, 0.3))),
        )
    ):
        vtc.save_config(method, tmp_path / f"{number}.json")
        assert vtc.load_config(tmp_path / f"{number}.json") == method
