"""A compressed encoder against a slow, independent forward pass written here from the formulas, in float64.

No code of vtc's adapters or methods is used: the loops below read the weights and follow the papers.
"""

import copy
import math

import pytest
import torch
from zoo import ZOO, model, pixels

import vtc


def norm(x, layer):
    if isinstance(layer, torch.nn.Identity):
        return x
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + layer.eps).sqrt() * layer.weight.double() + layer.bias.double()


def linear(x, layer):
    return x @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double())


def attention(q, k, v, size, bias=0):
    """[H, N, D]; logits plus log size of the key."""
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + torch.tensor(size).double().log() + bias
    return (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)


def tome_groups(keys, prefix, r):
    unit = keys / keys.norm(dim=-1, keepdim=True)
    rows = range(prefix, len(keys))
    even, odd = [t for t in rows if t % 2 == 0], [t for t in rows if t % 2 == 1]
    best = sorted((-max((unit[a] @ unit[b]).item() for b in odd), a) for a in even)
    return {a: max(odd, key=lambda b, a=a: (unit[a] @ unit[b]).item()) for _, a in best[:r]}


def pitome_groups(keys, prefix, r, margin):
    """Algorithm 1 with the energy of Eq. 4."""
    unit = keys / keys.norm(dim=-1, keepdim=True)
    rows = list(range(prefix, len(keys)))

    def energy(i):
        similarity = [(unit[i] @ unit[j]).item() for j in rows]
        return sum(s if s >= margin else math.exp(s - margin) - 1 for s in similarity) / len(rows)

    order = sorted(rows, key=lambda i: (-energy(i), i))[: 2 * r]
    return {a: max(order[1::2], key=lambda b, a=a: (unit[a] @ unit[b]).item()) for a in order[0::2]}


def merged(x, size, members, pairs):
    """Sources join their targets: size-weighted mean; the others stay; original order."""
    groups = [[t, *(a for a, b in pairs.items() if b == t)] for t in range(len(x)) if t not in pairs]
    rows = [sum(x[t] * size[t] for t in g) / sum(size[t] for t in g) for g in groups]
    return (
        torch.stack(rows),
        [sum(size[t] for t in g) for g in groups],
        [[m for t in g for m in members[t]] for g in groups],
        [g[0] for g in groups],
    )


def encode(x, layers, prefix, groups_of, q):
    """x [N, C] after the embeddings -> [N, C], every token with its group's final state."""
    size, members, at = [1.0] * len(x), [[t] for t in range(len(x))], list(range(len(x)))
    for index, layer in enumerate(layers):
        h, keys = layer["attend"](x, size, at)
        x = x + h
        patches = len(x) - prefix
        r = math.floor(patches - patches * q)
        pairs = groups_of(keys.mean(0), prefix, r, index / len(layers))
        x, size, members, anchors = merged(x, size, members, pairs)
        at = [at[a] for a in anchors]
        x = x + layer["feed"](x)
        if "after" in layer:
            x = x + layer["after"](at)
    full = torch.empty(sum(map(len, members)), x.shape[1], dtype=torch.float64)
    for row, group in zip(x, members, strict=True):
        full[group] = row
    return full


def hf_layers(layers, norms, scales, rotate=None, bias=None):
    """transformers' layers: [attention, MLP] norms and scales by name, rotary positions, relative position bias."""

    def make(layer):
        attn = layer.attention

        def heads(x, project):
            return linear(x, project).unflatten(-1, (4, -1)).transpose(0, 1)

        def attend(x, size, at):
            h = norm(x, getattr(layer, norms[0]))
            q, k, v = heads(h, attn.q_proj), heads(h, attn.k_proj), heads(h, attn.v_proj)
            turned = (q, k) if rotate is None else (rotate(q, at), rotate(k, at))
            out = attention(*turned, v, size, 0 if bias is None else bias(layer, at))
            return linear(out, attn.o_proj) * scales(layer)[0].double(), k

        def feed(x):
            mlp = layer.mlp
            first, last = (mlp.fc1, mlp.fc2) if hasattr(mlp, "fc1") else (mlp.up_proj, mlp.down_proj)
            h = torch.nn.functional.gelu(linear(norm(x, getattr(layer, norms[1])), first))
            return linear(h, last) * scales(layer)[1].double()

        return {"attend": attend, "feed": feed}

    return [make(layer) for layer in layers]


def dino_scales(layer):
    return layer.layer_scale1.lambda1, layer.layer_scale2.lambda1


def eva_layers(net, rope, turn=None):
    """timm's EVA-02: rotary positions of the patch each token stands for, SwiGLU or plain MLP, biases of their own."""

    def rotate(x, at):
        sin, cos = rope.double().chunk(2, -1)
        where = torch.tensor([a - 1 for a in at[1:]])
        pairs = x[:, 1:].unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
        return torch.cat([x[:, :1], x[:, 1:] * cos[where] + turned * sin[where]], 1)

    turn = turn or rotate

    def make(block):
        attn = block.attn

        def attend(x, size, at):
            h = norm(x, block.norm1)

            def heads(y):
                return y.unflatten(-1, (attn.num_heads, -1)).transpose(0, 1)

            weights, biases = attn.qkv.weight.double().chunk(3), (attn.q_bias, attn.k_bias, attn.v_bias)
            q, k, v = (heads(h @ w.T + b.double()) for w, b in zip(weights, biases, strict=True))
            out = attention(turn(q, at), turn(k, at), v, size)
            return linear(norm(out, attn.norm), attn.proj), k

        def feed(x):
            with torch.no_grad():
                return block.mlp.double()(norm(x, block.norm2))

        return {"attend": attend, "feed": feed}

    return [make(block) for block in net.blocks]


CASES = {
    "tome": (vtc.ToMe(keep=0.8), lambda keys, prefix, r, share: tome_groups(keys, prefix, r)),
    "pitome": (
        vtc.PiToMe(keep=0.8, preset="paper", margin=0.6),
        lambda keys, prefix, r, share: pitome_groups(keys, prefix, r, 0.6 - 0.6 * share),
    ),
}


def compressed(net, method, images, item=0):
    with vtc.compress(net, CASES[method][0]):
        return net(pixel_values=images).last_hidden_state[item].double()


@pytest.mark.parametrize("method", CASES)
@torch.no_grad()
def test_hf_dinov2(method):
    net, images = model("hf-dinov2"), pixels(1)
    if not hasattr(net.encoder.layer[0].attention, "k_proj"):  # transformers 5.17 names its parts otherwise
        for layer in net.encoder.layer:
            own = layer.attention.attention
            layer.attention.k_proj, layer.attention.q_proj, layer.attention.v_proj = own.key, own.query, own.value
            layer.attention.o_proj = layer.attention.output.dense
    layers = hf_layers(net.encoder.layer, ("norm1", "norm2"), dino_scales)
    expected = encode(net.embeddings(images)[0].double(), layers, 1, CASES[method][1], 0.8)
    torch.testing.assert_close(compressed(net, method, images), norm(expected, net.layernorm), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", CASES)
@torch.no_grad()
def test_hf_dinov3_rotary(method):
    net, images = model("hf-dinov3"), pixels(1)
    cos, sin = (table.double() for table in net.rope_embeddings(images))
    prefix = 5  # CLS and four registers

    def rotate(x, at):
        where = torch.tensor([a - prefix for a in at[prefix:]])
        first, second = x[:, prefix:].chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        return torch.cat([x[:, :prefix], x[:, prefix:] * cos[where] + turned * sin[where]], 1)

    layers = hf_layers(net.model.layer, ("norm1", "norm2"), dino_scales, rotate=rotate)
    expected = encode(net.embeddings(images)[0].double(), layers, prefix, CASES[method][1], 0.8)
    torch.testing.assert_close(compressed(net, method, images), norm(expected, net.norm), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", CASES)
@torch.no_grad()
def test_hf_mlcd_rotary(method):
    """One table for all tokens of all images, with a row for the class token."""
    net, images = copy.deepcopy(model("hf-mlcd")), pixels(2)
    ours, tables = compressed(net, method, images, 1), []
    hook = net.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: tables.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    net(images)
    hook.remove()
    cos, sin = (table.double() for table in tables[0])

    def rotate(x, at):
        first, second = x.chunk(2, -1)
        return x * cos[at] + torch.cat([-second, first], -1) * sin[at]

    for layer in net.encoder.layers:
        layer.attention, layer.self_attn.o_proj = layer.self_attn, layer.self_attn.out_proj
    layers = hf_layers(net.encoder.layers, ("layer_norm1", "layer_norm2"), lambda layer: torch.ones(2), rotate=rotate)
    entry = norm(net.embeddings(images)[1].double(), net.pre_layrnorm)
    torch.testing.assert_close(ours, encode(entry, layers, 1, CASES[method][1], 0.8), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", CASES)
@torch.no_grad()
def test_hf_beit_relative_positions(method):
    net, images = model("hf-beit"), pixels(1)

    def bias(layer, at):
        table = layer.relative_position_bias((8, 8), dim_size=65)[0].double()  # [heads, 65, 65]
        return torch.stack([torch.stack([table[:, i, j] for j in at], -1) for i in at], 1)

    def scales(layer):
        return layer.lambda_1, layer.lambda_2

    layers = hf_layers(net.layers, ("layernorm_before", "layernorm_after"), scales, bias=bias)
    expected = encode(net.embeddings(images)[0].double(), layers, 1, CASES[method][1], 0.8)
    torch.testing.assert_close(compressed(net, method, images), norm(expected, net.layernorm), rtol=1e-4, atol=1e-4)


def with_query(layer):
    """A layer whose attention calls its parts otherwise, as the oracle knows them."""
    own, layer.attention.o_proj = layer.attention.attention, layer.attention.output.dense
    layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj = own.query, own.key, own.value
    layer.mlp = torch.nn.Module()
    layer.mlp.fc1, layer.mlp.fc2 = layer.intermediate.dense, layer.output.dense


@pytest.mark.parametrize("method", CASES)
@torch.no_grad()
def test_hf_data2vec_relative_positions(method):
    """Two tables: the layer's own and the one that all layers share."""
    net, images = copy.deepcopy(model("hf-data2vec-relative")), pixels(1)
    ours = compressed(net, method, images)

    def bias(layer, at):
        tables = (layer.attention.attention.relative_position_bias, net.encoder.relative_position_bias)
        table = sum(table((8, 8), dim_size=65)[0].double() for table in tables)
        return torch.stack([torch.stack([table[:, i, j] for j in at], -1) for i in at], 1)

    for layer in net.encoder.layer:
        with_query(layer)
    norms = ("layernorm_before", "layernorm_after")
    layers = hf_layers(net.encoder.layer, norms, lambda layer: (layer.lambda_1, layer.lambda_2), bias=bias)
    expected = encode(net.embeddings(images)[0][0].double(), layers, 1, CASES[method][1], 0.8)
    torch.testing.assert_close(ours, norm(expected, net.layernorm), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", CASES)
@torch.no_grad()
def test_hf_yolos_tokens_behind_the_patches(method):
    """Five of them, and positions that are added between the layers. Here they stand in front, where they are kept."""
    net, images = copy.deepcopy(model("hf-yolos-detection").vit), pixels(1)
    ours = compressed(net, method, images)
    order = [0, *range(65, 70), *range(1, 65)]
    tables = dict(net.encoder.named_parameters())  # which module holds it depends on the version; it is of this size
    positions = next(t for name, t in tables.items() if name.endswith("mid_position_embeddings"))[:, 0, order].double()
    for layer in net.encoder.layer:
        with_query(layer)
    layers = hf_layers(net.encoder.layer, ("layernorm_before", "layernorm_after"), lambda layer: torch.ones(2))
    for layer, added in zip(layers, positions, strict=False):
        layer["after"] = lambda at, added=added: added[at]
    expected = encode(net.embeddings(images)[0, order].double(), layers, 6, CASES[method][1], 0.8)
    torch.testing.assert_close(ours[order], norm(expected, net.layernorm), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("name", ["timm-relpos", "timm-srelpos"])
@torch.no_grad()
def test_timm_relative_positions(name, method):
    """A table that a small network makes of log distances, in every attention or in one place for all."""
    net, images = model(name), pixels(1)
    chosen, groups_of = CASES[method]
    with vtc.compress(net, chosen):
        ours = net.forward_features(images)[0]

    def make(block):
        attn, table = block.attn, (block.attn.rel_pos or net.shared_rel_pos).get_bias()[0].double()

        def attend(x, size, at):
            q, k, v = linear(norm(x, block.norm1), attn.qkv).unflatten(-1, (3, 4, -1)).permute(1, 2, 0, 3)
            bias = torch.stack([torch.stack([table[:, i, j] for j in at], -1) for i in at], 1)
            return linear(attention(q, k, v, size, bias), attn.proj) * block.ls1.gamma.double(), k

        def feed(x):
            h = torch.nn.functional.gelu(linear(norm(x, block.norm2), block.mlp.fc1))
            return linear(h, block.mlp.fc2) * block.ls2.gamma.double()

        return {"attend": attend, "feed": feed}

    layers = [make(block) for block in net.blocks]
    expected = encode(net.patch_embed(images)[0].double(), layers, 0, groups_of, 0.8)
    torch.testing.assert_close(ours.double(), norm(expected, net.norm), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", CASES)
@torch.no_grad()
def test_eva02_rotary(method):
    net = copy.deepcopy(model("timm-eva02"))  # the oracle turns its MLPs into float64
    # not the zoo's image: there two candidates for a merge are 5e-8 apart, and float32 may take either
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    chosen, groups_of = CASES[method]
    with vtc.compress(net, chosen):
        ours = net.forward_features(images)[0]
    x, rope = net._pos_embed(net.patch_embed(images))
    expected = encode(net.norm_pre(x)[0].double(), eva_layers(net, rope), 1, groups_of, 0.8)
    torch.testing.assert_close(ours.double(), norm(expected, net.norm), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_mean_pool_weighs_by_size_and_attention_pool_counts_every_member():
    """Full-length outputs make every pooling right: the mean over tokens is the size-weighted mean of the groups."""
    for name in ("timm-vit-avg", "timm-siglip"):
        net, images = model(name), ZOO[name].inputs(2)["x"]
        with vtc.compress(net, "tome", keep=0.7) as handle:
            features = net.forward_features(images)
            pooled = net.pool(features)
            token_map = handle.token_map
        prefix = net.num_prefix_tokens
        groups = token_map.gather(features[:, prefix:])
        if name == "timm-vit-avg":
            expected = (groups * token_map.size[..., None]).sum(1) / token_map.size.sum(1, keepdim=True)
        else:
            expected = net.attn_pool(groups, attn_mask=token_map.size.log()[:, None, None])
        torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
