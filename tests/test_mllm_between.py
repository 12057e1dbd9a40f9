"""Methods between the layers of a decoder, and merged tokens with several positions, in the classes of the generic
family: FastV, DART, cascades, proportional attention and PPE, against the plain decoder on every column."""

from __future__ import annotations

from functools import partial

import mllm_classes as classes
import pytest
import torch
from between_oracle import Row, carrying, gone, plain, slots_of
from classes_oracle import entry, expected, said
from mllm_zoo import CACHE, fingerprint
from pairs import matrix
from test_cascade import Token, merged, units_of
from test_mllm_classes import NAMES, STEPS

import vtc

TOLERANCE = 1e-4
_WINDOWS = "windows of this decoder's sliding layers would shift"
_STATE = "is no attention and keeps a state of its own"
BETWEEN_REFUSED = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "lfm2_vl"), _STATE),
    **dict.fromkeys(("lfm3_vl", "exaone4_5", "cohere_compass", "muse_glimmer", "muse_spark", "dots3_note"), _WINDOWS),
    **dict.fromkeys(("gemma4", "gemma4_moe", "gemma4_unified", "gemma3n", "step3p7"), _WINDOWS),
    **dict.fromkeys(("aya_vision", "cohere2_vision"), _WINDOWS),
    **dict.fromkeys(("hy_v4_vl", "mistral_large4"), "DynamicIndexedLayer"),
}
PPE_REFUSED = ("mistral3_ministral3", "mistral3_mistral4", "mistral_large4")  # read positions outside of the table
OPEN = [name for name in NAMES if name not in BETWEEN_REFUSED]
DEEP = {"qwen3_vl_moe": 2, "qwen3_omni_moe_thinker": 2, "cosmos3_omni": 2, "granite_docling": 2}
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


PRODUCT = [
    (name, kind, attn, method)
    for name in OPEN
    for kind in ("single", "ragged", "video")
    if kind in classes.CASES[name] and not (kind == "video" and name in ("video_llama_3", "perception_lm"))
    for attn in ("sdpa", "eager")
    if attn == "sdpa" or classes.CLASSES[name].eager
    for method in methods_of(name)
]


def shown(case):
    name, kind, attn, method = case
    return {(name, kind == "ragged"), (kind, attn, method)}


@matrix("name, kind, attn, method", PRODUCT, shown)
def test_oracle(name, kind, attn, method):
    """Prefill and ten steps of decoding are those of the plain decoder, where nobody attends to what is gone."""
    model, inputs, method = classes.build(name, attn), classes.inputs(name, kind), METHODS[method]
    text, tokens = classes.text_model(model), words(inputs)
    with vtc.compress(model, method) as handle:
        got = said(model, inputs, tokens)
        record, units = handle.patches[0].record, units_of(handle)
    real = [row.nonzero().flatten().tolist() for row in inputs["attention_mask"]]
    rows = [Row([[real[p].index(c) for c in inside] for p, inside in units if p == r], len(real[r])) for r in range(len(real))]
    if method.in_decoder:
        left = iter([[i for i, c in enumerate(real[r]) if record.kept[r, c]] for r in range(len(rows))])
        steps = {2: lambda tokens, x: gone(next(left))(tokens, x)}
    else:
        keeps = dict(method.cascade) | ({} if method.keep == 1.0 else {0: method.keep})
        steps = {layer: partial(merged, keep=keep) for layer, keep in keeps.items()}
    slots = 1
    if method.ppe:
        slots = slots_of(name, text.rotary_emb)
    with plain(name, text, rows, steps, method.proportional, slots):
        prefill, decode = expected(name, model, inputs, torch.ones_like(record.kept), tokens)
    for row, (mine, want) in enumerate(zip(rows, prefill, strict=True)):
        here = record.columns[row] >= 0
        columns = [token.column for token in mine.tokens]
        assert [real[row][c] for c in columns] == record.columns[row, here].tolist()
        assert torch.allclose(got[0][row, here], want[columns], atol=TOLERANCE, rtol=0), "prefill"
    if name != "janus":  # whose `generate` is its own
        for step in range(STEPS):
            assert torch.allclose(got[1 + step][:, -1], decode[:, step], atol=TOLERANCE, rtol=0), f"step {step}"


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
    [(n, k, a) for n, k, a, m in dict.fromkeys(
        (name, kind, attn, "")
        for name in NAMES
        if name not in PPE_REFUSED
        for kind in ("single", "ragged", "video")
        if kind in classes.CASES[name] and not (kind == "video" and name in ("video_llama_3", "perception_lm"))
        for attn in ("sdpa", "eager")
        if attn == "sdpa" or classes.CLASSES[name].eager
    )],
    lambda case: {case[0], case[1:]},
)
def test_ppe(name, kind, attn):
    """Merged tokens turn by the positions of their members, those that stay alone by their own."""
    model, inputs = classes.build(name, attn), classes.inputs(name, kind)
    text, tokens, seen = classes.text_model(model), words(inputs), entry(model, inputs)
    batch, length = inputs["input_ids"].shape
    positions = seen.get("position_ids")
    positions = torch.arange(length)[None] if positions is None else positions
    positions = (positions[-3:] if positions.ndim == 3 else positions).expand(*positions.shape[:-2][:0], *positions[-3:].shape[:-2], batch, length)
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
        assert torch.allclose(got[0][row, here], prefill[row], atol=TOLERANCE, rtol=0), "prefill"
    if name != "janus":
        for step in range(STEPS):
            assert torch.allclose(got[1 + step][:, -1], decode[:, step], atol=TOLERANCE, rtol=0), f"step {step}"


# -- what FastV and DART read -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", [name for name in OPEN if classes.CLASSES[name].eager])
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


@pytest.mark.parametrize("name", OPEN)
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
