"""What is checked by behaviour before anything is patched, and that a refusal says what is so: one test per kind."""

from __future__ import annotations

import copy
import importlib

import pytest
import timm
import torch
import transformers
from torch import nn
from zoo import ZOO, model, pixels, randomise

import vtc
from vtc.adapters.encoders import timm as timm_adapter
from vtc.adapters.encoders import trial

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 8,
}


def small(name, module="", **sizes):
    """A model of transformers, two layers of 64 channels."""
    place = importlib.import_module(f"transformers.models.{module}") if module else transformers
    part = importlib.import_module(f"{place.__name__}.modeling_{module}") if module else transformers
    cls = getattr(part, name)
    return cls(cls.config_class(**{**SIZES, **sizes}))


def on_meta(build):
    with torch.device("meta"):
        return build()


def refusal(net):
    """The one reason, on which `explain` without and with a method and `compress` agree."""
    plain, plan = vtc.explain(net), vtc.explain(net, "tome", keep=0.9)
    reasons = [encoder.refusal for encoder in plan.encoders]
    assert reasons and all(reasons) and [encoder.refusal for encoder in plain.encoders] == reasons
    with pytest.raises(vtc.UnsupportedModelError) as error:
        vtc.compress(net, "tome", keep=0.9)
    assert all(reason in str(error.value) for reason in reasons)
    return "; ".join(reasons)


# -- attention that takes sizes otherwise ---------------------------------------------------------------------------


def edited(change, name="timm-vit", every=False):
    net = copy.deepcopy(model(name))
    for block in net.blocks if every else net.blocks[-1:]:
        change(block)
    return net


def scaled_down(attn, x, attn_mask=None, is_causal=False):
    """Adds half of its mask."""
    return type(attn).forward(attn, x, attn_mask=None if attn_mask is None else attn_mask / 2)


def deaf(attn, x, attn_mask=None, is_causal=False):
    return type(attn).forward(attn, x)


def counting(attn, x, attn_mask=None, is_causal=False):
    """Tells tokens by their place in the row."""
    places = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None] * 0.3
    return type(attn).forward(attn, x + places.sin(), attn_mask=attn_mask)


def jumpy(attn, x, attn_mask=None, is_causal=False):
    """Another temperature where it is given a mask."""
    return type(attn).forward(attn, x if attn_mask is None else 2 * x, attn_mask=attn_mask)


def in_a_class(forward):
    """The attention's class with another forward: what is put on an instance does not show on the meta device."""

    def change(block):
        attn = block.attn
        names = {"forward": lambda self, x, attn_mask=None, is_causal=False: forward(_plain(self), x, attn_mask)}
        attn.__class__ = type("OtherAttention", (type(attn),), names)

    return change


def _plain(attn):
    out = copy.copy(attn)
    out.__class__ = type(attn).__mro__[1]
    return out


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (scaled_down, "does not take a token of size 4 for that token four times"),
        (deaf, "does not take a token of size 4 for that token four times"),
        (counting, "does not take a token of size 4 for that token four times"),
        (jumpy, "attends differently once it is given sizes"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_attention_that_takes_no_sizes(forward, words):
    net = edited(in_a_class(forward))
    assert words in refusal(net) and "block 2 (Block)" in refusal(net)
    assert refusal(net.to("meta")) == refusal(edited(in_a_class(forward)))
    assert words in refusal(edited(in_a_class(forward)).half())


def causal_clip():
    net = copy.deepcopy(model("hf-clip-vision"))
    for layer in net.encoder.layers if hasattr(net, "encoder") else net.vision_model.encoder.layers:
        layer.self_attn.is_causal = True
    return net


def causal_timm():
    return edited(in_a_class(lambda attn, x, mask: type(attn).forward(attn, x, is_causal=mask is None, attn_mask=mask)))


@pytest.mark.parametrize(
    "build",
    [lambda: small("Phi4MultimodalVisionModel", "phi4_multimodal"), causal_timm, causal_clip],
    ids=["phi4", "timm", "clip"],
)
def test_an_attention_that_is_causal_by_itself(build):
    assert "attends causally" in refusal(build())
    assert refusal(on_meta(build) if "phi4" in str(build) else build().to("meta")) == refusal(build())


def test_an_mlp_that_mixes_tokens():
    class Mixing(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.fc1, self.fc2 = inner, inner.fc1, inner.fc2

        def forward(self, x):
            return self.inner(x) + x.roll(1, dims=1)

    def change(block):
        block.mlp = Mixing(block.mlp)

    assert "mixes tokens in its MLP" in refusal(edited(change))


def test_a_block_that_returns_a_tuple():
    def change(block):
        forward = type(block).forward
        block.__class__ = type("TupleBlock", (type(block),), {"forward": lambda self, x: (forward(self, x), None)})

    assert "gives a tuple, not one tensor of tokens" in refusal(edited(change))
    assert "gives a tuple" in refusal(edited(change).to("meta"))


def test_every_block_is_compared_and_each_kind_tried_once(monkeypatch):
    seen = {"exact": 0, "sizes": 0}
    exact, sizes = trial._exact, trial._sizes

    def count(name, call):
        def counted(*given):
            seen[name] += 1
            return call(*given)

        return counted

    monkeypatch.setattr(trial, "_exact", count("exact", exact))
    monkeypatch.setattr(trial, "_sizes", count("sizes", sizes))
    assert vtc.explain(model("timm-vit")).ok and seen == {"exact": 3, "sizes": 1}
    assert vtc.explain(copy.deepcopy(model("timm-vit")).to("meta")).ok and seen == {"exact": 4, "sizes": 2}


@torch.no_grad()
def test_the_trial_leaves_no_trace():
    net = model("hf-dinov2").train()
    try:
        heard = []
        handles = [module.register_forward_hook(lambda *_: heard.append(1)) for module in net.embeddings.modules()]
        state, modes = torch.get_rng_state(), [module.training for module in net.modules()]
        values = {name: value.clone() for name, value in net.state_dict().items()}
        assert vtc.explain(net, "tome").ok
        assert not heard and torch.equal(state, torch.get_rng_state())
        assert modes == [module.training for module in net.modules()]
        assert all(torch.equal(values[name], value) for name, value in net.state_dict().items())
    finally:
        net.eval()
        for handle in handles:
            handle.remove()


# -- tokens that are no patches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("hf-pixio", 8),
        ("hf-dinov3", 5),
        ("hf-deit-distilled", 2),
        ("timm-dinov2-reg", 5),
        ("hf-siglip2", 0),
        ("hf-yolos", 6),
    ],
)
def test_prefix_tokens_are_counted(name, prefix):
    assert vtc.explain(model(name)).encoders[0].prefix_tokens == prefix


def miscounted():
    net = copy.deepcopy(model("timm-dinov2-reg"))
    net.num_prefix_tokens = 1
    return net


def behind():
    """Detection tokens behind the patches, as in YOLOS."""
    net = copy.deepcopy(model("hf-vit"))
    more, forward = nn.Parameter(torch.randn(1, 5, 64)), type(net.embeddings).forward

    def longer(self, *args, **kwargs):
        return torch.cat([forward(self, *args, **kwargs), self.more], dim=1)

    net.embeddings.__class__ = type("Longer", (type(net.embeddings),), {"forward": longer})
    net.embeddings.more = more
    return net


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (miscounted, "69 tokens reach its first block for 64 patches, and vtc counts 1 prefix token:"),
        (behind, "70 tokens reach its first block for 64 patches, and vtc counts 1 prefix token:"),
    ],
)
def test_tokens_that_nobody_counted(build, words):
    assert words in refusal(build()) and words in refusal(build().to("meta"))


def test_tokens_that_change_between_blocks():
    net = copy.deepcopy(model("hf-yolos"))

    def forward(self, x, **kwargs):
        for layer in self.layer:
            x = layer(x) + 1
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x)

    net.encoder.__class__ = type("Adding", (type(net.encoder),), {"forward": forward})
    assert "changes its tokens between block 0 and block 1" in refusal(net)


def test_arguments_that_would_have_to_be_shortened():
    build = lambda: small("GlmImageVisionModel", "glm_image")  # noqa: E731
    assert "its blocks (GlmImageVisionBlock) are given cu_seqlens" in refusal(build())
    assert refusal(on_meta(build)) == refusal(build())


def test_rotary_tables_of_another_form():
    """MLCD's are [tokens, width]; these, one for each image, would be cut along the images."""
    net = copy.deepcopy(model("hf-mlcd"))
    forward = type(net.encoder).forward

    def batched(self, inputs_embeds, position_embeddings, **kwargs):
        tables = [table[None] for table in position_embeddings]
        return forward(self, inputs_embeds, tables, **kwargs)

    net.encoder.__class__ = type("Batched", (type(net.encoder),), {"forward": batched})
    assert "are given position_embeddings of form [1, 65, 16] and [1, 65, 16], and vtc can" in refusal(net)


# -- quantized weights ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["timm-vit", "timm-siglip", "hf-vit", "hf-dinov3"])
@torch.no_grad()
def test_layers_whose_weights_are_packed(name):
    entry = ZOO[name]
    net = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model(name)), {nn.Linear}, dtype=torch.qint8)
    dense = entry.run(net, entry.inputs(2))
    with vtc.compress(net, "tome", keep=1.0) as handle:
        assert torch.equal(entry.run(net, entry.inputs(2)), dense)
        before = handle.report.macs_before
    with vtc.compress(model(name), "tome", keep=1.0) as handle:
        entry.run(model(name), entry.inputs(2))
        assert handle.report.macs_before == before  # counted from shapes
    with vtc.compress(net, "pitome", keep=0.7) as handle:
        assert entry.run(net, entry.inputs(2)).isfinite().all() and handle.report.after[0] < handle.report.before[0]


class Packed(torch.Tensor):
    """As torchao's: it can be applied, and not read."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func not in (nn.functional.linear, torch.Tensor.detach, torch.Tensor.shape.__get__):
            name = getattr(func, "__name__", "")
            assert name in ("__get__", "is_floating_point", "__deepcopy__", "numel", "element_size"), f"{name} reads it"
        args = [arg.as_subclass(torch.Tensor) if isinstance(arg, Packed) else arg for arg in args]
        return func(*args, **(kwargs or {}))


def test_fused_projections_that_cannot_be_read():
    """BEiT and nn.MultiheadAttention project past every hook; their keys come from the weights, packed or not."""
    from vtc.adapters.encoders.site import projected_keys

    x, weight, bias = torch.randn(2, 5, 8), torch.randn(24, 8), torch.randn(24)
    for given in (None, bias):
        expected = nn.functional.linear(x, weight, given)[..., 8:16].unflatten(-1, (2, 4)).mean(-2)
        for kind in (torch.Tensor, Packed):
            keys = projected_keys(x, weight.as_subclass(kind), given, 2)
            torch.testing.assert_close(keys, expected, rtol=1e-5, atol=1e-5)


# -- what nobody foresaw --------------------------------------------------------------------------------------------


def test_one_strange_encoder_hides_no_other(monkeypatch):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = copy.deepcopy(model("timm-vit")), model("timm-deit")

    net, look = Both(), timm_adapter._kind

    def fail(block):
        if block is net.first.blocks[1]:
            raise KeyError("planted")
        return look(block)

    monkeypatch.setattr(timm_adapter, "_kind", fail)
    first, second = vtc.explain(net).encoders
    assert "vtc could not look at it (KeyError: 'planted')" in first.refusal and not second.refusal


def test_a_trial_that_fails_in_an_unforeseen_way(monkeypatch):
    monkeypatch.setattr(trial, "kind_of", lambda block: {}["planted"])
    assert "vtc could not look at it (KeyError: 'planted')" in refusal(copy.deepcopy(model("timm-vit")))


@pytest.mark.parametrize("name", ["qwen3_vit_88m", "qwen3_vit_88m_enc", "deepseek_vit_412m"])
def test_an_encoder_without_a_head_is_looked_at(name):
    """`explain` raised an AttributeError of any model that held one."""
    net = on_meta(lambda: timm.create_model(name, depth=2))
    holder = nn.ModuleDict({"a": net, "b": model("timm-vit")})
    assert [encoder.refusal for encoder in vtc.explain(holder).encoders] == ["", ""]


# -- reasons --------------------------------------------------------------------------------------------------------

TIMM = {
    "samvit_base_patch16": "its attention works in windows of a fixed grid, which",
    "cait_xxs24_224": "the attention of its blocks (TalkingHeadAttn in LayerScaleBlock) takes no mask",
    "convit_tiny": "the attention of its blocks (GPSA in Block) takes no mask",
    "xcit_nano_12_p16_224": "hold convolutions over the grid of patches",
    "tnt_s_patch16_224": "attend more than once: attn_in (Attention) and attn_out (Attention)",
    "vit_small_patch16_18x2_224": "are not one attention and one MLP behind it: attns (ModuleList)",
    "vit_dpwee_patch16_reg1_gap_256": "(DiffParallelScalingBlock) are not one attention and one MLP behind it: in_norm",
    "gemma4_vit_167m_enc": "its blocks (Gemma4Block) are put together in a way vtc has no account of: norm1",
    "crossvit_9_240": "it works on grids of several sizes",
    "mvitv2_tiny": "it works on grids of several sizes",
    "swin_tiny_patch4_window7_224": "windows of a fixed grid that is pooled from stage to stage",
    "mixer_s32_224": "it holds no attention: its patches are mixed by layers over the whole grid",
    "resnet18": "it holds no attention: its patches are mixed by convolutions",
    "sequencer2d_s": "mixed by convolutions and recurrent layers",
}


@pytest.mark.parametrize("name", TIMM)
def test_reasons_in_timm(name):
    net = on_meta(lambda: timm.create_model(name))
    assert TIMM[name] in refusal(net) and "CNN" not in refusal(net)


TRANSFORMERS = {
    "BlipVisionModel": "its blocks (BlipEncoderLayer) attend past transformers' interface",
    "PixtralVisionModel": "it packs the images of a batch into one row of tokens",
    "VJEPA2Model": "the attention of its blocks (VJEPA2RopeAttention in VJEPA2Layer) takes no mask",
    "ConvNextModel": "mixed by convolutions",
    "SwinModel": "windows of a fixed grid",
    "SegformerModel": "it works on grids of several sizes",
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_reasons_in_transformers(name):
    cls = getattr(transformers, name)
    config = cls.config_class()
    for part in ("num_hidden_layers", "pred_num_hidden_layers"):
        if hasattr(config, part):
            setattr(config, part, 2)
    net = on_meta(lambda: cls(config))
    assert TRANSFORMERS[name] in refusal(net) and "CNN" not in refusal(net)


def test_encoders_that_were_not_found():
    """OWL-ViT's tower is a part, no model of its own."""
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    net = randomise(transformers.OwlViTModel(transformers.OwlViTConfig(vision_config=SIZES, text_config=text)))
    assert [encoder.path for encoder in vtc.explain(net, "tome").encoders] == ["vision_model"]
    with torch.no_grad(), vtc.compress(net, "tome", keep=0.7) as handle:
        net.vision_model(pixels(2))
        assert handle.report.after[0] < 64
