"""PiToMe and ToMe inside the vision tower of a multimodal LLM: fewer tokens leave it, and the placeholders follow."""

from __future__ import annotations

import mllm_zoo as zoo
import pytest
import torch
from mllm_oracle import dense_features, dense_generate_positions, forward_logits, oracle

import vtc
from vtc.adapters.multimodal.support import tower_site

NAMES = ["llava", "llava_siglip", "llava_next", "paligemma"]
CASES = [(name, case) for name in NAMES for case in ("single", "ragged", "pair")]


@pytest.mark.parametrize("method", ["pitome", "tome"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_decoder_gets_what_the_tower_left(name, case, method):
    """The oracle, fed the features of the compressed tower (as the encoder's own adapter gives them) at the anchors."""
    model, inputs = zoo.build(name), zoo.inputs(name, case)
    positions = dense_generate_positions(name, model, inputs)
    tokens = torch.randint(5, 100, (len(inputs["input_ids"]), 4), generator=torch.Generator().manual_seed(3))
    with vtc.compress(model, method, keep=0.8, where="tower") as handle:
        prefill, decode = forward_logits(model, inputs, tokens, positions)
        record, kept, report = handle.patches[0].record, handle.kept, handle.report
    # Alone, the same tower gives every token its group's row at the layer that is projected.
    site = tower_site(vtc.explain(model, method, keep=0.8, where="tower")._sites[0])
    tower = vtc.adapters.encoders.patch.EncoderPatch(site, vtc.methods.make(method, keep=0.8))
    tower.install(model)
    try:
        wide = dense_features(model, inputs)
        whole = tower.stage.total.drop_prefix(tower.stage.prefix)
    finally:
        vtc.remove(model)
    visual = zoo.placeholders(model, inputs["input_ids"])
    want = oracle(name, model, inputs, kept, wide[kept[visual]], forced=tokens, steps=4)
    for row in range(len(tokens)):
        real = record.columns[row] >= 0
        assert torch.allclose(prefill[row, real], want.prefill[row], atol=1e-5, rtol=0)
    assert torch.allclose(decode, want.decode, atol=1e-5, rtol=0)
    assert 0 < sum(report.after) < sum(report.before)
    if name != "llava_next":  # one unit is one image of the tower, and its groups are the tower's
        assert torch.equal(record.token_map.group, whole.group)
        assert torch.equal(record.token_map.anchor, whole.anchor)
    assert report.macs_after < report.macs_before and (kept | visual).all()


@pytest.mark.parametrize("name", NAMES)
def test_keep_all_and_off_again(name):
    model, inputs = zoo.build(name), zoo.inputs(name, "ragged")
    with torch.no_grad():
        dense = model(**inputs).logits
        with vtc.compress(model, "tome", keep=1.0, where="tower"):
            assert torch.equal(model(**inputs).logits, dense)
        with vtc.compress(model, "tome", keep=9 if name != "llava_next" else 6, where="tower") as handle:
            assert model(**inputs).logits.shape[1] < dense.shape[1]
            if name != "llava_next":
                assert set(handle.report.after) == {9}
        assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "internvl", "llava_onevision"])
def test_refused_where_tokens_are_rearranged(name):
    with pytest.raises(vtc.UnsupportedModelError, match=r'where="llm" works'):
        vtc.compress(zoo.build(name), "tome", keep=0.9, where="tower")


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
@torch.no_grad()
def test_merged_and_copied_back(name):
    """As by the tower's own adapter: its work is less, and the decoder gets every token."""
    model, inputs = zoo.build(name), zoo.inputs(name, "ragged")
    dense = model(**inputs).logits
    with vtc.compress(model.model.vision_model, "tome", keep=0.8):
        want = model(**inputs).logits
    assert vtc.explain(model, "tome", where="tower").ok
    with vtc.compress(model, "tome", keep=0.8, where="tower") as handle:
        assert torch.equal(model(**inputs).logits, want) and not torch.equal(want, dense)
        report = handle.report
    assert report.macs_after < report.macs_before and sum(report.after) < sum(report.before)
    with vtc.compress(model, "tome", keep=1.0, where="tower"):
        assert torch.equal(model(**inputs).logits, dense)
    assert torch.equal(model(**inputs).logits, dense)


def test_cut_groups_keep_a_member():
    """Where an image is cut to its shape, a group may lose its anchor: then its first member stands for it."""
    model, inputs = zoo.build("llava_next"), zoo.inputs("llava_next", "ragged")
    with vtc.compress(model, "tome", keep=0.6, where="tower") as handle:
        model(**inputs)
        token_map = handle.token_map
    real = (token_map.group >= 0).sum(1)
    assert torch.equal(token_map.size.sum(1), real.float())
    assert (token_map.group.gather(1, token_map.anchor.clamp(min=0))[token_map.anchor >= 0] >= 0).all()


@pytest.mark.parametrize("name", ["llava", "paligemma"])
@torch.no_grad()
def test_what_the_tower_merged_carries_its_members_positions(name):
    """PPE means the decoder's positions, also where the tower merges; K = 1 is the anchor's."""
    model, inputs = zoo.build(name), zoo.inputs(name, "single")
    said = {}
    for positions in ("original", vtc.PPE(1), "ppe"):
        with vtc.compress(model, "tome", keep=0.8, where="tower", positions=positions) as handle:
            said[str(positions)] = model(**inputs).logits
            assert handle.patches[0].tower.slot is None
    plain, one, many = said.values()
    assert torch.equal(plain, one) and (plain - many).abs().max() > 1e-4
