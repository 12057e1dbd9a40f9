"""The methods for videos, and shares of frames, in multimodal LLMs: against the oracle, and what the report says."""

from __future__ import annotations

import mllm_zoo as zoo
import pytest
import torch
from mllm_oracle import dense_generate_positions, forward_logits, generate_logits, oracle
from test_mllm import STEPS, TOLERANCE, replaced

import vtc
from vtc.errors import UnsupportedModelError
from vtc.frames import FrameShares

NAMES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision")
METHODS = {
    "evs": vtc.EVS(keep=0.4),
    "evs-pixels": vtc.EVS(keep=0.4, on="pixels"),
    "evs-quantile": vtc.EVS(keep=0.4, cut="quantile"),
    "vidcom2": vtc.VidCom2(keep=0.3),
    "flashvid": vtc.FlashVID(keep=0.3),
    "flashvid-two": vtc.FlashVID(keep=0.4, segments=1, cut=-1, alpha=0.4),
    "divprune+shares": vtc.DivPrune(keep=0.3, shares="uniqueness"),
    "idpruner+change": vtc.IDPruner(keep=0.3, shares=FrameShares("change", window=2)),
    "dpc_knn+none": vtc.DPCKNN(keep=0.15, shares=FrameShares("change", least=0)),
    "tome+segments": vtc.ToMe(keep=0.4, shares=FrameShares("uniform", window="segments")),
}


# each method in each family; beside a picture each in one of them, and the rest by `make matrix`
CASES = [(name, which, "video") for name in NAMES for which in METHODS]
CASES += [
    pytest.param(name, which, "image_video", marks=() if (i + j) % 3 == 0 else pytest.mark.matrix)
    for i, name in enumerate(NAMES)
    for j, which in enumerate(METHODS)
]


@pytest.mark.parametrize(("name", "which", "case"), CASES)
def test_oracle(name, which, case):
    method, model, inputs = METHODS[which], zoo.build(name), zoo.inputs(name, case)
    if which == "evs-pixels" and not name.startswith("qwen"):
        with pytest.raises(UnsupportedModelError, match="pixels that each token covers"):
            vtc.compress(model, method)
        return
    positions = dense_generate_positions(name, model, inputs)
    tokens = torch.randint(5, 100, (len(inputs["input_ids"]), STEPS), generator=torch.Generator().manual_seed(3))
    with vtc.compress(model, method) as handle:
        prefill, decode = forward_logits(model, inputs, tokens, positions)
        said = generate_logits(model, inputs, tokens)
        kept, report = handle.kept, handle.report
    new = replaced(model, inputs, handle) if method.merges else None
    want = oracle(name, model, inputs, kept, new, forced=tokens)
    assert torch.allclose(prefill[0], want.prefill[0], atol=TOLERANCE, rtol=0), "prefill"
    assert torch.allclose(decode, want.decode, atol=TOLERANCE, rtol=0), "decode"
    assert torch.allclose(said[:, 1:], want.decode, atol=TOLERANCE, rtol=0), "generate, decode"
    assert not kept.all()

    # the budget, by the definition: of the whole video, and the report tells it by frame
    (frames,) = report.frames
    token = model.config.video_token_id
    total = int((inputs["input_ids"] == token).sum()) - (1 if name == "llava_onevision" else 0)  # its newline
    places = total // len(frames)
    if which == "evs-quantile":
        assert frames[0] == places and sum(frames) >= places
    elif isinstance(method, vtc.EVS):
        assert frames[0] == places and sum(frames) == max(places, int(0.4 * total))
    else:
        assert sum(frames) == max(1, round(method.keep * total))
    assert int(((inputs["input_ids"] == token) & kept).sum()) == sum(frames) + (name == "llava_onevision")
    assert f"{frames[0] if len(set(frames)) == 1 else f'{min(frames)}-{max(frames)}'} a frame" in str(report)


def test_a_video_is_the_same_beside_another():
    """Two videos of different lengths in one call keep what each keeps alone."""
    name = "qwen2_5_vl"
    model = zoo.build(name)
    one, inputs = zoo.inputs(name, "video"), None
    for method in METHODS.values():
        with vtc.compress(model, method) as handle:
            model(**one)
            alone = handle.report.frames
            inputs = {key: torch.cat([value, value]) for key, value in one.items()}
            model(**inputs)
            assert handle.report.frames == alone * 2, method


def test_everything_stays_to_the_bit():
    model, inputs = zoo.build("qwen3_vl"), zoo.inputs("qwen3_vl", "image_video")
    with torch.no_grad():
        dense = model(**inputs).logits
        for method in METHODS.values():
            with vtc.compress(model, vtc.methods.make(method.name, **{**method.options(), "keep": 1.0})):
                assert torch.equal(model(**inputs).logits, dense)
        assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize("which", ["evs", "vidcom2", "flashvid", "divprune+shares"])
def test_families_without_videos(which):
    for name in ("llava", "internvl"):
        plan = vtc.explain(zoo.build(name), METHODS[which])
        assert not plan.ok and "images only" in str(plan) and ("shares=" in str(plan)) == ("shares" in which)


def test_encoders_have_no_frames():
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    with pytest.raises(UnsupportedModelError, match="shares="):
        vtc.compress(vit, vtc.ToMe(keep=0.8, shares="change"))


def test_pictures_beside_methods_for_videos():
    """EVS leaves a picture whole and says so; the others take it for a video of one frame."""
    model, inputs = zoo.build("qwen2_vl"), zoo.inputs("qwen2_vl", "single")
    for name in ("evs", "vidcom2", "flashvid"):
        with vtc.compress(model, name, keep=0.5) as handle:
            model(**inputs)
            report = handle.report
        assert report.frames == ()
        assert (report.after == report.before) == (name == "evs")
        assert ("pictures stay whole" in report.notes) == (name == "evs")
