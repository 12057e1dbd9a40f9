"""PPE against its definition: slots, positions, and whole models with a rotation computed pair by pair."""

from __future__ import annotations

import math
from contextlib import contextmanager

import mllm_zoo as zoo
import pytest
import torch
from mllm_oracle import (
    dense_deepstack,
    dense_features,
    dense_generate_positions,
    forward_logits,
    generate_logits,
    oracle,
)
from test_mllm import STEPS, TOLERANCE

import vtc
from vtc.adapters.multimodal.rotary import Positions, axes
from vtc.positions import PPE, members, sections, slot_of_pair, slots_for

# The rotary pairs of each zoo model by axis, in the order of frequencies, written down rather than asked for.
AXES = {
    "qwen2_vl": [0] * 4 + [1] * 2 + [2] * 2,
    "qwen2_5_vl": [0] * 4 + [1] * 2 + [2] * 2,
    "qwen3_vl": [0, 1, 2] * 4 + [0] * 4,
}
SLOTS = {"qwen2_vl": 2, "qwen2_5_vl": 2, "qwen3_vl": 4}
CASES = [(name, case) for name in zoo.FAMILIES for case in ("single", "ragged", "video") if case in zoo.CASES[name]]


def axis_of(name: str) -> list[int]:
    return AXES.get(name, [0] * 8)


def slots_of(name: str) -> int:
    return SLOTS.get(name, 8)


def pair_slots(axis: list[int], slots: int) -> list[int]:
    """By counting: the pairs of an axis, one after the other, fill the slots evenly."""
    seen, out = {}, []
    for number in axis:
        seen[number] = seen.get(number, -1) + 1
        out.append(seen[number] // (axis.count(number) // slots))
    return out


# -- the pieces -------------------------------------------------------------------------------------------------------


def test_map_of_the_reference_page():
    """K = 8 over sections [16, 24, 24]: rows 0 0 1 1 .. 7 7 | 8 8 8 .. 15 15 15 | 16 16 16 .. 23 23 23."""
    axis = torch.tensor([0] * 16 + [1] * 24 + [2] * 24)
    row = axis * 8 + slot_of_pair(axis, 8)
    want = [k for k in range(8) for _ in range(2)] + [k for k in range(8, 24) for _ in range(3)]
    assert row.tolist() == want
    assert slot_of_pair(axis, 8).tolist() == pair_slots(axis.tolist(), 8)


def test_interleaved_pairs_count_by_axis():
    axis = torch.tensor([0, 1, 2] * 20 + [0] * 4)  # Qwen3-VL, [24, 20, 20]
    assert sections(axis) == (24, 20, 20)
    assert slot_of_pair(axis, 4).tolist() == pair_slots(axis.tolist(), 4)


@pytest.mark.parametrize(
    ("found", "slots"), [((16, 24, 24), 8), ((64,), 8), ((24, 20, 20), 4), ((11, 11, 10), 1), ((12,), 6), ((32, 32), 8)]
)
def test_default_slots(found, slots):
    assert slots_for(PPE(), found) == slots


def test_slots_that_do_not_fit_are_refused():
    with pytest.raises(vtc.OptionError, match=r"slots=5.*\[16, 24, 24\].*1, 2, 4, 8"):
        slots_for(PPE(5), (16, 24, 24))
    with pytest.raises(vtc.OptionError, match=r"\[32, 32\]"):  # the paper's form for images, by name
        slots_for(PPE(32), (16, 24, 24))
    assert slots_for(PPE(32), (32, 32)) == 32
    for slots in (0, -1, 2.0, True, "8"):
        with pytest.raises(vtc.OptionError, match="slots="):
            PPE(slots)


def closed(n: int, d: int) -> torch.Tensor:
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return (torch.sin(0.7 * i * (j + 1) + 0.3 * j) + 0.5 * torch.cos(0.11 * i * i + j)).float()


def test_members_of_the_reference_page():
    """The clusters of DPC-KNN's vector, nearest to the centre first, and the positions that K = 8 slots carry."""
    token_map = vtc.functional.dpc_knn(closed(24, 8)[None], keep=11)
    want = {20: [20, 2, 11], 14: [14, 5, 23], 22: [22, 4, 7, 16], 19: [19, 13], 18: [18, 9], 12: [12, 21]}
    want |= {17: [17, 8], 15: [15, 6], 1: [1, 10], 0: [0], 3: [3]}
    index = members(token_map, 8)[:, 0]
    for slot, anchor in enumerate(token_map.anchor[0].tolist()):
        mine = want[anchor]
        assert index[:, slot].tolist() == [mine[k % len(mine)] for k in range(8)]
    grid = torch.stack([torch.full((24,), 7), 7 + torch.arange(24) // 6, 7 + torch.arange(24) % 6])[:, None]
    ids = vtc.functional.ppe_positions(token_map, grid, slots=8)
    assert ids.shape == (8, 3, 1, 11)
    at = token_map.anchor[0].tolist().index(20)
    assert ids[:3, :, 0, at].tolist() == [[7, 10, 9], [7, 7, 9], [7, 8, 12]]  # (3, 2), (0, 2), (1, 5) behind 7
    assert torch.equal(ids[:, :, 0, at], ids[torch.arange(8) % 3][:, :, 0, at])
    flat = vtc.functional.ppe_positions(token_map, torch.arange(24)[None], slots=8)
    assert torch.equal(flat[:, 0], index)


def test_members_of_a_ragged_batch_and_of_a_second_merge():
    features = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(20) < torch.tensor([20, 11, 4])[:, None]
    token_map = vtc.functional.dpc_knn(features, keep=0.4, mask=mask)
    index = members(token_map, 4)
    for b in range(3):
        alone = vtc.functional.dpc_knn(features[b : b + 1, mask[b]], keep=0.4)
        assert torch.equal(index[:, b, : alone.anchor.shape[1]], members(alone, 4)[:, 0])
        assert (index[:, b, alone.anchor.shape[1] :] == -1).all()
    # n children, round-robin: with K >= n every child of a second merge is heard
    later = vtc.functional.dpc_knn(token_map.merge(features), keep=0.5, mask=token_map.mask())
    both = token_map.compose(later)
    index, children = members(both, 4), later.group
    for b in range(3):
        for slot in range(both.anchor.shape[1]):
            mine = (children[b] == slot).nonzero().flatten().tolist()
            ids = index[:, b, slot].tolist()
            if mine:
                heard = [int(token_map.group[b, i]) for i in ids]
                assert set(heard[: len(mine)]) == set(mine[:4]) or len(mine) > 4 and set(heard) <= set(mine)
                assert heard[0] == int(later.anchor[b, slot])


def test_positions_of_another_shape_are_refused():
    token_map = vtc.functional.dpc_knn(closed(24, 8)[None], keep=11)
    for bad in (torch.arange(24), torch.zeros(1, 23), torch.zeros(3, 2, 24)):
        with pytest.raises(vtc.InputError, match="positions must be"):
            vtc.functional.ppe_positions(token_map, bad, slots=2)
    with pytest.raises(vtc.OptionError, match="slots="):
        vtc.functional.ppe_positions(token_map, torch.zeros(1, 24), slots=0)


# -- the rotation of every family -------------------------------------------------------------------------------------


def rotary(name: str):
    return zoo.text_model(zoo.build(name)).rotary_emb


def kinds(module) -> list[tuple]:
    return [(kind,) for kind in getattr(module, "layer_types", None) or []] or [()]


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_rotation(name):
    """K equal ids are the model's own rotation, to the last bit; any K ids are a rotation."""
    module = rotary(name)
    axis = axes(module, *kinds(module)[0])
    assert axis.tolist() == axis_of(name)
    common = math.gcd(*sections(axis))
    generator = torch.Generator().manual_seed(2)
    shape = (3, 2, 7) if name in AXES else (2, 7)
    x = torch.randn(2, 7, 64, generator=generator)
    for slots in (k for k in range(1, common + 1) if common % k == 0):
        patch = Positions(module, PPE(slots))
        ids = torch.randint(0, 900, (slots, *shape), generator=generator)
        for kind in kinds(module):
            same = patch.table(x, ids[:1].expand(slots, *shape), *kind)
            for ours, own in zip(same, module(x, ids[0], *kind), strict=True):
                assert torch.equal(ours, own)
            cos, sin = patch.table(x, ids, *kind)
            half = cos.shape[-1] // 2
            assert torch.equal(cos[..., :half], cos[..., half:]) and torch.equal(sin[..., :half], sin[..., half:])
            assert torch.allclose(cos**2 + sin**2, torch.ones(()), atol=1e-6)
    assert "forward" not in module.__dict__  # nothing was installed


# -- whole models -----------------------------------------------------------------------------------------------------


@contextmanager
def slow_rotation(text, rows, axis, slots):
    """The decoder's rotary embedding, for the prefill of each row in turn, pair by pair from explicit ids.

    `rows`: of each row, of each token, the positions [axes] of its K members.
    """
    module, turn = text.rotary_emb, {"row": 0, "calls": 0}
    own, slot = type(module).forward, pair_slots(axis, slots)

    def forward(x, position_ids, *kind):
        if position_ids.shape[-1] == 1:  # decoding: text
            return own(module, x, position_ids, *kind)
        ids = rows[turn["row"]]
        inv = getattr(module, f"{kind[0]}_inv_freq" if kind else "inv_freq").tolist()
        table = torch.zeros(1, len(ids), 2 * len(inv), dtype=torch.float64)
        for token, carried in enumerate(ids):
            for pair, frequency in enumerate(inv):
                angle = float(carried[slot[pair]][axis[pair]]) * frequency
                table[0, token, pair] = table[0, token, pair + len(inv)] = angle
        turn["calls"] += 1
        if turn["calls"] == len(kinds(module)):
            turn["row"], turn["calls"] = turn["row"] + 1, 0
        return table.cos().to(x.dtype), table.sin().to(x.dtype)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
    assert turn["row"] == len(rows)


def expected(name, model, inputs, handle, positions, slots):
    """Merged rows, and of every token that is left the positions of its members, by sorting distances to the anchor."""
    record = handle.patches[0].record
    visual = zoo.placeholders(model, inputs["input_ids"])
    number = (visual.flatten().long().cumsum(0) - 1).view(visual.shape)
    features, planes = dense_features(model, inputs), dense_deepstack(model, inputs)
    places = positions if positions.ndim == 3 else positions[None]
    carried = {}
    new, levels = features.clone(), [plane.clone() for plane in planes]
    for unit, prompt in enumerate(record.rows):
        group, columns = record.token_map.group[unit], record.places[unit]
        for slot, anchor in enumerate(record.token_map.anchor[unit].tolist()):
            if anchor < 0:
                continue
            inside = [i for i in (group == slot).nonzero().flatten().tolist() if i != anchor]
            at = number[prompt, columns]
            far = {i: float((features[at[i]].double() - features[at[anchor]].double()).norm()) for i in inside}
            ordered = [anchor, *sorted(inside, key=lambda i: (round(far[i], 6), i))]
            mine = [ordered[k % min(slots, len(ordered))] for k in range(slots)]
            carried[prompt, int(columns[anchor])] = [places[:, prompt, columns[i]].tolist() for i in mine]
            for rows, whole in ((new, features), *zip(levels, planes, strict=True)):
                rows[at[anchor]] = whole[at[ordered]].double().mean(0).float()
    kept = handle.kept[visual]
    rows = []
    for row in range(len(visual)):
        left = (handle.kept[row] & inputs["attention_mask"][row].bool()).nonzero().flatten().tolist()
        rows.append([carried.get((row, c), [places[:, row, c].tolist()] * slots) for c in left])
    replaced = {"embeds": new[kept], "deepstack": [level[kept] for level in levels]} if planes else new[kept]
    return replaced, rows


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_oracle_with_ppe(name, case, attn):
    model, inputs = zoo.build(name, attn), zoo.inputs(name, case)
    positions = dense_generate_positions(name, model, inputs)
    tokens = torch.randint(5, 100, (len(inputs["input_ids"]), STEPS), generator=torch.Generator().manual_seed(3))
    slots = slots_of(name)
    with vtc.compress(model, "dpc_knn", keep=0.3, positions="ppe") as handle:
        prefill, decode = forward_logits(model, inputs, tokens, positions)
        said = generate_logits(model, inputs, tokens)
        columns = handle.patches[0].record.columns
    replaced, rows = expected(name, model, inputs, handle, positions, slots)
    assert any(len({tuple(ids) for ids in token}) > 1 for row in rows for token in row), "nothing carries two positions"
    with slow_rotation(zoo.text_model(model), rows, axis_of(name), slots):
        want = oracle(name, model, inputs, handle.kept, replaced, forced=tokens)
    for row in range(len(tokens)):
        real = columns[row] >= 0
        assert torch.allclose(prefill[row, real], want.prefill[row], atol=TOLERANCE, rtol=0), "prefill"
    assert torch.allclose(decode, want.decode, atol=TOLERANCE, rtol=0), "decode"
    assert torch.allclose(said[:, 1:], want.decode, atol=TOLERANCE, rtol=0), "generate"
    plain = oracle(name, model, inputs, handle.kept, replaced, forced=tokens)  # with the anchors' positions: not that
    assert max((a - b).abs().max() for a, b in zip(want.prefill, plain.prefill, strict=True)) > 10 * TOLERANCE


@pytest.mark.parametrize("method", ["pitome", "tome", "visionzip", "downsample", "dpc_knn"])
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_every_merging_method(name, method):
    """PPE changes what is said, not what is kept; alone in a batch as in company; nothing merged, nothing changed."""
    if method == "downsample" and name in ("llava_next", "llava_onevision"):
        options = {"keep": 0.5}
    else:
        options = {"keep": 0.3}
    model, inputs = zoo.build(name), zoo.inputs(name, "single")
    with torch.no_grad():
        dense = model(**inputs).logits
        with vtc.compress(model, method, **options) as handle:
            plain, kept = model(**inputs).logits, handle.kept
        with vtc.compress(model, method, positions="ppe", **options) as handle:
            ours = model(**inputs).logits
            assert torch.equal(handle.kept, kept)
        with vtc.compress(model, method, positions=vtc.PPE(1), **options):
            assert torch.equal(model(**inputs).logits, plain)
        assert (ours - plain).abs().max() > 1e-4
        with vtc.compress(model, method, keep=1.0, positions="ppe"):
            assert torch.equal(model(**inputs).logits, dense)
        if "ragged" in zoo.CASES[name]:
            with vtc.compress(model, method, positions="ppe", **options):
                both = generate_logits(model, zoo.inputs(name, "ragged"), torch.full((3, 2), 7))
                for row in range(3):
                    single = generate_logits(model, zoo.alone(name, "ragged", row), torch.full((1, 2), 7))
                    assert torch.allclose(both[row], single[0], atol=TOLERANCE, rtol=0)
        assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize(("name", "tower"), [("llava", "vision_tower"), ("qwen2_5_vl", "visual")])
def test_the_tower_runs_once(name, tower):
    model, calls = zoo.build(name), []
    hook = getattr(model.model, tower).register_forward_hook(lambda *_: calls.append(1))
    try:
        with vtc.compress(model, "dpc_knn", keep=0.3, positions="ppe"):
            model.generate(**zoo.inputs(name, "single"), max_new_tokens=5, do_sample=False)
    finally:
        hook.remove()
    assert len(calls) == 1


def test_gradients_flow_through_merges_and_slots():
    model, inputs = zoo.build("qwen2_5_vl", fresh=True), zoo.inputs("qwen2_5_vl", "single")
    with vtc.compress(model, "dpc_knn", keep=0.3, positions="ppe"):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for part in (model.model.visual.patch_embed, model.model.language_model.layers[0].self_attn.q_proj):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


# -- saying no --------------------------------------------------------------------------------------------------------


def test_refusals():
    with pytest.raises(vtc.OptionError, match="drops tokens"):
        vtc.IDPruner(keep=0.5, positions="ppe")
    with pytest.raises(vtc.OptionError, match="positions='rope'"):
        vtc.ToMe(keep=0.5, positions="rope")
    model = zoo.build("qwen2_5_vl")
    before = dict(model.model.language_model.rotary_emb.__dict__)
    with pytest.raises(vtc.UnsupportedModelError, match=r"slots=4.*\[4, 2, 2\]"):
        vtc.compress(model, "dpc_knn", keep=0.5, positions=vtc.PPE(4))
    assert dict(model.model.language_model.rotary_emb.__dict__) == before


def test_two_axes_take_the_papers_32_slots():
    """A decoder whose sections are [0, 32, 32]: the paper's two-dimensional form for images."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

    config = zoo.FAMILIES["qwen2_5_vl"].config().text_config
    config.head_dim = 128
    config.rope_parameters = {**config.rope_parameters, "mrope_section": [0, 32, 32]}
    module = Qwen2_5_VLRotaryEmbedding(config)
    assert sections(axes(module)) == (32, 32)
    patch = Positions(module, PPE(32))
    assert patch.slot[()].tolist() == [*range(32)] * 4


def test_sections_without_a_common_divisor():
    """K = 1 is the anchor's position: said beforehand and in the report, not left to be found out."""
    import transformers

    config = zoo.FAMILIES["qwen2_5_vl"].config()
    config.text_config.rope_parameters["mrope_section"] = [3, 3, 2]
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    inputs = zoo.inputs("qwen2_5_vl", "single")
    assert "up to 1 members" in str(vtc.explain(model, "dpc_knn", keep=0.5, positions="ppe"))
    with torch.no_grad(), vtc.compress(model, "dpc_knn", keep=0.5, positions="ppe") as handle:
        ours = model(**inputs).logits
        assert "PPE has no effect" in handle.report.notes
    with torch.no_grad(), vtc.compress(model, "dpc_knn", keep=0.5):
        assert torch.equal(model(**inputs).logits, ours)


def test_config_file(tmp_path):
    for positions in ("original", "ppe", vtc.PPE(4)):
        method = vtc.DPCKNN(keep=0.5, positions=positions)
        vtc.save_config(method, tmp_path / "a.json")
        assert vtc.load_config(tmp_path / "a.json") == method
    assert vtc.DPCKNN(keep=0.5, positions=vtc.PPE()) == vtc.DPCKNN(keep=0.5, positions="ppe")
