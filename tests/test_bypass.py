"""Images that reach a compressed encoder pass its patch, or the call raises and says how it went past."""

import copy

import pytest
import torch
from torch import nn
from zoo import ZOO, model, pixels

import vtc


def layers(net, name):
    """(module, attribute) of the list of blocks."""
    if name.startswith("timm"):
        return net, "blocks"
    if name.startswith("open_clip"):
        return net.visual.transformer, "resblocks"
    from vtc.adapters.encoders.guard import container

    place = container(net, tuple(next(m for m in net.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)))
    return place


def cut(net, place):
    setattr(*place, getattr(*place)[:2])


def first_gone(net, place):
    setattr(*place, getattr(*place)[1:])


def another(net, place):
    getattr(*place)[1] = copy.deepcopy(vtc_free(getattr(*place)[1]))


def all_others(net, place):
    setattr(*place, nn.ModuleList([vtc_free(copy.deepcopy(block)) for block in getattr(*place)]))


def vtc_free(block):
    block.__dict__.pop("forward", None)
    return block


CHANGES = {
    cut: r"3 then, 2 now\): compress it again",
    first_gone: "without the blocks before it|3 then, 2 now",
    another: "block 1 is another one",
    all_others: "passed none of the 3 blocks",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["timm-dinov2", "timm-eva02", "open_clip-vit", "hf-dinov2", "hf-clip-vision"])
@torch.no_grad()
def test_the_blocks_change_after_compress(name, change):
    net, inputs = copy.deepcopy(model(name)), ZOO[name].inputs(1)
    with vtc.compress(net, "tome", keep=0.8):
        place = layers(net, name)
        if change is all_others and name.startswith("timm"):
            blocks = [vtc_free(copy.deepcopy(block)) for block in net.blocks]
            net.blocks = nn.Sequential(*blocks)
        else:
            change(net, place)
        with pytest.raises(vtc.VTCError, match=CHANGES[change]):
            ZOO[name].run(net, inputs)


@torch.no_grad()
def test_intermediate_layers_pruned_after_compress():
    net, x = copy.deepcopy(model("timm-dinov2")), pixels(1)
    with vtc.compress(net, "tome", keep=0.8):
        net.prune_intermediate_layers([1])
        for call in (net, net.forward_features, lambda x: net.forward_intermediates(x, indices=1)):
            with pytest.raises(vtc.InputError, match="3 then, 2 now"):
                call(x)


@torch.no_grad()
def test_blocks_that_leave_by_another_way():
    """A model that stops early, one that goes past its blocks by hand, and methods called in the model's place."""
    net, x = copy.deepcopy(model("timm-dinov2")), pixels(1)

    class Early(type(net)):
        def forward_features(self, x, **kwargs):
            x = self._pos_embed(self.patch_embed(x))
            return self.norm(self.blocks[1](self.blocks[0](x)))

    class Past(type(net)):
        def forward(self, x):
            return self.head(self._pos_embed(self.patch_embed(x))[:, 0])

    for cls, how in ((Early, "stopped behind 2 of 3"), (Past, "passed none of the 3")):
        own, plain = copy.deepcopy(net), type(net)
        own.__class__ = cls
        dense = own(x)
        for keep in (0.8, 1.0):
            own.__class__ = plain  # it goes its other way from now on; the trial sees one that always does
            with vtc.compress(own, "tome", keep=keep):
                own.__class__ = cls
                if keep == 1.0:
                    assert torch.equal(own(x), dense)
                else:
                    with pytest.raises(vtc.InputError, match=how):
                        own(x)
        assert torch.equal(own(x), dense)
    net.__class__ = Early
    with pytest.raises(vtc.UnsupportedModelError, match="its call with one image runs 2 of its 3 blocks"):
        vtc.compress(net, "tome", keep=0.8)


@pytest.mark.parametrize("method", ["tome", "downsample"])
@torch.no_grad()
def test_stopping_early_is_no_bypass(method):
    net, x = model("timm-dinov2"), pixels(2)
    with vtc.compress(net, method, keep=0.8) as handle:
        _, whole = net.forward_intermediates(x)
        _, some = net.forward_intermediates(x, indices=[1], stop_early=True)
        assert torch.equal(some[0], whole[1]) and some[0].shape == (2, 64, 8, 8)
        report = handle.report
        assert len(report.tokens) == 2 and report.before == (64, 64) and 0 < report.macs_ratio < 1
        assert handle.token_map.anchor.shape[1] == report.after[0]
        net(x)
        assert len(handle.report.tokens) == 3
    clip = model("open_clip-vit").visual
    with vtc.compress(clip, method, keep=0.8) as handle:
        whole = clip.forward_intermediates(x)["image_intermediates"]
        some = clip.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
        assert torch.equal(some["image_intermediates"][0], whole[0])
        assert len(handle.report.tokens) == 1


@torch.no_grad()
def test_parts_used_by_hand_raise_nothing_later():
    net, x = model("timm-dinov2"), pixels(1)
    with vtc.compress(net, "tome", keep=0.8) as handle:
        want = net(x)
        net.patch_embed(pixels(1, 32) if net.patch_embed.img_size is None else x)
        assert torch.equal(net(x), want)
        tokens = torch.randn(1, 40, 64)
        net.blocks[0](tokens)
        assert torch.equal(net(x), want)
        with pytest.raises(vtc.VTCError, match="without the blocks before it"):
            net.blocks[2](tokens)
        assert torch.equal(net(x), want)
        assert handle.report.before == (64,)
        with pytest.raises(vtc.InputError, match="NaN"):
            net(x * float("nan"))
        with pytest.raises(vtc.VTCError, match="without the blocks before it"):
            net.blocks[1](tokens)  # nothing is left of the call that failed
        assert torch.equal(net(x), want)


@torch.no_grad()
def test_wrappers_that_run_the_encoder_whole():
    """What others put around an encoder, and wrappers of single blocks that run them."""
    import timm

    net, x = model("timm-dinov2"), pixels(1)

    class Wrapped(nn.Module):  # as sentence-transformers and lightning do: a dict in, a dict out
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, features):
            return {**features, "embedding": self.net(features["pixel_values"])}

    around = nn.Sequential(Wrapped(net))
    with vtc.compress(net, "tome", keep=0.8):
        want = net(x)
    with vtc.compress(around, "tome", keep=0.8) as handle:
        assert torch.equal(around({"pixel_values": x})["embedding"], want)
        assert handle.report.after == (34,)

    class Outer(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.inner = block

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    own = copy.deepcopy(net)
    with vtc.compress(own, "tome", keep=0.8):
        own.blocks[1] = Outer(own.blocks[1])
        assert torch.equal(own(x), want)

    features = timm.create_model(
        "vit_small_patch14_dinov2",
        pretrained=False,
        img_size=64,
        depth=3,
        patch_size=8,
        embed_dim=64,
        num_heads=4,
        features_only=True,
        out_indices=[0, 1],
    ).eval()
    dense = features(x)
    with vtc.compress(features, "tome", keep=0.8) as handle:
        out = features(x)
        assert [o.shape for o in out] == [d.shape for d in dense] and not torch.equal(out[1], dense[1])
        assert handle.report.before == (64,)


@torch.no_grad()
def test_tokens_that_are_no_patches():
    net, x = copy.deepcopy(model("timm-dinov2")), pixels(1)

    class Queries(type(net)):  # EoMT's way: more tokens before one of the last blocks
        at = None

        def forward_features(self, x, **kwargs):
            x = self._pos_embed(self.patch_embed(x))
            for index, block in enumerate(self.blocks):
                if index == self.at:
                    x = torch.cat([torch.ones(len(x), 10, 64), x], dim=1)
                x = block(x)
            return self.norm(x)

    net.__class__ = Queries
    for at, message in ((2, "5[0-9] tokens, and 1 x 4[0-9] came out"), (0, "75 tokens of an image reached")):
        net.at = at
        dense = net(x)
        with pytest.raises(vtc.UnsupportedModelError, match="75 tokens reach (block 2|its first block)"):
            vtc.compress(net, "tome", keep=0.8)  # always; below, from some call on
        for method in ("tome", "random"):
            net.at = None
            with vtc.compress(net, method, keep=0.8), pytest.raises(vtc.InputError, match=message):
                net.at = at
                net(x)
        for r in ([0, 0, 9], [9, 0, 0]):
            net.at = None
            with vtc.compress(net, "tome", r=r), pytest.raises(vtc.InputError, match="1 x [67]|75 tokens"):
                net.at = at
                net(x)
        net.at = None
        with vtc.compress(net, "tome", keep=1.0):
            net.at = at
            assert torch.equal(net(x), dense)
    net.at = 9
    with vtc.compress(net, "tome", keep=0.8) as handle:
        net(x)
        assert handle.report.after == (34,)


@torch.no_grad()
def test_fewer_patches_are_no_other_tokens():
    import timm

    net = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64, depth=2, patch_size=8)
    net = net.eval()
    from timm.layers import PatchDropout

    net.patch_drop = PatchDropout(0.5, num_prefix_tokens=1).train()
    with vtc.compress(net, "tome", keep=0.8) as handle:
        net(pixels(2))
        assert handle.report.before == (32, 32)
