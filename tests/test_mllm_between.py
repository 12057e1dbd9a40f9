"""Methods between the layers of a decoder, and merged tokens with several positions, in the classes of the generic
family: FastV, DART, cascades, proportional attention and PPE, against the plain decoder on every column."""

from __future__ import annotations

from functools import partial

import mllm_classes as classes
import pytest
import torch
from between_oracle import AXES, MIXED, NEXT, Row, carrying, gone, plain, slots_of
from classes_oracle import expected, said, tolerance
from mllm_oracle import entered
from mllm_zoo import CACHE, fingerprint
from pairs import matrix
from test_cascade import Token, merged, merged_rows, units_of
from test_mllm_classes import CASES, OWN, STEPS
from test_mllm_classes import NAMES as EVERY

import vtc

NAMES = [name for name in EVERY if name not in OWN]  # whose features come behind the decoder's entry
_WINDOWS = "windows of this decoder's sliding layers would shift"
_STATE = "is no attention and keeps a state of its own"
BETWEEN_REFUSED = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "lfm2_vl"), _STATE),
    **dict.fromkeys(("glm5_next", "qwen4_exp"), _STATE),
    **dict.fromkeys(("lfm3_vl", "exaone4_5", "cohere_compass", "muse_glimmer", "muse_spark", "dots3_note"), _WINDOWS),
    **dict.fromkeys(("gemma4", "gemma4_moe", "gemma4_unified", "gemma3n", "step3p7"), _WINDOWS),
    **dict.fromkeys(("aya_vision", "cohere2_vision"), _WINDOWS),
    **dict.fromkeys(("hy_v4_vl", "mistral_large4"), "DynamicIndexedLayer"),
}
PPE_REFUSED = {
    **dict.fromkeys(("mistral3_ministral3", "mistral3_mistral4", "mistral_large4"), "outside of its rotary table"),
    "glm5_next": "needs a rotary table, and its decoder .* has none",
    "qwen4_exp": "keeps positions in its cache",
    "hunyuan_vl": "turns column c together with neither",  # a pair is of two axes
}
OPEN = [name for name in NAMES if name not in BETWEEN_REFUSED]
DEEP = ("qwen3_vl_moe", "qwen3_omni_moe_thinker", "cosmos3_omni", "granite_docling")  # two planes each
KINDS = ("single", "ragged", "video")
METHODS = {
    "fastv": vtc.FastV(keep=0.4, layer=2),
    "dart": vtc.DART(keep=0.4, layer=2),
    "cascade": vtc.DPCKNN(keep=0.8, cascade={1: 0.6, 2: 0.5}),
    "deep": vtc.DPCKNN(keep=1.0, cascade={2: 0.5}),
    "sized": vtc.DPCKNN(keep=0.8, cascade={2: 0.5}, proportional=True),
    "proportional": vtc.DPCKNN(keep=0.4, proportional=True),
    "ppe": vtc.DPCKNN(keep=0.8, cascade={2: 0.5}, proportional=True, positions="ppe"),
}


def methods_of(name):
    if name in PPE_REFUSED:
        return [m for m in METHODS if m != "ppe"]
    return [m for m in METHODS if not (m == "cascade" and name in DEEP)]  # it merges before the second layer


def words(inputs):
    rows = len(inputs["input_ids"])
    return torch.randint(5, 100, (rows, STEPS), generator=torch.Generator().manual_seed(3))


def attentions(name):
    return ("sdpa", "eager") if classes.CLASSES[name].eager else ("sdpa",)


PRODUCT = [
    (name, kind, attn, method)
    for name in OPEN
    for kind in CASES[name]
    if kind in KINDS
    for attn in attentions(name)
    for method in methods_of(name)
]


def shown(case):
    name, kind, attn, method = case
    return {name, (kind, method), (attn, method)}


@matrix("name, kind, attn, method", PRODUCT, shown)
def test_oracle(name, kind, attn, method):
    """Prefill and ten steps of decoding are those of the plain decoder, where nobody attends to what is gone."""
    model, inputs, method = classes.build(name, attn), classes.inputs(name, kind), METHODS[method]
    text, tokens = classes.text_model(model), words(inputs)
    with vtc.compress(model, method) as handle:
        got = said(model, inputs, tokens)
        record, units = handle.patches[0].record, units_of(handle)
    real = [row.nonzero().flatten().tolist() for row in inputs["attention_mask"]]
    rows = [
        Row([[columns.index(c) for c in inside] for p, inside in units if p == row], len(columns))
        for row, columns in enumerate(real)
    ]
    if method.in_decoder:
        left = iter([[i for i, c in enumerate(columns) if record.kept[r, c]] for r, columns in enumerate(real)])
        steps = {2: lambda tokens, x: gone(next(left), tokens, x)}
    else:
        keeps = dict(method.cascade) | ({} if method.keep == 1.0 else {0: method.keep})
        steps = {layer: partial(merged, keep=keep) for layer, keep in keeps.items()}
    slots = slots_of(name, text.rotary_emb) if method.ppe else 1
    with plain(name, text, rows, steps, method.proportional, slots):
        prefill, decode = expected(name, model, inputs, torch.ones_like(record.kept), tokens)
    for row, (mine, want) in enumerate(zip(rows, prefill, strict=True)):
        here = record.columns[row] >= 0
        columns = [token.column for token in mine.tokens]
        assert [real[row][c] for c in columns] == record.columns[row, here].tolist()
        assert torch.allclose(got[0][row, here], want[columns], atol=tolerance(name), rtol=0), "prefill"
    if name != "janus":  # whose `generate` is its own
        for step in range(STEPS):
            assert torch.allclose(got[1 + step][:, -1], decode[:, step], atol=tolerance(name), rtol=0), f"step {step}"


def members_of(name, inputs, handle, features):
    """{(row, column): the columns that a merged token stands for}, the anchor first, then by distance to it."""
    record, out = handle.patches[0].record, {}
    for unit, row in enumerate(record.rows):
        group, places = record.token_map.group[unit], record.places[unit]
        for slot, anchor in enumerate(record.token_map.anchor[unit].tolist()):
            if anchor < 0:
                continue
            x = features[row, places[places >= 0]].double()
            inside = [i for i in (group == slot).nonzero().flatten().tolist() if i != anchor]
            inside.sort(key=lambda i: (round(float((x[i] - x[anchor]).norm()), 6), i))
            out[row, int(places[anchor])] = [int(places[i]) for i in (anchor, *inside)]
    return out


@matrix(
    "name, kind, attn",
    [(n, k, attn) for n in NAMES if n not in PPE_REFUSED for k in CASES[n] for attn in attentions(n) if k in KINDS],
    lambda case: {str(AXES.get(case[0])), case[0] in NEXT, case[0] if case[0] in MIXED else "", case[1:]},
)
def test_ppe(name, kind, attn):
    """Merged tokens turn by the positions of their members, those that stay alone by their own."""
    model, inputs = classes.build(name, attn), classes.inputs(name, kind)
    text, tokens, seen = classes.text_model(model), words(inputs), entered(model, classes.text_model(model), inputs)
    batch, length = inputs["input_ids"].shape
    positions = seen.get("position_ids")
    positions = torch.arange(length)[None] if positions is None else positions
    positions = positions[-3:] if positions.ndim == 3 else positions  # the words' own come first
    positions = positions.expand(*positions.shape[:-2], batch, length)
    method = vtc.DPCKNN(keep=0.3, positions="ppe")
    with vtc.compress(model, method) as handle:
        got, kept = said(model, inputs, tokens), handle.kept
        columns, notes = handle.patches[0].record.columns, handle.report.notes
        slots = handle.patches[0].positions.slots
    groups = members_of(name, inputs, handle, seen["inputs_embeds"])
    assert any(len(of) > 1 for of in groups.values())
    rows = []
    for row in range(batch):
        left = (kept[row] & inputs["attention_mask"][row].bool()).nonzero().flatten().tolist()
        mine = [Token(c, of) for (prompt, c), of in groups.items() if prompt == row]
        rows.append((positions[..., row : row + 1, :], mine, left))
    with carrying(name, text, rows, slots):
        prefill, decode = expected(name, model, inputs, kept, tokens, groups)
    assert slots == slots_of(name, text.rotary_emb) and (slots > 1 or "PPE has no effect" in notes)
    for row in range(batch):
        here = columns[row] >= 0
        assert torch.allclose(got[0][row, here], prefill[row], atol=tolerance(name), rtol=0), "prefill"
    if name != "janus":
        for step in range(STEPS):
            assert torch.allclose(got[1 + step][:, -1], decode[:, step], atol=tolerance(name), rtol=0), f"step {step}"


# -- what FastV and DART read -----------------------------------------------------------------------------------------


SOME = (
    "kimi_k25",
    "mistral3_mistral4",
    "molmo2",
    "glm4v",
    "lighton_ocr",
    "qwen3_vl_moe",
    "ernie4_5_vl_moe",
    "idefics2",
)


def inside(model, inputs, layer):
    """Of the plain model: the attention maps of `layer` (if it makes any), its keys, and what enters the next layer."""
    text, seen = classes.text_model(model), {}
    hooks = [
        text.layers[layer].self_attn.register_forward_hook(lambda m, args, out: seen.update(maps=out[1])),
        text.layers[layer + 1].register_forward_pre_hook(lambda m, args: seen.update(hidden=args[0])),
    ]
    try:
        held = model(**inputs, use_cache=True)[CACHE].layers[layer]
    finally:
        for hook in hooks:
            hook.remove()
    expand = getattr(text.layers[layer].self_attn, "expand_kv", None)  # some cache what keys and values are made from
    keys = held.keys if expand is None else expand(held.keys, held.values)[0]
    return seen["maps"], keys, seen["hidden"]


def chosen(handle):
    """Of every image, crop or frame: its columns, and which of them stay."""
    record = handle.patches[0].record
    for unit, places in enumerate(record.places):
        kept = record.token_map.anchor[unit]
        yield places[places >= 0], kept[kept >= 0].tolist()


@matrix(
    "name",
    [(name,) for name in OPEN if classes.CLASSES[name].eager],
    lambda case: {case[0] if case[0] in SOME else ""},
)
@torch.no_grad()
def test_fastv_reads_the_last_words_attention(name):
    """Against the eager map of the layer before: what the last word gives to each image's columns."""
    model, inputs = classes.build(name, "eager"), classes.inputs(name, "single")
    maps, _, _ = inside(model, inputs, 1)
    last = int((~classes.placeholders(name, inputs["input_ids"])[0]).nonzero().max())
    for same in (model, classes.build(name)):
        with vtc.compress(same, METHODS["fastv"]) as handle:
            same(**inputs)
        for places, kept in chosen(handle):
            given = maps[0, :, last, places].double()
            score = (given / given.sum(-1, keepdim=True)).mean(0)
            best = score.argsort(descending=True, stable=True)[: max(1, round(0.4 * len(places)))]
            assert sorted(best.tolist()) == kept


@matrix("name", [(name,) for name in OPEN], lambda case: {case[0] if case[0] in SOME else ""})
@torch.no_grad()
def test_dart_reads_the_decoders_keys(name):
    """Against the definition on the plain model's cache and hidden states, one pivot after the other."""
    model, inputs = classes.build(name), classes.inputs(name, "single")
    _, keys, hidden = inside(model, inputs, 1)
    with vtc.compress(model, METHODS["dart"]) as handle:
        model(**inputs)
    hidden = torch.nn.functional.normalize(hidden[0].double(), dim=-1)
    norms = keys[0].double().abs().sum((0, 2))
    words = (~classes.placeholders(name, inputs["input_ids"])[0]).nonzero().flatten()
    for places, stay in chosen(handle):
        wanted = max(1, round(0.4 * len(places)))

        def longest(at, wanted=wanted):
            return at[norms[at].argsort(descending=True, stable=True)][: min(4, wanted)].tolist()

        kept, pivots = longest(places), [*longest(places), *longest(words, 4)]
        quota = -(-(wanted - len(kept)) // len(pivots))
        for pivot in pivots:
            free = torch.tensor([c for c in places.tolist() if c not in kept], dtype=torch.long)
            order = free[(hidden[free] @ hidden[pivot]).argsort(stable=True)]
            kept += order[: min(quota, wanted - len(kept))].tolist()
        assert sorted(kept) == places[stay].tolist()


# -- saying no --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BETWEEN_REFUSED)
def test_refusals_between_layers(name):
    """`explain` and `compress` say the same, and leave nothing behind."""
    model = classes.build(name)
    before = fingerprint(model)
    for method in ("fastv", "dart", "deep", "proportional"):
        why = BETWEEN_REFUSED[name]
        if method == "proportional" and why == _WINDOWS:
            why = "sliding layers hold a part of the sizes only"
        plan = vtc.explain(model, METHODS[method])
        assert not plan.ok and why in str(plan)
        with pytest.raises(vtc.UnsupportedModelError, match=why):
            vtc.compress(model, METHODS[method])
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", PPE_REFUSED)
def test_several_positions_are_refused_where_the_table_is_not_all(name):
    with pytest.raises(vtc.UnsupportedModelError, match=PPE_REFUSED[name]):
        vtc.compress(classes.build(name), "dpc_knn", keep=0.5, positions="ppe")


@pytest.mark.parametrize("name", DEEP)
def test_layers_in_front_of_planes_are_refused(name):
    for method in (vtc.FastV(keep=0.5, layer=1), vtc.DPCKNN(keep=1.0, cascade={1: 0.5})):
        with pytest.raises(vtc.UnsupportedModelError, match="DeepStack adds to the image tokens behind 2 layers"):
            vtc.compress(classes.build(name), method)


def test_planes_that_are_not_told_are_refused():
    model = classes.build("granite_docling", fresh=True)
    model.config.vision_config.deepstack_visual_indexes = None
    for method in ("fastv", "deep"):
        with pytest.raises(vtc.UnsupportedModelError, match="DeepStack adds to image tokens behind layers vtc cannot"):
            vtc.compress(model, METHODS[method])
    assert vtc.explain(model, METHODS["proportional"]).ok


def test_windows_without_types_of_layers_are_refused():
    """A Mistral decoder names no types of layers, and has a window all the same."""
    import transformers

    config = classes.CLASSES["idefics2"].config()
    config.text_config.sliding_window = 8
    model = transformers.AutoModelForImageTextToText.from_config(config)
    for method, why in (("fastv", _WINDOWS), ("deep", _WINDOWS), ("proportional", "sliding layers hold a part")):
        assert why in str(vtc.explain(model, METHODS[method]))
    assert vtc.explain(model, "divprune").ok


def test_layers_that_take_what_is_not_cut_are_refused():
    model = classes.build("vipllava", fresh=True)
    layer = model.model.language_model.layers[1]

    class Told(type(layer)):
        def forward(self, hidden_states, per_layer_input=None, **kwargs):
            return super().forward(hidden_states, **kwargs)

    layer.__class__ = Told
    for method in ("fastv", "deep", "proportional"):
        with pytest.raises(vtc.UnsupportedModelError, match="takes per_layer_input, which vtc does not cut"):
            vtc.compress(model, METHODS[method])


# -- temporal events --------------------------------------------------------------------------------------------------

# Their videos are encoded frame by frame as images are, in chunks, or with frames folded into one.
UNFRAMED = (
    "kimi_k25",
    "ernie4_5_vl_moe",
    "hy_v4_vl",
    "gemma4",
    "gemma4_moe",
    "gemma4_unified",
    "molmo2",
    "video_llava",
)
UNFRAMED += ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr")
FRAMED = [name for name in NAMES if "video" in CASES[name] and name not in UNFRAMED]


@matrix("name", [(name,) for name in FRAMED], lambda case: {str(AXES.get(case[0]))})
@torch.no_grad()
def test_events(name):
    """Frames merged alone, clustered by their means, and merged again event by event."""
    model, inputs = classes.build(name), classes.inputs(name, "video")
    tokens, features = words(inputs), entered(model, classes.text_model(model), inputs)["inputs_embeds"]
    with vtc.compress(model, "dpc_knn", keep=0.6) as handle:
        model(**inputs)
        frames = [columns for _, columns in units_of(handle)]
    x = features[0]
    alone = [[[columns[i] for i in group] for group in merged_rows(x[columns], 0.6)] for columns in frames]
    means = torch.stack([x[columns].double().mean(0).float() for columns in frames])
    want, events = set(), merged_rows(means, 0.5)
    for event in events:
        groups = sorted((group for frame in event for group in alone[frame]), key=lambda group: group[0])
        rows = torch.stack([x[group].double().mean(0).float() for group in groups])
        want |= {frozenset(c for i in again for c in groups[i]) for again in merged_rows(rows, 0.6)}
    with vtc.compress(model, vtc.DPCKNN(keep=0.6, events=0.5)) as handle:
        got, kept, notes = said(model, inputs, tokens), handle.kept, handle.report.notes
        groups = members_of(name, inputs, handle, features)
    assert {frozenset(group) for group in groups.values()} == want
    assert 1 < len(frames) and f"{len(events)} events of {len(frames)} frames" in notes
    prefill, decode = expected(name, model, inputs, kept, tokens, groups)
    assert torch.allclose(got[0][0], prefill[0], atol=tolerance(name), rtol=0)
    for step in range(STEPS):
        assert torch.allclose(got[1 + step][:, -1], decode[:, step], atol=tolerance(name), rtol=0), f"step {step}"


@pytest.mark.parametrize("name", UNFRAMED)
def test_events_are_refused_where_frames_are_not_told(name):
    with pytest.raises(vtc.UnsupportedModelError, match="does not know which tokens of .* are one"):
        vtc.compress(classes.build(name), vtc.DPCKNN(keep=0.5, events=0.5))


def test_events_of_images_are_refused():
    with pytest.raises(vtc.UnsupportedModelError, match="with images only"):
        vtc.compress(classes.build("mistral3"), vtc.DPCKNN(keep=0.5, events=0.5))


@pytest.mark.parametrize("name", sorted(OWN))
def test_what_was_not_compared_is_refused(name):
    for method in METHODS.values():
        with pytest.raises(vtc.UnsupportedModelError, match="was not tried on"):
            vtc.compress(classes.build(name), method)
