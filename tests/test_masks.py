"""Masks that callers give an encoder: cut to the tokens that stay where that is exact, or refused."""

import pytest
import torch
from zoo import model

import vtc

N, BATCH = 65, 2


def tokens():
    return torch.randn(BATCH, N, 64, generator=torch.Generator().manual_seed(3))


def allowed(*shape):
    """Which pairs may attend, at random; everybody sees itself."""
    seen = torch.rand(*shape, N, N, generator=torch.Generator().manual_seed(4)) < 0.6
    return seen | torch.eye(N, dtype=torch.bool)


def hidden(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))


def slopes():
    """A finite additive bias, as ALiBi's: [H, N, N]."""
    place = torch.arange(N)
    return -(place - place[:, None]).abs() * torch.tensor([0.5, 0.25, 0.1, 0.01])[:, None, None]


PAIRS = {
    "bool [N, N]": allowed(),
    "additive [N, N]": hidden(allowed()),
    "[1, 1, N, N]": hidden(allowed(1, 1)),
    "bool [B, 1, N, N]": allowed(BATCH, 1),
    "finite [H, N, N]": slopes(),
    "causal": torch.ones(N, N, dtype=torch.bool).tril(),
}

TIMM = ("timm-dinov2", "timm-deit3")


def blocks(name):
    net = model(name)
    return net.blocks if name.startswith("timm") else net.visual.transformer.resblocks


def run(name, x, mask):
    for block in blocks(name):
        x = block(x, attn_mask=mask)
    return x


def oracle(name, x, mask, maps):
    """The unpatched blocks' parts on the tokens that stay, with the mask's rows and columns at them."""
    mask = mask[(None,) * (4 - mask.ndim)].expand(len(x), -1, N, N)
    batch = torch.arange(len(x))[:, None]
    at, last = torch.arange(N).expand(len(x), N), None
    for block, step in zip(blocks(name), maps, strict=True):
        here = mask[batch, :, at].transpose(1, 2)  # [B, H, M, N]
        here = torch.stack([m[:, :, a] for m, a in zip(here, at, strict=True)])
        if name.startswith("timm"):
            x = x + block.ls1(block.attn(block.norm1(x), attn_mask=here))
        else:
            heads = here.expand(-1, block.attn.num_heads, -1, -1).flatten(0, 1)
            x = x + block.ls_1(block.attention(block.ln_1(x), attn_mask=heads))
        now = torch.cat([torch.zeros(len(x), 1, dtype=torch.long), step.anchor + 1], dim=1)  # the prefix stays
        place = (at[:, None] == now[..., None]).long().argmax(-1)
        x, at = x[batch, place], now
        x = x + (
            block.ls2(block.mlp(block.norm2(x))) if name.startswith("timm") else block.ls_2(block.mlp(block.ln_2(x)))
        )
        last = at
    return x, last


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("name", [*TIMM, "open_clip-vit"])
@torch.no_grad()
def test_dropping_cuts_a_mask_along_both_axes(name, kind):
    mask, x = PAIRS[kind], tokens()
    if name.startswith("open_clip"):
        if kind in ("bool [N, N]", "causal"):
            mask = hidden(mask)  # open_clip adds a bool mask to the logits as 0 and 1
        elif mask.ndim > 2:  # [B x H, N, N]
            mask = mask.float() if mask.dtype != torch.bool else hidden(mask)
            mask = mask[(None,) * (4 - mask.ndim)].expand(BATCH, 4, N, N).flatten(0, 1)
    net = model(name)
    dense = run(name, x, mask)
    with vtc.compress(net, "random", keep=1.0):
        assert torch.equal(run(name, x, mask), dense)
    with vtc.compress(net, "random", keep=40) as handle:
        found = run(name, x, mask)
        maps = handle.layer_maps
    full = mask.unflatten(0, (BATCH, 4)) if name.startswith("open_clip") and mask.ndim == 3 else mask
    want, at = oracle(name, x, full, maps)
    batch = torch.arange(BATCH)[:, None]
    torch.testing.assert_close(found[batch, at], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("name", [*TIMM, "open_clip-vit"])
@torch.no_grad()
def test_merging_refuses_a_mask_that_tells_merged_tokens_apart(name, kind):
    mask = PAIRS[kind]
    if name.startswith("open_clip"):
        mask = hidden(mask) if mask.dtype == torch.bool else mask
        mask = mask[(None,) * (4 - mask.ndim)].expand(BATCH, 4, N, N).flatten(0, 1)
    dense = run(name, tokens(), mask)
    for method in ("tome", "pitome"):
        with vtc.compress(model(name), method, keep=0.8):
            with pytest.raises(
                vtc.InputError, match="tells tokens apart that were merged in layer 0 .* or pass no mask"
            ):
                run(name, tokens(), mask)
        with vtc.compress(model(name), method, keep=1.0):
            assert torch.equal(run(name, tokens(), mask), dense)
    assert torch.equal(run(name, tokens(), mask), dense)


@torch.no_grad()
def test_a_mask_that_tells_no_merged_tokens_apart_is_exact():
    """Two images' tokens side by side that do not see one another, each made of copies of one token: they merge."""
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(5))
    x = x[:, [0] + [1, 1, 2, 2] * 8 + [3, 3, 4, 4] * 8]
    part = torch.tensor([0] + [1] * 32 + [2] * 32)
    mask = (part == part[:, None]) | (part[:, None] == 0)
    dense = run("timm-dinov2", x, mask)
    with vtc.compress(model("timm-dinov2"), "tome", r=[16, 0, 0]):
        torch.testing.assert_close(run("timm-dinov2", x, mask), dense, rtol=1e-4, atol=1e-4)


def column_masks(name):
    """Every way to write that the last 20 tokens are padding."""
    real = torch.arange(N) < 45
    bool_pairs = real.expand(N, N)
    if name.startswith("open_clip"):
        return [hidden(bool_pairs), hidden(bool_pairs).expand(BATCH * 4, N, N)]
    shapes = [bool_pairs, bool_pairs[None, None], real[None, None, None].expand(BATCH, 1, 1, N), real[None]]
    return [*shapes, *map(hidden, shapes)]


@pytest.mark.parametrize("method", ["tome", "pitome", "random"])
@pytest.mark.parametrize("name", ["timm-dinov2", "timm-deit3", "open_clip-vit"])
@torch.no_grad()
def test_padding_in_every_form(name, method):
    """The tokens that are real come out as they do alone, whatever the padding holds."""
    x = tokens()
    other = torch.cat([x[:, :45], 3 * x[:, 45:].flip(1)], dim=1)
    with vtc.compress(model(name), method, keep=0.8):
        alone = run(name, x[:, :45], None)
        for mask in column_masks(name):
            for held in (x, other):
                torch.testing.assert_close(run(name, held, mask)[:, :45], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["tome", "random"])
@torch.no_grad()
def test_masks_of_transformers_layers(method):
    """A mask handed to the layers: [B, 1, N, N], bool or additive."""
    layers = model("hf-vit").layers if hasattr(model("hf-vit"), "layers") else model("hf-vit").encoder.layer
    x = tokens()

    def run(mask, x=x):
        for layer in layers:
            x = layer(x, mask)
        return x

    real = (torch.arange(N) < 45)[None, None, None].expand(BATCH, 1, N, N)
    low = torch.zeros(real.shape).masked_fill(~real, torch.finfo(torch.float32).min)
    with vtc.compress(model("hf-vit"), method, keep=0.8):
        alone = run(None, x[:, :45])
        for mask in (real, low):
            torch.testing.assert_close(run(mask)[:, :45], alone, rtol=1e-4, atol=1e-4)
        if method == "tome":
            with pytest.raises(vtc.InputError, match="tells tokens apart"):
                run(allowed(BATCH, 1))
        else:
            found = run(allowed(BATCH, 1))
            assert torch.equal(found, run(allowed(BATCH, 1)))
            torch.testing.assert_close(found, run(hidden(allowed(BATCH, 1))), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(found, run(None), atol=1e-2)


@torch.no_grad()
def test_resizing_takes_no_mask():
    net = model("timm-vit-dynamic")
    with vtc.compress(net, vtc.Downsample(keep=0.5, mode="resize")):
        with pytest.raises(vtc.InputError, match="an attention mask is of one size"):
            net(torch.randn(1, 3, 64, 64), attn_mask=torch.ones(65, 65, dtype=torch.bool).tril())
