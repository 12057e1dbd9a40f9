"""PPE inside rotary vision encoders: merged tokens turn by the rows of several patches, column by column."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from test_matrix import fingerprint
from test_oracle import attention, dino_scales, eva_layers, hf_layers, linear, norm, pitome_groups, tome_groups
from zoo import ZOO, model, pixels, randomise

import vtc
from vtc.adapters.encoders.rotary import column_slots

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


def both(chosen):
    return chosen, replace(chosen, positions="original")


def compressed(net, method, run):
    with vtc.compress(net, method):
        return run()


def rotation(cos, sin, prefix, adjacent):
    """Turns queries and keys [H, N, D] of tokens whose members are `at`, those behind the prefix; float64."""

    def rotate(x, at):
        patches = [[m - prefix for m in token] for token in at[prefix:]]
        c, s = (torch.stack([rows_of(p, table, adjacent) for p in patches]) for table in (cos, sin))
        own = x[:, prefix:]
        if adjacent:
            pairs = own.unflatten(-1, (-1, 2))
            turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
        else:
            first, second = own.chunk(2, -1)
            turned = torch.cat([-second, first], -1)
        return torch.cat([x[:, :prefix], own * c + turned * s], 1)

    return rotate


def check_oracle(ours, plain, start, layers, prefix, groups_of, last):
    expected = norm(encode(start.double(), layers, prefix, groups_of, 0.7), last)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)
    assert (plain.double() - expected).abs().max() > 1e-3  # the anchors' positions are not that


@pytest.mark.parametrize("method", CASES)
@torch.no_grad()
def test_oracle_hf_dinov3(method):
    net, images, (chosen, groups_of) = model("hf-dinov3"), pixels(1), CASES[method]
    ours, plain = (compressed(net, way, lambda: net(pixel_values=images).last_hidden_state[0]) for way in both(chosen))
    rotate = rotation(*(table.double() for table in net.rope_embeddings(images)), 5, False)  # CLS and four registers
    layers = hf_layers(net.model.layer, ("norm1", "norm2"), dino_scales, rotate=rotate)
    check_oracle(ours, plain, net.embeddings(images)[0], layers, 5, groups_of, net.norm)


@pytest.mark.parametrize("method", CASES)
@torch.no_grad()
def test_oracle_timm_eva02(method):
    net = copy.deepcopy(model("timm-eva02"))  # the oracle turns its MLPs into float64
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    chosen, groups_of = CASES[method]
    ours, plain = (compressed(net, way, lambda: net.forward_features(images)[0]) for way in both(chosen))
    x, rope = net._pos_embed(net.patch_embed(images))
    sin, cos = rope.double().chunk(2, -1)
    layers = eva_layers(net, rope, rotation(cos, sin, 1, True))
    check_oracle(ours, plain, net.norm_pre(x)[0], layers, 1, groups_of, net.norm)


@pytest.mark.parametrize("method", CASES)
@torch.no_grad()
def test_oracle_timm_dinov3(method):
    net, images, (chosen, groups_of) = model("timm-dinov3"), pixels(1), CASES[method]
    ours, plain = (compressed(net, way, lambda: net.forward_features(images)[0]) for way in both(chosen))
    x, rope = net._pos_embed(net.patch_embed(images))
    sin, cos = rope.double().chunk(2, -1)
    rotate = rotation(cos, sin, 5, False)

    def make(block):
        def attend(x, size, at):
            parts = linear(norm(x, block.norm1), block.attn.qkv).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (4, -1)).transpose(0, 1) for part in parts)
            out = attention(rotate(q, at), rotate(k, at), v, size)
            return linear(out, block.attn.proj) * block.gamma_1.double(), k

        def feed(x):
            hidden = torch.nn.functional.gelu(linear(norm(x, block.norm2), block.mlp.fc1))
            return linear(hidden, block.mlp.fc2) * block.gamma_2.double()

        return {"attend": attend, "feed": feed}

    check_oracle(ours, plain, net.norm_pre(x)[0], list(map(make, net.blocks)), 5, groups_of, net.norm)


@pytest.mark.parametrize("method", ["tome", "pitome", "downsample"])
@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_promises(name, method):
    entry, net = ZOO[name], model(name)
    inputs = entry.inputs(3)
    dense, before = entry.run(net, inputs), fingerprint(net)
    with vtc.compress(net, method, keep=0.6):
        plain = entry.run(net, inputs)
    with vtc.compress(net, method, keep=1.0, positions="ppe"):
        assert torch.equal(entry.run(net, inputs), dense)
    with vtc.compress(net, method, keep=0.6, positions=vtc.PPE(1)):
        assert torch.equal(entry.run(net, inputs), plain)
    with vtc.compress(net, method, keep=0.6, positions="ppe") as handle:
        ours = entry.run(net, inputs)
        assert (ours - plain).abs().max() > 1e-5
        stage = handle.patches[0].stage
        assert stage.carried.shape[0] == SLOTS and stage.slot is not None
        for row in range(3):
            single = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            torch.testing.assert_close(entry.run(net, single)[0], ours[row], rtol=1e-4, atol=1e-5)
    assert torch.equal(entry.run(net, inputs), dense)
    assert fingerprint(net) == before


def table_of(name):
    """The encoder's own rotary table of its image, [64, C]; and of every column the other one of its pair."""
    net, images = model(name), pixels(1)
    if name == "hf-dinov3":
        table, parts, adjacent = torch.cat(net.rope_embeddings(images), -1), 2, False
    else:
        table, parts, adjacent = net._pos_embed(net.patch_embed(images))[1], 2, name == "timm-eva02"
    width = table.shape[1] // parts
    other = [c ^ 1 if adjacent else (c + width // 2) % width for c in range(width)]
    return table, torch.tensor([part * width + c for part in range(parts) for c in other])


@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_rows_of_merged_tokens(name):
    """Every column is its member's, to the last bit; both columns of a pair read one member; K equal rows are a row."""
    entry, net = ZOO[name], model(name)
    table, other = table_of(name)
    with vtc.compress(net, "tome", keep=0.6, positions="ppe") as handle:
        entry.run(net, entry.inputs(2))
    stage = handle.patches[0].stage
    stage = replace(stage, slot=stage.slot.repeat(table.shape[1] // len(stage.slot)))  # sines and cosines side by side
    assert torch.equal(stage.slot, stage.slot[other])
    ours = stage.turned(table)
    assert torch.equal(ours, ours[..., other])
    several = 0
    for b in range(2):
        for token in range(ours.shape[2]):
            mine = stage.carried[:, b, token].tolist()
            several += len(set(mine)) > 1
            for column, slot in enumerate(stage.slot.tolist()):
                assert ours[b, 0, token, column] == table[mine[slot], column]
    assert several
    alike = replace(stage, carried=stage.patches().expand_as(stage.carried))
    assert torch.equal(alike.turned(table), replace(stage, carried=None).turned(table))


@pytest.mark.parametrize(
    ("kind", "side"),
    [
        ("vit_small_patch16_rope_224", (64, 64)),
        ("vit_pe_core_tiny_patch16_384", (48, 64)),
        ("eva02_tiny_patch14_224", (64, 48)),
    ],
)
@torch.no_grad()
def test_other_rotary_encoders_of_timm(kind, side):
    """Columns before rows, an attention of another kind, images that are not square."""
    import timm

    net = timm.create_model(kind, img_size=side, depth=3, num_classes=5, patch_size=8, embed_dim=64, num_heads=4)
    net, images = randomise(net), torch.randn(2, 3, *side, generator=torch.Generator().manual_seed(1))
    plain, one, ours = (
        compressed(net, vtc.ToMe(keep=0.6, positions=positions), lambda: net(images))
        for positions in ("original", vtc.PPE(1), "ppe")
    )
    assert torch.equal(one, plain)
    assert (ours - plain).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["timm-dinov3", "hf-dinov3"])
@torch.no_grad()
def test_takes_the_place_of_a_resize(name):
    """Reading the table must not wake the hooks that shrink images."""
    entry, net = ZOO[name], model(name)
    inputs, chosen = entry.inputs(1), vtc.ToMe(keep=0.7, positions="ppe")
    expected = compressed(net, chosen, lambda: entry.run(net, inputs))
    vtc.compress(net, "downsample", keep=0.5, mode="resize")
    assert torch.equal(compressed(net, chosen, lambda: entry.run(net, inputs)), expected)


@pytest.mark.parametrize("name", ROTARY)
def test_explain_without_weights(name):
    with torch.device("meta"):
        net = ZOO[name].build()
    assert vtc.explain(net, "tome", positions="ppe").ok
    assert "slots=3" in str(vtc.explain(net, "tome", positions=vtc.PPE(3)))


def test_explain_draws_no_random_numbers():
    """DINOv3 moves its grid at random in training."""
    import timm
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    moves = {"rope_shift_coords": 0.2, "rope_jitter_coords": 1.5, "rope_rescale_coords": 1.5}
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    moved = {"pos_embed_shift": 0.2, "pos_embed_jitter": 1.5}
    nets = [
        timm.create_model("vit_small_patch16_dinov3", img_size=64, depth=1, embed_dim=64, num_heads=4, **moves),
        DINOv3ViTModel(
            DINOv3ViTConfig(**sizes, image_size=64, patch_size=[8, 16], **moved)
        ),  # patches that are no squares
    ]
    for net in nets:
        before = torch.get_rng_state()
        assert vtc.explain(net.train(), "tome", positions="ppe").ok
        assert torch.equal(torch.get_rng_state(), before) and all(m.training for m in net.modules())


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
        ("hf-beit", {"positions": "ppe"}, "not rotary"),
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


def test_a_resized_image_has_no_merged_tokens():
    with pytest.raises(vtc.UnsupportedModelError, match='merges no tokens.*mode="pool" does'):
        vtc.compress(model("hf-dinov3"), "downsample", keep=0.5, mode="resize", positions="ppe")


def test_where_tower_does_not_hide_positions():
    """where="tower" is for multimodal LLMs; given to an encoder alone, PPE is neither forgotten nor let through."""
    with pytest.raises(vtc.UnsupportedModelError, match="not rotary"):
        vtc.compress(model("timm-vit"), "tome", keep=0.7, where="tower", positions="ppe")
    with vtc.compress(model("hf-dinov3"), "tome", keep=0.7, where="tower", positions="ppe") as handle:
        assert handle.patches[0].slots == SLOTS
    assert f"up to {SLOTS} members" in str(vtc.explain(model("hf-dinov3"), "tome", positions="ppe"))
