"""PixelPrune in multimodal LLMs: the tower on some of the patches, the decoder on what it makes of them."""

from __future__ import annotations

import copy

import mllm_zoo as zoo
import pytest
import torch
from mllm_oracle import dense_generate_positions, forward_logits, generate_logits, oracle
from test_pixelprune import reference
from transformers import AttentionInterface

import vtc
from vtc.adapters.multimodal.families.base import IMAGE

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CASES = ("single", "ragged", "ragged_right", "pair", "mixed")
COMPOSED = ("divprune", "idpruner", "dpc_knn", "zoo_prune", "visionzip", "random", "divprune+frame")
TOKENS = torch.randint(5, 100, (3, 3), generator=torch.Generator().manual_seed(3))


def grids(inputs):
    return [(rows // 2, columns // 2) for _, rows, columns in inputs["image_grid_thw"].tolist()]


def flat(name, case, seed=0):
    """A prompt whose images have flat areas: blocks of two by two tokens, of three colours, and a few odd tokens."""
    inputs, generator = dict(zoo.inputs(name, case)), torch.Generator().manual_seed(seed)
    width, rows = inputs["pixel_values"].shape[1], []
    palette = torch.rand(3, 4 * width, generator=generator)
    for high, wide in grids(inputs):
        blocks = torch.randint(0, 3, (-(-high // 2), -(-wide // 2)), generator=generator)
        image = palette[blocks.repeat_interleave(2, 0).repeat_interleave(2, 1)[:high, :wide].flatten()]
        odd = torch.rand(len(image), generator=generator) < 0.1
        rows.append(torch.where(odd[:, None], image + torch.rand(image.shape, generator=generator), image))
    inputs["pixel_values"] = torch.cat(rows).view(-1, width)
    return inputs


def by_hand(inputs, tolerance=0.0, scale=1.0):
    """Which tokens the rule keeps, [n] bool over all images, cell by cell."""
    cells, kept, start = inputs["pixel_values"].double().view(-1, 4 * inputs["pixel_values"].shape[1]) * scale, [], 0
    for high, wide in grids(inputs):
        mine = cells[start : start + high * wide].numpy()
        own = torch.zeros(high * wide, dtype=torch.bool)
        own[reference(mine, high, wide, tolerance, "max", True)[0]] = True
        kept.append(own)
        start += high * wide
    return kept


def windows(high, wide, side=2):
    """The tokens of each window, in raster order."""
    return [
        [r * wide + c for r in range(top, min(high, top + side)) for c in range(left, min(wide, left + side))]
        for top in range(0, high, side)
        for left in range(0, wide, side)
    ]


def masked_tower(name, model, inputs, kept):
    """The plain tower on all patches, where none attends to those that left: what it makes of the others [m, C], and
    its planes for DeepStack, and the attention that each token receives in each layer [layers, n]."""
    order, start = [], 0
    for (high, wide), own in zip(grids(inputs), kept, strict=True):
        mine = sum(windows(high, wide), []) if name == "qwen2_5_vl" else list(range(high * wide))
        order += [start + token for token in mine]
        start += len(own)
    stays = torch.cat(kept)[order].repeat_interleave(4)
    at, received = 0, []

    def attend(module, query, key, value, attention_mask, scaling, **more):
        nonlocal at
        mine = stays[at : at + key.shape[2]]
        at = (at + key.shape[2]) % len(stays)
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mine, torch.finfo(query.dtype).min).softmax(-1)
        received.append(scores[0, :, mine].mean(0).sum(0))
        return (scores @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("vtc_masked", attend)
    visual = model.model.visual
    before = visual.config._attn_implementation
    try:
        visual.config._attn_implementation = "vtc_masked"
        with torch.no_grad():
            out = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    finally:
        visual.config._attn_implementation = before
    whole, layers = torch.cat(kept), torch.cat(received).view(-1, len(order), 4).sum(2)
    planes = [level[whole] for level in getattr(out, "deepstack_features", None) or []]
    return out.pooler_output[whole], planes, layers[:, torch.tensor(order).argsort()]


def columns(model, inputs, kept):
    """[B, L] bool: the prompt without the tokens that left."""
    visual = zoo.placeholders(model, inputs["input_ids"])
    out = torch.ones_like(visual)
    out[visual] = torch.cat(kept)
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", QWEN)
def test_the_tower_is_the_one_that_does_not_see_what_left(name, case):
    model, inputs = zoo.build(name), flat(name, case)
    kept = by_hand(inputs)
    share = float(torch.cat(kept).float().mean())
    assert 0.2 < share < 0.8
    pooled, planes, _ = masked_tower(name, model, inputs, kept)
    seen = []
    with torch.no_grad(), vtc.compress(model, "pixelprune") as handle:
        hook = model.model.visual.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        try:
            out = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        finally:
            hook.remove()
        whole = torch.cat(kept)
        assert seen == [4 * int(whole.sum())]  # the tower ran on the patches that stay and on no others
        rows = torch.cat(list(out.pooler_output))
        assert torch.allclose(rows[whole], pooled, atol=1e-5) and not rows[~whole].any()
        for level, plane in zip(getattr(out, "deepstack_features", None) or [], planes, strict=True):
            level = level if isinstance(level, torch.Tensor) else torch.cat(list(level))  # a tensor in older versions
            assert torch.allclose(level[whole], plane, atol=1e-5)
        model(**inputs)
        assert handle.report.after == tuple(int(own.sum()) for own in kept)
        assert handle.report.before == tuple(map(len, kept))
        assert f"{1 - share:.1%} of the image patches left before the tower" in str(handle.report)
        assert handle.grids == tuple(grids(inputs))
        assert torch.equal(handle.kept, columns(model, inputs, kept))
    dense = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    assert not torch.allclose(torch.cat(list(dense.pooler_output))[whole], pooled, atol=1e-3)


@pytest.mark.parametrize("method, options", [("pixelprune", {}), ("divprune+pixelprune", {"keep": 0.4})])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", QWEN)
def test_the_decoder_is_the_plain_one_on_the_columns_that_stay(name, case, method, options):
    model, inputs = zoo.build(name), flat(name, case)
    kept = by_hand(inputs)
    pooled, planes, _ = masked_tower(name, model, inputs, kept)
    there = columns(model, inputs, kept)
    positions = dense_generate_positions(name, model, inputs)
    with vtc.compress(model, method, **options) as handle:
        prefill, decode = forward_logits(model, inputs, TOKENS[: len(there)], positions)
        said = None if case == "ragged_right" else generate_logits(model, inputs, TOKENS[: len(there)])
        last, rows = handle.kept, handle.patches[0].record.columns
        bare = model(**inputs).logits if case in ("single", "pair") else None
    assert torch.equal(last, there) if method == "pixelprune" else bool((there | ~last).all())
    behind = last[zoo.placeholders(model, inputs["input_ids"])][torch.cat(kept)]
    new = {"embeds": pooled[behind], "deepstack": [plane[behind] for plane in planes]} if planes else pooled[behind]
    want = oracle(name, model, inputs, last, new, steps=3, forced=TOKENS[: len(there)])
    for row, expected in enumerate(want.prefill):
        assert torch.allclose(prefill[row, rows[row] >= 0], expected, atol=1e-4, rtol=0), "prefill"
    assert torch.allclose(decode, want.decode, atol=1e-4, rtol=0), "decode"
    if bare is not None:
        assert torch.allclose(bare[0], want.prefill[0], atol=1e-4, rtol=0), "forward"
    if said is not None:
        assert torch.allclose(said[:, 0], torch.stack([x[-1] for x in want.prefill]), atol=1e-4, rtol=0), "generate"
        assert torch.allclose(said[:, 1:], want.decode, atol=1e-4, rtol=0), "generate, decode"


@pytest.mark.parametrize("name", QWEN)
def test_nothing_leaves_from_pictures_without_repetition(name):
    model, inputs = zoo.build(name), zoo.inputs(name, "ragged")
    before = zoo.fingerprint(model)
    with torch.no_grad():
        dense = model(**inputs).logits
        with vtc.compress(model, "pixelprune") as handle:
            assert torch.equal(model(**inputs).logits, dense)
            assert handle.report.kept == 1 and handle.report.macs_ratio == 1
            assert "0.0% of the image patches left" in handle.report.notes and bool(handle.kept.all())
        assert zoo.fingerprint(model) == before and torch.equal(model(**inputs).logits, dense)
        small = flat(name, "ragged")
        dense = model(**small).logits
        with vtc.compress(model, "pixelprune"):
            assert model(**small).logits.shape[1] < dense.shape[1]
        assert zoo.fingerprint(model) == before and torch.equal(model(**small).logits, dense)


@pytest.mark.parametrize("name", QWEN)
def test_videos_stay_whole(name):
    model, inputs = zoo.build(name), zoo.inputs(name, "image_video")
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    inputs["pixel_values_videos"] = torch.zeros_like(inputs["pixel_values_videos"])
    with torch.no_grad(), vtc.compress(model, "pixelprune") as handle:
        model(**inputs)
        after, before = handle.report.after, handle.report.before
        assert after[0] == 1 and after[1:] == before[1:] and "videos stay whole" in handle.report.notes
        alone = zoo.inputs(name, "video")
        assert torch.equal(model(**alone).logits, zoo.build(name, fresh=True)(**alone).logits)
        assert handle.report.kept == 1 and handle.report.notes == "pixelprune; videos stay whole"


@pytest.mark.parametrize("method", COMPOSED)
@pytest.mark.parametrize("name", QWEN)
def test_another_method_decides_among_those_that_are_left(name, method):
    """It picks what it picks from the tokens that are left alone, and a batch is its rows."""
    model, inputs = zoo.build(name), flat(name, "ragged")
    kept = by_hand(inputs)
    pooled, _, _ = masked_tower(name, model, inputs, kept)
    with torch.no_grad():
        with vtc.compress(model, f"{method}+pixelprune", keep=0.5) as handle:
            out = model(**inputs)
            report, there, token_map = handle.report, handle.kept, handle.token_map
            lone = []
            for row in range(len(there)):
                single = alone(inputs, row)
                model(**single)
                lone.append(handle.kept[0])
                assert torch.equal(handle.kept[0], there[row, -single["input_ids"].shape[1] :]), row
        assert report.after == tuple(max(1, round(0.5 * int(own.sum()))) for own in kept)
        assert report.before == tuple(map(len, kept)) and out.logits.shape[1] < there.shape[1]
        if method == "divprune":
            for own, anchor, rows in zip(
                kept, token_map.anchor, pooled.split([int(x.sum()) for x in kept]), strict=True
            ):
                picked = vtc.functional.max_min(rows[None], keep=0.5).anchor[0]
                assert torch.equal(own.nonzero().flatten()[picked], anchor[anchor >= 0])
        for own, group in zip(kept, token_map.group, strict=True):
            assert not (group[: len(own)][~own] >= 0).any()  # what left is no member of anything
        with vtc.compress(model, f"{method}+pixelprune", keep=1.0) as handle:
            model(**inputs)
            assert handle.report.after == tuple(int(own.sum()) for own in kept)
        with vtc.compress(model, f"{method}+pixelprune", keep=7) as handle:  # a number is of each image, at most
            model(**inputs)
            assert handle.report.after == tuple(min(7, int(own.sum())) for own in kept)


def alone(inputs, row):
    """One row of a batch with one image per row."""
    visual, real = inputs["image_grid_thw"].prod(1).tolist(), inputs["attention_mask"][row].bool()
    counts = [int((ids == zoo.IMAGE).sum()) * 4 for ids in inputs["input_ids"]]
    items, found = [0, *torch.tensor(visual).cumsum(0).tolist()], {}
    edges = [0, *torch.tensor(counts).cumsum(0).tolist()]
    first, last = items.index(edges[row]), items.index(edges[row + 1])
    found["pixel_values"] = inputs["pixel_values"][edges[row] : edges[row + 1]]
    found["image_grid_thw"] = inputs["image_grid_thw"][first:last]
    return found | {
        name: inputs[name][row : row + 1, real]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        if name in inputs
    }


@pytest.mark.parametrize("name", QWEN)
def test_what_methods_read_is_of_the_shorter_tower(name):
    """Attention, keys and the projector's input, as the tower that does not see the patches that left has them."""
    model, inputs = zoo.build(name), flat(name, "ragged")  # where Qwen2.5-VL's order of windows is not its own inverse
    _, _, layers = masked_tower(name, model, inputs, by_hand(inputs))
    kept = torch.cat(by_hand(inputs))
    read = frozenset({"attention", "middle", "keys", "projector"})
    with torch.no_grad(), vtc.compress(model, "pixelprune") as handle:
        from vtc.adapters.multimodal.capture import Capture

        patch = handle.patches[0]
        patch.encoders.capture = Capture(patch.family, patch.inner, read)
        patch.encoders.capture.install()
        out = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        found = patch.encoders.known(IMAGE, out, torch.cat(list(out.pooler_output))).evidence
        rows = torch.cat(list(out.pooler_output))[kept]
        merged = patch.family.projection(patch.inner)(found["inputs"][kept])
        assert torch.allclose(merged.flatten(0, -2) if merged.ndim > 2 else merged, rows, atol=1e-5)  # in order
        for field in ("attention", "middle", "keys", "inputs"):
            assert not found[field][~kept].any() and found[field][kept].isfinite().all()
        assert torch.allclose(found["attention"][kept], layers[-1][kept], atol=1e-4)
        assert torch.allclose(found["middle"][kept], layers[2][kept], atol=1e-4)


@pytest.mark.parametrize("name", QWEN)
def test_a_tolerance_is_of_pixels_in_0_to_1(name):
    """Differences in the processor's units are taken back by its standard deviations, channel by channel."""
    std = (0.5, 0.5, 0.5) if name == "qwen3_vl" else (0.26862954, 0.26130258, 0.27577711)
    model, inputs = zoo.build(name), dict(zoo.inputs(name, "single"))
    pixels = torch.zeros_like(inputs["pixel_values"]).view(-1, 3, 128)
    for channel in range(3):
        odd = pixels.clone()
        odd[4:8, channel, 5] = 0.02 / std[channel]  # the second token, by 0.02 in one channel
        inputs["pixel_values"] = odd.flatten(1)
        for tolerance in (0.0, 0.019, 0.021):
            with torch.no_grad(), vtc.compress(model, "pixelprune", tolerance=tolerance) as handle:
                model(**inputs)
            assert (handle.report.after[0] == 1) == (tolerance == 0.021)
        with torch.no_grad(), vtc.compress(model, "pixelprune", tolerance=0.021, std=(1.0, 1.0, 1.0)) as handle:
            model(**inputs)
        assert handle.report.after[0] > 1


@pytest.mark.parametrize("name", QWEN)
def test_generate(name):
    model, inputs = zoo.build(name), flat(name, "ragged")
    with torch.no_grad(), vtc.compress(model, "idpruner+pixelprune", keep=0.5) as handle:
        one = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        beams = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=2, num_return_sequences=2)
        assert one.shape == (3, inputs["input_ids"].shape[1] + 4) and len(beams) == 6
        copied = copy.deepcopy(model)
        assert torch.equal(copied.generate(**inputs, max_new_tokens=4, do_sample=False), one)
        model.train()
        try:
            with torch.enable_grad():
                loss = model(**inputs, labels=inputs["input_ids"]).loss
                loss.backward()
            assert model.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0
        finally:
            model.zero_grad(set_to_none=True)
            model.eval()
        assert handle.report.macs_ratio < 0.8


def test_a_broken_call_leaves_nothing_behind():
    model, inputs = zoo.build("qwen2_vl"), flat("qwen2_vl", "single")
    with torch.no_grad(), vtc.compress(model, "pixelprune") as handle:
        with pytest.raises(vtc.InputError, match="NaN"):
            model(**{**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], float("nan"))})
        with pytest.raises(vtc.InputError, match="position_ids of the whole images"):
            model.model.get_image_features(
                inputs["pixel_values"], inputs["image_grid_thw"], position_ids=torch.zeros(4, 2)
            )
        assert handle.patches[0].encoders.entrance.left is None
        model(**inputs)


def test_retrieval():
    model = zoo.retriever("colqwen2")
    inputs = flat("qwen2_vl", "mixed")
    inputs = alone(inputs, 0)
    inputs["pixel_values"] = inputs["pixel_values"][None]
    with torch.no_grad():
        dense = model(**inputs).embeddings
        with vtc.compress(model, "pixelprune") as handle:
            some = model(**inputs).embeddings
    assert some.shape[1] == int(handle.kept.sum()) < dense.shape[1]


@pytest.mark.parametrize("name", [name for name in zoo.FAMILIES if name not in QWEN])
def test_others_are_refused(name):
    model = zoo.build(name)
    for method in ("pixelprune", "divprune+pixelprune"):
        plan = vtc.explain(model, method)
        assert not plan.ok and "towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL" in str(plan)
        with pytest.raises(vtc.UnsupportedModelError, match="pixelprune"):
            vtc.compress(model, vtc.methods.make(method, keep=1.0))


def test_explain():
    for name in QWEN:
        assert "the tower's input" in str(vtc.explain(zoo.build(name), "pixelprune"))
        assert "the tower's input and the decoder's input" in str(vtc.explain(zoo.build(name), "divprune+pixelprune"))

    class Own(type(zoo.build("qwen2_vl").model.visual)):
        def forward(self, hidden_states, grid_thw, **kwargs):
            return super().forward(hidden_states, grid_thw, **kwargs)

    model = zoo.build("qwen2_vl", fresh=True)
    model.model.visual.__class__ = Own
    assert "its tower (Own) is none of transformers' own" in str(vtc.explain(model, "pixelprune"))
    assert vtc.explain(model, "divprune").ok


def test_encoders_and_servers_refuse():
    import timm

    from vtc.vllm.settings import Settings

    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    assert "before= is for multimodal LLMs" in str(vtc.explain(encoder, "tome+pixelprune"))
    for method in ("pixelprune", "tome+pixelprune"):
        with pytest.raises(vtc.OptionError, match="vLLM runs it on whole images"):
            Settings(vtc.methods.make(method, keep=1.0))
