"""The measurements themselves: what they compute, on data small enough to check by hand."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

import vtc
from vtc.eval import common, elpv, photos, positions, spectral
from vtc.methods.pitome import PRESETS
from vtc.tokens import Tokens


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Dinov2Model:
    """A random DINOv2 of two layers in place of the real one, for 224x224."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=224, patch_size=28
    )
    model = Dinov2Model(config).eval()
    monkeypatch.setattr(common, "load_model", lambda dtype="float32": model)
    return model


# -- spectral -------------------------------------------------------------------------------------------------------


def two_clusters(w: float) -> torch.Tensor:
    """Four nodes, {0, 1} alike and {2, 3} alike, weight w between the clusters."""
    block = torch.tensor([[1.0, 1, w, w], [1, 1, w, w], [w, w, 1, 1], [w, w, 1, 1]], dtype=torch.float64)
    return block[None]


def test_spectrum_of_two_clusters_by_hand():
    w = 0.25
    expected = torch.tensor([[0, 2 * w / (1 + w), 1, 1]], dtype=torch.float64)
    torch.testing.assert_close(spectral.spectrum(two_clusters(w)), expected)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ([0, 1, 2, 3], 0.0),  # nothing merged
        ([0, 0, 1, 1], 0.0),  # equal nodes merged: no harm
        ([0, 0, 1, 2], 0.0),
        ([0, 1, 0, 1], (1 - 0.25) / (1 + 0.25)),  # across the clusters: one eigenvalue 2w/(1+w) becomes 1
        ([0, 0, 0, 0], (1 - 0.25) / (1 + 0.25)),
    ],
)
def test_spectral_distance_by_hand(group: list[int], expected: float):
    distance = spectral.spectral_distance(two_clusters(0.25), torch.tensor([group]))
    assert distance.item() == pytest.approx(expected, abs=1e-12)


def test_lift_is_the_mean_over_both_groups_and_keeps_the_volume():
    weights = torch.rand(2, 7, 7, dtype=torch.float64)
    weights = weights + weights.mT
    group = torch.tensor([[0, 1, 0, 2, 2, 2, 3], [0, 0, 1, 1, 2, 3, 4]])
    lifted = spectral.lift(weights, group)
    for b in range(2):
        for u in range(7):
            for v in range(7):
                block = weights[b][group[b] == group[b, u]][:, group[b] == group[b, v]]
                assert lifted[b, u, v].item() == pytest.approx(block.mean().item())
    torch.testing.assert_close(lifted.sum((1, 2)), weights.sum((1, 2)))


def test_lifted_spectrum_is_the_coarse_one_and_ones():
    keys = torch.randn(1, 6, 4)
    weights, group = spectral.graph(keys), torch.tensor([[0, 0, 1, 2, 2, 2]])
    members = torch.nn.functional.one_hot(group).double().mT
    coarse = members @ weights @ members.mT
    expected = torch.cat([spectral.spectrum(coarse), torch.ones(1, 3, dtype=torch.float64)], dim=1).sort().values
    torch.testing.assert_close(spectral.spectrum(spectral.lift(weights, group)), expected)


def test_graph_cuts_negative_cosines():
    weights = spectral.graph(torch.tensor([[[2.0, 0], [-1, 0], [1, 1]]]))
    torch.testing.assert_close(weights[0], torch.tensor([[1, 0, 0.5**0.5], [0, 1, 0], [0.5**0.5, 0, 1]]).double())


def test_pair_similarity_and_random_pairs():
    keys = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1], [-1, 0]]])
    pairs = (torch.tensor([[0, 4]]), torch.tensor([[1, 2]]), torch.zeros(1, 2))
    similarity = spectral.pair_similarity(keys, vtc.TokenMap.from_pairs(5, pairs))
    assert similarity.flatten().tolist() == pytest.approx([0.5, 0.0])  # cosines 1 and 0
    tokens = Tokens(features=torch.randn(3, 21, 4), prefix=1)
    step = spectral.RandomPairs(r=1).decide(tokens, 8)
    assert step.anchor.shape == (3, 13) and (step.group >= 0).all() and (step.anchor[:, 0] == 0).all()
    assert step.size.max() == 2


def test_spectral_run(tiny: Dinov2Model, tmp_path):
    results = spectral.run(images=4, out=tmp_path, levels=(0.95,))
    labels = set(spectral.methods(0.95))
    assert {f"PiToMe {name}" for name in PRESETS} < labels
    assert {row["method"] for row in results.rows} == labels
    assert len(results.rows) == len(labels) * 3  # two layers, and the whole encoder
    assert all(row["distance"] >= 0 for row in results.rows)
    assert results.table().count("\n") == len(labels) + 1
    assert (tmp_path / "spectral.csv").is_file() and (tmp_path / "spectral.png").stat().st_size > 1000


# -- elpv -----------------------------------------------------------------------------------------------------------


def test_judge_on_separable_features():
    draw = np.random.default_rng(0)
    labels = np.arange(60) % 2 == 0
    features = draw.normal(size=(60, 5))
    features[:, 0] = np.where(labels, 4, -4) + draw.normal(size=60) * 0.1
    features[:, 1:] *= 0.1
    judge = elpv.Judge(features, labels)
    assert judge.probe(features).all() and judge.neighbours(features).all()
    flipped = features * np.array([-1, 1, 1, 1, 1])  # what is tested counts, not what was trained on
    assert not judge.probe(flipped).any() and not judge.neighbours(flipped).any()


def test_folds_are_disjoint_and_stratified():
    labels = np.arange(50) % 5 == 0
    tests = [test for _, test in elpv.folds(labels)]
    assert sorted(np.concatenate(tests)) == list(range(50))
    assert {int(labels[test].sum()) for test in tests} == {2}
    assert all(not set(train) & set(test) for train, test in elpv.folds(labels))
    with pytest.raises(vtc.OptionError, match="fewer than 5"):
        elpv.folds(np.arange(20) == 0)


def test_splits_share_no_image():
    search, held = (set(elpv.chosen(2624, None, split)) for split in ("search", "held-out"))
    assert not search & held and len(search) == len(held) == 1312
    assert set(elpv.chosen(2624, 30, "held-out")) <= held and len(set(elpv.chosen(2624, 30))) == 30
    for bad in (0, -1, 1.5, True):
        with pytest.raises(vtc.OptionError, match="images"):
            elpv.chosen(2624, bad)
    with pytest.raises(vtc.OptionError, match="split"):
        elpv.chosen(2624, 5, "test")


def test_elpv_missing_says_how_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(elpv.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(common.MissingDataError, match="pip install --no-deps elpv-dataset==1.0.0.post1"):
        elpv.run(images=10)
    with pytest.raises(common.MissingDataError, match="pip install"):
        photos.load("search")


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """Forty tiny images in place of ELPV, bright ones defective."""
    labels = np.arange(40) % 3 == 0
    files = []
    for i, bad in enumerate(labels):
        noise = np.random.default_rng(i).integers(0, 60, (30, 30)) + 150 * bad
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(noise.astype(np.uint8)).save(files[-1])
    monkeypatch.setattr(elpv, "dataset", lambda: (files, labels))


def test_elpv_run_resumes_from_its_cache(tiny: Dinov2Model, cells, tmp_path, monkeypatch: pytest.MonkeyPatch):
    first = elpv.run(images=40, out=tmp_path / "out", levels=(0.95,), split="all")
    assert len(first.rows) == 1 + len(common.candidates())
    dense = first.rows[0]
    assert dense["method"] == "dense" and dense["probe_dense"] == 0 and dense["cls_cosine"] == pytest.approx(1)
    assert all(row["macs_saved"] >= 0.05 - 1e-9 for row in first.rows[1:])
    assert all(row["probe_dense_low"] <= row["probe_dense"] <= row["probe_dense_high"] for row in first.rows)
    assert first.rows[1]["knn_tome"] == 0 and "knn_tome" not in dense
    with (tmp_path / "out" / "elpv.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == [row["method"] for row in first.rows]
    assert (tmp_path / "out" / "elpv.png").stat().st_size > 1000
    monkeypatch.setattr(common, "features", lambda *a, **k: pytest.fail("computed again"))
    assert elpv.run(images=40, out=tmp_path / "out", levels=(0.95,), split="all").rows == first.rows


def test_bad_levels_raise_before_anything_runs():
    for levels in ((), (0,), (1.2,), ("a",)):
        with pytest.raises(vtc.OptionError, match="levels"):
            elpv.run(levels=levels)


# -- photos, and what is shared -------------------------------------------------------------------------------------


def test_photos_run(tiny: Dinov2Model):
    results = photos.run(images=4, levels=(1.0, 0.95), methods=[common.Candidate("ToMe", "tome")])
    same, reduced = results.rows
    assert same["cls_cosine"] == pytest.approx(1) and same["patch_cosine"] == pytest.approx(1)
    assert reduced["patch_cosine"] < 1 and reduced["images"] == 4
    assert same["cls_tome"] == reduced["patch_tome"] == 0  # ToMe against itself
    assert results.table().startswith("| method | MACs saved | CLS cosine |")


def test_photo_splits_share_no_photograph():
    search, held = (set(photos.PHOTOS[split]) for split in ("search", "held-out"))
    assert len(search) == len(held) == 8 and not search & held
    pixels, names = photos.load("held-out", per_photo=2)
    assert pixels.shape == (16, 3, 224, 224) and len(set(names)) == 8


def test_crops_lie_inside_and_repeat():
    image = Image.fromarray(np.arange(40 * 60, dtype=np.uint32).reshape(40, 60).astype(np.uint8))
    first, again = photos.crops(image, 5, seed=3), photos.crops(image, 5, seed=3)
    assert [c.size for c in first] == [c.size for c in again] and first[0].size == (60, 40)
    assert all(c.width == c.height and 20 <= c.width <= 40 for c in first[1:])


def test_insert_replaces_the_table_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- x -->\nold\n<!-- /x -->\nbelow\n")
    results = common.Results("x", [{"a": 0.12345, "b": "c"}], {"a": "A", "b": "B"}, "About.")
    results.insert(page)
    results.insert(page)
    expected = "above\n<!-- x -->\nAbout.\n\n| A | B |\n| --- | --- |\n| 0.123 | c |\n<!-- /x -->\nbelow\n"
    assert page.read_text() == expected
    page.write_text("nothing here")
    with pytest.raises(vtc.OptionError, match="no place"):
        results.insert(page)


def test_crops_of_a_photograph_count_once():
    assert photos.per_photo(torch.tensor([1.0, 3, 7]), ["a", "a", "b"]).tolist() == [2, 7]


def test_intervals_of_five_values_hold_the_mean_as_often_as_they_say():
    """Student's t does, 95 times in a hundred; a bootstrap of five values 84 times."""
    values = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0)).tolist()
    held = [abs(middle) <= half for middle, half in map(common.spread, values)]
    assert sum(held) / 2000 == pytest.approx(0.95, abs=0.015)
    assert common.spread([0.5]) == (0.5, float("inf"))
    row = positions._row((2, "tome", 0.5, 8), [0.6, 0.7, 0.5], {(2, "tome", 0.5, 1): [0.5, 0.5, 0.5]}, 9)
    assert (row["low"], row["high"]) == pytest.approx((0.1 - 0.24841, 0.1 + 0.24841), abs=1e-4)  # 4.3027 * .1 / sqrt 3


def test_interval_holds_the_mean():
    values = torch.arange(100.0)
    low, high = common.interval(values)
    assert 43 < low < 49.5 < high < 56
    assert common.interval(torch.ones(7)) == (1.0, 1.0)


@pytest.mark.slow
def test_positions(tmp_path):
    """A reader of a few steps beats chance by far, every row is there, and the files are written."""

    found = positions.run(images=2, out=tmp_path, levels=(0.1,), seeds=1, steps=150)
    dense = {row["parts"]: row["accuracy"] for row in found.rows if row["method"] == "dense"}
    assert dense[4] > 0.4 and dense[16] > 0.15
    assert len(found.rows) == 2 * (1 + 3 * 5)
    assert {row["slots"] for row in found.rows if row["method"] == "tome"} == {1, 2, 4, 8, 16}
    # a fraction that does not come out even: downsample keeps one more, and the table says so
    assert {row["method"]: row["tokens"] for row in found.rows} == {
        "dense": 144, "dpc_knn": 14, "tome": 14, "downsample": 15
    }  # fmt: skip
    assert all("gain" in row for row in found.rows if row["slots"] > 1)
    assert (tmp_path / "positions.csv").exists() and (tmp_path / "positions.md").exists()


def test_positions_readers_turn_as_rotary_models_do():
    """The table of unmerged tokens is each token's own rotation; PPE with one slot is the anchor's."""

    whole = vtc.TokenMap.identity(1, 144)
    cos, sin = positions.carried(whole, 8)
    for patch in (0, 7, 143):
        for pair in range(32):
            place = patch // 12 if pair < 16 else patch % 12
            angle = place * 20.0 ** (-(pair % 16) / 16)
            assert float(cos[0, patch, pair]) == pytest.approx(math.cos(angle), abs=1e-5)
            assert float(sin[0, patch, pair + 32]) == pytest.approx(math.sin(angle), abs=1e-5)
    features = torch.randn(1, 144, 8, generator=torch.Generator().manual_seed(0))
    token_map = positions.maps(features, "dpc_knn", 0.2)
    for slots in (1, 4):
        ours = positions.carried(token_map, slots)[0]
        anchors = cos[:, token_map.anchor[0]]
        assert torch.allclose(ours, anchors) == (slots == 1)
