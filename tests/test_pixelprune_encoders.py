"""PixelPrune in plain encoders, against the encoder itself with what left masked out of its attention."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_pixelprune import picture, reference
from torch.utils.checkpoint import checkpoint
from zoo import ZOO, model

import vtc
from vtc.errors import InputError, UnsupportedModelError

FITS = [name for name in ZOO if vtc.explain(model(name), "pixelprune").ok]
REFUSED = {
    "timm-hybrid": "channels",
    "timm-mobileclip": "out of a network",
    "timm-vitamin": "out of a network",
    "timm-naflex": "given patches",
    "timm-naflex-images": "given patches",
    "timm-naflex-rope": "given patches",
    "timm-naflex-rope-mixed": "given patches",
    "hf-siglip2": "given patches",
    "hf-vivit": "several frames",
    "hf-videomae": "several frames",
    "hf-mae": "shuffle",
    "hf-vitpose": "over the image's edges",
}


def drawn(batch: int, patch: int = 8, side: int = 64) -> torch.Tensor:
    """Pictures of flat areas, each with other areas; the last but one of at least three is one colour."""
    images = []
    for seed in range(batch):
        generator = torch.Generator().manual_seed(seed)
        cells = torch.randint(0, 3, (side // patch // 2, side // patch // 2), generator=generator)
        colours = torch.randn(3, 3, generator=generator)
        flat = colours[cells].permute(2, 0, 1).repeat_interleave(2 * patch, 1).repeat_interleave(2 * patch, 2)
        flat[:, : patch * seed, :patch] = torch.randn(3, patch * seed, patch, generator=generator)
        images.append(flat * 0 + 1 if batch > 2 and seed == batch - 2 else flat)
    return torch.stack(images)


def inputs_of(name: str, batch: int) -> dict:
    given = ZOO[name].inputs(batch)
    patch = site_of(model(name)).patchify.stride[0]
    return {key: drawn(batch, patch, x.shape[-1]) if x.ndim == 4 else x for key, x in given.items()}


def site_of(net):
    (site,) = vtc.explain(net, "pixelprune")._sites
    return site


def expected_kept(images, patch):
    rows, columns = images.shape[-2] // patch, images.shape[-1] // patch
    kept = []
    for image in images.double().numpy():
        cells = image.reshape(3, rows, patch, columns, patch).transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1)
        kept.append(reference(cells, rows, columns, 0, "max", True)[0])
    return kept


def masked_out(net, site, inputs, kept):
    """The dense model's last block, with the patches that left hidden from every attention of its encoder."""
    batch, inside, out, count = len(kept), [], [], [0]
    attend = F.scaled_dot_product_attention

    def hidden(q, k, v, attn_mask=None, *more, **options):
        if not inside:
            return attend(q, k, v, attn_mask, *more, **options)
        count[0] += 1
        patches, front = k.shape[-2] - site.prefix, site.prefix - site.suffix
        seen = torch.ones(batch, k.shape[-2], dtype=torch.bool)
        seen[:, front : front + patches] = False
        for row, its in zip(seen, kept, strict=True):
            row[[front + i for i in its]] = True
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[:, None, None]
        mask = mask if attn_mask is None else mask + attn_mask
        heads = (x.reshape(batch, -1, *x.shape[-2:]) for x in (q, k, v))  # some have them among the images
        return attend(*heads, mask, *more, **options).reshape(*q.shape[:-1], v.shape[-1])

    hooks = [site.blocks[0].register_forward_pre_hook(lambda *_: inside.append(1))]
    hooks += [site.blocks[-1].register_forward_hook(lambda module, args, output: out.append(output) or inside.clear())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
        patch.setattr(F, "scaled_dot_product_attention", hidden)
        net(**inputs)
    for hook in hooks:
        hook.remove()
    assert count[0] >= len(site.blocks)
    return out[0][0] if isinstance(out[0], tuple) else out[0]


def last_block(net, site, inputs):
    out = []
    hook = site.blocks[-1].register_forward_hook(lambda module, args, output: out.append(output))
    net(**inputs)
    hook.remove()
    return out[0][0] if isinstance(out[0], tuple) else out[0]


@torch.no_grad()
@pytest.mark.parametrize("name", FITS)
def test_the_blocks_equal_the_plain_ones_with_the_rest_masked_out(name):
    net, inputs = model(name), inputs_of(name, 3)
    images = next(x for x in inputs.values() if x.ndim == 4)
    site = site_of(net)
    patches, kept = images[0, 0].numel() // site.patchify.stride[0] ** 2, expected_kept(images, site.patchify.stride[0])
    assert kept[1] == [0] and 1 < len(kept[0]) < patches
    want, noisy = masked_out(net, site, inputs, kept), ZOO[name].inputs(2)
    dense = ZOO[name].run(net, noisy)
    with vtc.compress(net, "pixelprune") as handle:
        got = last_block(net, site, inputs)
        report, token_map = handle.report, handle.patches[0].maps[-1]
        each = [{key: x[i : i + 1] if len(x) == 3 else x for key, x in inputs.items()} for i in range(3)]
        alone = [last_block(net, site, one)[0] for one in each]
        again = ZOO[name].run(net, noisy)
        assert handle.report.before == handle.report.after  # nothing leaves, and nothing changes
    assert report.after == tuple(map(len, kept))
    assert report.before == (patches,) * 3 and report.macs_after < report.macs_before
    front = site.prefix - site.suffix
    for i, its in enumerate(kept):
        rows = [*range(front), *(front + j for j in its)]
        torch.testing.assert_close(got[i, rows], want[i, rows], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[i], alone[i], atol=1e-5, rtol=1e-5)
        assert token_map.anchor[i][token_map.mask()[i]].tolist() == its
        stands = token_map.anchor[i][token_map.group[i]]
        assert torch.equal(got[i, front : front + len(stands)], got[i, front + stands])
    assert torch.equal(again, dense) and torch.equal(ZOO[name].run(net, noisy), dense)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    assert REFUSED[name] in str(vtc.explain(model(name), "pixelprune"))
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        vtc.compress(model(name), "pixelprune")


def test_all_others_fit():
    refused = {name for name in ZOO if name not in FITS and vtc.explain(model(name), "tome").ok}
    assert refused == set(REFUSED)


def test_whose_pixels_stand_for_which_patch():
    """The sources rebuild the picture at 0, exactly, and within the tolerance above it."""
    for seed in range(200):
        x, rows, columns = picture(seed)
        for tolerance, anchored in ((0.0, True), (0.031, True), (0.031, False)):
            cells = torch.tensor(x)[None]
            source = vtc.PixelPrune(tolerance=tolerance, anchored=anchored).sources(cells, (rows, columns))[0]
            kept, rebuilt = reference(x, rows, columns, tolerance, "max", anchored)
            assert (source == torch.arange(len(source))).nonzero().flatten().tolist() == kept
            assert torch.equal(source[source], source)
            if anchored:
                assert (cells[0][source].numpy() == rebuilt).all()


@torch.no_grad()
def test_a_tolerance_is_of_pixels():
    net, images = copy.deepcopy(model("timm-vit")), torch.zeros(1, 3, 64, 64)
    images[:, 1, :, 32:] = 0.1  # of what the processor gives: .1 x .5 of a pixel's range
    net.pretrained_cfg = dict(net.pretrained_cfg, std=(0.5, 0.5, 0.5))

    def left(**options):
        with vtc.compress(net, "pixelprune", **options) as handle:
            net(images)
            return handle.report.after[0]

    assert left(tolerance=0.04) > 1 == left(tolerance=0.06)
    assert left(tolerance=0.06, std=(1, 1, 1)) > 1
    with pytest.raises(UnsupportedModelError, match="give std="):
        vtc.compress(model("hf-vit"), "pixelprune", tolerance=0.02)
    with vtc.compress(model("hf-vit"), "pixelprune", tolerance=0.02, std=(0.5, 0.5, 0.5)):
        pass


def test_what_a_call_must_be():
    net, x = model("hf-vit"), drawn(2)
    with vtc.compress(net, "pixelprune"):
        with pytest.raises(InputError, match="not finite|NaN"):
            net(pixel_values=x * float("nan"))
        net(pixel_values=x)
        with pytest.raises(InputError, match="pixels of all patches, but none"):
            site_of(net).blocks[0](torch.randn(2, 65, 64))
        with pytest.raises(UnsupportedModelError, match="the picture says"):
            torch.export.export(net, (), {"pixel_values": x})
        with pytest.raises(UnsupportedModelError, match="vmap"):
            torch.func.vmap(lambda one: net(pixel_values=one[None]).last_hidden_state)(x)
        with pytest.raises(InputError, match="pass none"):
            net(pixel_values=x, attention_mask=torch.tensor([[1] * 60 + [0] * 5] * 2))
        net(pixel_values=x)


def test_training_checkpointing_autocast_and_a_compiled_call():
    net, x = copy.deepcopy(model("timm-vit")), drawn(3)
    with vtc.compress(net, "pixelprune"):
        net(x).square().sum().backward()
        grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        net.zero_grad()
        checkpoint(net, x, use_reentrant=False).square().sum().backward()
        again = [p.grad for p in net.parameters() if p.grad is not None]
        assert len(grads) == len(again) > 20
        for a, b in zip(grads, again, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            half = net(x)
        with torch.no_grad():
            assert (half - net(x)).abs().max() < 0.05 * net(x).abs().max()


@pytest.mark.slow
def test_a_compiled_call_gives_the_same():
    net, x = copy.deepcopy(model("timm-vit")), drawn(3)
    with vtc.compress(net, "pixelprune"), torch.no_grad():
        torch.testing.assert_close(torch.compile(net)(x), net(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_all_blocks_are_read_at_full_length():
    net, x = copy.deepcopy(model("timm-vit")), drawn(2)
    with vtc.compress(net, "pixelprune"):
        final, middle = net.forward_intermediates(x)
        torch.testing.assert_close(final, net.forward_features(x), atol=1e-5, rtol=1e-5)
        assert all(level.shape[-2:] == (8, 8) for level in middle)
