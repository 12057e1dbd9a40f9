"""The frame: tokens that stay for their place, part of every selector's budget."""

from dataclasses import replace

import mllm_zoo as zoo
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mllm_oracle import dense_generate_positions

import vtc
from vtc.methods import METHODS, Tokens, make
from vtc.methods.frame import corners, even, places, read
from vtc.methods.selector import Selector

SELECTORS = [name for name, cls in METHODS.items() if issubclass(cls, Selector)]
FRAMES = (0.25, 0.5, 1.0, "corners", "rotary", "rotary:0.75")


def seen(grids, seed=0, width=6):
    """Tokens of pictures of several sizes with all evidence, padded; a picture without a grid has 7 tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [7 if grid is None else grid[0] * grid[1] for grid in grids]
    shape = (len(grids), max(lengths))
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]

    def rand(*more):
        rows = [torch.rand(n, *more, generator=draw) for n in lengths]  # so that a picture is the same in any batch
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    weight = torch.rand(5, width, generator=torch.Generator().manual_seed(1))
    tokens = Tokens(
        rand(width) - 0.5 * mask[..., None],
        keys=rand(4),
        mask=None if bool(mask.all()) else mask,
        grid=tuple(grids),
        frames=tuple((n,) for n in lengths),
        attention=rand(),
        middle=rand(),
        inputs=rand(1, 5),
        projector=lambda x: (x @ weight).mean(2),
        text=torch.rand(1, 3, width, generator=torch.Generator().manual_seed(2)).expand(len(grids), -1, -1),
        text_mask=torch.ones(len(grids), 3, dtype=torch.bool),
        rotary=rand(2),
    )
    return replace(tokens, prompt_attention=tokens.attention, decoder_keys=tokens.keys, decoder_text=tokens.text)


def alone(tokens, row):
    """One picture of a batch, without its padding."""
    count = tokens.features.shape[1] if tokens.mask is None else int(tokens.mask[row].sum())
    fields = {
        name: value[row : row + 1] if "text" in name else value[row : row + 1, :count]
        for name, value in vars(tokens).items()
        if isinstance(value, torch.Tensor) and name != "mask"
    }
    told = {"grid": tokens.grid[row : row + 1], "frames": tokens.frames[row : row + 1]}
    return Tokens(**fields, **told, projector=tokens.projector)


def picked(method, tokens, counts):
    """The order of every picture's picks."""
    total = tokens.features.shape[1]
    gone = total - counts[0] if tokens.mask is None else tokens.mask.sum(1) - torch.tensor(counts)
    order = method.decide(tokens, gone).order
    return [[t for t in row if t >= 0] for row in order.tolist()]


def asks(name, grids):
    """hiprune wants a grid of every picture."""
    return [grid or (1, 7) for grid in grids] if name == "hiprune" else grids


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("grids", [[(4, 6)], [(5, 3), (3, 5)], [(4, 6), (2, 9), (7, 7)], [(3, 8), None]], ids=str)
def test_every_selector_with_every_frame(name, grids):
    """Exact totals, no token twice, the frame in front, then the method's own order; a batch equals its items alone."""
    tokens = seen(asks(name, grids))
    lengths = [7 if grid is None else grid[0] * grid[1] for grid in grids]
    for keep in (0.2, 0.6):
        counts = [max(1, round(n * keep)) for n in lengths]
        counts = counts if tokens.mask is not None else counts[:1] * len(counts)
        plain = picked(make(name, keep=keep), tokens, counts)
        assert picked(make(name, keep=keep, frame=0), tokens, counts) == plain
        for frame in FRAMES:
            method = make(name, keep=keep, frame=frame)
            kind, share = read(frame)
            first = [[t for t in row if t >= 0] for row in places(tokens, counts, kind, share).tolist()]
            for row, (order, k) in enumerate(zip(picked(method, tokens, counts), counts, strict=True)):
                assert len(order) == len(set(order)) == k and max(order) < lengths[row]
                assert len(first[row]) <= (4 if kind == "corners" else round(share * k))
                assert order == [*first[row], *(t for t in plain[row] if t not in first[row])][:k]
                assert picked(method, alone(tokens, row), [k]) == [order]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_places_of_any_grid(rows, columns, data):
    count = rows * columns
    wanted = data.draw(st.integers(0, count))
    spread = even(count, (rows, columns), wanted)
    assert len(spread) == len(set(spread)) <= wanted and all(0 <= t < count for t in spread)
    assert (len(spread) == 0) == (wanted == 0)
    steps = even(count, None, wanted)
    assert len(steps) == len(set(steps)) == wanted and all(0 <= t < count for t in steps)
    found = corners(count, (rows, columns))
    assert {(t // columns, t % columns) for t in found} == {(y, x) for y in (0, rows - 1) for x in (0, columns - 1)}
    assert len(corners(count, None)) == min(4, count)


def test_the_grid_stands_in_the_middles_of_equal_cells():
    assert even(256, (16, 16), 16) == [y * 16 + x for y in (1, 5, 9, 13) for x in (1, 5, 9, 13)]
    assert even(12, (2, 6), 3) == [0, 2, 4]  # one row of three: the upper of two middle rows
    assert even(10, None, 5) == [1, 3, 5, 7, 9]


def test_a_frame_needs_no_evidence_but_the_grid():
    tokens = seen([(6, 6)])
    bare = Tokens(tokens.features, grid=tokens.grid)
    assert picked(make("norm", keep=9, frame=0.5), bare, [9]) == picked(make("norm", keep=9, frame=0.5), tokens, [9])
    assert len(picked(make("divprune", keep=9, frame=0.5), Tokens(tokens.features), [9])[0]) == 9  # even steps


def test_rotary_takes_the_highest_means():
    tokens = seen([(5, 5)])
    order = picked(make("norm", keep=10, frame="rotary:0.4"), tokens, [10])[0]
    cosine, sine = tokens.rotary[0].T
    assert order[:2] == cosine.argsort(descending=True)[:2].tolist()
    assert order[2:4] == [t for t in sine.argsort(descending=True).tolist() if t not in order[:2]][:2]


@pytest.mark.parametrize("frame", [-0.1, 1.5, float("nan"), True, None, "middle", "corners:0.5", "rotary:", "rotary:2"])
def test_what_is_no_frame_is_refused(frame):
    with pytest.raises(vtc.OptionError, match="frame"):
        vtc.DivPrune(keep=0.5, frame=frame)


def test_names_with_a_frame():
    assert make("divprune+frame", keep=0.5).frame == 0.5
    for name in ("divprune+frame", "norm+frame=0.25", "idpruner+frame=corners", "scope+frame=rotary:0.3", "fastv"):
        assert make(name, keep=0.5).label == name
    for name in ("tome+frame", "divprune+frame=2", "divprune+ppe=2", "tome+ppe=2"):
        with pytest.raises(vtc.OptionError):
            make(name, keep=0.5)
    with pytest.raises(vtc.OptionError, match="frame"):
        make("divprune+frame", keep=0.5, frame=0.2)


@pytest.mark.parametrize("frame", [0.5, "corners", "rotary"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava_next", "gemma3", "idefics3"])
def test_in_a_model(name, frame):
    """Ragged batches of several pictures: rows as alone, exact totals; and frame tokens at known places."""
    model, inputs = zoo.build(name), zoo.inputs(name, "ragged")
    positions = dense_generate_positions(name, model, inputs)  # which "rotary" looks at
    with torch.no_grad(), vtc.compress(model, "norm", keep=0.4, frame=frame) as handle:
        model(**inputs, position_ids=positions)
        kept, report = handle.kept, handle.report
        assert list(report.after) == [max(1, round(0.4 * n)) for n in report.before]
        for row in range(len(kept)):
            single = zoo.alone(name, "ragged", row)
            model(**single)
            assert torch.equal(handle.kept[0], kept[row, -single["input_ids"].shape[1] :]), f"row {row} alone"


def test_rotary_means_are_the_decoders():
    """What a model's own rotary table says at its own positions."""
    name = "qwen2_5_vl"
    model, inputs = zoo.build(name), zoo.inputs(name, "single")
    positions = dense_generate_positions(name, model, inputs)[-3:]
    rotary = model.model.language_model.rotary_emb
    cosine, sine = rotary(torch.zeros(1, 1, 1), positions)
    visual = zoo.placeholders(model, inputs["input_ids"])[0]
    with torch.no_grad(), vtc.compress(model, "norm", keep=10, frame="rotary:1") as handle:
        model(**inputs)
        order = [t for t in handle.token_map.order[0].tolist() if t >= 0]
    near, turned = (table[0, visual].mean(-1) for table in (cosine, sine))
    best = near.argsort(descending=True, stable=True)[:5].tolist()
    rest = [t for t in turned.argsort(descending=True, stable=True).tolist() if t not in best][:5]
    assert order == best + rest


@pytest.mark.parametrize("frame", [0.5, "rotary"])
@pytest.mark.parametrize("method", ["fastv", "dart"])
def test_inside_the_decoder(method, frame):
    model, inputs = zoo.build("qwen2_5_vl"), zoo.inputs("qwen2_5_vl", "ragged")
    with torch.no_grad(), vtc.compress(model, method, keep=0.4, frame=frame) as handle:
        model(**inputs)
        assert list(handle.report.after) == [max(1, round(0.4 * n)) for n in handle.report.before]


def test_videos_have_a_frame_each():
    model, inputs = zoo.build("qwen2_5_vl"), zoo.inputs("qwen2_5_vl", "video")
    with torch.no_grad(), vtc.compress(model, "divprune", keep=0.4, frame="corners") as handle:
        model(**inputs)
        for (rows, columns), order in zip(handle.grids, handle.token_map.order.tolist(), strict=True):
            assert [t for t in order if t >= 0][:4] == corners(rows * columns, (rows, columns))
