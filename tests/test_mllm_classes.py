"""Some seventy tiny models of transformers' classes, but for LLaVA with a Pixtral tower through the one generic way in:
supported, against the oracle, or refused by name."""

from __future__ import annotations

import inspect

import mllm_classes as classes
import pytest
import torch
from classes_oracle import expected, said, tolerance
from mllm_classes import others
from mllm_oracle import entered
from mllm_zoo import CACHE, fingerprint
from pairs import matrix

import vtc
from vtc.adapters.multimodal.families import prompts
from vtc.adapters.multimodal.families.generic import PROVEN, RASTER, Generic

STEPS = 10
REFUSED = {
    "minimax_m3_vl": "takes positions for numbers of columns",
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


@pytest.mark.parametrize("name", others.REFUSED)
def test_every_other_class_is_refused(name):
    """Whole and without weights; nothing is half served, and the reason is the true one."""
    model = others.sketch(name)
    with pytest.raises(vtc.UnsupportedModelError, match=others.REFUSED[name]):
        vtc.compress(model, "divprune", keep=0.5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_keep_all_and_off_again(name):
    """keep=1.0 is the model itself to the bit, units hold what the prompt holds, and nothing is left behind."""
    model, inputs, text = classes.build(name), classes.inputs(name, "ragged"), classes.inputs(name, "text")
    dense, words, before = model(**inputs).logits, model(**text).logits, fingerprint(model)
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
        assert torch.equal(model(**text).logits, words)  # of words alone nothing goes
    assert fingerprint(model) == before and torch.equal(model(**inputs).logits, dense)


def shown(case):
    """Every class with every kind of prompt, either attention and either share; every kind of prompt with both."""
    name, kind, attn, keep = case
    return {(name, kind), (name, attn), (name, keep), (kind, attn, keep)}


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
    near = {"atol": tolerance(name), "rtol": 0}
    for row in range(rows):
        here = columns[row] >= 0
        assert torch.allclose(got[0][row, here], prefill[row], **near), "prefill"
    # Of rows padded on the right `generate` reads the last column; Janus has a `generate` of its own.
    if kind != "ragged_right" and name != "janus":
        for step in range(STEPS):
            assert torch.allclose(got[1 + step][:, -1], decode[:, step], **near), f"step {step}"


# -- decoders that read words, or keep positions ----------------------------------------------------------------------


def compared(model, inputs, outs, kept, columns, tokens):
    """The decoder's outputs in prefill, in one call or in turns, and in every step of decoding, against the oracle."""
    prefill, decode = expected("qwen4_exp", model, inputs, kept, tokens)
    turns, steps = outs[: -tokens.shape[1]], outs[-tokens.shape[1] :]
    for row, here in enumerate(columns >= 0):
        assert torch.allclose(torch.cat([out[row] for out in turns])[here], prefill[row], atol=1e-5, rtol=0), "prefill"
    for step, out in enumerate(steps):
        assert torch.allclose(out[:, -1], decode[:, step], atol=1e-5, rtol=0), f"step {step}"


@pytest.mark.parametrize("keep", [1, 0.5])
def test_the_words_before_a_token_are_the_prompts(keep):
    """Also where the prompt ends inside an image: the words before the first answer are placeholders that are gone."""
    model, inputs = classes.build("qwen4_exp"), classes.inputs("qwen4_exp", "single")
    end = int(classes.placeholders("qwen4_exp", inputs["input_ids"])[0].nonzero().max()) + 1
    columns = ("input_ids", "attention_mask", "mm_token_type_ids")
    inputs = {key: value[:, :end] if key in columns else value for key, value in inputs.items()}
    tokens = torch.randint(5, 100, (1, STEPS), generator=torch.Generator().manual_seed(3))
    with vtc.compress(model, "random", keep=keep) as handle:
        outs, kept, columns = said(model, inputs, tokens), handle.kept, handle.patches[0].record.columns
    assert keep == 0.5 or not kept[0, -2:].any()
    compared(model, inputs, outs[: 1 + STEPS], kept, columns, tokens)


@torch.no_grad()
def test_positions_of_earlier_turns_are_kept():
    """Two turns with an image each, the first as embeddings, are one prompt with two."""
    model, inputs = classes.build("qwen4_exp"), classes.inputs("qwen4_exp", "pair")
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    positions = entered(model, classes.text_model(model), inputs)["position_ids"]
    cut = int(classes.placeholders("qwen4_exp", ids)[0].nonzero()[classes.tokens_per_item("qwen4_exp", "pair")[0]]) - 2
    patches = int(inputs["image_grid_thw"][0].prod())
    tokens = torch.randint(5, 100, (1, STEPS), generator=torch.Generator().manual_seed(3))
    outs, kept, cache = [], [], {}
    hook = classes.text_model(model).register_forward_hook(lambda m, args, out: outs.append(out.last_hidden_state))
    try:
        with vtc.compress(model, "random", keep=0.25) as handle:
            for turn, (start, stop) in enumerate(((0, cut), (cut, length))):
                part = ids[:, start:stop]
                words = {"input_ids": part} if turn else {"inputs_embeds": model.get_input_embeddings()(part)}
                cache[CACHE] = model(
                    **words,
                    attention_mask=inputs["attention_mask"][:, :stop],
                    position_ids=positions[..., start:stop],
                    pixel_values=inputs["pixel_values"].tensor_split([patches])[turn],
                    image_grid_thw=inputs["image_grid_thw"][turn : turn + 1],
                    use_cache=True,
                    **cache,
                )[CACHE]
                kept.append(handle.kept)
            for step in range(STEPS):
                place = positions[..., -1:] + 1 + step
                model(input_ids=tokens[:, step : step + 1], position_ids=place, use_cache=True, **cache)
    finally:
        hook.remove()
    kept = torch.cat(kept, 1)
    assert outs[0].shape[1] + outs[1].shape[1] == int(kept.sum()) < length
    compared(model, inputs, outs, kept, torch.zeros(1, int(kept.sum())), tokens)


def test_gradients_reach_words_but_not_through_checkpoints():
    model, inputs = classes.build("qwen4_exp", fresh=True).train(), classes.inputs("qwen4_exp", "pair")
    with vtc.compress(model, "random", keep=0.5):
        model(**inputs).logits.square().mean().backward()
        assert model.model.language_model.layers[0].ple.ple_embedding.ngram_embedding.weight.grad.any()
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        with pytest.raises(vtc.InputError, match="read words, .* switch gradient checkpointing off"):
            model(**inputs, use_cache=False)
        with torch.no_grad():
            model(**inputs)


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
