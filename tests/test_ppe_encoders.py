"""PPE inside rotary vision encoders: merged tokens turn by the rows of several patches, column by column."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_oracle import dino_scales, eva_layers, hf_layers, norm, pitome_groups, tome_groups
from zoo import ZOO, model, pixels

import vtc
from vtc.adapters.rotary import column_slots

ROTARY = ["timm-dinov3", "timm-eva02", "hf-dinov3"]
# Rotary pairs by axis, rows first, written down; head width 16.
AXIS = [0] * 4 + [1] * 4
SLOTS = 4


def rows_of(members: list[int], table: torch.Tensor, adjacent: bool) -> torch.Tensor:
    """One token's row of a table [N, C] of sines or cosines, column by column."""
    out = torch.empty(table.shape[1], dtype=table.dtype)
    half = table.shape[1] // 2
    for column in range(table.shape[1]):
        pair = column // 2 if adjacent else column % half
        before = AXIS[:pair].count(AXIS[pair])
        slot = before // (AXIS.count(AXIS[pair]) // SLOTS)
        out[column] = table[members[slot % min(SLOTS, len(members))], column]
    return out


def encode(x, layers, prefix, groups_of, q):
    """As tests/test_oracle.py, with the members of every token in the order in which PPE goes through them."""
    size, members, at = [1.0] * len(x), [[t] for t in range(len(x))], [[t] for t in range(len(x))]
    for index, layer in enumerate(layers):
        h, keys = layer["attend"](x, size, at)
        x, keys = x + h, keys.mean(0)
        patches = len(x) - prefix
        pairs = groups_of(keys, prefix, math.floor(patches - patches * q), index / len(layers))
        unit = keys / keys.norm(dim=-1, keepdim=True)
        groups = []
        for target in range(len(x)):
            if target not in pairs:
                sources = [a for a, b in pairs.items() if b == target]
                near = sorted(sources, key=lambda a, t=target: (-float(unit[a] @ unit[t]), a))
                groups.append([target, *near])
        x = torch.stack([sum(x[t] * size[t] for t in g) / sum(size[t] for t in g) for g in groups])
        size = [sum(size[t] for t in g) for g in groups]
        members = [[m for t in g for m in members[t]] for g in groups]
        deepest = max(map(len, at))
        at = [[at[t][turn] for turn in range(deepest) for t in g if turn < len(at[t])] for g in groups]
        x = x + layer["feed"](x)
    full = torch.empty(sum(map(len, members)), x.shape[1], dtype=torch.float64)
    for row, group in zip(x, members, strict=True):
        full[group] = row
    return full


CASES = {
    "tome": (vtc.ToMe(keep=0.7, positions="ppe"), lambda k, prefix, r, share: tome_groups(k, prefix, r)),
    "pitome": (
        vtc.PiToMe(keep=0.7, preset="paper", margin=0.6, positions="ppe"),
        lambda k, prefix, r, share: pitome_groups(k, prefix, r, 0.6 - 0.6 * share),
    ),
}


@pytest.mark.parametrize("method", CASES)
@torch.no_grad()
def test_oracle_hf_dinov3(method):
    net, images = model("hf-dinov3"), pixels(1)
    cos, sin = (table.double() for table in net.rope_embeddings(images))
    prefix = 5  # CLS and four registers

    def rotate(x, at):
        patches = [[m - prefix for m in token] for token in at[prefix:]]
        c, s = (torch.stack([rows_of(p, table, adjacent=False) for p in patches]) for table in (cos, sin))
        first, second = x[:, prefix:].chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        return torch.cat([x[:, :prefix], x[:, prefix:] * c + turned * s], 1)

    chosen, groups_of = CASES[method]
    layers = hf_layers(net.model.layer, ("norm1", "norm2"), dino_scales, rotate=rotate)
    expected = encode(net.embeddings(images)[0].double(), layers, prefix, groups_of, 0.7)
    with vtc.compress(net, chosen):
        ours = net(pixel_values=images).last_hidden_state[0].double()
    torch.testing.assert_close(ours, norm(expected, net.norm), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", CASES)
@torch.no_grad()
def test_oracle_timm_eva02(method):
    net = copy.deepcopy(model("timm-eva02"))  # the oracle turns its MLPs into float64
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    chosen, groups_of = CASES[method]
    with vtc.compress(net, chosen):
        ours = net.forward_features(images)[0]
    x, rope = net._pos_embed(net.patch_embed(images))
    sin, cos = rope.double().chunk(2, -1)

    def rotate(x, at):
        patches = [[m - 1 for m in token] for token in at[1:]]
        c, s = (torch.stack([rows_of(p, table, adjacent=True) for p in patches]) for table in (cos, sin))
        pairs = x[:, 1:].unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
        return torch.cat([x[:, :1], x[:, 1:] * c + turned * s], 1)

    layers = eva_layers(net, rope, rotate)
    expected = encode(net.norm_pre(x)[0].double(), layers, 1, groups_of, 0.7)
    torch.testing.assert_close(ours.double(), norm(expected, net.norm), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["tome", "pitome", "downsample"])
@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_promises(name, method):
    entry, net = ZOO[name], model(name)
    inputs = entry.inputs(3)
    dense = entry.run(net, inputs)
    with vtc.compress(net, method, keep=0.6):
        plain = entry.run(net, inputs)
    with vtc.compress(net, method, keep=1.0, positions="ppe"):
        assert torch.equal(entry.run(net, inputs), dense)
    with vtc.compress(net, method, keep=0.6, positions=vtc.PPE(1)):
        assert torch.equal(entry.run(net, inputs), plain)
    with vtc.compress(net, method, keep=0.6, positions="ppe") as handle:
        ours = entry.run(net, inputs)
        assert (ours - plain).abs().max() > 1e-5
        stage = handle._parts[0].stage
        assert stage.carried.shape[0] == SLOTS and stage.slot is not None
        for row in range(3):
            single = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            torch.testing.assert_close(entry.run(net, single)[0], ours[row], rtol=1e-4, atol=1e-5)
    assert torch.equal(entry.run(net, inputs), dense)


@pytest.mark.parametrize("name", ROTARY)
def test_gradients_and_training(name):
    entry, net = ZOO[name], model(name)
    inputs = entry.inputs(1)
    image = next(k for k, v in inputs.items() if v.is_floating_point() and v.ndim > 2)
    leaf = inputs[image].clone().requires_grad_()
    with vtc.compress(net, "tome", keep=0.7, positions="ppe"):
        out = entry.run(net, {**inputs, image: leaf})
        aim = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
        (gradient,) = torch.autograd.grad((out * aim).sum(), leaf)
    assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.99


def test_slots_of_columns():
    """Both halves of a pair read one slot, for tables of adjacent pairs, of halves, and of sine and cosine together."""
    frequency = torch.tensor([1.0, 0.5, 0.25, 0.125])
    place = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0))
    angle = torch.cat([place[:, :1] * frequency, place[:, 1:] * frequency], 1)  # [12, 8], rows, then columns
    slots, slot = column_slots(angle.repeat(1, 2).sin(), (3, 4), 1, vtc.PPE())
    assert slots == 4 and slot.tolist() == [0, 1, 2, 3] * 4
    both = torch.cat([angle.sin(), angle.cos()], 1).repeat_interleave(2, 1)
    slots, slot = column_slots(both, (3, 4), 2, vtc.PPE(2))
    assert slots == 2 and slot.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] * 4
    with pytest.raises(vtc.OptionError, match="no axis"):
        column_slots((angle + angle.flip(1)).repeat(1, 2).sin(), (3, 4), 1, vtc.PPE())
    with pytest.raises(vtc.OptionError, match="pairs"):
        column_slots(angle.sin(), (3, 4), 1, vtc.PPE())


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("timm-vit", {"positions": "ppe"}, "not rotary"),
        ("timm-beit", {"positions": "ppe"}, "not rotary"),
        ("hf-dinov2", {"positions": "ppe"}, "not rotary"),
        ("open_clip-vit", {"positions": "ppe"}, "not rotary"),
        ("timm-vit-rope-mixed", {"positions": "ppe"}, "its own mix"),
        ("timm-eva02", {"positions": vtc.PPE(3)}, r"slots=3.*\[4, 4\]"),
        ("hf-dinov3", {"cascade": {1: 0.5}}, "cascade= is for multimodal LLMs"),
        ("hf-dinov3", {"proportional": True}, "proportional= is for multimodal LLMs"),
    ],
)
def test_refusals(name, options, why):
    net = model(name)
    before = {path: dict(module.__dict__) for path, module in net.named_modules()}
    with pytest.raises(vtc.UnsupportedModelError, match=why):
        vtc.compress(net, "tome", keep=0.7, **options)
    assert {path: dict(module.__dict__) for path, module in net.named_modules()} == before
