"""Merging again between the decoder's layers, against the definition: rows alone, layer by layer, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import mllm_zoo as zoo
import pytest
import torch
from mllm_oracle import _masks, capture, dense_generate_positions, forward_logits, generate_logits
from pairs import matrix
from test_mllm import STEPS, TOLERANCE
from test_ppe import axis_of, pair_slots, slots_of

import vtc

DEEP = {"qwen3_vl"}  # adds to the image tokens behind its first layers
FAMILIES = [name for name in zoo.FAMILIES if not name.startswith("gemma3")]
CASES = [(name, case) for name in FAMILIES for case in ("single", "ragged", "pair", "video") if case in zoo.CASES[name]]


def steps_of(name: str) -> dict[int, float]:
    if name not in DEEP:
        return {1: 0.6, 2: 0.5}
    planes = len(zoo.build(name).config.vision_config.deepstack_visual_indexes)
    return {planes: 0.5}


@dataclass
class Token:
    """A row of the decoder: the prompt's column it stands at, those it stands for, and the unit it belongs to."""

    column: int
    members: list[int]
    unit: int | None = None


def merged(tokens: list[Token], x: torch.Tensor, keep: float) -> tuple[list[Token], torch.Tensor]:
    """Every unit merged by DPC-KNN, token by token: size-weighted means, members taken in turn from the children."""
    out: list[tuple[Token, torch.Tensor]] = [(t, x[i]) for i, t in enumerate(tokens) if t.unit is None]
    for unit in sorted({t.unit for t in tokens if t.unit is not None}):
        at = [i for i, t in enumerate(tokens) if t.unit == unit]
        rows = x[at]
        token_map = vtc.functional.dpc_knn(rows[None], keep=max(1, round(len(at) * keep)))
        for slot, anchor in enumerate(token_map.anchor[0].tolist()):
            inside = [i for i in (token_map.group[0] == slot).nonzero().flatten().tolist() if i != anchor]
            far = {i: round(float((rows[i].double() - rows[anchor].double()).norm()), 6) for i in inside}
            children = [tokens[at[i]] for i in [anchor, *sorted(inside, key=lambda i: (far[i], i))]]
            deepest = max(len(child.members) for child in children)
            members = [c.members[turn] for turn in range(deepest) for c in children if turn < len(c.members)]
            sizes = [len(tokens[at[i]].members) for i in [anchor, *inside]]
            mean = sum(n * rows[i].double() for n, i in zip(sizes, [anchor, *inside], strict=True)) / sum(sizes)
            out.append((Token(tokens[at[anchor]].column, members, unit), mean.to(x.dtype)))
    out.sort(key=lambda item: item[0].column)
    return [t for t, _ in out], torch.stack([row for _, row in out])


def rotation(text, name, places, tokens, slots):
    """cos and sin [1, S, 2 P], pair by pair; places [axes, L]."""
    axis, inv = axis_of(name), text.rotary_emb.inv_freq.tolist()
    slot = pair_slots(axis, slots)
    table = torch.zeros(1, len(tokens), 2 * len(inv), dtype=torch.float64)
    for i, token in enumerate(tokens):
        mine = token.members if slots > 1 else [token.column]
        carried = [mine[k % min(slots, len(mine))] for k in range(slots)]
        for pair, frequency in enumerate(inv):
            angle = float(places[axis[pair], carried[slot[pair]]]) * frequency
            table[0, i, pair] = table[0, i, pair + len(inv)] = angle
    return table.cos().float(), table.sin().float()


def oracle(name, model, inputs, units, keep, steps, slots, proportional, fed):
    """Prefill and decode logits of every row, and the rows that each layer cached. `units`: columns of each image."""
    from transformers import DynamicCache

    dense, text = capture(model, inputs), zoo.text_model(model)
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    places = dense.positions if dense.positions.ndim == 3 else dense.positions[None]
    prefill, decode, lengths = [], [], []
    for row in range(len(dense.embeds)):
        number = {c: u for u, (prompt, columns) in enumerate(units) if prompt == row for c in columns}
        real = dense.mask[row].nonzero().flatten().tolist()
        tokens, x = [Token(c, [c], number.get(c)) for c in real], dense.embeds[row, real]
        planes = [plane[row] for plane in dense.deepstack]
        if keep < 1:
            assert not planes, "planes would have to be merged too"
            tokens, x = merged(tokens, x, keep)
        cache, x, last = DynamicCache(), x[None], []
        held: list[list[Token]] = []
        for index, block in enumerate(text.layers):
            if index in steps:
                tokens, rows = merged(tokens, x[0], steps[index])
                x = rows[None]
            held.append(tokens)
            marks = dense.block[row, [t.column for t in tokens]]
            mask = _masks(text, marks, x.dtype)
            if proportional:
                mask = mask + torch.tensor([float(len(t.members)) for t in tokens]).log()
            table = rotation(text, name, places[:, row], tokens, slots)
            x = block(x, attention_mask=mask, position_embeddings=table, use_cache=True, **{zoo.CACHE: cache})
            if index < len(planes):
                x = x + planes[index][[t.column for t in tokens]]
        out = head(text.norm(x))[0]
        prefill.append(out)
        after = dense.next_position(row, "generate")
        for step in range(STEPS):
            x = embed(fed[row, step].view(1, 1))
            table = text.rotary_emb(x, after + step)
            for index, block in enumerate(text.layers):
                mask = torch.zeros(1, 1, 1, len(held[index]) + step + 1)
                if proportional:
                    sizes = [float(len(t.members)) for t in held[index]] + [1.0] * (step + 1)
                    mask = mask + torch.tensor(sizes).log()
                x = block(x, attention_mask=mask, position_embeddings=table, use_cache=True, **{zoo.CACHE: cache})
            last.append(head(text.norm(x))[0, -1])
        decode.append(torch.stack(last))
        lengths.append([len(level) for level in held])
    return prefill, torch.stack(decode), lengths


def units_of(handle):
    """The columns of every image, crop or frame, as the record says."""
    record = handle.patches[0].record
    return [
        (prompt, [int(c) for c in places if c >= 0]) for prompt, places in zip(record.rows, record.places, strict=True)
    ]


@matrix("name, case, attn, plain", [(*c, attn, plain) for c in CASES for attn in ("sdpa", "eager") for plain in (0, 1)])
@torch.no_grad()
def test_oracle_of_a_cascade(name, case, attn, plain):
    positions, proportional = ("original", False) if plain else ("ppe", True)
    model, inputs = zoo.build(name, attn), zoo.inputs(name, case)
    steps, keep = steps_of(name), 1.0 if name in DEEP else 0.8
    slots = slots_of(name) if positions == "ppe" else 1
    given = dense_generate_positions(name, model, inputs)
    tokens = torch.randint(5, 100, (len(inputs["input_ids"]), STEPS), generator=torch.Generator().manual_seed(3))
    method = vtc.DPCKNN(keep=keep, cascade=steps, positions=positions, proportional=proportional)
    with vtc.compress(model, method) as handle:
        prefill, decode = forward_logits(model, inputs, tokens, given)
        said, columns = generate_logits(model, inputs, tokens), handle.patches[0].record.columns
        report, units = handle.report, units_of(handle)
        cache = model(**inputs, use_cache=True)[zoo.CACHE]
    want, then, lengths = oracle(name, model, inputs, units, keep, steps, slots, proportional, tokens)
    for row in range(len(tokens)):
        real = columns[row] >= 0
        assert real.sum() == len(want[row])
        assert torch.allclose(prefill[row, real], want[row], atol=TOLERANCE, rtol=0), "prefill"
    assert torch.allclose(decode, then, atol=TOLERANCE, rtol=0), "decode"
    assert torch.allclose(said[:, 1:], then, atol=TOLERANCE, rtol=0), "generate"
    # every layer's cache is as long as the ratios say, and the report speaks of the mean over the layers
    for index in range(len(lengths[0])):
        longest = max(row[index] for row in lengths)
        assert cache.layers[index].keys.shape[2] == longest
        counts = report.tokens[index][0]
        assert (list(counts) if isinstance(counts, tuple) else [counts] * len(lengths)) == [r[index] for r in lengths]
    image = sum(len(columns) for _, columns in units)
    text = sum(int(m.sum()) for m in inputs["attention_mask"]) - image
    average = sum(sum(row[i] for row in lengths) - text for i in range(len(lengths[0]))) / len(lengths[0]) / image
    assert report.kept == pytest.approx(average)
    assert "on average over the layers" in str(report)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in DEEP])  # this oracle merges no planes
@torch.no_grad()
def test_proportional_attention_at_the_input_alone(name):
    model, inputs = zoo.build(name), zoo.inputs(name, "ragged")
    tokens = torch.randint(5, 100, (3, STEPS), generator=torch.Generator().manual_seed(3))
    given = dense_generate_positions(name, model, inputs)
    with vtc.compress(model, "dpc_knn", keep=0.4, proportional=True) as handle:
        prefill, decode = forward_logits(model, inputs, tokens, given)
        columns, units = handle.patches[0].record.columns, units_of(handle)
    want, then, _ = oracle(name, model, inputs, units, 0.4, {}, 1, True, tokens)
    for row in range(3):
        assert torch.allclose(prefill[row, columns[row] >= 0], want[row], atol=TOLERANCE, rtol=0)
    assert torch.allclose(decode, then, atol=TOLERANCE, rtol=0)
    plain, _, _ = oracle(name, model, inputs, units, 0.4, {}, 1, False, tokens)
    assert max((a - b).abs().max() for a, b in zip(want, plain, strict=True)) > 10 * TOLERANCE


@pytest.mark.parametrize("method", ["dpc_knn", "tome", "pitome"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_life_of_a_cascade(name, method):
    """A batch gives what its rows give alone; turns and beams go on; nothing merged, nothing changed."""
    model = zoo.build(name)
    options = {"keep": 1.0, "cascade": {1: 0.5, 2: 0.5}, "positions": "ppe", "proportional": True}
    inputs, dense = zoo.inputs(name, "ragged"), model(**zoo.inputs(name, "single")).logits
    with vtc.compress(model, method, **options):
        both = generate_logits(model, inputs, torch.full((3, 3), 7))
        for row in range(3):
            alone = generate_logits(model, zoo.alone(name, "ragged", row), torch.full((1, 3), 7))
            assert torch.allclose(both[row], alone[0], atol=TOLERANCE, rtol=0)
        single = zoo.inputs(name, "single")
        beams = model.generate(**single, max_new_tokens=4, num_beams=2, do_sample=False)
        assert beams.shape[1] == single["input_ids"].shape[1] + 4
        # a second question on the returned cache = the whole conversation at once
        first = model.generate(**single, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        more = torch.cat([first.sequences, torch.tensor([[9, 8, 7]])], dim=1)
        given = {k: v for k, v in single.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
        if "mm_token_type_ids" in single:
            types = torch.zeros_like(more)
            types[:, : single["input_ids"].shape[1]] = single["mm_token_type_ids"]
            given["mm_token_type_ids"] = types
        ask = {"input_ids": more, "attention_mask": torch.ones_like(more)}
        kind = {"max_new_tokens": 3, "do_sample": False}
        at_once = model.generate(**ask, **given, **kind)
        later = {k: v for k, v in given.items() if k == "mm_token_type_ids"}
        assert torch.equal(model.generate(**ask, **later, **{zoo.CACHE: first[zoo.CACHE]}, **kind), at_once)
    with vtc.compress(model, method, keep=1.0, cascade={1: 1.0}, positions="ppe"):
        assert torch.allclose(model(**zoo.inputs(name, "single")).logits, dense, atol=TOLERANCE, rtol=0)
    assert torch.equal(model(**zoo.inputs(name, "single")).logits, dense)


def test_gradients_flow_through_a_cascade():
    model, inputs = zoo.build("qwen2_5_vl", fresh=True), zoo.inputs("qwen2_5_vl", "single")
    with vtc.compress(model, "dpc_knn", keep=1.0, cascade={1: 0.5, 2: 0.5}, positions="ppe", proportional=True):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for part in (model.model.visual.patch_embed, model.model.language_model.layers[0].self_attn.q_proj):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_refusals():
    for bad, why in (
        ({0: 0.5}, "decoder layer >= 1"),
        ({1: 1.5}, "out of range"),
        ({1: 3}, "fraction"),
        (((1, 0.5), (1, 0.4)), "twice"),
        (7, "fraction that stays"),
    ):
        with pytest.raises(vtc.OptionError, match=why):
            vtc.DPCKNN(keep=1.0, cascade=bad)
    with pytest.raises(vtc.OptionError, match="merges nothing"):
        vtc.IDPruner(keep=0.5, cascade={1: 0.5})
    with pytest.raises(vtc.OptionError, match="merges nothing"):
        vtc.Random(keep=0.5, proportional=True)
    with pytest.raises(vtc.OptionError, match="visionzip reads the attention"):
        vtc.VisionZip(keep=0.5, cascade={1: 0.5})
    with pytest.raises(vtc.OptionError, match="tower"):
        vtc.ToMe(keep=0.9, where="tower", proportional=True)
    with pytest.raises(vtc.UnsupportedModelError, match="3 layers"):
        vtc.compress(zoo.build("llava"), "dpc_knn", keep=1.0, cascade={3: 0.5})
    with pytest.raises(vtc.UnsupportedModelError, match="sliding"):
        vtc.compress(zoo.build("gemma3"), "dpc_knn", keep=1.0, cascade={1: 0.5})
    with pytest.raises(vtc.UnsupportedModelError, match="sliding"):
        vtc.compress(zoo.build("gemma3_sliding"), "dpc_knn", keep=0.5, proportional=True)
    with pytest.raises(vtc.UnsupportedModelError, match="DeepStack"):
        vtc.compress(zoo.build("qwen3_vl"), "dpc_knn", keep=1.0, cascade={1: 0.5})
    model = zoo.build("llava")
    with vtc.compress(model, "dpc_knn", keep=1.0, cascade={1: 0.5}):
        with pytest.raises(vtc.InputError, match="static cache"):
            model.generate(**zoo.inputs("llava", "single"), max_new_tokens=2, cache_implementation="static")


def test_config_file(tmp_path):
    method = vtc.DPCKNN(keep=1.0, cascade={23: 0.45, 11: 0.45}, proportional=True)
    assert method.cascade == ((11, 0.45), (23, 0.45))
    vtc.save_config(method, tmp_path / "a.json")
    assert vtc.load_config(tmp_path / "a.json") == method


# -- temporal events --------------------------------------------------------------------------------------------------

VIDEO = [name for name in zoo.FAMILIES if "video" in zoo.CASES[name]]


def merged_rows(rows: torch.Tensor, keep: float, sizes: list[int] | None = None) -> list[list[int]]:
    """The groups that DPC-KNN makes of rows [N, C], anchor first."""
    token_map = vtc.functional.dpc_knn(rows[None], keep=max(1, round(len(rows) * keep)))
    groups = []
    for slot, anchor in enumerate(token_map.anchor[0].tolist()):
        inside = (token_map.group[0] == slot).nonzero().flatten().tolist()
        groups.append([anchor, *(i for i in inside if i != anchor)])
    return groups


@pytest.mark.parametrize("case", ["video", "image_video"])
@pytest.mark.parametrize("name", VIDEO)
@torch.no_grad()
def test_events(name, case):
    """Frames merged alone, clustered by their means, and merged again event by event: groups and the real ratio."""
    model, inputs = zoo.build(name), zoo.inputs(name, case)
    with vtc.compress(model, "dpc_knn", keep=0.6) as handle:
        model(**inputs)
        frames = [columns for _, columns in units_of(handle)]
    dense = capture(model, inputs).embeds[0]
    video = [u for u, columns in enumerate(frames) if inputs["input_ids"][0, columns[0]] == zoo.VIDEO]
    assert len(video) > 1
    alone = {u: [[frames[u][i] for i in g] for g in merged_rows(dense[frames[u]], 0.6)] for u in range(len(frames))}
    means = torch.stack([dense[frames[u]].double().mean(0).float() for u in video])
    events = [[video[i] for i in sorted(event)] for event in merged_rows(means, 0.5)]
    want = {frozenset(group) for u in range(len(frames)) if u not in video for group in alone[u]}
    for event in events:
        groups = sorted((group for u in event for group in alone[u]), key=lambda group: group[0])
        rows = torch.stack([dense[group].double().mean(0).float() for group in groups])
        again = merged_rows(rows, 0.6)
        want |= {frozenset(c for i in g for c in groups[i]) for g in again}
    with vtc.compress(model, "dpc_knn", keep=0.6, events=0.5, positions="ppe") as handle:
        out = model(**inputs, use_cache=True)
        record, report = handle.patches[0].record, handle.report
    found = set()
    for unit, places in enumerate(record.places):
        for slot in range(record.token_map.anchor.shape[1]):
            mine = places[(record.token_map.group[unit] == slot) & (places >= 0)]
            if len(mine):
                found.add(frozenset(mine.tolist()))
    assert found == want
    assert sum(report.after) == len(want)
    assert report.kept == pytest.approx(len(want) / sum(map(len, frames)))
    assert f"{len(events)} events of {len(video)} frames" in report.notes
    text = inputs["input_ids"].shape[1] - sum(map(len, frames))
    assert out[zoo.CACHE].layers[0].keys.shape[2] == text + len(want)


@torch.no_grad()
def test_events_are_merged_like_any_groups():
    """The logits are those of the slow model that is given the events' groups."""
    name = "qwen2_5_vl"
    model, inputs = zoo.build(name), zoo.inputs(name, "video")
    tokens = torch.randint(5, 100, (1, STEPS), generator=torch.Generator().manual_seed(3))
    given = dense_generate_positions(name, model, inputs)
    with vtc.compress(model, "dpc_knn", keep=0.6, events=0.5) as handle:
        prefill, decode = forward_logits(model, inputs, tokens, given)
    from mllm_oracle import oracle as short
    from test_mllm import replaced

    want = short(name, model, inputs, handle.kept, replaced(model, inputs, handle), forced=tokens)
    assert torch.allclose(prefill[0], want.prefill[0], atol=TOLERANCE, rtol=0)
    assert torch.allclose(decode, want.decode, atol=TOLERANCE, rtol=0)


def test_events_refusals():
    with pytest.raises(vtc.OptionError, match="events"):
        vtc.DPCKNN(keep=0.5, events=1.5)
    with pytest.raises(vtc.OptionError, match="fraction"):
        vtc.DPCKNN(keep=20, events=0.5)
    with pytest.raises(vtc.UnsupportedModelError, match="images only"):
        vtc.compress(zoo.build("llava"), "dpc_knn", keep=0.5, events=0.5)
