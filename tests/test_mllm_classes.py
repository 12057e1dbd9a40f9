"""Some seventy tiny models of transformers' classes, but for LLaVA with a Pixtral tower through the one generic way in:
supported, against the oracle, or refused by name."""

from __future__ import annotations

import inspect

import mllm_classes as classes
import pytest
import torch
from classes_oracle import expected, said
from mllm_zoo import fingerprint
from pairs import matrix

import vtc
from vtc.adapters.multimodal.families import prompts
from vtc.adapters.multimodal.families.generic import PROVEN, RASTER, Generic

TOLERANCE = 1e-4  # of hidden states of size 1 to 6; linear attention adds in another order when its chunks shift
LOOSER = {"qwen3_5_moe": 1e-3}  # 2.5e-4 measured: that rounding, weighed by its router
STEPS = 10
REFUSED = {
    "qwen4_exp": "reads the words before each token",
    "minimax_m3_vl": "takes positions for numbers of columns",
    "hunyuan_vl": "numbers the images of a batch on a fourth axis",
    "nemotron_h_omni": "holds its decoder in another model",
    "inkling_mm_model": "counts distances by columns",
    "inkling2": "counts distances by columns",
    "inkling2_loop": "counts distances by columns",
    "unlimited_ocr": "counts its window's reference from the prompt's ids",
    "fuyu": "puts patches into the prompt without an encoder",
    "phi4_multimodal": "attends causally",  # its tower, which is found as an encoder: it has no get_image_features
    "deepseek_vl_hybrid": "encodes every image at two sizes",
    "chameleon": "embeds, merges and decodes in one forward",
}
OWN = {"granite4_vision"}  # has a family file; its newline tokens always stay, and are not counted
NAMES = [name for name in classes.CLASSES if name not in REFUSED]
# Padding on the right counts into sliding windows in the plain models, so a row there is not what it is alone.
CASES = {name: [c for c in classes.CASES[name] if c not in ("text", "image_video")] for name in NAMES}
CASES["video_llama_3"] = [case for case in CASES["video_llama_3"] if case != "video"]  # refused in the call
CASES["perception_lm"] = [case for case in CASES["perception_lm"] if case != "video"]  # the same


def test_every_class_is_supported_or_refused():
    assert {classes.build(name).config.model_type for name in NAMES} == PROVEN | OWN
    own = {name for name, why in classes.LEFT_OUT.items() if why == "in `mllm_zoo`"}
    assert PROVEN & own == {"llava"}  # with a Pixtral tower: it is of LLaVA's family
    assert len(PROVEN | own) >= 60


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name):
    model = classes.build(name)
    before = fingerprint(model)
    plan = vtc.explain(model, "random", keep=0.5)
    assert not plan.ok and REFUSED[name] in str(plan)
    with pytest.raises(vtc.UnsupportedModelError, match=REFUSED[name]):
        vtc.compress(model, "random", keep=0.5)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_keep_all_and_off_again(name):
    """keep=1.0 is the model itself to the bit, units hold what the prompt holds, and nothing is left behind."""
    model, inputs = classes.build(name), classes.inputs(name, "ragged")
    dense, before = model(**inputs).logits, fingerprint(model)
    with vtc.compress(model, "divprune", keep=1.0) as handle:
        assert torch.equal(model(**inputs).logits, dense)
        newlines = sum(classes.tokens_per_item(name, "ragged")) - sum(handle.report.before)
        assert (newlines > 0) == (name in OWN) and newlines >= 0 and handle.kept.all()
        told = None not in handle.grids  # a method that needs rows and columns is refused at once where there are none
    assert vtc.explain(model, "downsample", keep=0.5).ok == told
    with vtc.compress(model, "tome", keep=0.5) as handle:
        out = model(**inputs).logits
        assert out.isfinite().all() and not torch.equal(out[:, -1], dense[:, -1])
        assert str(handle.report) and handle.token_map.mask().sum(1).tolist() == list(handle.report.after)
    assert fingerprint(model) == before and torch.equal(model(**inputs).logits, dense)


def shown(case):
    """Every class with either attention and either share; every kind of prompt with both, in every class's turn."""
    name, kind, attn, keep = case
    return {(name, attn), (name, keep), (kind, attn, keep), (name, kind == "video")}


PRODUCT = [
    (name, kind, attn, keep)
    for name in NAMES
    for kind in CASES[name]
    for attn in ("sdpa", "eager")
    if attn == "sdpa" or classes.CLASSES[name].eager
    for keep in (0.5, 0.25)
]


@matrix("name, kind, attn, keep", PRODUCT, shown)
def test_oracle(name, kind, attn, keep):
    """Prefill and ten steps of decoding are those of the plain decoder on the tokens that stay, each row alone."""
    model, inputs = classes.build(name, attn), classes.inputs(name, kind)
    rows = len(inputs["input_ids"])
    tokens = torch.randint(5, 100, (rows, STEPS), generator=torch.Generator().manual_seed(3))
    with vtc.compress(model, "random", keep=keep) as handle:
        got = said(model, inputs, tokens)
        kept, columns, report = handle.kept, handle.patches[0].record.columns, handle.report
    assert list(report.after) == [max(1, round(keep * n)) for n in report.before]
    visual = classes.placeholders(name, inputs["input_ids"])
    assert kept[~visual].all() and not kept[visual].all()
    prefill, decode = expected(name, model, inputs, kept, tokens)
    near = {"atol": LOOSER.get(name, TOLERANCE), "rtol": 0}
    for row in range(rows):
        here = columns[row] >= 0
        assert torch.allclose(got[0][row, here], prefill[row], **near), "prefill"
    # Of rows padded on the right `generate` reads the last column; Janus has a `generate` of its own.
    if kind != "ragged_right" and name != "janus":
        for step in range(STEPS):
            assert torch.allclose(got[1 + step][:, -1], decode[:, step], **near), f"step {step}"


@pytest.mark.parametrize("name", ["video_llama_3", "perception_lm"])
def test_videos_that_are_not_known_are_refused(name):
    model, inputs = classes.build(name), classes.inputs(name, "video")
    with vtc.compress(model, "random", keep=0.5):
        for call in (model, lambda **given: model.generate(**given, max_new_tokens=1)):
            with pytest.raises(vtc.InputError, match="alone|filled in before"), torch.no_grad():
                call(**inputs)


def grids_of(name, kind):
    """The units of a call's images, with what the encoder was given."""
    seen, own = [], Generic.layout

    def layout(self, inner, modality, lengths, call):
        seen.append((modality, inner, dict(call), own(self, inner, modality, lengths, call)))
        return seen[-1][-1]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Generic, "layout", layout)
        with vtc.compress(classes.build(name), "random", keep=0.5):
            classes.build(name)(**classes.inputs(name, kind))
    return seen[-1]  # the first ones are of the trial at `compress`


# Their convolutions see the whole of an image this small: rows of cells in the code (flatten(2), then permute).
WIDE = {"gemma3n", "fast_vlm"}
NO_GRADIENT = {"apertus1p5"}  # codes


@pytest.mark.parametrize("name", sorted(RASTER - WIDE - NO_GRADIENT))
def test_a_token_is_its_cell(name):
    """Where an image's tokens have rows and columns: each depends on the pixels of its own cell more than on others."""
    modality, inner, call, layout = grids_of(name, "ragged")
    pixels = call[modality.pixels].detach().float().clone().requires_grad_(True)
    encode = getattr(inner, modality.encode)
    takes = inspect.signature(encode).parameters
    more = {key: value for key, value in call.items() if key in takes and key != modality.pixels}
    pooled = encode(**{modality.pixels: pixels}, **more).pooler_output
    rows = torch.cat([each.reshape(-1, each.shape[-1]) for each in pooled])
    unit = next(unit for unit in layout.units if unit.grid is not None)
    high, wide = unit.grid
    right = 0
    for place, row in enumerate(unit.rows.tolist()):
        (moves,) = torch.autograd.grad(rows[row].square().sum(), pixels, retain_graph=True)
        moves = moves.abs().sum(-3).flatten(0, -3)
        moves = moves[moves.sum((1, 2)).argmax()]
        if call.get("image_sizes") is not None:  # padded to the largest
            sides = torch.as_tensor(call["image_sizes"])[unit.item].tolist()
            moves = moves[: sides[0], : sides[1]]
        high_, wide_ = moves.shape[0] // high, moves.shape[1] // wide
        cells = moves[: high * high_, : wide * wide_].reshape(high, high_, wide, wide_).sum((1, 3))
        right += int(cells.argmax()) == place
    assert right >= 0.7 * high * wide, f"{right} of {high} x {wide}"


@pytest.mark.parametrize("name", ["aria", "idefics2", "deepseek_ocr2"])
def test_queries_of_a_resampler_have_no_rows(name):
    """Their number may be a square, or fit the image, by chance."""
    _, inner, call, layout = grids_of(name, "ragged")
    assert all(unit.grid is None for unit in layout.units)
    family = Generic(inner)
    pixels = torch.zeros(1, 3, 64, 64)
    assert (
        family.layout(inner, family.modalities[0], [16], {**call, family.modalities[0].pixels: pixels}).units[0].grid
        is None
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name in prompts._FAMILIES])
@torch.no_grad()
def test_the_typical_prompt_is_one(name):
    """What `vtc bench` and `vtc explain` make up for a configuration alone: the class takes it, and units hold it."""
    model = classes.build(name)
    made = prompts.picture(model.config, 64)
    with vtc.compress(model, "divprune", keep=0.5) as handle:
        model(**made.inputs(model))
        assert handle.report.before == (made.tokens,)
