"""Compressed multimodal LLMs against the oracle: what the plain model says of just those tokens at their positions."""

from __future__ import annotations

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
from pairs import matrix

import vtc

TOLERANCE = 1e-5
METHODS = {"selector": ("idpruner", {"keep": 0.3}), "merger": ("visionzip", {"keep": 0.3})}
STEPS = 10
ATTENTION = ("sdpa", "eager")


def replaced(model, inputs, handle):
    """The rows that the merged tokens should have, for the oracle: the means of their groups, by the definition."""
    record = handle.patches[0].record
    visual = zoo.placeholders(model, inputs["input_ids"])
    number = (visual.flatten().long().cumsum(0) - 1).view(visual.shape)

    def means(rows):
        new = rows.clone()
        for unit, prompt in enumerate(record.rows):
            group, places = record.token_map.group[unit], record.places[unit]
            for slot, anchor in enumerate(record.token_map.anchor[unit].tolist()):
                if anchor >= 0:
                    members = number[prompt, places[group == slot]]
                    new[number[prompt, places[anchor]]] = rows[members].double().mean(0).float()
        return new[handle.kept[visual]]

    embeds = means(dense_features(model, inputs))
    planes = dense_deepstack(model, inputs)
    return {"embeds": embeds, "deepstack": [means(plane) for plane in planes]} if planes else embeds


CASES = [(name, case) for name in zoo.FAMILIES for case in zoo.CASES[name]]
# The plain model counts padding on the right into its sliding windows, so in a batch it is not what it is alone.
CASES.remove(("gemma3_sliding", "ragged_right"))


@matrix("name, case, kind, attn", [(*one, kind, attn) for one in CASES for kind in METHODS for attn in ATTENTION])
def test_oracle(name, case, kind, attn):
    method, options = METHODS[kind]
    model, inputs = zoo.build(name, attn), zoo.inputs(name, case)
    positions = dense_generate_positions(name, model, inputs)
    length = inputs["input_ids"].shape[1]
    tokens = torch.randint(5, 100, (len(inputs["input_ids"]), STEPS), generator=torch.Generator().manual_seed(3))
    with vtc.compress(model, method, **options) as handle:
        prefill, decode = forward_logits(model, inputs, tokens, positions)
        said = None if case == "ragged_right" else generate_logits(model, inputs, tokens)
        if case == "text":
            kept = columns = None
            with pytest.raises(vtc.VTCError, match="no call with an image"):
                str(handle.report)
        else:
            kept, columns = handle.kept, handle.patches[0].record.columns
        bare = model(**inputs).logits if case in ("single", "pair", "video") else None
    new = replaced(model, inputs, handle) if kind == "merger" and kept is not None else None
    kept = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if kept is None else kept
    want = oracle(name, model, inputs, kept, new, forced=tokens)
    mask = inputs["attention_mask"].bool()
    if bare is not None:  # without positions, which the model then counts for itself
        assert torch.allclose(bare[0], want.prefill[0], atol=TOLERANCE, rtol=0), "forward"
    for row in range(len(tokens)):
        real = mask[row] if columns is None else columns[row] >= 0
        assert real.sum() == (kept & mask)[row].sum()
        if columns is not None:  # padding behind a prompt stays there, the rest goes in front
            assert real.flip(0).long().argmax() == mask[row].flip(0).long().argmax()
            assert int(real.long().diff(prepend=torch.zeros(1)).clamp(min=0).sum()) == 1
        assert torch.allclose(prefill[row, real], want.prefill[row], atol=TOLERANCE, rtol=0), "prefill"
    assert torch.allclose(decode, want.decode, atol=TOLERANCE, rtol=0), "decode"
    if said is not None:
        last = torch.stack([rows[-1] for rows in want.prefill])
        assert torch.allclose(said[:, 0], last, atol=TOLERANCE, rtol=0), "generate, prefill"
        assert torch.allclose(said[:, 1:], want.decode, atol=TOLERANCE, rtol=0), "generate, decode"
    if case != "text":
        assert not kept.all() and kept.shape == (len(tokens), length)


# -- fewer tokens from a layer of the decoder on ----------------------------------------------------------------------

LAYERED = [(name, case) for name, case in CASES if not name.startswith("gemma3") and case != "text"]


def layered_oracle(model, inputs, kept, layer, tokens):
    """Prefill and decode logits of every row alone, its decoder's layers called one by one by the definition."""
    from mllm_oracle import _masks, _part, capture
    from transformers import DynamicCache

    dense, text = capture(model, inputs), zoo.text_model(model)
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    prefill, decode = [], []
    for row in range(len(kept)):
        everything = dense.mask[row].nonzero().flatten()
        few = (dense.mask[row] & kept[row]).nonzero().flatten()
        inside = torch.isin(everything, few).nonzero().flatten()
        cache, logits = DynamicCache(), []
        for step in range(STEPS + 1):
            if step == 0:
                x, positions = (
                    dense.embeds[row, everything][None],
                    dense.positions[..., row : row + 1, :][..., everything],
                )
            else:
                x = embed(tokens[row, step - 1].view(1, 1))
                positions = dense.next_position(row, "generate") + step - 1
            table = text.rotary_emb(x, positions)
            for index, block in enumerate(text.layers[: text.config.num_hidden_layers]):
                behind = index >= layer
                columns = few if behind else everything
                if step == 0 and index == layer:
                    x, table = x[:, inside], tuple(t[:, inside] for t in table)
                marks = torch.cat([dense.block[row, columns], torch.full((step,), -1)])
                start = 0 if step == 0 else len(columns) + step - 1
                mask = _part(_masks(text, marks, x.dtype), start, start + x.shape[1])
                x = block(x, attention_mask=mask, position_embeddings=table, use_cache=True, **{zoo.CACHE: cache})
                if step == 0 and index < len(dense.deepstack):
                    x = x + dense.deepstack[index][row, columns]
            out = head(text.norm(x))[0]
            logits.append(out[-1])
            if step == 0:
                prefill.append(out)
        decode.append(torch.stack(logits[1:]))
    return prefill, torch.stack(decode)


@matrix(
    "name, case, method, attn", [(*one, m, attn) for one in LAYERED for m in ("fastv", "dart") for attn in ATTENTION]
)
def test_layered_oracle(name, case, method, attn):
    model, inputs = zoo.build(name, attn), zoo.inputs(name, case)
    planes = len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))
    layer = max(planes, 1 if method == "dart" else 2)
    if layer >= model.config.get_text_config().num_hidden_layers:
        pytest.fail("the zoo's model is too shallow for this")
    positions = dense_generate_positions(name, model, inputs)
    tokens = torch.randint(5, 100, (len(inputs["input_ids"]), STEPS), generator=torch.Generator().manual_seed(3))
    with vtc.compress(model, method, keep=0.4, layer=layer) as handle:
        prefill, decode = forward_logits(model, inputs, tokens, positions)
        kept, columns = handle.kept, handle.patches[0].record.columns
        said = None if case == "ragged_right" else generate_logits(model, inputs, tokens)
    with torch.no_grad():
        want, then = layered_oracle(model, inputs, kept, layer, tokens)
    for row in range(len(tokens)):
        assert torch.allclose(prefill[row, columns[row] >= 0], want[row], atol=TOLERANCE, rtol=0), "prefill"
    assert torch.allclose(decode, then, atol=TOLERANCE, rtol=0), "decode"
    if said is not None:
        assert torch.allclose(said[:, 1:], then, atol=TOLERANCE, rtol=0), "generate"
    assert not kept.all()
