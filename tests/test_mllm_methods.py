"""Every method in every multimodal family, and the evidence that adapters gather for them."""

from __future__ import annotations

import mllm_zoo as zoo
import pytest
import torch
from mllm_oracle import dense_features, dense_generate_positions

import vtc
from vtc.adapters.multimodal.capture import Capture
from vtc.adapters.multimodal.families.base import IMAGE, VIDEO
from vtc.adapters.multimodal.find import find as find_llms
from vtc.methods import METHODS

NAMES = list(zoo.FAMILIES)
VIDEO_METHODS = [name for name in ("evs", "flashvid", "vidcom2") if name in METHODS]
NEEDS = frozenset({"attention", "middle", "keys", "projector"})


def allowed(name, method):
    """Whether `explain` says that the method goes with the family; a refusal must say why."""
    plan = vtc.explain(zoo.build(name), make(name, method))
    if not plan.ok:
        assert len(str(plan)) > 40
    return plan.ok


def make(name, method, keep=0.3):
    options = {}
    if METHODS[method].in_decoder and name == "qwen3_vl":
        options["layer"] = 2
    return vtc.methods.make(method, keep=keep, **options)


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if cls.budgeted and not cls.rectangle])
@pytest.mark.parametrize("name", NAMES)
def test_every_method_in_every_family(name, method):
    model, inputs = zoo.build(name), zoo.inputs(name, "ragged")
    if not allowed(name, method):
        with pytest.raises(vtc.UnsupportedModelError):
            vtc.compress(model, make(name, method))
        windowed = method in ("fastv", "dart") and name.startswith("gemma3")  # windows would shift
        assert windowed or (method in VIDEO_METHODS and "video" not in zoo.CASES[name])  # the two refusals
        return
    positions = dense_generate_positions(name, model, inputs)  # keys, which DART measures, depend on them
    with torch.no_grad():
        dense, before = model(**inputs).logits, zoo.fingerprint(model)
        with vtc.compress(model, make(name, method, 1.0)):
            assert torch.equal(model(**inputs).logits, dense)
        with vtc.compress(model, make(name, method)) as handle:
            out = model(**inputs, position_ids=positions)
            again = model(**inputs, position_ids=positions)
            kept, report, token_map = handle.kept, handle.report, handle.token_map
            assert torch.equal(out.logits, again.logits)
            for row in range(len(kept)):
                single = zoo.alone(name, "ragged", row)
                model(**single)
                assert torch.equal(handle.kept[0], kept[row, -single["input_ids"].shape[1] :]), f"row {row} alone"
        assert zoo.fingerprint(model) == before and torch.equal(model(**inputs).logits, dense)
    wanted = [max(1, round(0.3 * n)) for n in report.before]
    if METHODS[method].only_videos:
        wanted = list(report.before)
        assert "pictures stay whole" in report.notes
    if method == "downsample":
        assert all(0 < k <= w for k, w in zip(report.after, wanted, strict=True))
    else:
        assert list(report.after) == wanted
    assert METHODS[method].only_videos or METHODS[method].merges == (token_map.order is None)
    size = token_map.size.sum(1)
    assert torch.equal(size, torch.tensor(report.before if METHODS[method].merges else report.after).float())
    visual = zoo.placeholders(model, inputs["input_ids"])
    assert kept[~visual].all()  # text is never pruned
    assert int((kept & visual).sum()) == sum(report.after) + newlines(name, inputs)


def newlines(name, inputs):
    """Placeholders that no unit holds, which always stay."""
    model = zoo.build(name)
    if not hasattr(model.model, "image_newline"):
        return 0
    return int((dense_features(model, inputs) == model.model.image_newline).all(-1).sum())


@pytest.mark.parametrize("pooled", [False, True])
def test_budgets(pooled):
    """Counts are per image; pooled, per prompt."""
    model, inputs = zoo.build("qwen2_5_vl"), zoo.inputs("qwen2_5_vl", "ragged")
    with vtc.compress(model, "divprune", keep=6, pooled=pooled) as handle:
        model(**inputs)
        visual = zoo.placeholders(model, inputs["input_ids"])
        per_prompt = (handle.kept & visual).sum(1).tolist()
        images = [sum(run[0] == row for run in zoo.runs(model, inputs["input_ids"])) for row in range(3)]
    assert per_prompt == ([6] * 3 if pooled else [6 * n for n in images])
    model, inputs = zoo.build("llava_next"), zoo.inputs("llava_next", "single")
    extra = newlines("llava_next", inputs)
    assert extra > 0
    with vtc.compress(model, "random", keep=7) as handle:
        model(**inputs)
        assert sum(handle.report.after) == 7 and min(handle.report.after) >= 1
        assert int((handle.kept & zoo.placeholders(model, inputs["input_ids"])).sum()) == 7 + extra


# -- evidence ---------------------------------------------------------------------------------------------------------


def gathered(name, case):
    """The evidence of a call by hand: (site, {kind: (features, layout, evidence)})."""
    model, inputs = zoo.build(name, fresh=True), zoo.inputs(name, case)
    site = next(iter(find_llms(model)))
    evidence = Capture(site.family, site.inner, NEEDS)
    evidence.install()
    found = {}
    for kind in site.family.modalities:
        if kind.pixels not in inputs:
            continue
        evidence.start()
        with torch.no_grad():
            names = ("image_grid_thw", "video_grid_thw", "image_sizes", "pixel_attention_mask", "batch_num_images")
            want = [
                n
                for n in names
                if n in inputs and (kind.name in n or n in ("pixel_attention_mask", "batch_num_images"))
            ]
            if kind is VIDEO:
                want = [n for n in want if n == "video_grid_thw"]
            output = getattr(site.inner, kind.encode)(
                inputs[kind.pixels], **{n: inputs[n] for n in want}, return_dict=True
            )
            heard = evidence.stop()
            lengths = [x.numel() // x.shape[-1] for x in output.pooler_output]
            layout = site.family.layout(site.inner, kind, lengths, inputs)
            features = torch.cat([x.reshape(-1, x.shape[-1]) for x in output.pooler_output])
            found[kind.name] = features, layout, evidence.gather(heard, kind, layout, len(features), inputs)
    vtc.remove(model)
    return site, found


@pytest.mark.parametrize("case", ["single", "ragged", "video"])
@pytest.mark.parametrize("name", NAMES)
def test_the_projectors_input_is_each_tokens_own(name, case):
    """Projected again, it gives the token: so crops, windows, folds and newlines are told apart rightly."""
    if case not in zoo.CASES[name]:
        assert case == "video"
        return
    site, found = gathered(name, case)
    for kind, (features, layout, evidence) in found.items():
        if name == "llava_onevision" and kind == "video":
            continue  # a token is the mean of projected patches, its evidence that of the mean patch
        with torch.no_grad():
            again = site.family.projection(site.inner)(evidence["inputs"])
        own = torch.ones(len(features), dtype=torch.bool) if layout.source is None else layout.source >= 0
        exact = own
        if name == "llava_onevision" and case == "ragged":  # one image is resized behind the projector
            exact = torch.zeros_like(own)
            for item in {unit.item for unit in layout.units}:
                exact[next(unit.rows for unit in layout.units if unit.item == item)] = True
        assert torch.allclose(again[exact], features[exact], atol=1e-5), kind
        inside = torch.cat([unit.rows for unit in layout.units]).sort().values
        assert torch.equal(inside, own.nonzero().flatten())  # every token but the newlines is in one unit


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_the_towers(name):
    """Against the maps that eager attention makes in the layer, summed by the definition."""
    site, found = gathered(name, "ragged" if name != "gemma3" else "pair")
    features, layout, evidence = found[IMAGE.name]
    model = zoo.build(name, "eager", fresh=True)
    inner = next(iter(find_llms(model))).inner
    inputs = zoo.inputs(name, "ragged" if name != "gemma3" else "pair")
    block = site.family.attentions(inner)[-1]
    space = __import__("sys").modules[type(block).__module__]
    original, maps = space.eager_attention_forward, []

    def record(module, *args, **kwargs):
        out = original(module, *args, **kwargs)
        if module is block:
            maps.append(out[1].detach())
        return out

    space.eager_attention_forward = record
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        space.eager_attention_forward = original
    prefix = site.family.prefix(inner, {})
    received = []
    for chunk in maps:  # [n, heads, P, P]
        for image in chunk.double().mean(1):
            if prefix:
                row = image[0, prefix:]
                received.append(row / row.sum())
            else:
                received.append(image.sum(0))
    per_patch = torch.cat(received)
    patches = len(per_patch) if name.startswith("qwen") else len(received[0])
    if name.startswith("qwen"):
        rows = per_patch.view(-1, 4).sum(1)
    else:
        per_image = site.family.rows_per_image(inner, patches)
        members = site.family.patches(inner, patches, per_image)
        rows = torch.cat([image[members].sum(1) for image in received])
    want = rows if layout.source is None else torch.where(layout.source < 0, 0.0, rows[layout.source.clamp(min=0)])
    if name in ("idefics3", "smolvlm"):  # padded patches look around too in an eager map
        real = evidence["attention"] > 0
        assert torch.isfinite(evidence["attention"]).all() and real.any()
        return
    if prefix:  # ours is over the patch keys alone per head, then averaged
        assert torch.allclose(evidence["attention"].double(), want, rtol=0.2, atol=1e-3)
    else:
        assert torch.allclose(evidence["attention"].double(), want, rtol=1e-4, atol=1e-5)
    assert evidence["keys"].shape[0] == len(features)


def test_crops_in_two_rows_and_columns():
    """A large image, four crops stitched: every token is projected from its own patch, and sits in its own crop."""
    from vtc.adapters.multimodal.families.llava_next import LlavaNext

    model = zoo.build("llava_next").model
    pixels, size = torch.randn(1, 5, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([[50, 60]])
    seen = []
    hook = model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        features = model.get_image_features(pixels, size, return_dict=True).pooler_output[0]
    hook.remove()
    layout = LlavaNext().layout(model, IMAGE, [len(features)], {"image_sizes": size})
    own = layout.source >= 0
    with torch.no_grad():
        again = model.multi_modal_projector(seen[0].flatten(0, 1)[layout.source[own]])
    assert torch.allclose(again, features[own], atol=1e-5)
    assert [int(layout.source[unit.rows[0]]) // 16 for unit in layout.units] == [0, 1, 2, 3, 4]
    assert all(len({int(s) // 16 for s in layout.source[unit.rows]}) == 1 for unit in layout.units)


def test_shares_of_a_number():
    from vtc.budget import kept_of_units

    def units(*lengths):
        return lengths, [0] * len(lengths)

    assert kept_of_units(7, *units(10, 20, 30)) == [1, 2, 4]  # the largest remainder gets the last
    assert kept_of_units(4, *units(1, 1, 100)) == [1, 1, 2]  # everybody one, at the cost of the largest
    assert kept_of_units(60, *units(10, 20, 30)) == [10, 20, 30]
    with pytest.raises(vtc.OptionError, match="more than the 60"):
        kept_of_units(61, *units(10, 20, 30))
    with pytest.raises(vtc.OptionError, match="less than one"):
        kept_of_units(2, *units(10, 20, 30))


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "idefics3", "paligemma"])
def test_fastv_reads_the_last_words_attention(name):
    """Against the eager map of the layer before: what the last text token gives to each image's keys."""
    model, inputs = zoo.build(name, "eager"), zoo.inputs(name, "single")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[1][0].double()  # [heads, L, L]
        with vtc.compress(model, "fastv", keep=0.4, layer=2) as handle:
            model(**inputs)
    record = handle.patches[0].record
    last = int((~zoo.placeholders(model, inputs["input_ids"])[0]).nonzero().max())
    for unit in range(len(record.rows)):
        places = record.places[unit][record.token_map.group[unit] >= -1][: record.lengths[unit]]
        given = maps[:, last, places]
        score = (given / given.sum(-1, keepdim=True)).mean(0)
        best = score.argsort(descending=True, stable=True)[: record.token_map.mask()[unit].sum()]
        kept = record.token_map.anchor[unit][record.token_map.anchor[unit] >= 0]
        assert torch.equal(best.sort().values, kept)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "paligemma"])
def test_dart_reads_the_decoders_keys(name):
    """Against the definition on the plain model's cache and hidden states, one pivot after the other."""
    model, inputs = zoo.build(name), zoo.inputs(name, "single")
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, use_cache=True)
        with vtc.compress(model, "dart", keep=0.4, layer=2) as handle:
            model(**inputs)
    hidden = torch.nn.functional.normalize(out.hidden_states[2][0].double(), dim=-1)
    norms = out[zoo.CACHE].layers[1].keys[0].double().abs().sum((0, 2))  # [L]
    visual = zoo.placeholders(model, inputs["input_ids"])[0]
    images, words = visual.nonzero().flatten(), (~visual).nonzero().flatten()
    wanted = max(1, round(0.4 * len(images)))

    def longest(at):
        return at[norms[at].argsort(descending=True, stable=True)][: min(4, wanted)]

    kept, pivots = longest(images).tolist(), [*longest(images).tolist(), *longest(words)[:4].tolist()]
    quota = -(-(wanted - len(kept)) // len(pivots))
    for pivot in pivots:
        free = torch.tensor([i for i in images.tolist() if i not in kept])
        order = free[(hidden[free] @ hidden[pivot]).argsort(stable=True)]
        kept += order[: min(quota, wanted - len(kept))].tolist()
    assert sorted(kept) == handle.kept[0].logical_and(visual).nonzero().flatten().tolist()


def test_units_come_in_prompt_order():
    """A video in front of an image: the map's rows follow the prompt, and what each unit holds is its own."""
    from vtc.adapters.multimodal.token_batch import EncodedFeatures, PlacedTokens, TokenBatch
    from vtc.layout import Layout, Unit

    def seen(kind, value, columns, *lengths):
        edges = torch.tensor([0, *lengths]).cumsum(0).tolist()
        units = tuple(Unit(torch.arange(a, b), i) for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False)))
        rows = torch.full((edges[-1], 2), float(value)) + torch.arange(edges[-1])[:, None]
        return PlacedTokens(kind, None, EncodedFeatures(None, lengths, Layout(units), {}), rows, torch.tensor(columns))

    image = seen(IMAGE, 100, [6, 7, 8, 21, 22], 3, 2)
    video = seen(VIDEO, 200, [1, 2, 3, 4], 2, 2)
    batch = TokenBatch([image, video], size=2, length=15, pooled=False)
    assert batch.prompts == [0, 0, 0, 1]
    assert batch.places.tolist() == [[1, 2, -1], [3, 4, -1], [6, 7, 8], [6, 7, -1]]
    first = batch.packed(batch.rows)[:, 0, 0].tolist()
    assert first == [200.0, 202.0, 100.0, 103.0]
    assert len({unit.item for unit in batch.units}) == 4  # a number is per item, and no two kinds share one
    pooled = TokenBatch([image, video], size=2, length=15, pooled=True)
    assert pooled.prompts == [0, 1] and pooled.places[0].tolist() == [1, 2, 3, 4, 6, 7, 8]
