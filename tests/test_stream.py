"""Videos that come in pieces: what is kept is what one call keeps, and memory does not grow."""

from __future__ import annotations

import mllm_zoo as zoo
import pytest
import torch

import vtc
from vtc.errors import InputError, OptionError, UnsupportedModelError

NESTED = [name for name, cls in vtc.methods.METHODS.items() if cls.nested]
HIGH, WIDE = 6, 8  # patches of a frame; 2 x 2 are a token


def video(name, frames, seed=0):
    """Pixels of a video of so many pairs of frames, as the processor gives them."""
    width = zoo.inputs(name, "video")["pixel_values_videos"].shape[1]
    pixels = torch.randn(frames * HIGH * WIDE, width, generator=torch.Generator().manual_seed(seed))
    return pixels, torch.tensor([[frames, HIGH, WIDE]])


def frame_by_frame(model):
    return model.config.model_type == "qwen3_vl"


def prompt(model, frames):
    """With one placeholder for the video, or for every pair of frames, behind its time."""
    token = model.config.video_token_id
    start, end = 112, 113
    each = [[5 + i % 7, start, token, end] for i in range(frames)] if frame_by_frame(model) else [[start, token, end]]
    return torch.tensor([[3, *(i for run in each for i in run), 9, 10, 11]])


def asked(model, pixels, grid):
    """The same in one call, as a processor gives it."""
    frames, count = int(grid[0, 0]), int(grid[0, 1:].prod()) // 4
    count *= 1 if frame_by_frame(model) else frames
    token, ids = model.config.video_token_id, prompt(model, frames)[0].tolist()
    ids = torch.tensor([[i for word in ids for i in [word] * (count if word == token else 1)]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == token).long(),
        "pixel_values_videos": pixels,
        "video_grid_thw": grid,
    }


def said(found):
    return found.sequences, torch.stack(found.scores)


ASK = {"do_sample": False, "max_new_tokens": 5, "output_scores": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("method", [name for name in NESTED if name != "cdpruner"])  # reads the question: refused
@pytest.mark.parametrize(
    ("name", "pieces"),
    [("qwen2_5_vl", (7,)), ("qwen2_5_vl", (1, 1, 1, 4)), ("qwen2_vl", (3, 2, 2)), ("qwen3_vl", (2, 1, 4))],
    ids=str,
)
def test_pieces_are_the_whole(name, method, pieces):
    model = zoo.build(name)
    pixels, grid = video(name, sum(pieces))
    with vtc.compress(model, method, keep=25, shares="uniform") as handle, torch.no_grad():
        whole = said(model.generate(**asked(model, pixels, grid), **ASK))
        kept, frames = handle.kept, handle.report.frames
    with vtc.compress(model, method, keep=0.5) as handle, torch.no_grad():
        stream, start = handle.stream(tokens=25), 0
        for count in pieces:
            part = pixels[start * HIGH * WIDE : (start + count) * HIGH * WIDE]
            stream.feed(part, torch.tensor([[count, HIGH, WIDE]]))
            start += count
            assert stream.kept == min(25, start * 12) and stream.seen == start * 12
        again = said(stream.generate(prompt(model, sum(pieces)), **ASK))
        assert torch.equal(handle.kept, kept) and handle.report.frames == frames
        assert "a stream" in handle.report.notes
        later = said(stream.generate(prompt(model, sum(pieces)), **ASK))  # asked again
    assert torch.equal(again[0], whole[0]) and torch.allclose(again[1], whole[1], atol=1e-5)
    assert torch.equal(later[1], again[1])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_within_the_budget_nothing_goes(name):
    model = zoo.build(name)
    pixels, grid = video(name, 3)
    with torch.no_grad():
        dense = said(model.generate(**asked(model, pixels, grid), **ASK))
        with vtc.compress(model, "divprune", keep=0.5) as handle:
            stream = handle.stream(tokens=1000)
            stream.feed(pixels, grid)
            assert stream.kept == stream.seen == 36
            again = said(stream.generate(prompt(model, 3), **ASK))
            # and a call of its own afterwards is one like any other
            model.generate(**asked(model, pixels, grid), **ASK)
            assert sum(handle.report.after) == 18
    assert torch.equal(again[0], dense[0]) and torch.allclose(again[1], dense[1], atol=1e-5)


def test_the_first_picks_do_not_depend_on_their_number():
    from test_selectors import evidence

    tokens = evidence(24)
    for name in NESTED:
        method = vtc.methods.make(name, keep=0.5)
        whole = method.pick(tokens, 24)
        for count in (1, 5, 13):
            assert torch.equal(method.pick(tokens, count), whole[:, :count]), name


def test_a_thousand_frames_take_no_more_memory():
    """What a stream holds after each of 500 pairs of frames: the budget's rows, and no piece behind them."""
    model = zoo.build("qwen2_vl")
    with vtc.compress(model, "norm", keep=0.5) as handle:
        stream, held = handle.stream(tokens=600), []
        for i in range(100):
            stream.feed(*video("qwen2_vl", 5, seed=i))
            held.append(sum(frame.rows.untyped_storage().nbytes() for frame in stream.frames))
        width = stream.frames[0].rows.shape[1]
        assert len(stream.frames) == 500 and stream.kept == 600 and stream.seen == 6000
        assert max(held) <= 600 * width * 4 and held[20] == held[-1] == 600 * width * 4
        assert len({id(frame) for frame in stream.frames}) == 500
        found = stream.generate(prompt(model, 500), do_sample=False, max_new_tokens=2)
        assert found.shape[1] > 6000 and sum(handle.report.after) == 600


def test_what_is_refused():
    model = zoo.build("qwen2_5_vl")
    pixels, grid = video("qwen2_5_vl", 2)
    for name in ("pitome", "vispruner", "evs", "cdpruner", "divprune+frame", "divprune+shares"):
        with (
            vtc.compress(model, name, keep=0.5) as handle,
            pytest.raises(UnsupportedModelError, match="stream|question"),
        ):
            handle.stream(tokens=10)
    with vtc.compress(zoo.build("llava_onevision"), "divprune", keep=0.5) as handle:
        with pytest.raises(UnsupportedModelError, match="LlavaOnevisionModel"):
            handle.stream(tokens=10)
    with vtc.compress(zoo.build("qwen3_vl"), "divprune", keep=0.5) as handle:
        stream = handle.stream(tokens=10)
        stream.feed(*video("qwen3_vl", 2))
        with pytest.raises(InputError, match="1 video placeholders .* and 2 of them"):
            stream.generate(prompt(stream.model, 1))
    with vtc.compress(model, "divprune", keep=0.5) as handle:
        with pytest.raises(OptionError, match="tokens"):
            handle.stream(tokens=0)
        stream = handle.stream(tokens=3)
        with pytest.raises(InputError, match="no frame"):
            stream.generate(prompt(model, 2))
        with pytest.raises(InputError, match="one video"):
            stream.feed(pixels, grid.repeat(2, 1))
        stream.feed(pixels, grid)
        with pytest.raises(InputError, match="resize"):
            stream.feed(pixels, torch.tensor([[2, WIDE, HIGH]]))
        with pytest.raises(InputError, match="more than the budget"):
            stream.feed(pixels, grid)
        with pytest.raises(InputError, match="NaN"):
            stream.feed(torch.full_like(pixels[: HIGH * WIDE], float("nan")), torch.tensor([[1, HIGH, WIDE]]))
        assert [len(frame.places) for frame in stream.frames] == [2, 1]  # as they were
        with pytest.raises(InputError, match="0 video placeholders"):
            stream.generate(torch.tensor([[5, 6]]))
        with pytest.raises(InputError, match="attention_mask"):
            stream.generate(prompt(model, 2), attention_mask=torch.zeros(1, 8))
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    with vtc.compress(vit, "tome", keep=0.8) as handle, pytest.raises(UnsupportedModelError, match="no multimodal"):
        handle.stream(tokens=3)
